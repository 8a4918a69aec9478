"""How many directions fit into a few dimensions: bounds on interference, on projections, and on recovery."""

import numpy as np

from mijax._types import Array, Float


def welch(n: int, m: int) -> float:
    """The least that the largest |cos| between n unit vectors in m dimensions can be: ((n - m) / (m (n - 1)))^(1/2). Welch 1974.

    The Gram matrix has trace n and rank at most m, so that the sum of its squares is at least n^2 / m (Cauchy-Schwarz on its
    eigenvalues); n of these are the diagonal's ones, and the largest of the n (n - 1) others is at least their mean.

    >>> welch(3, 2), welch(2, 2)
    (0.5, 0.0)
    """
    return float(np.sqrt(max(0, n - m) / (m * max(1, n - 1))))


def frame_potential(w: Float[Array | np.ndarray, "hidden feature"]) -> float:
    """The sum of squared cosines of all pairs of columns, each with itself too; at least n^2 / m (Benedetto and Fickus 2003).

    Equal where the unit vectors are a tight frame, U U^T = (n / m) 1. The mean squared interference of a feature is then n / m - 1.

    >>> round(frame_potential(np.array([[1.0, -0.5, -0.5], [0.0, 0.75**0.5, -(0.75**0.5)]])), 6)
    4.5
    """
    unit = w / np.linalg.norm(w, axis=0)
    return float(((unit.T @ unit) ** 2).sum())


def johnson_lindenstrauss(points: int, epsilon: float) -> int:
    """In how many dimensions n points keep all squared distances within 1 +- epsilon: ceil(4 ln n / (epsilon^2/2 - epsilon^3/3)).

    Under a random projection a squared length is chi-squared, and leaves the interval with probability at most
    2 exp(-m (epsilon^2/2 - epsilon^3/3) / 2); at this m that is 2 / n^2, less than one in all n (n - 1) / 2 pairs together.
    Dasgupta and Gupta 2003.

    >>> johnson_lindenstrauss(1000, 0.5)
    332
    """
    if points < 1 or not 0 < epsilon < 1:
        raise ValueError(f"{points} points and epsilon {epsilon}: at least one, and between 0 and 1, are expected")
    return int(np.ceil(4 * np.log(points) / (epsilon**2 / 2 - epsilon**3 / 3)))


def recoverable(w: Float[Array | np.ndarray, "hidden feature"]) -> int:
    """How many active features can always be told from `W x`: the largest k < (1 + 1 / mu) / 2, mu the largest |cos| of two columns.

    Two different k-sparse inputs with one image would be a kernel vector with 2k entries; Gershgorin's disks keep the Gram matrix of
    2k unit columns invertible while (2k - 1) mu < 1. Donoho and Elad 2003. With orthogonal columns it is n.

    >>> recoverable(np.eye(3)), recoverable(np.array([[1.0, -1.0]]))
    (3, 0)
    """
    unit = w / np.linalg.norm(w, axis=0)
    mu = np.abs(unit.T @ unit - np.eye(w.shape[1])).max()
    return w.shape[1] if mu < 1e-12 else max(0, int(np.ceil((1 + 1 / mu) / 2)) - 1)


def compressed_sensing(n: int, active: float) -> float:
    """The order of dimensions that n features need, of which `active` = n (1 - S) are present at a time: active ln(n / active).

    There are about exp(active ln(n / active)) sets of present features, and stable recovery must keep them apart: m of that order is
    necessary (Do Ba et al. 2010), and sufficient with random projections (Candes, Romberg and Tao 2006). Elhage et al. 2022 write it
    -n (1 - S) ln(1 - S).

    >>> round(compressed_sensing(1000, 10.0), 1)
    46.1
    """
    if not 0 < active <= n:
        raise ValueError(f"{active} of {n} features: between 0 and all are expected")
    return float(active * np.log(n / active))
