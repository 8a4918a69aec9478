"""The base run with every site moved by a gate towards the source run, which goes through the layers beside it.

The source run's activations of a layer are computed when the layer needs them and dropped after it, so that no
array of the size of all layers' activations is kept; with `checkpoint`, the backward pass computes them again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Ids
from mijax.attribution.taps import KEPT, Gates, Path, Toward, called_sites
from mijax.forward import Out
from mijax.interventions.capturing import Capturing
from mijax.model.model import LayeredModel
from mijax.model.position import Frame
from mijax.model.tap import Chain, State
from mijax.model.tokens import Tokens


class Run(NamedTuple):
    """A run on its way through the model.

    Attributes:
        x: its residual stream, or the ids before the embedding.
        seen: the state of the taps that read it.
    """

    x: Array
    seen: State


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
    ids, read_by = jnp.asarray(tokens.ids), Chain(tuple(read))
    layered, inside, around = _by_place(model, gates)
    beside = _Beside(model, model.frame(tokens), path, read_by, gates)

    def body(layer: Any, runs: dict[str, Run], layer_gates: dict[str, Array]) -> tuple[dict[str, Run], Any]:
        runs = beside(layer, runs, {**layer_gates, **inside})
        closed = {name: read_by.close(run.seen) for name, run in runs.items()}
        after = {name: run._replace(seen=closed[name][0]) for name, run in runs.items()}
        return after, {name: kept for name, (_, kept) in closed.items()}

    first = {"gated": ids} | ({} if source is None else {"source": source})
    if path.inputs is not None:  # gates then add differences from the base run with its embeddings unmoved
        first["base"] = ids
    runs = {name: Run(x, beside.init(read_by)) for name, x in first.items()}
    runs = beside(model.embed, runs, {**around, **inside})
    group = group_size(model.n_layers) if checkpoint == 2 else 1
    runs, kept = model.walk(body, runs, layered, remat=lambda function: _again(function, checkpoint), group=group)
    runs = beside(model.final, runs, {**around, **inside})

    def out(name: str, ids: Array) -> Out:
        readout = model.readout(runs[name].x, Tokens.tree_unflatten(None, (ids, tokens.mask)))
        return Out(readout, {}, read_by.result(runs[name].seen, kept[name]))

    return out("gated", ids), None if source is None else out("source", source)


class _Beside(eqx.Module):
    """Takes all runs through one part of the model: the embedding, a layer or the final norm.

    Args:
        model: the model.
        frame: the positions of the prompts.
        path: how else the gated run is changed.
        read: the taps that read all runs.
        gates: all gates, of whose sites the other runs' activations are needed.
    """

    model: LayeredModel
    frame: Frame
    path: Path
    read: Chain
    gates: Gates

    def init(self, tap: Any) -> State:
        """The state of a tap before the run."""
        return tap.init(self.model.sites, self.frame, jnp.zeros((1, 1, 1), self.model.dtype))

    def __call__(self, part: Callable, runs: Mapping[str, Run], gates: Gates) -> dict[str, Run]:
        """All runs after the part, in which the gated run reads the others' activations; `gates` are those within it."""
        sites, after, others = self.model.sites, {}, {}
        of_others, touched = called_sites(sites, self.gates, self.path)
        needed = Capturing(dict.fromkeys(of_others), self.model.n_layers)
        for name in [name for name in runs if name != "gated"]:
            state = (self.init(needed), runs[name].seen)
            x, (kept, seen) = part(runs[name].x, self.frame, Chain((needed, self.read)), state)
            after[name], others[name] = Run(x, seen), {**kept.layer, **kept.outer}
        toward = Toward(gates, self.path, others, touched, sites["attn_scores"].rule)
        x, (_, seen) = part(runs["gated"].x, self.frame, Chain((toward, self.read)), ({}, runs["gated"].seen))
        return {**after, "gated": Run(x, seen)}


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
