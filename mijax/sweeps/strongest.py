"""Sweeps too large to hold: the strongest cells of a patching grid, computed one slab of the grid at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import jax
import numpy as np

from mijax._types import ArrayLike
from mijax.engine.axes import full_grid
from mijax.engine.grid import Grid
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
    together.

    Args:
        model: the model.
        clean: the clean prompts.
        corrupted: the corrupted prompts, of the same shape and padding.
        site: name of the site.
        over: axes of the site, each taken in full, or a `mijax.grid`, as in `patch`.
        metric: the metric.
        k: the number of cells to keep.
        direction: as in `patch`.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        The metric of the cells that are kept, `[cell, batch]`, strongest first, with the cells' labels as
        coordinates, and `base` and `source` as in `patch`.

    Raises:
        ValueError: for a `k` below 1 or above the number of cells, and what `patch` raises.
        TypeError: what `patch` raises.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> r = mj.strongest(model, clean=[[1, 2, 3]], corrupted=[[1, 4, 3]], site="post", over=("layer", "unit"), k=3, metric=mj.metrics.logit(7))
    >>> dict(r.sizes), sorted(set(r.coords) & {"layer", "unit"})
    ({'cell': 3, 'batch': 1}, ['layer', 'unit'])
    """
    import xarray as xr

    clean, corrupted = model.inputs(clean), model.inputs(corrupted)
    places = over if isinstance(over, Grid) else full_grid(model, clean, site, over)
    if not 0 < k <= places.size:
        raise ValueError(f"k must be from 1 to the {places.size} cells of the grid, given {k}")
    best, save = None, running.get("save")
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
        patched = patched.stack(cell=places.dims, create_index=False).transpose("cell", "batch")
        best = patched if best is None else xr.concat([best, patched], "cell", combine_attrs="override")
        effect = np.abs((best - best.base).mean("batch").values)
        best = best.isel(cell=np.argsort(-effect, kind="stable")[:k])
    assert best is not None
    return best


def _slabs(places: Grid) -> list[Grid]:
    """The grid cut along its first dimension."""
    first, *_ = places.labels
    size = places.size // len(places.labels[first])
    cut = lambda i: jax.tree.map(lambda index: index[i * size : (i + 1) * size], places.where)
    return [Grid(cut(i), {**places.labels, first: [label]}) for i, label in enumerate(places.labels[first])]
