"""The base run with every site moved by a gate towards another run, which goes through the layers beside it.

State around the one block of the model. What stands in the source run is there when the layer needs it and forgotten after,
so that nothing of the size of all layers' activations is ever kept; with `checkpoint`, the backward pass computes it anew.
Both runs go through a layer as one batch, which reads its parameters once; of the base run a second pass takes the derivative.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mijax._types import Array, Ids, Int, Stream
from mijax.attribution.taps import KEPT, Gates, Path, Together, Toward, known, nothing
from mijax.interventions.tap import Tap
from mijax.model.block import block
from mijax.model.numerics import accumulator
from mijax.model.position import frame
from mijax.model.readout import Readout
from mijax.model.sites import SITES
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer, embed, final_norm


def gated(
    model: Transformer,
    tokens: Tokens,
    source: Ids | None,
    gates: Gates,
    path: Path,
    checkpoint: int,
) -> tuple[Readout, Readout | None]:
    """The base run on `tokens`, each site `x` in it now `x + gate * (source's - x)`; and the source run.

    `source` are ids padded as `tokens` are; `None` puts zeros in place of the source's activations. The backward pass
    computes again what is between the matrix products (`checkpoint` 0), each layer (1), or groups of layers and
    then each layer (2), which keeps the streams of about twice the root of the number of layers.
    """
    config = model.config
    n, dtype = config.n_layers, accumulator(model.W_E.dtype)
    here = frame(config, tokens, dtype)
    in_full = {s: jnp.broadcast_to(g, (n, *g.shape[1:])) for s, g in gates.items() if SITES[s].has_layer}
    outer = {site: gate for site, gate in gates.items() if not SITES[site].has_layer}
    # What goes through the layers: the run that is differentiated, and those that it is compared with.
    others = {} if source is None else {"source": source}
    if path.inputs is not None:
        others["base"] = jnp.asarray(tokens.ids)
    around = nothing(others)
    beside = {}
    for run, ids in others.items():
        tap = Tap(config, here, {}, dict.fromkeys((*outer, "embed")))
        beside[run] = embed(model, ids, here, tap)
        around.others[run].update(tap.acts)
    x = embed(model, jnp.asarray(tokens.ids), here, Toward(config, here, outer, path, around))
    tiled = lambda a: jnp.tile(jnp.asarray(a), (1 + len(others), 1))
    every = frame(config, Tokens.tree_unflatten(None, (tiled(tokens.ids), tiled(tokens.mask))), dtype)

    def layer(carry: tuple[Stream, dict[str, Stream]], scanned: tuple[Int[Array, ""], dict[str, Array]]):
        (x, beside), (index, own) = carry, scanned
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), model.blocks)
        first, rest, still = jax.lax.stop_gradient((x, beside, own))
        together = Together(config, every, still, path, nothing(others))
        streams = jnp.concatenate([first, *(rest[run] for run in others)])
        after = together.split(block(config, params, streams, every, together))
        toward = Toward(config, here, own, path, together.held, index)
        return (known(block(config, params, x, here, toward), after[0]), dict(zip(others, after[1:]))), None

    x, beside = _scan(layer, (x, beside), (jnp.arange(n, dtype=jnp.int32), in_full), checkpoint)
    ends = {}
    for run, stream in beside.items():
        tap = Tap(config, here, {}, dict.fromkeys(outer))
        ends[run] = final_norm(model, stream, tap)
        around.others[run].update(tap.acts)
    x = final_norm(model, x, Toward(config, here, outer, path, around))
    readout = lambda final, tokens: Readout(final, tokens, model.unembedding, model.b_U)
    if source is None:
        return readout(x, tokens), None
    return readout(x, tokens), readout(ends["source"], Tokens.tree_unflatten(None, (source, tokens.mask)))


def _scan(layer: Callable, carry: Any, scanned: Any, checkpoint: int) -> Any:
    """Scan over the layers; or over groups of them, over each group's layers inside, and over those that are left."""
    n, again = len(scanned[0]), _again(layer, checkpoint)
    each = lambda carry, own: jax.lax.scan(again, carry, own)
    if checkpoint < 2:
        return each(carry, scanned)[0]
    size = group_size(n)
    grouped = jax.tree.map(lambda a: a[: n // size * size].reshape(n // size, size, *a.shape[1:]), scanned)
    carry, _ = jax.lax.scan(_again(each, checkpoint), carry, grouped)
    return _again(each, checkpoint)(carry, jax.tree.map(lambda a: a[n // size * size :], scanned))[0]


def _again(function: Callable, checkpoint: int) -> Callable:
    """What of it the backward pass computes again: all, or all but matrix products. (Not even that: each layer's
    parameters would be kept a second time.)"""
    policy = None if checkpoint else jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def group_size(n_layers: int) -> int:
    """The root of the number of layers, rounded up.

    >>> group_size(12), group_size(29), group_size(1)
    (4, 6, 1)
    """
    return max(1, math.isqrt(max(0, n_layers - 1)) + 1)
