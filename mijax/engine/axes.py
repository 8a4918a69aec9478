"""Grids over whole axes of a site, and windows of layers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mijax._types import Int
from mijax.engine.grid import Grid, picked
from mijax.interventions.where import FIELDS, Where
from mijax.model.model import Model
from mijax.model.sites import field_of, site_of
from mijax.model.tokens import Inputs

POSITIONS = ("pos", "query", "key")
"""The axes of a site along which the tokens of a prompt stand."""


def layer_window(layer: int, window: int, n_layers: int) -> list[int]:
    """The indices of the `window` layers around a layer, cut off at the ends of the model.

    An even window has one more layer before `layer` than after it.

    Args:
        layer: index of the layer in the centre.
        window: number of layers.
        n_layers: number of layers of the model.

    Returns:
        The indices in ascending order.

    >>> layer_window(0, 3, 12), layer_window(5, 4, 12)
    ([0, 1], [3, 4, 5, 6])
    """
    begin = layer - window // 2
    return [i for i in range(begin, begin + window) if 0 <= i < n_layers]


def full_grid(model: Model, tokens: Inputs, site: str, over: Sequence[str]) -> Grid:
    """A grid over whole axes of a site, one cell for every combination of their indices.

    In a prompt that is shorter than the longest one, the last position stands in for positions that it lacks.

    Args:
        model: the model that has the site.
        tokens: the prompts.
        site: name of the site.
        over: names of the axes, as in `axes_of`.

    Returns:
        The grid; its labels are the indices along each axis.

    Raises:
        ValueError: for an unknown site, an axis that the site lacks or that is named twice, and no axes.
    """
    axes = axes_of(model, tokens, site, over)
    return Grid(places_of(tokens, axes, np.arange(math.prod(map(len, axes.values())))), axes)


def axes_of(model: Model, tokens: Inputs, site: str, over: Sequence[str]) -> dict[str, Sequence[int]]:
    """The indices of the cells along each axis of a site that is named in `over`.

    Key/value heads may be named `head`, as in `Where`, or `kv_head`. An axis of positions has as many cells as the
    longest prompt has tokens, an axis of layers one for each layer that has the site.

    Args:
        model: the model that has the site.
        tokens: the prompts.
        site: name of the site.
        over: names of the axes.

    Returns:
        The indices by axis, in the order of `over`.

    Raises:
        ValueError: for an unknown site, an axis that the site lacks or that is named twice, and no axes.
    """
    entry = site_of(site, model.sites)
    sizes = {axis: n for axis, n in zip(entry.axes, entry.shape(*tokens.ids.shape)) if axis != "batch"}
    sizes = {name: n for axis, n in sizes.items() for name in (field_of(axis), axis) if name in (*FIELDS, "kv_head")}
    message = f"over must name axes of site {site!r}, some of {', '.join(sizes)}; given {over!r}"
    if isinstance(over, str) or not isinstance(over, Sequence) or not over or any(axis not in sizes for axis in over):
        raise ValueError(message)
    if len({"head" if axis == "kv_head" else axis for axis in over}) < len(over):
        raise ValueError(f"{message}, an axis twice")
    longest = int(np.asarray(tokens.lengths).max())
    indices: dict[str, Sequence[int]] = {axis: range(longest if axis in POSITIONS else sizes[axis]) for axis in over}
    return indices | ({"layer": entry.layers} if "layer" in over and entry.layers else {})


def places_of(tokens: Inputs, axes: Mapping[str, Sequence[int]], cells: Int[np.ndarray, " cell"]) -> Where:
    """The places of some cells of the product of whole axes.

    Args:
        tokens: the prompts.
        axes: the indices by axis, as `axes_of` gives them.
        cells: row-major numbers of the cells.

    Returns:
        A `Where` with a leading axis of cells; entries for positions are `[cell, batch, 1]` where prompts differ in
        length.
    """
    lengths, choices = np.asarray(tokens.lengths), {}
    for axis, entries in axes.items():
        indices = np.asarray(entries, np.int32)
        if axis in POSITIONS and len(set(lengths.tolist())) > 1:
            indices = np.minimum(indices[:, None, None], lengths[:, None] - 1)
        choices["head" if axis == "kv_head" else axis] = indices
    return picked(choices, cells)


def in_positions(values: np.ndarray, tokens: Inputs, axis: int) -> np.ndarray:
    """Values by column of the batch, rearranged to values by position (real tokens counted from the first).

    Args:
        values: values with the examples along the leading axis.
        tokens: the prompts.
        axis: the axis of columns.

    Returns:
        The values by position along `axis`, which is as long as the longest prompt; entries at positions that a
        prompt lacks are arbitrary.
    """
    mask = np.asarray(tokens.mask)
    if mask.all():
        return values
    real = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(axis=1).max()]
    result = np.moveaxis(values, axis, 1)
    result = np.take_along_axis(result, real.reshape(*real.shape, *(1,) * (result.ndim - 2)), axis=1)
    return np.moveaxis(result, 1, axis)
