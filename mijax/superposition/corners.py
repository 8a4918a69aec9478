"""The corners of known arrangements on a sphere: the regular polytopes that toy models form, and Thomson's energies."""

import itertools
from typing import Any

import numpy as np


def _unit(corners: Any) -> np.ndarray:
    """Corners `[k, d]` as unit vectors `[d, k]`."""
    array = np.asarray(corners, float).T
    return array / np.linalg.norm(array, axis=0)


def _gon(k: int) -> np.ndarray:
    """The corners `[2, k]` of a regular k-gon."""
    angle = 2 * np.pi * np.arange(k) / k
    return np.stack([np.cos(angle), np.sin(angle)])


def _simplex(d: int) -> np.ndarray:
    """The corners `[d, d + 1]` of a regular simplex."""
    basis = np.linalg.svd(np.eye(d + 1) - 1 / (d + 1))[0][:, :d]
    return _unit(basis)


def _bipyramid(k: int) -> np.ndarray:
    """The corners `[3, k + 2]` of a regular k-gon and two poles."""
    return np.concatenate([np.pad(_gon(k), ((0, 1), (0, 0))), [[0, 0], [0, 0], [1, -1]]], axis=1)


def _antiprism(height: float) -> np.ndarray:
    """The corners `[3, 8]` of two squares at +-`height`, one turned by 45 degrees, projected on the unit sphere."""
    angle = np.pi / 4
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    above, below = np.vstack([_gon(4), np.full(4, height)]), np.vstack([rotation @ _gon(4), np.full(4, -height)])
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
"""The corners `[d, k]` of each named polytope.

The antiprism has the height at which eight charges on a sphere are in equilibrium.
"""

THOMSON = {2: 0.5, 3: 1.732050808, 4: 3.674234614, 5: 6.474691495, 6: 9.985281374, 7: 14.452977414, 8: 19.675287861}
"""The least energies (`thomson_energy`) of k charges on a sphere in three dimensions, by k. Wales and Ulker 2006."""
