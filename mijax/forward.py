"""The waist: one pure function from (model, tokens, interventions) to a readout and activations. All methods use it."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mijax._types import Array, ArrayLike, Bool, Float, Int, Logits, Stream
from mijax.display import as_html
from mijax.interventions.capturing import Capture, Captures, Capturing, as_captures
from mijax.interventions.checks import check, check_reached, check_selects, faulty
from mijax.interventions.editing import Editing
from mijax.interventions.edits import Edits, Interventions, as_edits
from mijax.interventions.functions import of_prompts
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.model.attention import KVCache
from mijax.model.model import LayeredModel, Model, Output
from mijax.model.position import Frame
from mijax.model.readout import Readout
from mijax.model.sites import site_of
from mijax.model.tap import Chain, Result, Tap
from mijax.model.tokens import Inputs
from mijax.programs.now import JitNow

T = TypeVar("T")


class Out(NamedTuple):
    """The output of a run.

    Attributes:
        readout: the final stream with the unembedding; `None` for a run with `readout=False`.
        acts: the captured activations by site.
        taps: the result of each of the run's taps.
    """

    readout: Readout
    acts: dict[str, Array]
    taps: tuple[Result, ...] = ()

    def _repr_html_(self) -> str:
        return as_html(self._asdict())  # treescope would ask the tuple itself for its page

    @property
    def logits(self) -> Logits:
        """`[batch, pos, vocab]`, NaN at padding, computed at each access; `readout.logits` computes a part of them.

        Raises:
            ValueError: for a run with `readout=False`.
        """
        if self.readout is None:
            raise ValueError("this run was made with readout=False: it has no logits")
        return self.readout.logits()


def run(
    model: Model,
    tokens: Inputs | ArrayLike,
    interventions: Interventions | None = None,
    *,
    capture: Capture = (),
    taps: Sequence[Tap] = (),
    readout: bool = True,
) -> Out:
    """Run `model` on `tokens` under `interventions`, keeping the activations named in `capture`.

    A pure function of data: use it under `jit`, `vmap`, `grad`, `scan`, `checkpoint`, `shard_map`. Inside a
    function to be vmapped, return the needed parts of the result, not all of it. Where an index that is known only
    inside a trace is out of range, the result is NaN.

    Args:
        model: the model.
        tokens: the prompts, `mijax.Tokens` or plain ids `[batch, pos]`.
        interventions: sites mapped to an edit, or to several edits that act in order.
        capture: names of sites; or sites mapped to a `Where` that says which entries to keep, axis by axis (`{"z":
            Where(layer=[3, 9], pos=-1)}` keeps the last position of two layers), or to `None` for all. The
            activation after the edits of its site is captured. No axis is dropped, so that the activations captured
            at one entry of an axis, or at all of them in order, broadcast to that place in another run.
        taps: `mijax.Tap`s of the user's; at each site they act after the edits and before the capture.
        readout: whether to compute the final stream. With `False`, only what `capture` needs is computed: no layer
            above the last one that it names (all layers, where there are taps), and no final norm.

    Returns:
        The readout, the captured activations by site, and the result of each tap.

    Raises:
        ValueError: for a site that does not exist, an axis that a site lacks, shapes that do not fit, an index out
            of range, a mask that selects nothing, a token outside the vocabulary, a prompt longer than the context,
            an edit in the part that `readout=False` leaves out, a tap that returns another shape than it takes.
        TypeError: for an element of `taps` that is no tap.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> clean, other = [[1, 2, 3]], [[1, 4, 3]]
    >>> source = mj.run(model, other, capture=("z",)).acts
    >>> out = mj.run(model, clean, {"z": mj.Replace(source["z"], mj.Where(layer=1, head=0))})
    >>> out.logits.shape
    (1, 3, 11)
    """
    model.check()
    prompts, edits, captures = model.inputs(tokens), as_edits(interventions), as_captures(capture)
    check(model, prompts, edits, captures)
    check_selects(model, prompts, edits)
    _check_taps(model, taps)
    if not (readout or taps) and isinstance(model, LayeredModel):
        check_reached(model, edits, captures)
    prompts, edits, captures = on_device((prompts, of_prompts(model, prompts, edits), captures))
    result, acts, tap_results = with_automatic_axes(
        _run, model, prompts, edits, captures, tuple(taps), readout,
        like=prompts.ids, out_axes=_out_axes(model, captures),
    )  # fmt: skip
    # Outside the compiled program, so that the readout refers to the model's parameters and not to copies of them.
    if readout and isinstance(model, LayeredModel):
        result = model.readout(result, prompts)  # pyright: ignore[reportArgumentType]
    return Out(result, acts, tap_results)


def _check_taps(model: Model, taps: Sequence[Any]) -> None:
    """Raise `TypeError` for an element that is no tap, `ValueError` for a tap at a site that the model lacks."""
    if isinstance(taps, Tap) or not isinstance(taps, Sequence):
        raise TypeError(f"taps must be a sequence of mijax.Tap, given {type(taps).__name__}")
    for tap in taps:
        if not isinstance(tap, Tap):
            raise TypeError(
                f"a tap is a mijax.Tap, a module with `sites` and `at(point, x, state)`, given {type(tap).__name__}"
            )
        for name in tap.sites:
            site_of(name, model.sites)


def on_device(tree: T) -> T:
    """Move the host arrays of a tree to the device.

    The transfer is explicit, so that `jax.transfer_guard` accepts it.

    Args:
        tree: any pytree.

    Returns:
        The tree with JAX arrays in place of its NumPy arrays.
    """
    return jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x, tree)


def _out_axes(model: Model, captures: Captures) -> Any:
    """The sharding of a run's results where the batch axis has explicit sharding."""
    axes_by_site = {name: model.sites[name].axes for name in captures}
    whole = lambda name: captures[name] is None or captures[name].batch is None  # pyright: ignore[reportOptionalMemberAccess]
    acts = lambda batch: {name: batch_spec(axes, batch if whole(name) else None) for name, axes in axes_by_site.items()}
    return lambda batch: (batch_spec(("batch",), batch), acts(batch), PartitionSpec())


