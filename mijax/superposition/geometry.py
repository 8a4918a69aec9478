"""How a model arranges its features: `W [hidden, feature]`, whose columns are the features' directions.

Functions of `Matrices` take NumPy or JAX arrays with any number of leading axes. Functions of `Matrix` (which
group and name arrangements, or compute an energy) take one matrix.
"""

from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from mijax._types import Array, Float
from mijax.superposition.corners import POLYTOPES

Matrices: TypeAlias = Float[Array | np.ndarray, "*model hidden feature"]
Matrix: TypeAlias = Float[Array | np.ndarray, "hidden feature"]
PerFeature: TypeAlias = Float[Array | np.ndarray, "*model feature"]
X = TypeVar("X", Array, np.ndarray)

_TINY = 1e-12


def norms(w: Float[X, "*model hidden feature"]) -> Float[X, "*model feature"]:
    """The Euclidean norm of each feature's direction: about 1 where it is represented, about 0 where not.

    Args:
        w: `[..., hidden, feature]`.

    Returns:
        `[..., feature]` norms.

    >>> norms(np.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
    [5.0, 1.0]
    """
    return (w**2).sum(-2) ** 0.5  # pyright: ignore[reportReturnType]


def interference(w: Float[X, "*model hidden feature"]) -> Float[X, "*model feature"]:
    """How much other features share each feature's direction: the sum over j other than i of (W_i_hat . W_j)^2.

    W_i_hat is W_i divided by its norm. Elhage et al. 2022.

    Args:
        w: `[..., hidden, feature]`.

    Returns:
        `[..., feature]` sums of squared projections; 0 for a feature of norm 0.

    >>> interference(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()
    [1.0, 1.0, 0.0]
    """
    return _squared_shares(w) - norms(w) ** 2


def dimensionality(w: Float[X, "*model hidden feature"]) -> Float[X, "*model feature"]:
    """The fraction of a dimension that each feature has: D_i = |W_i|^2 / sum_j (W_i_hat . W_j)^2. Elhage et al. 2022.

    The fractions sum to at most the number of hidden dimensions, with equality for tight arrangements. 1 is a
    dedicated dimension, 1/2 an antipodal pair, 2/k a k-gon in a plane.

    Args:
        w: `[..., hidden, feature]`.

    Returns:
        `[..., feature]` fractions in [0, 1]; 0 for a feature of norm 0.

    >>> dimensionality(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).tolist()
    [0.5, 0.5, 1.0]
    """
    return _ratio(norms(w) ** 2, _squared_shares(w))


def _squared_shares(w: Any) -> Any:
    """`[..., feature]`: the sum over all j, i included, of (W_i_hat . W_j)^2."""
    gram = w.swapaxes(-1, -2) @ w
    return _ratio((gram**2).sum(-1), norms(w) ** 2)


def _ratio(numerator: Any, denominator: Any) -> Any:
    """The quotient, 0 where both are 0; for NumPy and JAX alike."""
    return numerator / (denominator + (denominator == 0).astype(denominator.dtype))


def dimensions_per_feature(w: Float[X, "*model hidden feature"]) -> Float[X, "*model"] | np.floating:
    """D* = m / |W|_F^2: hidden dimensions per represented feature. Elhage et al. 2022.

    Args:
        w: `[..., hidden, feature]`.

    Returns:
        `[...]` ratios.

    >>> float(dimensions_per_feature(np.array([[1.0, -1.0]])))
    0.5
    """
    return w.shape[-2] / (w**2).sum((-1, -2))


class Represented(NamedTuple):
    """Length and sharing of each feature, which set the bars and colours of the figures in Elhage et al. 2022.

    Attributes:
        norm: `[..., feature]`, |W_i|.
        shared: `[..., feature]`, the sum over j other than i of (W_i_hat . W_j)^2.
    """

    norm: PerFeature
    shared: PerFeature


def represented(w: Float[X, "*model hidden feature"]) -> Represented:
    """Which features are represented, and which of these have a dedicated dimension: `norms` and `interference`.

    Args:
        w: `[..., hidden, feature]`.

    Returns:
        |W_i|, and the sum over j other than i of (W_i_hat . W_j)^2.

    >>> represented(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])).shared.tolist()
    [1.0, 1.0, 0.0]
    """
    return Represented(norms(w), interference(w))


