"""How a model arranges its features: `W [hidden, feature]`, whose columns are the features' directions.

Functions take NumPy or JAX arrays with any axes in front, unless they name what they find: then one matrix.
"""

import itertools
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mijax._types import Array, Float

Matrices: TypeAlias = Float[Array | np.ndarray, "*model hidden feature"]
Matrix: TypeAlias = Float[Array | np.ndarray, "hidden feature"]

_TINY = 1e-12


def norms(w: Matrices) -> Any:
    """The length of each feature's direction: about 1 where it is represented, about 0 where not.

    >>> norms(np.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [5.0, 1.0]
    """
    return (w**2).sum(-2) ** 0.5


def interference(w: Matrices) -> Any:
    """How much other features share a feature's direction: sum over j other than i of (W_i_hat . W_j)^2. Elhage et al. 2022."""
    return _squared_shares(w) - norms(w) ** 2


def dimensionality(w: Matrices) -> Any:
    """The fraction of a dimension that each feature has: D_i = |W_i|^2 / sum_j (W_i_hat . W_j)^2; 0 for one of no length.

    They sum to at most the hidden dimensions, and to all of them for tight arrangements. 1 is a dimension of its own,
    1/2 an antipodal pair, 2/k a k-gon in a plane. Elhage et al. 2022.

    >>> dimensionality(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()
    [0.5, 0.5, 1.0]
    """
    return _ratio(norms(w) ** 2, _squared_shares(w))


def _squared_shares(w: Any) -> Any:
    gram = w.swapaxes(-1, -2) @ w
    return _ratio((gram**2).sum(-1), norms(w) ** 2)


def _ratio(one: Any, other: Any) -> Any:
    """0 where both are 0; for NumPy and JAX alike."""
    return one / (other + (other == 0).astype(other.dtype))


def dimensions_per_feature(w: Matrices) -> Any:
    """D* = m / |W|_F^2: hidden dimensions for each feature that is represented. Elhage et al. 2022.

    >>> float(dimensions_per_feature(np.array([[1.0, -1.0]])))
    0.5
    """
    return w.shape[-2] / (w**2).sum((-1, -2))


class Represented(NamedTuple):
    """What colours features in the paper's pictures `[feature]`: their length, and how much others share their direction."""

    norm: Any
    shared: Any


def represented(w: Matrices) -> Represented:
    """Which features are represented, and which in a dimension of their own: |W_i|, and the sum over j of (W_i_hat . W_j)^2."""
    return Represented(norms(w), interference(w))


UNKNOWN, IGNORED, SHARING, DEDICATED = range(-1, 3)


def role(w: Matrices, feature: int = -1) -> np.ndarray:
    """What becomes of a feature: 0 ignored, 1 sharing a dimension, 2 dedicated; -1 where W is not finite (training failed).

    Ignored below half of the squared length that the longest feature has, or of 1 if that is longer; sharing where others'
    squared projections on its direction exceed a tenth of it.

    >>> role(np.array([[1.0, -1.0]])).item(), role(np.array([[1.0, 0.0]])).item(), role(np.array([[0.0, 1.0]])).item()
    (1, 0, 2)
    """
    w = np.asarray(w)
    squared = norms(w) ** 2
    there = squared[..., feature] > 0.5 * np.minimum(1.0, squared.max(-1))
    alone = interference(w)[..., feature] < 0.1 * squared[..., feature]
    found = np.where(there, np.where(alone, DEDICATED, SHARING), IGNORED)
    return np.where(np.isfinite(w).all((-1, -2)), found, UNKNOWN)


def tegum_factors(w: Matrix, tolerance: float = 0.1) -> list[list[int]]:
    """The features in groups that are orthogonal to each other: blocks of `W^T W`, largest first.

    Two features are in one group where |cos| exceeds `tolerance`, or through others; features shorter than `tolerance` of
    the longest are in none.

    >>> tegum_factors(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    [[0, 1], [2]]
    """
    unit, kept = _directions(w, tolerance)
    near = np.abs(unit.T @ unit) > tolerance
    groups: list[list[int]] = []
    left = set(range(len(kept)))
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {j for i in edge for j in np.flatnonzero(near[i])} - group
        groups.append(sorted(int(kept[i]) for i in group))
        left -= group
    return sorted(groups, key=lambda g: (-len(g), g))


def polytopes(w: Matrix, tolerance: float = 0.1) -> list[str]:
    """The name of each tegum factor, largest first.

    >>> polytopes(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    ['digon', 'point']
    """
    return [polytope(np.asarray(w)[:, group], tolerance) for group in tegum_factors(w, tolerance)]


