"""Critical points of the two-dimensional toy model on one-hot data: k-gons. Chen et al. 2023 (arXiv:2310.06301).

Of c features exactly one is active, uniform in [0, 1]. The model is ReLU(W^T W x + b) in two dimensions; the loss
is the mean over examples of the sum over features of the squared error. A k-gon has k features of norm l at equal
angles with bias b; the other c - k features are dead: W_i = 0.
"""

from typing import NamedTuple

import numpy as np

from mijax.arguments import whole_number

LEARNING_COEFFICIENTS = {5: 7.0, 6: 8.5, 7: 10.0, 8: 11.5}
"""The local learning coefficient of the k-gon with k = c, by k: (3c - 1) / 2.

It is half of the number of parameters, 2c + c, less one for the rotation.
"""


class KGon(NamedTuple):
    """A critical k-gon.

    Attributes:
        k: number of corners.
        length: l, the norm of each of the k features.
        bias: b, the bias of each of the k features.
        h: the loss of the k features together, times 3c.
    """

    k: int
    length: float
    bias: float
    h: float


def kgon(k: int) -> KGon:
    """The critical k-gon, by minimising the loss over its length and bias.

    An active feature of size x gives outputs ReLU(l^2 cos(2 pi j / k) x + b), j = 0, ..., k - 1. Integrated over x
    in [0, 1], int ReLU(a x + b)^2 dx is (ReLU(a + b)^3 - ReLU(b)^3) / (3a), and int x ReLU(a x + b) dx for b <= 0
    < a + b is elementary. k = 4 is exact: l = 1, b = 0, since only the cosine of j = 0 is positive.

    Args:
        k: number of corners, at least 4. Fewer are not critical: two dimensions can hold more features without
            interference.

    Returns:
        Its length, bias and h.

    Raises:
        TypeError: for a k that is not whole.
        ValueError: for k < 4.

    >>> [round(v, 4) for v in kgon(5)[1:]]
    [1.1705, -0.2823, 0.2374]
    """
    whole_number("k", k)
    if k < 4:
        raise ValueError(f"k={k}: k-gons from 4 on are told")
    if k == 4:
        return KGon(4, 1.0, 0.0, 0.0)
    import scipy.optimize

    minimum = scipy.optimize.minimize(
        lambda v: _kgon_error(k, *v),
        (1.2, -0.3),
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000},
    )
    length, bias = map(float, minimum.x)
    return KGon(k, length, bias, float(k * 3 * minimum.fun))


def _kgon_error(k: int, length: float, bias: float) -> float:
    """The mean squared error of a k-gon's features when one of them is active, summed over outputs; bias <= 0."""
    slope = length**2  # of the active feature's output
    squares = sum(_relu_square(slope * np.cos(2 * np.pi * j / k), bias) for j in range(k))
    start = min(1.0, -bias / slope) if bias < 0 else 0.0  # the output is positive above it
    cross = slope * (1 - start**3) / 3 + bias * (1 - start**2) / 2
    return float(squares - 2 * cross + 1 / 3)


def _relu_square(a: float, b: float) -> float:
    """The integral of ReLU(a x + b)^2 over [0, 1]."""
    if abs(a) < 1e-12:
        return max(b, 0.0) ** 2
    return (max(a + b, 0.0) ** 3 - max(b, 0.0) ** 3) / (3 * a)


def kgon_loss(k: int, c: int, positive: int = 0) -> float:
    """The loss of a k-gon among c features: (h + c - k) / (3c) - positive / (4 c^2).

    The squared error of a dead feature with b <= 0 is x^2, on average 1/3, when it is active (probability 1/c).
    With b > 0 its output is the constant b, and its mean squared error (c b^2 - b + 1/3) / c, which is least at
    b = 1 / (2c); this saves 1 / (4c^2).

    Args:
        k: number of corners, at least 4.
        c: number of features, at least k.
        positive: number of dead features with a positive bias, at most c - k.

    Returns:
        The loss.

    Raises:
        ValueError: for numbers outside these ranges.

    >>> kgon_loss(4, 6)
    0.1111111111111111
    """
    _check(k, c, positive)
    return (kgon(k).h + c - k) / (3 * c) - positive / (4 * c**2)


def kgon_params(k: int, c: int, positive: int = 0) -> dict[str, np.ndarray]:
    """The parameters of a k-gon among c features.

    Of the c - k dead features `positive` have the bias 1 / (2c), which is optimal for positive ones, and the
    others the bias -1 / (2c): at 0 the loss has a kink.

    Args:
        k: number of corners, at least 4.
        c: number of features, at least k.
        positive: number of dead features with a positive bias, at most c - k.

    Returns:
        `W [2, c]` and `b [c]`.

    Raises:
        ValueError: for numbers outside these ranges.

    >>> kgon_params(4, 6, 1)["b"].round(3).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.083, -0.083]
    """
    _check(k, c, positive)
    _, length, bias, _ = kgon(k)
    angle = 2 * np.pi * np.arange(k) / k
    w = np.zeros((2, c))
    w[:, :k] = length * np.stack([np.cos(angle), np.sin(angle)])
    dead = [1 / (2 * c)] * positive + [-1 / (2 * c)] * (c - k - positive)
    return {"W": w, "b": np.array([bias] * k + dead)}


def _check(k: int, c: int, positive: int) -> None:
    if not 4 <= k <= c or not 0 <= positive <= c - k:
        raise ValueError(
            f"a {k}-gon of {c} features with {positive} positive dead ones: 4 <= k <= c, and at most c - k, are expected"
        )