UNKNOWN, IGNORED, SHARING, DEDICATED = range(-1, 3)


def role(w: Matrices, feature: int = -1) -> np.ndarray:
    """The role of a feature: ignored, sharing a dimension, or dedicated.

    A feature is ignored where its squared norm is at most half of the longest feature's, or at most 1/2 if the
    longest squared norm exceeds 1. It shares its dimension where the other features' squared projections on its
    direction sum to a tenth of its squared norm or more.

    Args:
        w: `[..., hidden, feature]`.
        feature: index of the feature, by default the last.

    Returns:
        `[...]` integers: 0 ignored, 1 sharing, 2 dedicated; -1 where W is not finite (training failed).

    >>> role(np.array([[1.0, -1.0]])).item(), role(np.array([[1.0, 0.0]])).item(), role(np.array([[0.0, 1.0]])).item()
    (1, 0, 2)
    """
    w = np.asarray(w)
    squared = norms(w) ** 2
    is_represented = squared[..., feature] > 0.5 * np.minimum(1.0, squared.max(-1))
    is_alone = interference(w)[..., feature] < 0.1 * squared[..., feature]
    roles = np.where(is_represented, np.where(is_alone, DEDICATED, SHARING), IGNORED)
    return np.where(np.isfinite(w).all((-1, -2)), roles, UNKNOWN)


def tegum_factors(w: Matrix, tolerance: float = 0.1) -> list[list[int]]:
    """The features in groups that are orthogonal to each other: the blocks of `W^T W`.

    The groups are the connected components of the graph whose edges are pairs of features with |cos| over
    `tolerance`. Features with a norm of at most `tolerance` times the longest feature's are in no group.

    Args:
        w: `[hidden, feature]`.
        tolerance: the threshold of |cos|, and of relative norms.

    Returns:
        Groups of sorted feature indices, the largest group first; of equal size, by their indices.

    Raises:
        ValueError: for a W that is not finite or no matrix with columns, and for a tolerance outside [0, 1).

    >>> tegum_factors(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    [[0, 1], [2]]
    """
    unit, indices = _directions(w, tolerance)
    adjacent = np.abs(unit.T @ unit) > tolerance
    groups: list[list[int]] = []
    ungrouped = set(range(len(indices)))
    while ungrouped:
        group, frontier = set(), {min(ungrouped)}
        while frontier:
            group |= frontier
            frontier = {j for i in frontier for j in np.flatnonzero(adjacent[i])} - group
        groups.append(sorted(int(indices[i]) for i in group))
        ungrouped -= group
    return sorted(groups, key=lambda g: (-len(g), g))


def polytopes(w: Matrix, tolerance: float = 0.1) -> list[str]:
    """The name (`polytope`) of each tegum factor, the largest factor first.

    Args:
        w: `[hidden, feature]`.
        tolerance: as in `tegum_factors` and `polytope`.

    Returns:
        One name per factor.

    Raises:
        ValueError: for a W that is not finite or no matrix with columns, and for a tolerance outside [0, 1).

    >>> polytopes(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    ['digon', 'point']
    """
    return [polytope(np.asarray(w)[:, group], tolerance) for group in tegum_factors(w, tolerance)]


def polytope(w: Matrix, tolerance: float = 0.1) -> str:
    """The name of the arrangement of all features' directions, up to rotation and order.

    The arrangement is compared with each entry of `POLYTOPES` that has as many corners, by the sorted cosines of each
    corner with all corners, corners matched as well as possible. The nearest polytope gives the name if its largest
    difference in cosine is at most `tolerance`.

    Args:
        w: `[hidden, feature]`.
        tolerance: the largest difference in cosine. Features with a norm of at most `tolerance` times the longest
            feature's are left out.

    Returns:
        A key of `POLYTOPES`; `"k in d"` where none matches (k directions that span d dimensions); `"nothing"`
        where all features are zero.

    Raises:
        ValueError: for a W that is not finite or no matrix with columns, and for a tolerance outside [0, 1).

    >>> polytope(np.array([[0.0, 0.866, -0.866], [-1.0, 0.5, 0.5]]))
    'triangle'
    """
    unit, indices = _directions(w, tolerance)
    if not len(indices):
        return "nothing"
    cosines = unit.T @ unit
    distances = {
        name: _apart(corners.T @ corners, cosines)
        for name, corners in POLYTOPES.items()
        if corners.shape[1] == len(indices)
    }
    if distances and min(distances.values()) <= tolerance:
        return min(distances, key=distances.__getitem__)
    rank = int((np.linalg.svd(unit, compute_uv=False) > tolerance).sum())
    return f"{len(indices)} in {rank}"


