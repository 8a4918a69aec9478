"""Grids over all of a site, or windows of layers, and what to tell of the prompts' positions afterwards."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mijax.model.sites import SELECTS, site_of
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer
from mijax.sweeps.grid import Grid, grid


def layer_window(layer: int, window: int, n_layers: int) -> list[int]:
    """The layers of a window around one, cut off at the ends of the model.

    >>> layer_window(0, 3, 12), layer_window(5, 4, 12)
    ([0, 1], [3, 4, 5, 6])
    """
    begin = layer - window // 2
    return [i for i in range(begin, begin + window) if 0 <= i < n_layers]


def full_grid(model: Transformer, tokens: Tokens, site: str, over: Sequence[str]) -> Grid:
    """All of the site's axes `over`; in shorter prompts, missing positions stand in for the last one."""
    found = site_of(site, model.config)
    sizes = {SELECTS[axis]: n for axis, n in zip(found.axes, found.shape(model.config, tokens)) if axis != "batch"}
    unknown = [axis for axis in over if axis not in sizes]
    if unknown or isinstance(over, str) or not over:
        raise ValueError(f"over must name axes of site {site!r}, some of {', '.join(sizes)}; given {over!r}")
    choices: dict[str, Any] = {}
    lengths = np.asarray(tokens.lengths)
    for axis in over:
        choices[axis] = range(sizes[axis])
        if axis in ("pos", "query", "key"):
            choices[axis] = range(lengths.max())
            if len(set(lengths.tolist())) > 1:
                choices[axis] = {str(p): np.minimum(p, lengths - 1)[:, None] for p in choices[axis]}
    places = grid(**choices)
    return Grid(places.where, {axis: list(map(int, labels)) for axis, labels in places.labels.items()})


def positions_told(result: Any, tokens: Tokens) -> Any:
    """Blank the positions that a prompt has not; put the tokens beside their positions."""
    import xarray as xr

    lengths = xr.DataArray(np.asarray(tokens.lengths), dims="batch")
    for axis in ("pos", "query", "key"):
        if axis in result.dims:
            result = result.where(result[axis] < lengths)
            if tokens.strings is not None:
                rows = [
                    [s for s, real in zip(row, mask) if real]
                    for row, mask in zip(tokens.strings, np.asarray(tokens.mask))
                ]
                table = np.asarray([row + [""] * (result.sizes[axis] - len(row)) for row in rows])
                name = "token" if axis == "pos" else f"{axis}_token"
                result = result.assign_coords({name: (("batch", axis), table)})
    return result
