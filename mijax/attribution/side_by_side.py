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

from mijax._types import Array, Ids, Stream
from mijax.attribution.taps import KEPT, Gates, Held, Path, Together, Toward, gated_sites, known
from mijax.interventions.capturing import Capturing, Kept
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer
from mijax.model.walk import Layer


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
    here = model.frame(tokens)
    # What goes through the layers: the run that is differentiated, and those that it is compared with.
    others = {} if source is None else {"source": source}
    if path.inputs is not None:
        others["base"] = jnp.asarray(tokens.ids)
    sites, runs = gated_sites(model.sites, gates, path), tuple(others)
    has_layer = lambda name: model.sites[name].has_layer
    outer = {name: gate for name, gate in gates.items() if not has_layer(name)}
    layered = {
        name: jnp.broadcast_to(gate, (model.n_layers, *gate.shape[1:]))
        for name, gate in gates.items()
        if has_layer(name)
    }
    keep = Capturing(dict.fromkeys((*outer, "embed")), model.n_layers)
    beside, kept = {}, {}
    for run, ids in others.items():
        beside[run], kept[run] = model.embed(ids, here, keep, Kept({}, {}, {}))
    around = lambda: Toward(outer, path, sites, Held({run: own.outer for run, own in kept.items()}, {}, {}))
    x, _ = model.embed(jnp.asarray(tokens.ids), here, around(), {})
    tiled = lambda a: jnp.tile(jnp.asarray(a), (1 + len(others), 1))
    every = model.frame(Tokens.tree_unflatten(None, (tiled(tokens.ids), tiled(tokens.mask))))

    def body(layer: Layer, carry: tuple[Stream, dict[str, Stream]], own: dict[str, Array]) -> Any:
        x, beside = carry
        first, rest, still = jax.lax.stop_gradient((x, beside, own))
        together = Together(still, path, sites, runs)
        streams = jnp.concatenate([first, *(rest[run] for run in others)])
        after, held = layer(streams, every, together, together.init({}, every, x))
        base, *rest = together.split(after)
        x, _ = layer(x, here, Toward(own, path, sites, held, model.config.attn_scale), {})
        return (known(x, base), dict(zip(others, rest))), None

    group = group_size(model.n_layers) if checkpoint == 2 else 1
    again = lambda function: _again(function, checkpoint)
    (x, beside), _ = model.walk(body, (x, beside), layered, remat=again, group=group)
    ends = {}
    for run, stream in beside.items():
        ends[run], kept[run] = model.final(stream, here, keep, kept[run])
    x, _ = model.final(x, here, around(), {})
    if source is None:
        return model.readout(x, tokens), None
    return model.readout(x, tokens), model.readout(ends["source"], Tokens.tree_unflatten(None, (source, tokens.mask)))


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
