"""The base run with every site moved by a gate towards another run, which goes through the layers beside it.

What stands in the source run is there when the layer needs it and forgotten after, so that nothing of the size of all layers'
activations is ever kept; with `checkpoint`, the backward pass computes it again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mijax._types import Array, Ids, Stream
from mijax.attribution.taps import KEPT, Gates, Held, Path, Together, Toward, gated_sites, known
from mijax.interventions.capturing import Capturing
from mijax.model.model import LayeredModel
from mijax.model.tap import Chain
from mijax.model.tokens import Tokens
from mijax.run import Out


class _Carry(NamedTuple):
    """What goes from layer to layer: the streams of the base run and of the others, and what is read of it, and of all."""

    base: Stream
    others: dict[str, Stream]
    seen: Any
    all_seen: Any


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

    A layer is run twice. First, all runs go through it as one batch, without a derivative: this gives their activations, and the
    values that the base run has at its products with parameters and at its gates. Then the base run goes through it alone, for its
    derivative; there these values take the place of what would be computed (`known`), so that the compiler leaves the products
    out. Two forward passes and one backward are what is computed; one pass with all runs in the batch would have the
    backward pass go through all of them, which takes a third more time.
    """
    ids = jnp.asarray(tokens.ids)
    others = {} if source is None else {"source": source}
    if path.inputs is not None:  # gates then add differences from the base run as it is
        others["base"] = ids
    runs, count = tuple(others), 1 + len(others)
    here = model.frame(tokens)
    tiled = lambda a: jnp.tile(jnp.asarray(a), (count, 1))
    every = model.frame(Tokens.tree_unflatten(None, (tiled(tokens.ids), tiled(tokens.mask))))
    layered, inside, around = _by_place(model, gates)
    sites, zero = gated_sites(model.sites, gates, path), jnp.zeros((1, 1, 1), model.dtype)
    watched = Chain(tuple(read))
    all_watched = Chain(tuple(tap.tiled(count) for tap in read if others))  # of all runs, in the order of `every`
    keep = Chain((Capturing(dict.fromkeys((*around, "embed")), model.n_layers), watched))

    def apart(part: Callable, base: Array, streams: dict[str, Array], kept: dict[str, Any], seen: Any):
        """The embedding or the final norm, of each run by itself; the base run last, by the others' activations."""
        ends = {run: part(x, here, keep, kept[run]) for run, x in streams.items()}
        held = Held({run: own.outer for run, (_, (own, _)) in ends.items()}, {}, {})
        toward = Toward({**around, **inside}, path, sites, held)
        base, (_, seen) = part(base, here, Chain((toward, watched)), ({}, seen))
        return base, {run: x for run, (x, _) in ends.items()}, {run: kept for run, (_, kept) in ends.items()}, seen

    def body(layer: Any, carry: _Carry, own: dict[str, Array]) -> Any:
        own = {**own, **inside}
        base, others, still = jax.lax.stop_gradient((carry.base, carry.others, own))
        together = Together(still, path, sites, runs)
        state = (together.init(model.sites, every, base), carry.all_seen)
        streams = jnp.concatenate([base, *(others[run] for run in runs)])
        after, (held, all_seen) = layer(streams, every, Chain((together, all_watched)), state)
        base, *rest = together.split(after)
        toward = Toward(own, path, sites, held, model.sites["attn_scores"].scale)
        alone, (_, seen) = layer(carry.base, here, Chain((toward, watched)), ({}, carry.seen))
        (seen, own_kept), (all_seen, all_kept) = watched.close(seen), all_watched.close(all_seen)
        return _Carry(known(alone, base), dict(zip(runs, rest)), seen, all_seen), (own_kept, all_kept)

    states = {run: keep.init(model.sites, here, zero) for run in runs}
    base, streams, kept, seen = apart(model.embed, ids, others, states, watched.init(model.sites, here, zero))
    carry = _Carry(base, streams, seen, all_watched.init(model.sites, every, zero))
    group = group_size(model.n_layers) if checkpoint == 2 else 1
    again = lambda function: _again(function, checkpoint)
    carry, (own_kept, all_kept) = model.walk(body, carry, layered, remat=again, group=group)
    base, streams, kept, seen = apart(model.final, carry.base, carry.others, kept, carry.seen)

    moved = Out(model.readout(base, tokens), {}, watched.result(seen, own_kept))
    if source is None:
        return moved, None
    of_source = lambda name, act: jnp.split(act, count, axis=model.sites[name].axes.index("batch"))[1]
    within = [
        {n: of_source(n, act) for n, act in acts.items()} for acts in all_watched.result(carry.all_seen, all_kept)
    ]
    acts = tuple({**own, **outside.outer} for own, outside in zip(within, kept["source"][1]))
    return moved, Out(model.readout(streams["source"], Tokens.tree_unflatten(None, (source, tokens.mask))), {}, acts)


def _by_place(model: LayeredModel, gates: Gates) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Gates of sites that every layer has, layers in front; of sites in some layer only; and of those around the layers."""
    layered, inside, around = {}, {}, {}
    for name, gate in gates.items():
        site = model.sites[name]
        if site.has_layer:
            layered[name] = jnp.broadcast_to(gate, (model.n_layers, *gate.shape[1:]))
        else:
            (inside if site.is_inside else around)[name] = gate
    return layered, inside, around


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
