"""Sweeps: a metric at every cell of a grid of edits, each resumed from the base run where it begins to differ."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack, overload

from mijax._types import ArrayLike
from mijax.engine.cells import Stack, cells_of
from mijax.engine.driver import swept
from mijax.engine.labels import labelled
from mijax.engine.measure import Metrics, described, named
from mijax.engine.names import check_metric_names
from mijax.engine.options import Running, options_of
from mijax.interventions.edits import Interventions
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs

if TYPE_CHECKING:
    import xarray as xr


@overload
def sweep(model: Model, tokens: Inputs | ArrayLike, interventions: Interventions | Stack, metric: AnyMetric,
          **running: Unpack[Running]) -> "xr.DataArray": ...  # fmt: skip
@overload
def sweep(model: Model, tokens: Inputs | ArrayLike, interventions: Interventions | Stack,
          metric: Mapping[str, AnyMetric], **running: Unpack[Running]) -> "xr.Dataset": ...  # fmt: skip
def sweep(
    model: Model,
    tokens: Inputs | ArrayLike,
    interventions: Interventions | Stack,
    metric: Metrics,
    **running: Unpack[Running],
) -> "xr.DataArray | xr.Dataset":
    """Run every cell of a grid of edits and measure each: one compilation, one labelled result.

    Edits with the same grid move together, different grids are multiplied (pairs of heads: one edit with one grid,
    another with a second one).

    Only what differs from the base is computed: a cell is resumed at its first edited layer and position, and the
    last layer is computed only at the positions that the metric's `pos` names. A bidirectional model, an edit at
    the embedding, a callable, or a metric without `pos` need more computation, and give the same numbers. New
    indices, values, answers and prompts of one shape compile nothing, except that work of many seconds gets a
    program of its own for cells that are twice as short or long.

    Args:
        model: the model.
        tokens: the prompts.
        interventions: as `run` takes them, with a `mijax.grid` in place of the `Where` of an edit; or a
            `mijax.stack` of interventions.
        metric: a metric, or metrics by name, which are read from one run of each cell.
        running: `memory`, `progress`, `save` and `mesh`, described at `mijax.engine.options.Running`.

    Returns:
        Each cell's metric, per example, with dimensions `grid.dims + ("batch",)`; the coordinate `base` is the
        metric with only the edits that are the same in all cells. Of several metrics a Dataset, whose coordinates
        are `base.<name>`.

    Raises:
        ValueError: what `run` raises, for all cells, before anything runs; where there is no grid, where `memory`
            does not hold one cell, where the folder `save` holds another sweep; and where the metric is not finite
            on the base.
        TypeError: what `run` raises; for an unknown keyword, and for a metric that is no function.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> heads = mj.grid(layer=range(2), head=range(2))
    >>> result = mj.sweep(model, [[1, 2, 3]], {"z": mj.Replace(0.0, heads)}, mj.metrics.logit(7))
    >>> dict(result.sizes)
    {'layer': 2, 'head': 2, 'batch': 1}
    """
    options, tokens, cells = options_of(running), model.inputs(tokens), cells_of(interventions)
    check_metric_names(metric, cells.labels)
    done = swept(model, tokens, cells, named(metric), options)
    attrs = {"sites": " ".join(cells.edits), **described(model)}
    return labelled(done, single=not isinstance(metric, Mapping), attrs=attrs)
