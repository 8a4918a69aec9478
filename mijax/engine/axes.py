"""Grids over all of a site's axes, and windows of layers."""

from collections.abc import Mapping, Sequence

import numpy as np

from mijax._types import Int
from mijax.engine.grid import Grid, picked
from mijax.interventions.where import FIELDS, Where
from mijax.model.model import Model
from mijax.model.sites import field_of, site_of
from mijax.model.tokens import Inputs

POSITIONS = ("pos", "query", "key")


def layer_window(layer: int, window: int, n_layers: int) -> list[int]:
    """The layers of a window around one, cut off at the ends of the model.

    >>> layer_window(0, 3, 12), layer_window(5, 4, 12)
    ([0, 1], [3, 4, 5, 6])
    """
    begin = layer - window // 2
    return [i for i in range(begin, begin + window) if 0 <= i < n_layers]


def full_grid(model: Model, tokens: Inputs, site: str, over: Sequence[str]) -> Grid:
    """All of the site's axes `over`; in shorter prompts, missing positions stand in for the last one."""
    axes = axes_of(model, tokens, site, over)
    labels = {axis: range(n) for axis, n in axes.items()}
    return Grid(places_of(tokens, axes, np.arange(np.prod(list(axes.values())))), labels)


def axes_of(model: Model, tokens: Inputs, site: str, over: Sequence[str]) -> dict[str, int]:
    """How many cells there are along each axis of `over`; `ValueError` for an axis that the site has not.

    Key/value heads may be named `head`, as in `Where`, or `kv_head`.
    """
    found = site_of(site, model.sites)
    sizes = {axis: n for axis, n in zip(found.axes, found.shape(*tokens.ids.shape)) if axis != "batch"}
    sizes = {name: n for axis, n in sizes.items() for name in (field_of(axis), axis) if name in (*FIELDS, "kv_head")}
    told = f"over must name axes of site {site!r}, some of {', '.join(sizes)}; given {over!r}"
    if isinstance(over, str) or not isinstance(over, Sequence) or not over or any(axis not in sizes for axis in over):
        raise ValueError(told)
    if len({"head" if axis == "kv_head" else axis for axis in over}) < len(over):
        raise ValueError(f"{told}, an axis twice")
    most = int(np.asarray(tokens.lengths).max())
    return {axis: most if axis in POSITIONS else sizes[axis] for axis in over}


def places_of(tokens: Inputs, axes: Mapping[str, int], cells: Int[np.ndarray, " cell"]) -> Where:
    """Some cells of the product of `axes`, by their row-major numbers."""
    lengths, stacked = np.asarray(tokens.lengths), {}
    for axis, n in axes.items():
        own = np.arange(n, dtype=np.int32)
        if axis in POSITIONS and len(set(lengths.tolist())) > 1:
            own = np.minimum(own[:, None, None], lengths[:, None] - 1)
        stacked["head" if axis == "kv_head" else axis] = own
    return picked(stacked, cells)


def in_positions(values: np.ndarray, tokens: Inputs, axis: int) -> np.ndarray:
    """What is by column along an axis, by position; examples in front; anything at positions that a prompt has not."""
    mask = np.asarray(tokens.mask)
    if mask.all():
        return values
    real = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(axis=1).max()]
    own = np.moveaxis(values, axis, 1)
    own = np.take_along_axis(own, real.reshape(*real.shape, *(1,) * (own.ndim - 2)), axis=1)
    return np.moveaxis(own, 1, axis)
