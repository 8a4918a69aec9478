"""How many directions fit into a few dimensions: bounds on interference, on projections, and on recovery."""

import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Float
from mijax.arguments import whole_number
from mijax.superposition.geometry import unit_columns


def welch(n: int, m: int) -> float:
    """The Welch bound: a lower bound on the largest |cos| between n unit vectors in m dimensions.

    It is ((n - m) / (m (n - 1)))^(1/2) (Welch 1974), and 0 for n <= m. The Gram matrix has trace n and rank at
    most m, so that the sum of its squared entries is at least n^2 / m (Cauchy-Schwarz on its eigenvalues). n of
    these squares are the diagonal's ones, and the largest of the n (n - 1) others is at least their mean.

    Args:
        n: number of unit vectors.
        m: number of dimensions.

    Returns:
        The bound, in [0, 1].

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: for numbers below 1.

    >>> welch(3, 2), welch(2, 2)
    (0.5, 0.0)
    """
    whole_number("n", n, least=1)
    whole_number("m", m, least=1)
    return float(np.sqrt(max(0, n - m) / (m * max(1, n - 1))))


def frame_potential(w: Float[Array | np.ndarray, "hidden feature"]) -> float:
    """The sum of squared cosines over all ordered pairs of columns, each column paired with itself included.

    It is at least n^2 / m (Benedetto and Fickus 2003). Equality holds where the unit vectors are a tight frame,
    U U^T = (n / m) 1; the mean squared interference of a feature is then n / m - 1.

    Args:
        w: `[hidden, feature]`, n columns in m dimensions, none of them zero. Only their directions matter.

    Returns:
        The frame potential.

    Raises:
        ValueError: for a W that is no matrix with columns, is not finite, or has a column of zeros.

    >>> round(frame_potential(np.array([[1.0, -0.5, -0.5], [0.0, 0.75**0.5, -(0.75**0.5)]])), 6)
    4.5
    """
    unit = unit_columns(w)
    return float(((unit.T @ unit) ** 2).sum())


def johnson_lindenstrauss(points: int, epsilon: float) -> int:
    """The number of dimensions in which n points keep all squared distances within a factor of 1 +- epsilon.

    It is m = ceil(4 ln n / (epsilon^2/2 - epsilon^3/3)) (Dasgupta and Gupta 2003). Under a random projection a
    squared length is chi-squared, and leaves the interval with probability at most 2 exp(-m (epsilon^2/2 -
    epsilon^3/3) / 2). At this m that is 2 / n^2, which sums to less than one over all n (n - 1) / 2 pairs.

    Args:
        points: n, the number of points.
        epsilon: the largest relative error of a squared distance, between 0 and 1, both excluded.

    Returns:
        The number of dimensions m.

    Raises:
        ValueError: for fewer than one point, or an epsilon outside (0, 1).

    >>> johnson_lindenstrauss(1000, 0.5)
    332
    """
    if not points >= 1 or not 0 < epsilon < 1:
        raise ValueError(f"{points} points and epsilon {epsilon}: at least one, and between 0 and 1, are expected")
    return int(np.ceil(4 * np.log(points) / (epsilon**2 / 2 - epsilon**3 / 3)))


def recoverable(w: Float[Array | np.ndarray, "hidden feature"]) -> int:
    """The number of active features that can always be recovered from `W x`: the largest k < (1 + 1 / mu) / 2, at most n.

    mu is the largest |cos| of two different columns (Donoho and Elad 2003). Two different k-sparse inputs with the
    same image would differ by a kernel vector of at most 2k nonzero entries. Gershgorin's disks keep the Gram
    matrix of 2k unit columns invertible while (2k - 1) mu < 1, so that there is none. With orthogonal columns k is
    n. mu is taken to be as large as the rounding of W's dtype allows: at 1 / mu = 2k - 1 exactly, such as that of a
    simplex, k is not recoverable in any dtype.

    Args:
        w: `[hidden, feature]`, n columns, none of them zero. Only their directions matter.

    Returns:
        The number of features k.

    Raises:
        ValueError: for a W that is no matrix with columns, is not finite, or has a column of zeros.

    >>> recoverable(np.eye(3)), recoverable(np.array([[1.0, -1.0]]))
    (3, 0)
    """
    unit = unit_columns(w)
    n = unit.shape[1]
    mu = np.abs(unit.T @ unit - np.diag(np.sum(unit**2, axis=0))).max()
    dtype = np.asarray(w).dtype if jnp.issubdtype(np.asarray(w).dtype, jnp.floating) else np.float64
    rounding = 4 * max(unit.shape) * float(jnp.finfo(dtype).eps)
    return n if mu <= rounding else min(n, int(np.ceil((1 + 1 / (mu + rounding)) / 2)) - 1)


def compressed_sensing(n: int, active: float) -> float:
    """The order of the number of dimensions that sparse features need: active ln(n / active).

    There are about exp(active ln(n / active)) sets of present features, and stable recovery must keep them apart.
    Dimensions of that order are necessary (Do Ba et al. 2010), and sufficient with random projections (Candes,
    Romberg and Tao 2006). Elhage et al. 2022 write it -n (1 - S) ln(1 - S).

    Args:
        n: number of features.
        active: mean number of features that are present at a time, n (1 - S).

    Returns:
        The number of dimensions, up to a constant factor.

    Raises:
        ValueError: for an `active` outside (0, n].

    >>> round(compressed_sensing(1000, 10.0), 1)
    46.1
    """
    if not 0 < active <= n:
        raise ValueError(f"{active} of {n} features: between 0 and all are expected")
    return float(active * np.log(n / active))
