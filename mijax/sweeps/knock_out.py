"""Attention knockout: cut edges from query to key at the scores, so that the rest of the row is renormalised."""

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from mijax._types import ArrayLike
from mijax.interventions.edits import Replace
from mijax.interventions.where import Where
from mijax.model.tokens import Tokens, as_tokens
from mijax.model.transformer import Transformer
from mijax.sweeps.grid import Grid, grid
from mijax.sweeps.measure import Metrics
from mijax.sweeps.places import layer_window
from mijax.sweeps.sweep import Running, sweep


def knock_out(
    model: Transformer,
    tokens: Tokens | ArrayLike,
    edges: Mapping[str, tuple[Any, Any]],
    metric: Metrics,
    *,
    window: int = 1,
    heads: Any = None,
    **running: Unpack[Running],
) -> Any:
    """Cut attention from queries to keys, in windows of `window` layers around each layer in turn (Geva et al. 2023).

    `edges` name pairs (query positions, key positions), each what `Where` takes there: every query of an edge is cut off
    from every key of it. `heads` are the heads in which that is done, by default all. The scores become -inf, so that the
    softmax shares the weight among the keys that are left (zeroing the pattern would not); a query that has none left
    gathers zero. Gives what `sweep` gives, over `layer` and `edge`.

    Raises what `sweep` raises.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> r = mj.knock_out(model, [[1, 2, 3]], {"last to first": (-1, 0), "to both": (-1, [0, 1])}, mj.metrics.logit(7))
    >>> dict(r.sizes)
    {'layer': 2, 'edge': 2, 'batch': 1}
    """
    tokens, n = as_tokens(tokens), model.n_layers
    layers = {str(layer): layer_window(layer, window, n) for layer in range(n)}
    grids = [
        grid(layer=layers, query={"": query}, key={"": key}, **({} if heads is None else {"head": {"": heads}}))
        for query, key in edges.values()
    ]
    places = Grid(_side_by_side([one.where for one in grids]), {"layer": range(n), "edge": list(edges)})
    return sweep(model, tokens, {"attn_scores": Replace(-np.inf, places)}, metric, **running)


def _side_by_side(wheres: list[Where]) -> Where:
    """Stacked places of several grids as one, the grids' cells in turn; a shorter list repeats its last index."""
    fields = {}
    for field in wheres[0].given:
        own = [np.asarray(where.given[field]) for where in wheres]
        rank, batch = max(i.ndim for i in own), max((i.shape[1] for i in own if i.ndim == 3), default=1)
        if rank == 3:
            own = [np.broadcast_to(_lists(i), (len(i), batch, _lists(i).shape[2])) for i in own]
        elif rank == 2:
            own = [i.reshape(len(i), -1) for i in own]
        fields[field] = own
    width = max(i.shape[-1] for own in fields.values() for i in own if i.ndim > 1) if fields else 1
    widen = lambda i: i if i.ndim == 1 else np.concatenate([i, np.repeat(i[..., -1:], width - i.shape[-1], -1)], -1)
    stacked = {field: np.stack([widen(i) for i in own], axis=1) for field, own in fields.items()}
    return Where(**{field: i.reshape(-1, *i.shape[2:]) for field, i in stacked.items()})


def _lists(index: np.ndarray) -> np.ndarray:
    """`[cell, batch or 1, k]`."""
    return index if index.ndim == 3 else index.reshape(len(index), 1, -1)
