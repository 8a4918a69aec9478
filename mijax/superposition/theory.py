"""Closed forms for sparse uniform features: the loss of configurations, and the densities where two losses are equal.

Features are independent, 0 with probability 1 - p, else uniform in [0, 1]. The model is ReLU(W^T W x + b). Losses
are sums over features of importance times squared error, as Elhage et al. 2022 write them. All functions compute
with NumPy in float64; their array arguments broadcast.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mijax._types import ArrayLike, Float

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
        ValueError: for a density outside [0, 1].

    >>> float(ignored(1.0))  # the variance of a uniform number
    0.08333333333333331
    """
    p = _density(p)
    return np.asarray(importance, float) * (p / 3 - p**2 / 4)


def dedicated(p: ArrayLike, importance: ArrayLike = 1.0) -> Numbers:
    """The loss of a feature with a dedicated dimension: 0, since ReLU(x + 0) = x for x >= 0.

    Args:
        p: density.
        importance: importance; it decides the shape only.

    Returns:
        Zeros.

    Raises:
        ValueError: for a density outside [0, 1].

    >>> dedicated([0.1, 0.5]).tolist()
    [0.0, 0.0]
    """
    return np.zeros(np.broadcast_shapes(_density(p).shape, np.shape(importance)))


def antipodal(p: ArrayLike, one: ArrayLike = 1.0, other: ArrayLike = 1.0) -> Numbers:
    """The loss of two features in one dimension, W = (1, -1), without bias: (I1 + I2) p^2 / 6.

    Output 1 is ReLU(x1 - x2). It errs only where both are active (p^2): by x2 where x1 > x2, by x1 elsewhere, that
    is by min(x1, x2), whose mean square is int_0^1 2 m^2 (1 - m) dm = 1/6.

    Args:
        p: density.
        one: I1, the importance of the first feature.
        other: I2, the importance of the second feature.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1].

    >>> float(antipodal(0.5))
    0.08333333333333333
    """
    return (np.asarray(one, float) + np.asarray(other, float)) * _density(p) ** 2 / 6


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
        ValueError: for a density outside [0, 1].

    >>> float(antipodal_at(0.0, 0.5)) == float(antipodal(0.5)) / 2
    True
    """
    b, p = np.asarray(b, float), _density(p)
    both = (1 - b) ** 3 * (1 + b) / 6 + b**3 / 3
    return (1 - p) * b**2 + p * (1 - p) * b**3 / 3 + p**2 * both


def antipodal_biased(p: ArrayLike, one: ArrayLike = 1.0, other: ArrayLike = 1.0) -> Numbers:
    """The loss of an antipodal pair at its optimal bias: (I1 + I2) min_b `antipodal_at`.

    `antipodal_at` is convex in b (the second derivative of (1-b)^3 (1+b) is 12 b (1-b)), so that bisecting its
    derivative finds the minimum.

    Args:
        p: density.
        one: I1, the importance of the first feature.
        other: I2, the importance of the second feature.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1].

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
    return (np.asarray(one, float) + np.asarray(other, float)) * antipodal_at((low + high) / 2, p)


def boundary(importance: ArrayLike) -> Numbers:
    """The density below which two features share one dimension, for n=2, m=1 and importances 1 and I, without bias.

    The loss of an antipodal pair is (1 + I) p^2/6, that of keeping only the more important feature min(1, I) (p/3
    - p^2/4). They cross at p = 4I / (2 + 5I) for I <= 1, and with the features exchanged at 4 / (5 + 2I) for I >=
    1.

    Args:
        importance: I.

    Returns:
        The density p.

    >>> boundary([0.1, 1.0]).round(3).tolist()
    [0.16, 0.571]
    """
    i = np.asarray(importance, float)
    return np.where(i <= 1, 4 * i / (2 + 5 * i), 4 / (5 + 2 * i))


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

    >>> boundary_three([0.1, 1.0, 5.0]).round(3).tolist()
    [0.16, 0.571, 0.571]
    """
    return boundary(np.minimum(np.asarray(importance, float), 1.0))


def boundary_biased(importance: ArrayLike) -> Numbers:
    """The density where an antipodal pair at its optimal bias costs as much as ignoring the less important feature.

    Args:
        importance: I; the other feature has importance 1.

    Returns:
        The density p, by bisection.

    >>> boundary_biased([0.1, 0.5, 1.0]).round(3).tolist()
    [0.161, 0.465, 0.627]
    """
    i = np.asarray(importance, float)
    i = np.minimum(i, 1 / i)  # exchanging the features divides both losses by I
    return _crossing(lambda p: antipodal_biased(p, 1.0, i), lambda p: ignored(p, i), i.shape)


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
        importance: `[feature]`, I.
        m: number of hidden dimensions.

    Returns:
        The loss.

    Raises:
        ValueError: for a density outside [0, 1], or an m outside 1 to n.

    >>> round(linear_loss(1.0, [1.0, 0.5, 0.1], 2), 6)
    0.008333
    """
    _check_rank(m, len(np.atleast_1d(importance)))
    losses = np.sort(ignored(np.broadcast_to(p, np.shape(importance)), importance))
    return float(losses[: len(losses) - m].sum())


def principal_components(covariance: Float[np.ndarray, "feature feature"], m: int) -> tuple[np.ndarray, float]:
    """The linear model's optimum for equally important, dependent features.

    The rows of W are the covariance's leading eigenvectors; the loss is the sum of the other eigenvalues (Eckart
    and Young).

    Args:
        covariance: `[feature, feature]`.
        m: number of hidden dimensions.

    Returns:
        `W [m, n]`, and its loss.

    Raises:
        ValueError: for an m outside 1 to n.

    >>> principal_components(np.array([[2.0, 1.0], [1.0, 2.0]]), 1)[1]
    1.0
    """
    _check_rank(m, len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return vectors[:, ::-1][:, :m].T, float(values[: len(values) - m].sum())


def _density(p: ArrayLike) -> np.ndarray:
    """A checked density, in float64."""
    p = np.asarray(p, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"a density is a probability p = 1 - S, in [0, 1]; given are some from {p.min():g} to {p.max():g}"
        )
    return p


def _check_rank(m: int, n: int) -> None:
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
