"""The base run with every site moved by a gate towards another run, which goes through the layers beside it.

State around the one block of the model. What stands in the source run is there when the layer needs it and forgotten after,
so that nothing of the size of all layers' activations is ever kept; with `checkpoint`, the backward pass computes it anew.
Both runs go through a layer as one batch, which reads its parameters once; of the base run a second pass takes the derivative.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mijax._types import Array, Ids
from mijax.attribution.taps import KEPT, Gates, Held, Path, Together, Toward, gated_sites, known
from mijax.interventions.capturing import Capturing
from mijax.model.model import LayeredModel
from mijax.model.tap import Chain
from mijax.model.tokens import Tokens
from mijax.run import Out


def gated(
    model: LayeredModel,
    tokens: Tokens,
    source: Ids | None,
    gates: Gates,
    path: Path,
    checkpoint: int,
    read: Sequence[Capturing] = (),
) -> tuple[Out, Out | None]:
    """The base run on `tokens`, each site `x` in it now `x + gate * (source's - x)`; and the source run, with what is `read` of
    each as their `taps`.

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
    inner = {name: gate for name, gate in outer.items() if model.sites[name].is_inside}  # in some layer only
    layered = {
        name: jnp.broadcast_to(gate, (model.n_layers, *gate.shape[1:]))
        for name, gate in gates.items()
        if has_layer(name)
    }
    zero, watched = jnp.zeros((1, 1, 1), model.dtype), Chain(tuple(read))
    keep = Chain((Capturing(dict.fromkeys((*(outer.keys() - inner), "embed")), model.n_layers), watched))
    beside, kept = {}, {}
    for run, ids in others.items():
        beside[run], kept[run] = model.embed(ids, here, keep, keep.init(model.sites, here, zero))
    held = Held({run: own.outer for run, (own, _) in kept.items()}, {}, {})
    around = Chain((Toward(outer, path, sites, held), watched))
    x, (_, seen) = model.embed(jnp.asarray(tokens.ids), here, around, ({}, watched.init(model.sites, here, zero)))
    count = 1 + len(others)
    tiled = lambda a: jnp.tile(jnp.asarray(a), (count, 1))
    every = model.frame(Tokens.tree_unflatten(None, (tiled(tokens.ids), tiled(tokens.mask))))
    all_watched = Chain(tuple(tap.tiled(count) for tap in read if others))  # of all runs, in the order of `every`

    def body(layer: Any, carry: Any, own: dict[str, Array]) -> Any:
        x, beside, seen, all_seen = carry
        own = {**own, **inner}
        first, rest, still = jax.lax.stop_gradient((x, beside, own))
        together = Together(still, path, sites, runs)
        streams = jnp.concatenate([first, *(rest[run] for run in others)])
        state = (together.init(model.sites, every, x), all_seen)
        after, (held, all_seen) = layer(streams, every, Chain((together, all_watched)), state)
        base, *rest = together.split(after)
        toward = Chain((Toward(own, path, sites, held, model.sites["attn_scores"].scale), watched))
        x, (_, seen) = layer(x, here, toward, ({}, seen))
        (seen, own_kept), (all_seen, all_kept) = watched.close(seen), all_watched.close(all_seen)
        return (known(x, base), dict(zip(others, rest)), seen, all_seen), (own_kept, all_kept)

    group = group_size(model.n_layers) if checkpoint == 2 else 1
    again = lambda function: _again(function, checkpoint)
    carry = (x, beside, seen, all_watched.init(model.sites, every, zero))
    carry, (own_kept, all_kept) = model.walk(body, carry, layered, remat=again, group=group)
    x, beside, seen, all_seen = carry
    ends = {}
    for run, stream in beside.items():
        ends[run], kept[run] = model.final(stream, here, keep, kept[run])
    held = Held({run: own.outer for run, (own, _) in kept.items()}, {}, {})
    around = Chain((Toward(outer, path, sites, held), watched))
    x, (_, seen) = model.final(x, here, around, ({}, seen))
    moved = Out(model.readout(x, tokens), {}, watched.result(seen, own_kept))
    if source is None:
        return moved, None
    part = lambda name, act: jnp.split(act, count, axis=model.sites[name].axes.index("batch"))[1]
    within = [{name: part(name, act) for name, act in acts.items()} for acts in all_watched.result(all_seen, all_kept)]
    acts = tuple({**own, **outside.outer} for own, outside in zip(within, kept["source"][1]))
    return moved, Out(model.readout(ends["source"], Tokens.tree_unflatten(None, (source, tokens.mask))), {}, acts)


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
