"""Sweeps too large to hold: the strongest cells of a patching grid, one slab of it at a time."""

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
    """Patch every cell of a grid and keep the `k` of the largest mean effect in magnitude, never holding the grid.

    For grids of millions of cells, such as every neuron (`site="post"`, `over=("layer", "unit")`) at every position. The
    grid is run in slabs along its first dimension. Gives the metric of each kept cell, [cell, batch], strongest first, with
    the cell's labels as coordinates; `base` and `source` as in `patch`.

    Raises `ValueError` for a `k` of none, or of more cells than there are.

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
    kept, save = None, running.get("save")
    for i, slab in enumerate(_slabs(places)):
        own: Any = {**running} if save is None else {**running, "save": f"{save}/{i:06d}"}
        found = patch(
            model, clean=clean, corrupted=corrupted, site=site, over=slab, metric=metric, direction=direction, **own
        )
        found = found.stack(cell=places.dims, create_index=False).transpose("cell", "batch")
        kept = found if kept is None else xr.concat([kept, found], "cell", combine_attrs="override")
        effect = np.abs((kept - kept.base).mean("batch").values)
        kept = kept.isel(cell=np.argsort(-effect, kind="stable")[:k])
    assert kept is not None
    return kept


def _slabs(places: Grid) -> list[Grid]:
    """The grid cut along its first dimension."""
    first, *_ = places.labels
    size = places.size // len(places.labels[first])
    cut = lambda i: jax.tree.map(lambda index: index[i * size : (i + 1) * size], places.where)
    return [Grid(cut(i), {**places.labels, first: [label]}) for i, label in enumerate(places.labels[first])]
