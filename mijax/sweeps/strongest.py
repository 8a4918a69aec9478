"""Sweeps too large to hold: the strongest cells of a patching grid, computed one slab of the grid at a time."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import jax
import numpy as np

from mijax._types import ArrayLike
from mijax.arguments import whole_number
from mijax.engine.axes import full_grid
from mijax.engine.grid import Grid
from mijax.engine.labels import mean_over_prompts, with_positions
from mijax.engine.options import Running
from mijax.engine.pairs import Direction
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs
from mijax.sweeps.patch import patch

if TYPE_CHECKING:
    import xarray as xr


def strongest(
    model: Model,
    *,
    clean: Inputs | ArrayLike,
    corrupted: Inputs | ArrayLike,
    site: str,
    over: Sequence[str] | Grid,
    metric: AnyMetric,
    k: int,
    direction: Direction = "denoise",
    **running: Unpack[Running],
) -> "xr.DataArray":
    """Patch every cell of a grid and keep the `k` cells with the largest mean effect in magnitude.

    For grids of millions of cells, such as every neuron (`site="post"`, `over=("layer", "unit")`) at every
    position: the grid is run in slabs along its first dimension, and the results of all cells are never held
    together. The mean effect is over the prompts that have a cell's position, as in `mijax.normalise`; cells where it
    is not a number cannot be ranked and come last, with a warning.

    Args:
        model: the model.
        clean: the clean prompts.
        corrupted: the corrupted prompts, of the same shape and padding.
        site: name of the site.
        over: axes of the site, each taken in full, or a `mijax.grid`, as in `patch`.
        metric: the metric, one alone.
        k: the number of cells to keep.
        direction: as in `patch`.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        The metric of the cells that are kept, `[cell, batch]`, strongest first, with the cells' labels as
        coordinates, and `base` and `source` as in `patch`. A position that a shorter prompt lacks is NaN.

    Raises:
        ValueError: for a `k` below 1 or above the number of cells, and what `patch` raises.
        TypeError: for several metrics by name, a `k` that is not whole, and what `patch` raises.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> r = mj.strongest(model, clean=[[1, 2, 3]], corrupted=[[1, 4, 3]], site="post", over=("layer", "unit"), k=3, metric=mj.metrics.logit(7))
    >>> dict(r.sizes), sorted(set(r.coords) & {"layer", "unit"})
    ({'cell': 3, 'batch': 1}, ['layer', 'unit'])
    """
    import xarray as xr

    if isinstance(metric, Mapping):
        raise TypeError(f"cells are ranked by one metric, given {len(metric)} by name: call strongest with each alone")
    k = whole_number("k", k, least=1)
    clean, corrupted = model.inputs(clean), model.inputs(corrupted)
    places = over if isinstance(over, Grid) else full_grid(model, clean, site, over)
    if k > places.size:
        raise ValueError(f"k must be from 1 to the {places.size} cells of the grid, given {k}")
    best, save, n_nan = None, running.get("save"), 0
    for i, slab in enumerate(_slabs(places)):
        keywords: Any = {**running} if save is None else {**running, "save": f"{save}/{i:06d}"}
        patched = patch(
            model,
            clean=clean,
            corrupted=corrupted,
            site=site,
            over=slab,
            metric=metric,
            direction=direction,
            **keywords,
        )
        if not isinstance(over, Grid):
            patched = with_positions(patched, clean)
        n_nan += int(np.isnan(_effects(patched)).sum())
        patched = patched.stack(cell=places.dims, create_index=False).transpose("cell", "batch")
        best = patched if best is None else xr.concat([best, patched], "cell", combine_attrs="override")
        best = best.isel(cell=np.argsort(-_effects(best), kind="stable")[:k])
    assert best is not None
    if n_nan:
        warnings.warn(
            f"the mean effect of {n_nan} of {places.size} cells is not a number, so that they could not be ranked and come"
            " last: the metric or the model fails there, in some prompt",
            stacklevel=2,
        )
    return best


def _effects(patched: "xr.DataArray") -> np.ndarray:
    """The size of the mean effect of every cell."""
    return np.abs(mean_over_prompts(patched - patched.base).values)


def _slabs(places: Grid) -> list[Grid]:
    """The grid cut along its first dimension."""
    first, *_ = places.labels
    size = places.size // len(places.labels[first])
    cut = lambda i: jax.tree.map(lambda index: index[i * size : (i + 1) * size], places.where)
    return [Grid(cut(i), {**places.labels, first: [label]}) for i, label in enumerate(places.labels[first])]
