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
    layered, inside, around = _by_place(model, gates)
    layers = _Layers(model, tokens, path, gated_sites(model.sites, gates, path), inside, tuple(others), tuple(read))
    ends = _Ends(layers, {**around, **inside}, Capturing(dict.fromkeys((*around, "embed")), model.n_layers))

    zero = jnp.zeros((1, 1, 1), model.dtype)
    seen, all_seen, states = (
        layers.watched.init(model.sites, layers.frame, zero),
        layers.all_init(zero),
        ends.init(zero),
    )
    base, streams, states, seen = ends.run(model.embed, ids, others, states, seen)
    group = group_size(model.n_layers) if checkpoint == 2 else 1
    remat = lambda function: _again(function, checkpoint)
    carry = _Carry(base, streams, seen, all_seen)
    carry, (stacked, all_stacked) = model.walk(layers.run, carry, layered, remat=remat, group=group)
    base, streams, states, seen = ends.run(model.final, carry.base, carry.others, states, carry.seen)

    base_out = Out(model.readout(base, tokens), {}, layers.watched.result(seen, stacked))
    if source is None:
        return base_out, None
    within = layers.of_source(layers.all_watched.result(carry.all_seen, all_stacked))
    acts = tuple({**inner, **captured.outer} for inner, captured in zip(within, states["source"][1]))
    return base_out, Out(model.readout(streams["source"], Tokens.tree_unflatten(None, (source, tokens.mask))), {}, acts)


class _Layers:
    """What is done with each layer: all runs go through it together, then the base run alone.

    Args:
        model: the model.
        tokens: the base prompts.
        path: how else the base run is changed.
        sites: the sites at which the taps of attribution are called.
        gates: the gates at sites that only some layers have.
        others: the names of the other runs.
        read: the activations to capture of both runs.
    """

    def __init__(
        self,
        model: LayeredModel,
        tokens: Tokens,
        path: Path,
        sites: frozenset[str],
        gates: dict[str, Array],
        others: tuple[str, ...],
        read: tuple[Capturing, ...],
    ):
        self.model, self.path, self.sites, self.gates, self.others = model, path, sites, gates, others
        self.n_runs = 1 + len(others)
        tiled = lambda a: jnp.tile(jnp.asarray(a), (self.n_runs, 1))
        self.frame = model.frame(tokens)
        self.all_frame = model.frame(Tokens.tree_unflatten(None, (tiled(tokens.ids), tiled(tokens.mask))))
        self.watched = Chain(read)
        self.all_watched = Chain(tuple(tap.tiled(self.n_runs) for tap in read if others))

    def run(self, layer: Any, carry: _Carry, layer_gates: dict[str, Array]) -> tuple[_Carry, Any]:
        """The body of the walk."""
        gates = {**layer_gates, **self.gates}
        streams, held, all_seen = self._together(layer, carry, gates)
        toward = Toward(gates, self.path, self.sites, held, self.model.sites["attn_scores"].scale)
        computed, (_, seen) = layer(carry.base, self.frame, Chain((toward, self.watched)), ({}, carry.seen))
        (seen, stacked), (all_seen, all_stacked) = self.watched.close(seen), self.all_watched.close(all_seen)
        base, *others = streams
        return _Carry(known(computed, base), dict(zip(self.others, others)), seen, all_seen), (stacked, all_stacked)

    def _together(self, layer: Any, carry: _Carry, gates: dict[str, Array]) -> tuple[list[Array], Held, Any]:
        """All runs through a layer, without a derivative: their streams, the values to hold, the captures' state."""
        base, others, gates = jax.lax.stop_gradient((carry.base, carry.others, gates))
        together = Together(gates, self.path, self.sites, self.others)
        state = (together.init(self.model.sites, self.all_frame, base), carry.all_seen)
        streams = jnp.concatenate([base, *(others[run] for run in self.others)])
        streams, (held, all_seen) = layer(streams, self.all_frame, Chain((together, self.all_watched)), state)
        return together.split(streams), held, all_seen

    def all_init(self, zero: Array) -> Any:
        """The state of the captures of all runs before the first layer."""
        return self.all_watched.init(self.model.sites, self.all_frame, zero)

    def of_source(self, captured: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
        """Of activations captured of all runs, those of the source run."""
        batch = lambda name: self.model.sites[name].axes.index("batch")
        source = lambda name, act: jnp.split(act, self.n_runs, axis=batch(name))[1]
        return [{name: source(name, act) for name, act in acts.items()} for acts in captured]


class _Ends(NamedTuple):
    """What is done with the embedding and the final norm: each run goes through them by itself.

    Attributes:
        layers: what is done with each layer.
        gates: the gates at sites around the layers, and at those that only some layers have.
        around: the tap that keeps what gates and captures need of the other runs.
    """

    layers: _Layers
    gates: dict[str, Array]
    around: Capturing

    def init(self, zero: Array) -> dict[str, Any]:
        """The states of the captures, by run."""
        return {run: self._keep.init(self.layers.model.sites, self.layers.frame, zero) for run in self.layers.others}

    def run(self, part: Callable, base: Array, streams: dict[str, Array], states: dict[str, Any], seen: Any) -> Any:
        """Run the base run last, since it reads the others: its result, the others', their states, its state."""
        layers = self.layers
        ends = {run: part(x, layers.frame, self._keep, states[run]) for run, x in streams.items()}
        held = Held({run: captured.outer for run, (_, (captured, _)) in ends.items()}, {}, {})
        toward = Toward(self.gates, layers.path, layers.sites, held)
        base, (_, seen) = part(base, layers.frame, Chain((toward, layers.watched)), ({}, seen))
        return base, {run: x for run, (x, _) in ends.items()}, {run: state for run, (_, state) in ends.items()}, seen

    @property
    def _keep(self) -> Chain:
        return Chain((self.around, self.layers.watched))


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
