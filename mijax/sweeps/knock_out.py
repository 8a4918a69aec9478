"""Attention knockout: edges from query to key cut at the scores, so that the rest of the row is renormalised."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np

from mijax._types import ArrayLike
from mijax.arguments import whole_number
from mijax.engine.axes import layer_window
from mijax.engine.grid import Grid, grid, side_by_side
from mijax.engine.measure import Metrics
from mijax.engine.options import Running
from mijax.interventions.checks import check_sees, field_lengths
from mijax.interventions.edits import Replace
from mijax.interventions.where import Where, check_range
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel, Model
from mijax.model.tokens import Inputs, is_concrete
from mijax.sweeps.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr


@overload
def knock_out(model: Model, tokens: Inputs | ArrayLike, edges: Mapping[str, tuple[Any, Any]], metric: AnyMetric, *,
              window: int = ..., heads: Any = ..., **running: Unpack[Running]) -> "xr.DataArray": ...  # fmt: skip
@overload
def knock_out(model: Model, tokens: Inputs | ArrayLike, edges: Mapping[str, tuple[Any, Any]],
              metric: Mapping[str, AnyMetric], *, window: int = ..., heads: Any = ...,
              **running: Unpack[Running]) -> "xr.Dataset": ...  # fmt: skip
def knock_out(
    model: Model,
    tokens: Inputs | ArrayLike,
    edges: Mapping[str, tuple[Any, Any]],
    metric: Metrics,
    *,
    window: int = 1,
    heads: Any = None,
    **running: Unpack[Running],
) -> "xr.DataArray | xr.Dataset":
    """Cut attention from queries to keys, in windows of layers around each layer in turn (Geva et al. 2023).

    The scores become -inf, so that the softmax shares the weight among the keys that are left (zeroing the pattern
    would not); a query without any key left gathers zero.

    Args:
        model: the model.
        tokens: the prompts.
        edges: by name, pairs (query positions, key positions), each as indices that `Where` takes: every query of an edge
            is cut off from every key of it.
        metric: a metric, or metrics by name.
        window: the number of layers in a window.
        heads: the heads in which edges are cut, by default all.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        What `sweep` gives, over `layer` and `edge`.

    Raises:
        ValueError: for an edge whose queries cannot see its keys, and what `sweep` raises.
        TypeError: what `sweep` raises.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> r = mj.knock_out(model, [[1, 2, 3]], {"last to first": (-1, 0), "to both": (-1, [0, 1])}, mj.metrics.logit(7))
    >>> dict(r.sizes)
    {'layer': 2, 'edge': 2, 'batch': 1}
    """
    tokens, n = model.inputs(tokens), model.n_layers
    if not edges:
        raise ValueError("there are no edges to cut")
    whole_number("window", window, least=1)
    layers = {str(layer): layer_window(layer, window, n) for layer in range(n)}
    grids = [
        grid(layer=layers, query={"": query}, key={"": key}, **({} if heads is None else {"head": {"": heads}}))
        for query, key in edges.values()
    ]
    places = Grid(side_by_side([g.where for g in grids]), {"layer": range(n), "edge": list(edges)})
    if isinstance(model, LayeredModel) and is_concrete(tokens.mask):
        _check_seen(model, tokens, edges)
    return sweep(model, tokens, {"attn_scores": Replace(-np.inf, places)}, metric, **running)


def _check_seen(model: LayeredModel, tokens: Inputs, edges: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise `ValueError` for an edge that no query has (one whose query and key are confused, say)."""
    site, mask = model.sites["attn_scores"], np.asarray(tokens.mask)
    for name, (query, key) in edges.items():
        where = Where(query=query, key=key)
        check_range(where, site, field_lengths(site, tokens))
        check_sees(model, site, mask, where, f"edge {name!r} (queries, keys)")
