"""The base run with every site moved by a gate towards the source run, which goes through the layers beside it.

The source run's activations of a layer are computed when the layer needs them and dropped after it, so that no
array of the size of all layers' activations is kept; with `checkpoint`, the backward pass computes them again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mijax._types import Array, Ids, Stream
from mijax.attribution.taps import KEPT, Gates, Held, Path, Together, Toward, gated_sites, known
from mijax.forward import Out
from mijax.interventions.capturing import Capturing
from mijax.model.model import LayeredModel
from mijax.model.tap import Chain
from mijax.model.tokens import Tokens


class _Carry(NamedTuple):
    """The carry of the walk: streams of the base run and of the other runs, states of the taps that read the base run
    (`seen`) and all runs (`all_seen`)."""

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
    """Run the base, each activation `x` replaced by `x + gate * (source's - x)`, and the source beside it.

    A layer is run twice. First, all runs go through it as one batch, without a derivative: this gives their
    activations, and the values of the base run at its products with parameters and at its gates. Then the base run
    goes through it alone, for its derivative. There these values replace the computed ones (`known`), so that the
    compiler removes the products. In total, two forward passes and one backward are computed. With a single pass of
    all runs in one batch, the backward pass would go through all of them, which takes a third more time.

    Args:
        model: the model.
        tokens: the base prompts.
        source: the ids of the source prompts, padded as `tokens` are; `None` puts zeros in place of the source's
            activations.
        gates: the gates by site.
        path: how else the base run is changed.
        checkpoint: what the backward pass computes again: everything between the matrix products (0), each layer
            (1), or groups of layers and then each layer (2), which keeps the streams of about twice the root of the
            number of layers.
        read: the activations to capture of both runs.

    Returns:
        The output of the base run, and that of the source run (`None` without one), with the captured activations
        in `taps`.
    """
    ids = jnp.asarray(tokens.ids)
    others = {} if source is None else {"source": source}
    if path.inputs is not None:  # gates then add differences from the base run with its embeddings unmoved
        others["base"] = ids
    runs, n_runs = tuple(others), 1 + len(others)
    frame = model.frame(tokens)
    tiled = lambda a: jnp.tile(jnp.asarray(a), (n_runs, 1))
    all_frame = model.frame(Tokens.tree_unflatten(None, (tiled(tokens.ids), tiled(tokens.mask))))
    layered, inside, around = _by_place(model, gates)
    sites, zero = gated_sites(model.sites, gates, path), jnp.zeros((1, 1, 1), model.dtype)
    watched = Chain(tuple(read))
    all_watched = Chain(tuple(tap.tiled(n_runs) for tap in read if others))  # of all runs, in the order of `all_frame`
    keep = Chain((Capturing(dict.fromkeys((*around, "embed")), model.n_layers), watched))

    def apart(part: Callable, base: Array, streams: dict[str, Array], states: dict[str, Any], seen: Any):
        """The embedding or the final norm of each run by itself; of the base run last, since it reads the others."""
        ends = {run: part(x, frame, keep, states[run]) for run, x in streams.items()}
        held = Held({run: captured.outer for run, (_, (captured, _)) in ends.items()}, {}, {})
        toward = Toward({**around, **inside}, path, sites, held)
        base, (_, seen) = part(base, frame, Chain((toward, watched)), ({}, seen))
        return base, {run: x for run, (x, _) in ends.items()}, {run: state for run, (_, state) in ends.items()}, seen

    def body(layer: Any, carry: _Carry, layer_gates: dict[str, Array]) -> Any:
        layer_gates = {**layer_gates, **inside}
        base, others, constant_gates = jax.lax.stop_gradient((carry.base, carry.others, layer_gates))
        together = Together(constant_gates, path, sites, runs)
        state = (together.init(model.sites, all_frame, base), carry.all_seen)
        streams = jnp.concatenate([base, *(others[run] for run in runs)])
        new_streams, (held, all_seen) = layer(streams, all_frame, Chain((together, all_watched)), state)
        base, *new_others = together.split(new_streams)
        toward = Toward(layer_gates, path, sites, held, model.sites["attn_scores"].scale)
        computed, (_, seen) = layer(carry.base, frame, Chain((toward, watched)), ({}, carry.seen))
        (seen, stacked), (all_seen, all_stacked) = watched.close(seen), all_watched.close(all_seen)
        return _Carry(known(computed, base), dict(zip(runs, new_others)), seen, all_seen), (stacked, all_stacked)

    states = {run: keep.init(model.sites, frame, zero) for run in runs}
    base, streams, states, seen = apart(model.embed, ids, others, states, watched.init(model.sites, frame, zero))
    carry = _Carry(base, streams, seen, all_watched.init(model.sites, all_frame, zero))
    group = group_size(model.n_layers) if checkpoint == 2 else 1
    remat = lambda function: _again(function, checkpoint)
    carry, (stacked, all_stacked) = model.walk(body, carry, layered, remat=remat, group=group)
    base, streams, states, seen = apart(model.final, carry.base, carry.others, states, carry.seen)

    base_out = Out(model.readout(base, tokens), {}, watched.result(seen, stacked))
    if source is None:
        return base_out, None
    of_source = lambda name, act: jnp.split(act, n_runs, axis=model.sites[name].axes.index("batch"))[1]
    within = [
        {n: of_source(n, act) for n, act in acts.items()} for acts in all_watched.result(carry.all_seen, all_stacked)
    ]
    acts = tuple({**inner, **captured.outer} for inner, captured in zip(within, states["source"][1]))
    return base_out, Out(model.readout(streams["source"], Tokens.tree_unflatten(None, (source, tokens.mask))), {}, acts)


def _by_place(model: LayeredModel, gates: Gates) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The gates of sites with a layer axis, of sites that only some layers have, and of sites around the layers."""
    layered, inside, around = {}, {}, {}
    for name, gate in gates.items():
        site = model.sites[name]
        if site.has_layer:
            layered[name] = jnp.broadcast_to(gate, (model.n_layers, *gate.shape[1:]))
        else:
            (inside if site.is_inside else around)[name] = gate
    return layered, inside, around


def _again(function: Callable, checkpoint: int) -> Callable:
    """Let the backward pass compute the function again: all of it, or (`checkpoint` 0) all but values named `KEPT`.

    Without any `jax.checkpoint`, the parameters of each layer would be kept a second time.
    """
    policy = None if checkpoint else jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def group_size(n_layers: int) -> int:
    """The number of layers in a checkpointed group: the root of the number of layers, rounded up.

    Args:
        n_layers: the number of layers of the model.

    Returns:
        The size of a group, at least 1.

    >>> group_size(12), group_size(29), group_size(1)
    (4, 6, 1)
    """
    return max(1, math.isqrt(max(0, n_layers - 1)) + 1)