@JitNow
def _run(
    model: Model, inputs: Inputs, edits: Edits, captures: Captures, taps: tuple[Tap, ...], readout: bool
) -> tuple[Output, dict[str, Array], tuple[Result, ...]]:
    tap, frame = Chain((Editing(edits), *taps, Capturing(captures, model.n_layers))), model.frame(inputs)
    bad = faulty(model, inputs, edits, captures)
    if not isinstance(model, LayeredModel):
        zero = zero_varying_like((model, inputs, tap), model.dtype)
        out, state = model.forward(inputs, frame, tap, tap.init(model.sites, frame, zero))
        _, *tap_results, acts = tap.result(*tap.close(state))  # the whole forward pass counts as one layer
        out, acts = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), (out, acts))
        return (out if readout else None), acts, tuple(tap_results)
    last = None if readout or taps else _last(model, captures)
    ids: Any = jnp.asarray(inputs.ids)
    x, (_, *tap_results, acts) = forward(model, ids, frame, tap, bad, last=last, readout=readout)
    return x, nan_where(bad, acts, model), tuple(tap_results)


def nan_where(bad: Bool[Array, ""], acts: dict[str, Array], model: Model) -> dict[str, Array]:
    """Make captured activations NaN where `bad`.

    A NaN in the embeddings spreads through the layers to most sites by itself. The others, before and after the
    layers or zero at padding whatever the queries are, are set here.

    Args:
        bad: whether the run is invalid.
        acts: activations by site, of a run whose embeddings are NaN where `bad`.
        model: what was run.

    Returns:
        The activations by site.
    """
    is_nan = lambda site: site.is_inside and not site.zero_at_padding
    return {name: act if is_nan(model.sites[name]) else jnp.where(bad, jnp.nan, act) for name, act in acts.items()}