def polytope(w: Matrix, tolerance: float = 0.1) -> str:
    """The name of the arrangement of all features' directions, up to rotation and order.

    Each known polytope is compared by the sorted cosines of each of its corners with the others; one whose largest difference
    is at most `tolerance`, and the least, gives its name. `"k in d"` is what none of them is.

    >>> polytope(np.array([[0.0, 0.866, -0.866], [-1.0, 0.5, 0.5]]))
    'triangle'
    """
    unit, kept = _directions(w, tolerance)
    if not len(kept):
        return "nothing"
    cosines = unit.T @ unit
    found = {
        name: _apart(corners.T @ corners, cosines)
        for name, corners in POLYTOPES.items()
        if corners.shape[1] == len(kept)
    }
    if found and min(found.values()) <= tolerance:
        return min(found, key=found.__getitem__)
    rank = int((np.linalg.svd(unit, compute_uv=False) > tolerance).sum())
    return f"{len(kept)} in {rank}"


def _directions(w: Any, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    w = np.asarray(w, float)
    if not np.isfinite(w).all():
        raise ValueError("W is not finite: the training of this model failed")
    length = np.linalg.norm(w, axis=0)
    kept = np.flatnonzero(length > tolerance * max(length.max(), _TINY))
    return w[:, kept] / length[kept], kept


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of the sorted cosines of corners that are matched as well as they can be."""
    from scipy.optimize import linear_sum_assignment

    rows = [np.sort(cosines, axis=1) for cosines in (one, other)]
    apart = np.abs(rows[0][:, None] - rows[1][None]).max(-1)
    return float(apart[linear_sum_assignment(apart)].max())


def _unit(corners: Any) -> np.ndarray:
    array = np.asarray(corners, float).T
    return array / np.linalg.norm(array, axis=0)


def _gon(k: int) -> np.ndarray:
    angle = 2 * np.pi * np.arange(k) / k
    return np.stack([np.cos(angle), np.sin(angle)])


def _simplex(d: int) -> np.ndarray:
    basis = np.linalg.svd(np.eye(d + 1) - 1 / (d + 1))[0][:, :d]
    return _unit(basis)


def _bipyramid(k: int) -> np.ndarray:
    return np.concatenate([np.pad(_gon(k), ((0, 1), (0, 0))), [[0, 0], [0, 0], [1, -1]]], axis=1)


def _antiprism(height: float) -> np.ndarray:
    turned = np.pi / 4
    turn = np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]])
    above, below = np.vstack([_gon(4), np.full(4, height)]), np.vstack([turn @ _gon(4), np.full(4, -height)])
    return _unit(np.concatenate([above, below], axis=1).T)


_GOLDEN = (1 + 5**0.5) / 2
_SIGNS = list(itertools.product((1, -1), repeat=3))
POLYTOPES: dict[str, np.ndarray] = {
    "point": np.ones((1, 1)),
    "digon": np.array([[1.0, -1.0]]),
    "triangle": _gon(3),
    "square": _gon(4),
    "pentagon": _gon(5),
    "hexagon": _gon(6),
    "heptagon": _gon(7),
    "octagon": _gon(8),
    "tetrahedron": _simplex(3),
    "5-cell": _simplex(4),
    "5-simplex": _simplex(5),
    "triangular bipyramid": _bipyramid(3),
    "octahedron": _bipyramid(4),
    "pentagonal bipyramid": _bipyramid(5),
    "cube": _unit(_SIGNS),
    "square antiprism": _antiprism(0.676695),
    "icosahedron": _unit([np.roll([0, a, b * _GOLDEN], s) for a in (1, -1) for b in (1, -1) for s in range(3)]),
}
"""The corners `[d, k]` of what is known by name; the antiprism with the height at which eight charges rest on a sphere."""

THOMSON = {2: 0.5, 3: 1.732050808, 4: 3.674234614, 5: 6.474691495, 6: 9.985281374, 7: 14.452977414, 8: 19.675287861}
"""The least energies of k charges on a sphere in three dimensions. Wales and Ulker 2006."""


def thomson_energy(w: Matrix) -> float:
    """The energy of the features' directions as charges on a sphere: the sum over pairs of 1 / distance.

    >>> round(thomson_energy(POLYTOPES["octahedron"]), 6)
    9.985281
    """
    unit = np.asarray(w, float) / np.linalg.norm(w, axis=0)
    i, j = np.triu_indices(unit.shape[1], 1)
    return float((1 / np.linalg.norm(unit[:, i] - unit[:, j], axis=0)).sum())


def features_of_neurons(w: Matrices) -> tuple[Any, Any]:
    """How many neurons are monosemantic, and how many polysemantic; the rest are dead. -1 where W is not finite.

    Of neurons (rows) whose norm is over 0.1, one is monosemantic where one feature carries over 90 % of the squared norm.

    >>> mono, poly = features_of_neurons(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.01]]))
    >>> int(mono), int(poly)
    (1, 1)
    """
    squared = w**2
    total = squared.sum(-1)
    alive = total > 0.01
    one = squared.max(-1) > 0.9 * total
    finite = (total == total).all(-1)  # a NaN equals nothing; for NumPy and JAX alike
    count = lambda which: which.sum(-1) * finite - ~finite
    return count(alive & one), count(alive & ~one)
