"""Closed forms for sparse uniform features: the loss of configurations, and the densities where two losses are equal.

Features are independent, 0 with probability 1 - p, else uniform in [0, 1]. The model is ReLU(W^T W x + b). Losses
are sums over features of importance times squared error, as Elhage et al. 2022 write them. All functions compute
with NumPy in float64; their array arguments broadcast.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mijax._types import ArrayLike, Float
from mijax.arguments import whole_number

Numbers: TypeAlias = np.ndarray | np.floating


def ignored(p: ArrayLike, importance: ArrayLike = 1.0) -> Numbers:
    """The loss of a feature that is not represented: I (p/3 - p^2/4), at the bias p/2.

    With W_i = 0 the output is the constant ReLU(b), and E(x - b)^2 is least at the mean b = E x = p/2, where it is
    the variance E x^2 - (E x)^2 = p/3 - p^2/4.

    Args:
        p: density.
        importance: I.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1], or a negative importance.

    >>> float(ignored(1.0))  # the variance of a uniform number
    0.08333333333333331
    """
    p = _density(p)
    return _importance(importance) * (p / 3 - p**2 / 4)


def dedicated(p: ArrayLike, importance: ArrayLike = 1.0) -> Numbers:
    """The loss of a feature with a dedicated dimension: 0, since ReLU(x + 0) = x for x >= 0.

    Args:
        p: density.
        importance: importance; it decides the shape only, and where NaN is.

    Returns:
        Zeros, NaN where the importance is.

    Raises:
        ValueError: for a density outside [0, 1], or a negative importance.

    >>> dedicated([0.1, 0.5]).tolist()
    [0.0, 0.0]
    """
    return np.where(np.isnan(_importance(importance)), np.nan, np.zeros_like(_density(p)))


def antipodal(p: ArrayLike, first: ArrayLike = 1.0, second: ArrayLike = 1.0) -> Numbers:
    """The loss of two features in one dimension, W = (1, -1), without bias: (I1 + I2) p^2 / 6.

    Output 1 is ReLU(x1 - x2). It errs only where both are active (p^2): by x2 where x1 > x2, by x1 elsewhere, that
    is by min(x1, x2), whose mean square is int_0^1 2 m^2 (1 - m) dm = 1/6.

    Args:
        p: density.
        first: I1, the importance of the first feature.
        second: I2, the importance of the second feature.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1], or a negative importance.

    >>> float(antipodal(0.5))
    0.08333333333333333
    """
    return (_importance(first) + _importance(second)) * _density(p) ** 2 / 6


def antipodal_at(b: ArrayLike, p: ArrayLike) -> Numbers:
    """The loss per importance of an antipodal pair with a bias b in [0, 1]: output 1 is ReLU(x1 - x2 + b).

    Neither or only x1 active (probability 1 - p): the error is b. Only x2 (p (1 - p)): ReLU(b - x2), whose mean
    square is b^3/3. Both (p^2): b - x2 where x2 < x1 + b, else x1; the mean square over the unit square is (1-b)^3
    (1+b) / 6 + b^3 / 3: the part with x2 > b, min(x1, x2 - b)^2, integrates to (1-b)^3 (1+b) / 6, that with x2 <
    b, (b - x2)^2, to b^3 / 3.

    Args:
        b: bias, in [0, 1].
        p: density.

    Returns:
        The mean squared error of one output.

    Raises:
        ValueError: for a density outside [0, 1], or a bias outside [0, 1].

    >>> float(antipodal_at(0.0, 0.5)) == float(antipodal(0.5)) / 2
    True
    """
    b, p = np.asarray(b, float), _density(p)
    if ((b < 0) | (b > 1)).any():
        raise ValueError(
            f"the formula holds for a bias in [0, 1]; given are some from {np.nanmin(b):g} to {np.nanmax(b):g}"
        )
    both = (1 - b) ** 3 * (1 + b) / 6 + b**3 / 3
    return (1 - p) * b**2 + p * (1 - p) * b**3 / 3 + p**2 * both


def antipodal_biased(p: ArrayLike, first: ArrayLike = 1.0, second: ArrayLike = 1.0) -> Numbers:
    """The loss of an antipodal pair at its optimal bias: (I1 + I2) min_b `antipodal_at`.

    `antipodal_at` is convex in b (the second derivative of (1-b)^3 (1+b) is 12 b (1-b)), so that bisecting its
    derivative finds the minimum.

    Args:
        p: density.
        first: I1, the importance of the first feature.
        second: I2, the importance of the second feature.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1], or a negative importance.

    >>> bool(antipodal_biased(0.5) < antipodal(0.5))
    True
    """
    p = _density(p)

    def slope(b: Numbers) -> Numbers:
        both = -((1 - b) ** 2) * (1 + 2 * b) / 3 + b**2
        return 2 * (1 - p) * b + p * (1 - p) * b**2 + p**2 * both

    low, high = np.zeros_like(p), np.ones_like(p)
    for _ in range(60):
        middle = (low + high) / 2
        rising = slope(middle) > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    return (_importance(first) + _importance(second)) * antipodal_at((low + high) / 2, p)


def boundary(importance: ArrayLike) -> Numbers:
    """The density below which two features share one dimension, for n=2, m=1 and importances 1 and I, without bias.

    The loss of an antipodal pair is (1 + I) p^2/6, that of keeping only the more important feature min(1, I) (p/3
    - p^2/4). They cross at p = 4I / (2 + 5I) for I <= 1, and with the features exchanged at 4 / (5 + 2I) for I >=
    1.

    Args:
        importance: I.

    Returns:
        The density p.

    Raises:
        ValueError: for a negative importance.

    >>> boundary([0.1, 1.0]).round(3).tolist()
    [0.16, 0.571]
    """
    i = _importance(importance)
    less = np.minimum(i, 1.0)
    return np.where(i > 1, 4 / (5 + 2 * i), 4 * less / (2 + 5 * less))


def boundary_three(importance: ArrayLike) -> Numbers:
    """The density above which superposition ends, for n=3, m=2 and importances 1, 1 and I, without bias.

    In superposition one feature has a dedicated dimension, and two share the other: a pair with the third feature
    costs (1 + I) p^2/6, the pair of the first two, which is cheaper for I > 1, p^2/3. Otherwise one feature is
    ignored. For I <= 1 this is the two-feature problem, p = 4I / (2 + 5I). For I >= 1 the third feature is
    dedicated in both cases, and the losses of the first two cross at p^2/3 = p/3 - p^2/4, that is at p = 4/7 for
    all such I.

    Args:
        importance: I, the importance of the third feature.

    Returns:
        The density p.

    Raises:
        ValueError: for a negative importance.

    >>> boundary_three([0.1, 1.0, 5.0]).round(3).tolist()
    [0.16, 0.571, 0.571]
    """
    return boundary(np.minimum(_importance(importance), 1.0))


def boundary_biased(importance: ArrayLike) -> Numbers:
    """The density where an antipodal pair at its optimal bias costs as much as ignoring the less important feature.

    Args:
        importance: I; the other feature has importance 1.

    Returns:
        The density p, by bisection; NaN where the importance is.

    Raises:
        ValueError: for a negative importance.

    >>> boundary_biased([0.1, 0.5, 1.0]).round(3).tolist()
    [0.161, 0.465, 0.627]
    """
    i = _importance(importance)
    i = np.minimum(i, 1 / np.maximum(i, 1.0))  # exchanging the features divides both losses by I
    crossing = _crossing(lambda p: antipodal_biased(p, 1.0, i), lambda p: ignored(p, i), i.shape)
    return np.where(np.isnan(i), np.nan, crossing)


def triangle(p: ArrayLike) -> Numbers:
    """The loss of three features of importance 1 at 120 degrees in a plane, without bias: 3 p^2 ((1 - p) / 8 + p / 6).

    This is not the lowest loss: at small p an antipodal pair beside a dedicated feature costs p^2/3, the triangle
    .375 p^2 + O(p^3). Output 1 is ReLU(x1 - (x2 + x3)/2). With x1 and x2 active it errs by x2/2 where x1 > x2/2,
    else by x1: int int min(x1, x2/2)^2 = 1/16; each of the 3 outputs has 2 such pairs. With x2 and x3 active the
    error is 0. With three active the squared error is min(x1, (x2 + x3)/2)^2, whose mean is 1/6.

    Args:
        p: density.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1].

    >>> round(float(triangle(1.0)), 6)
    0.5
    """
    p = _density(p)
    return 3 * (2 * p**2 * (1 - p) / 16 + p**3 * _three_active())


def _three_active() -> float:
    """The mean of min(x, s)^2, x uniform and s the mean of two uniforms: for a fixed s it is s^2 - 2 s^3 / 3."""
    second, third = 7 / 24, 3 / 16  # moments of s
    return second - 2 * third / 3


def linear_loss(p: ArrayLike, importance: ArrayLike, m: int) -> float:
    """The least loss of the linear model W^T W x + b: it keeps the `m` features of largest I_i Var(x_i), and no others.

    The bias removes the means. The remaining loss is |D_I^(1/2) (1 - M) D_v^(1/2)|_F^2, with D_I, D_v the diagonal
    matrices of importances and variances, and M = W^T W of rank m. By Eckart and Young the best approximation of
    rank m of D_I^(1/2) D_v^(1/2), whose singular values are (I_i v_i)^(1/2), loses the n - m smallest of them; the
    projection on the other features attains this.

    Args:
        p: density, one number, or one for each feature.
        importance: I, one number, or one for each feature.
        m: number of hidden dimensions.

    Returns:
        The loss; NaN where an importance is NaN.

    Raises:
        TypeError: for an m that is not whole.
        ValueError: for a density outside [0, 1], a negative importance, densities and importances of different
            numbers of features, or an m outside 1 to n.

    >>> round(linear_loss(1.0, [1.0, 0.5, 0.1], 2), 6)
    0.008333
    """
    density, importance = np.atleast_1d(_density(p)), np.atleast_1d(_importance(importance))
    n = max(density.size, importance.size)
    if any(array.shape not in ((1,), (n,)) for array in (density, importance)):
        raise ValueError(
            f"densities of shape {density.shape} and importances of shape {importance.shape}: one number, or one for each feature,"
            " is expected of both"
        )
    _check_rank(m, n)
    losses = np.sort(np.broadcast_to(ignored(density, importance), n))
    return np.nan if np.isnan(losses).any() else float(losses[: n - m].sum())


def principal_components(covariance: Float[np.ndarray, "feature feature"], m: int) -> tuple[np.ndarray, float]:
    """The linear model's optimum for equally important, dependent features.

    The rows of W are the covariance's leading eigenvectors; the loss is the sum of the other eigenvalues (Eckart
    and Young).

    Args:
        covariance: `[feature, feature]`, symmetric.
        m: number of hidden dimensions.

    Returns:
        `W [m, n]`, and its loss.

    Raises:
        TypeError: for an m that is not whole.
        ValueError: for an m outside 1 to n, and a matrix that is not finite or not symmetric.

    >>> principal_components(np.array([[2.0, 1.0], [1.0, 2.0]]), 1)[1]
    1.0
    """
    covariance = np.asarray(covariance)
    if covariance.ndim != 2 or len(covariance) != covariance.shape[1] or not np.isfinite(covariance).all():
        raise ValueError(
            f"a covariance is a square matrix of finite numbers, given shape {covariance.shape}: {covariance}"
        )
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0.0)):
        raise ValueError(f"a covariance is symmetric, given {covariance}")
    _check_rank(m, len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return vectors[:, ::-1][:, :m].T, float(values[: len(values) - m].sum())


def _importance(importance: ArrayLike) -> np.ndarray:
    """A checked importance, in float64; NaN stays NaN."""
    importance = np.asarray(importance, float)
    if (importance < 0).any():
        raise ValueError(f"importances are not negative; given are some from {np.nanmin(importance):g} on")
    return importance


def _density(p: ArrayLike) -> np.ndarray:
    """A checked density, in float64."""
    p = np.asarray(p, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"a density is a probability p = 1 - S, in [0, 1]; given are some from {p.min():g} to {p.max():g}"
        )
    return p


def _check_rank(m: int, n: int) -> None:
    whole_number("m", m, least=1)
    if not 1 <= m <= n:
        raise ValueError(f"{m} hidden dimensions for {n} features: between 1 and {n} are expected")


def _crossing(first: Callable, second: Callable, shape: tuple[int, ...]) -> Numbers:
    """The density in (0, 1] below which the first loss is lower than the second, by bisection; 1 where it always is.

    Bisection applies because (first - second) / p grows with p, so that the difference changes sign once.
    """
    low, high = np.full(shape, 1e-9), np.ones(shape)
    for _ in range(60):
        middle = (low + high) / 2
        lower = first(middle) < second(middle)
        low, high = np.where(lower, middle, low), np.where(lower, high, middle)
    return (low + high) / 2