def _last(model: LayeredModel, captures: Captures) -> Any:
    """One more than the last captured layer; `None` where that is the model's last layer, or may be."""
    ends = [jnp.int32(0)]
    for name, where in captures.items():
        site = model.sites[name]
        if site.part == "embedding":
            continue
        of_where = None if where is None else where.layers(model.n_layers)
        layers = of_where if site.has_layer else site.layers
        if layers is None or not site.is_inside:
            return None
        ends.append(jnp.max(jnp.asarray(layers, jnp.int32)) + 1)
    return jnp.max(jnp.stack(ends))


def forward(
    model: LayeredModel,
    ids: Int[Array, "batch pos"],
    frame: Frame,
    tap: Tap,
    bad: Bool[Array, ""],
    *,
    held: KVCache | None = None,
    last: Int[Array, ""] | None = None,
    readout: bool = True,
) -> tuple[Stream | None, Result]:
    """Run the embedding, the layers and the final norm on some tokens, under a tap.

    Args:
        model: what is run.
        ids: the ids of the tokens to compute.
        frame: their positions.
        tap: what is called at the sites.
        bad: whether the run is invalid; its stream is then NaN.
        held: the keys and values of the batch's other tokens in all layers, where `ids` are only a part of the
            tokens.
        last: the number of layers to run; `None` for all.
        readout: whether to return the final stream. Without it the final norm is run only where the tap is called
            there.

    Returns:
        The final stream `[batch, pos, d_model]` (`None` without `readout`), and the tap's result.
    """
    zero = zero_varying_like((model, ids, tap, held), model.dtype)
    state = tap.init(model.sites, frame, zero)
    x, state = model.embed(ids, frame, tap, state)
    x = jnp.where(bad, jnp.nan, x) + zero
    layered, rest = tap.per_layer(model.sites)

    def body(layer: Any, carry: Any, xs: Any) -> Any:
        (x, state), (tap_arrays, cache) = carry, xs
        x, new_state = layer(x, frame, eqx.combine(tap_arrays, rest), state, cache)
        new_state, stored = tap.close(new_state)
        _check_state(tap, state, new_state)
        return (x, new_state), stored

    (x, state), stacked = model.walk(body, (x, state), (layered, held), last=last)
    final = readout or any(site.part == "final" for name, site in model.sites.items() if name in tap.sites)
    if final:
        x, state = model.final(x, frame, tap, state)
    return (jnp.where(bad, jnp.nan, x) if readout else None), tap.result(state, stacked)


def _check_state(tap: Tap, before: Any, after: Any) -> None:
    """Raise `ValueError` for a tap whose state has another structure after a layer than before."""
    for part, *states in zip(tap.taps, before, after) if isinstance(tap, Chain) else [(tap, before, after)]:
        structures = [
            (jax.tree.structure(state), [(a.shape, a.dtype) for a in jax.tree.leaves(state)]) for state in states
        ]
        if structures[0] != structures[1]:
            shapes = [jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", state) for state in states]
            raise ValueError(
                f"the state of {type(part).__name__} must have one structure whenever a layer begins: it was {shapes[0]}, and is"
                f" {shapes[1]} after the layer"
            )


def zero_varying_like(tree: Any, dtype: Any) -> Float[Array, "1 1 1"]:
    """Zero, marked inside `shard_map` as varying over the mesh axes over which the tree's arrays vary.

    The carry of the scan over layers must have one type: the stream before the first layer must vary over the axes
    over which it varies after the first edit.

    Args:
        tree: any pytree.
        dtype: the dtype of the zero.

    Returns:
        The zero.
    """
    zeros = [jax.lax.full_like(a, 0, dtype, (1, 1, 1)) for a in jax.tree.leaves(tree) if eqx.is_array(a)]
    return sum(zeros, jnp.zeros((1, 1, 1), dtype))