def _directions(w: Any, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The unit vectors `[hidden, k]` of the k features that are not negligibly short, and their indices `[k]`."""
    w = _matrix(w)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be from 0 to 1, 1 excluded, given {tolerance}")
    length = np.linalg.norm(w, axis=0)
    indices = np.flatnonzero(length > tolerance * max(length.max(), _TINY))
    return w[:, indices] / length[indices], indices


def unit_columns(w: Matrix) -> Float[np.ndarray, "hidden feature"]:
    """The directions of all features, in float64.

    Args:
        w: `[hidden, feature]`, none of the columns zero.

    Returns:
        The columns divided by their norms.

    Raises:
        ValueError: for a W that is no matrix with columns, is not finite, or has a column of zeros.

    >>> unit_columns(np.array([[3.0, 0.0], [4.0, 2.0]])).tolist()
    [[0.6, 0.0], [0.8, 1.0]]
    """
    w = _matrix(w)
    length = np.linalg.norm(w, axis=0)
    if not length.all():
        raise ValueError(f"column {int(np.argmin(length))} of W is zero, and has no direction: leave it out")
    return w / length


def _matrix(w: Any) -> np.ndarray:
    """A checked W, in float64."""
    w = np.asarray(w, float)
    if w.ndim != 2 or not w.size:
        raise ValueError(f"W must be one matrix [hidden, feature] with columns, given shape {w.shape}")
    if not np.isfinite(w).all():
        raise ValueError("W is not finite: the training of this model failed")
    return w


def _apart(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference between two matrices of cosines `[k, k]`.

    Each row is sorted, and rows are matched such that the sum of their largest differences is least.
    """
    from scipy.optimize import linear_sum_assignment

    rows = [np.sort(cosines, axis=1) for cosines in (first, second)]
    difference = np.abs(rows[0][:, None] - rows[1][None]).max(-1)
    return float(difference[linear_sum_assignment(difference)].max())


def thomson_energy(w: Matrix) -> float:
    """The energy of the features' directions as charges on a sphere: the sum over pairs of 1 / distance.

    Args:
        w: `[hidden, feature]`, none of the columns zero. Only their directions matter.

    Returns:
        The energy of unit charges on the unit sphere, infinite where two coincide; `mijax.superposition.corners.THOMSON` holds its minima in three
        dimensions.

    Raises:
        ValueError: for a W that is no matrix with columns, is not finite, or has a column of zeros.

    >>> round(thomson_energy(POLYTOPES["octahedron"]), 6)
    9.985281
    """
    unit = unit_columns(w)
    i, j = np.triu_indices(unit.shape[1], 1)
    with np.errstate(divide="ignore"):
        return float((1 / np.linalg.norm(unit[:, i] - unit[:, j], axis=0)).sum())


def features_of_neurons(w: Matrices) -> tuple[Any, Any]:
    """How many neurons (rows of W) are monosemantic, and how many polysemantic; the others are dead.

    A neuron is dead where its norm is at most 0.1, monosemantic where a single feature carries over 90 % of its
    squared norm, and else polysemantic.

    Args:
        w: `[..., hidden, feature]`.

    Returns:
        Two arrays `[...]`: the numbers of monosemantic and of polysemantic neurons; both -1 where W is not finite
        (training failed).

    >>> mono, poly = features_of_neurons(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.01]]))
    >>> int(mono), int(poly)
    (1, 1)
    """
    squared = w**2
    total = squared.sum(-1)
    alive = total > 0.01
    monosemantic = squared.max(-1) > 0.9 * total
    finite = (total - total == 0).all(-1)  # neither NaN nor infinite; this runs in NumPy and JAX alike
    count = lambda neurons: neurons.sum(-1) * finite - ~finite
    return count(alive & monosemantic), count(alive & ~monosemantic)
