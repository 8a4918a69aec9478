"""Activation patching: the activations of one run put into another, place by place."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack, overload

from mijax._types import ArrayLike
from mijax.engine.axes import full_grid
from mijax.engine.grid import Grid
from mijax.engine.labels import labelled, with_positions
from mijax.engine.measure import Metrics, described, named
from mijax.engine.names import check_metric_names
from mijax.engine.options import Running, options_of
from mijax.engine.pairs import Direction, check_pair, patched
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs

if TYPE_CHECKING:
    import xarray as xr


@overload
def patch(model: Model, *, clean: Inputs | ArrayLike, corrupted: Inputs | ArrayLike, site: str,
          over: Sequence[str] | Grid, metric: AnyMetric, direction: Direction = ...,
          **running: Unpack[Running]) -> "xr.DataArray": ...  # fmt: skip
@overload
def patch(model: Model, *, clean: Inputs | ArrayLike, corrupted: Inputs | ArrayLike, site: str,
          over: Sequence[str] | Grid, metric: Mapping[str, AnyMetric], direction: Direction = ...,
          **running: Unpack[Running]) -> "xr.Dataset": ...  # fmt: skip
def patch(
    model: Model,
    *,
    clean: Inputs | ArrayLike,
    corrupted: Inputs | ArrayLike,
    site: str,
    over: Sequence[str] | Grid,
    metric: Metrics,
    direction: Direction = "denoise",
    **running: Unpack[Running],
) -> "xr.DataArray | xr.Dataset":
    """Replace `site` in one run by its values in the other, at every cell of a grid.

    See Heimersheim and Nanda 2024, "How to use and interpret activation patching".

    Args:
        model: the model.
        clean: the clean prompts.
        corrupted: the corrupted prompts, of the same shape and padding.
        site: name of the site.
        over: names of axes of the site (`"layer"`, `"pos"`, `"head"`, `"unit"`, `"query"`, `"key"`), each taken in
            full; or a `mijax.grid`, for chosen layers or named roles.
        metric: a metric, or metrics by name.
        direction: `"denoise"` edits the corrupted run with clean activations (what suffices to restore the
            behaviour), `"noise"` the clean run with corrupted ones (what is necessary for it).
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        What `sweep` gives, with the coordinate `source` beside `base`, and, over positions, the prompts' tokens as
        `token`. A position that a shorter prompt lacks is NaN.

    Raises:
        ValueError: where the batches differ in shape or padding, or `over` has an axis that the site lacks; and
            what `sweep` raises.
        TypeError: what `sweep` raises.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> metric = mj.metrics.logit_diff(7, 8)
    >>> r = mj.patch(model, clean=[[1, 2, 3]], corrupted=[[1, 4, 3]], site="resid_pre", over=("layer", "pos"), metric=metric)
    >>> r.dims, float(abs(r.sel(layer=0, pos=1) - r.source).max()) < 1e-6
    (('layer', 'pos', 'batch'), True)
    """
    options, clean, corrupted = options_of(running), model.inputs(clean), model.inputs(corrupted)
    check_pair(clean, corrupted)
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', given {direction!r}")
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    places = over if isinstance(over, Grid) else full_grid(model, base, site, over)
    check_metric_names(metric, places.labels)
    done = patched(model, base, source, site, places, named(metric), options)
    attrs = {"sites": site, "direction": direction, **described(model)}
    result = labelled(done, single=not isinstance(metric, Mapping), attrs=attrs)
    return result if isinstance(over, Grid) else with_positions(result, base)
