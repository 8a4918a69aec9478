"""What a `Where` selects, by looking at every entry of the site in turn (no masks, no broadcasting)."""

import itertools

import numpy as np

import mijax as mj
from mijax.model.sites import SELECTS


def selected(where: dict, site: str, layer: int | None, example: int, shape, n_layers: int) -> np.ndarray:
    """Booleans of `shape` (one example's activation in one layer, without padding).

    `where` maps fields to plain Python: a number, a list, a list of lists (one per example), or a
    NumPy boolean mask over the unpadded axis.
    """
    axes = [axis for axis in mj.SITES[site].axes if axis not in ("layer", "batch")]
    fields = [SELECTS[axis] for axis in axes]
    out = np.zeros(shape, bool)
    for place in itertools.product(*map(range, shape)):
        at = {"layer": (layer, n_layers), "batch": (example, 3), **{f: (i, n) for f, i, n in zip(fields, place, shape)}}
        out[place] = _is_selected(where, at, example)
    return out


def _is_selected(where: dict, at: dict, example: int) -> bool:
    lists = {}
    for field, index in where.items():
        value, size = at[field]
        if isinstance(index, np.ndarray) and index.dtype == bool:
            if not (index[example] if index.ndim == 2 else index)[value]:
                return False
            continue
        if isinstance(index, int):
            index = [index]
        elif index and isinstance(index[0], list):
            index = index[example]
        lists[field] = [i + size if i < 0 else i for i in index]
    length = max((len(x) for x in lists.values()), default=1)
    zipped = {f: x * length if len(x) == 1 else x for f, x in lists.items()}
    return any(all(x[k] == at[f][0] for f, x in zipped.items()) for k in range(length))
