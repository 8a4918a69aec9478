"""The waist: one pure function from (model, tokens, interventions) to a readout and activations."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mijax._types import Array, ArrayLike, Bool, Float, Int, Logits, Stream
from mijax.interventions.capturing import Capturing
from mijax.interventions.editing import Editing
from mijax.interventions.edits import Edit, Interventions, as_edits, canonical, check_shapes
from mijax.interventions.functions import convert_edits
from mijax.interventions.where import Where, any_out_of_range, check_range, check_structure
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.model.attention import KVCache
from mijax.model.model import LayeredModel, Model
from mijax.model.position import Frame
from mijax.model.readout import Readout
from mijax.model.sites import Site, field_of, site_of
from mijax.model.tap import Chain, Tap
from mijax.model.tokens import Inputs, is_concrete
from mijax.programs.now import JitNow

Capture: TypeAlias = Iterable[str] | Mapping[str, Where | None]
Edits: TypeAlias = dict[str, tuple[Edit, ...]]
Captures: TypeAlias = dict[str, Where | None]


class Out(NamedTuple):
    """What a run gives: the readout, the captured activations by site, and what each of the run's taps kept.

    `readout` is `None` of a run without it.
    """

    readout: Readout
    acts: dict[str, Array]
    taps: tuple[Any, ...] = ()

    @property
    def logits(self) -> Logits:
        """`[batch, pos, vocab]`, NaN at padding, computed when asked for; `readout.logits` computes fewer."""
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

    A pure function of data: use it under `jit`, `vmap`, `grad`, `scan`, `checkpoint`, `shard_map`.
    Inside a function to be vmapped, return what you need of the result, not all of it.

    `interventions` maps sites to an edit, or to several that act in order. What is captured at a site
    is what stands there after its edits. `capture` names sites, or maps them to a `Where` that says
    which entries to keep, axis by axis (`{"z": Where(layer=[3, 9], pos=-1)}` keeps the last position
    of two layers); no axis is ever dropped, so that what was kept of one place broadcasts to it again.

    `taps` are your own `mijax.Tap`s: at each site they act after the edits and before what is captured. With
    `readout=False` only what is captured is computed: no layer above the last one that is named there, and no final norm.

    Raises `ValueError` for a site that does not exist, an axis that a site lacks, shapes that do not
    fit, an index out of range, a mask that selects nothing, a token outside the vocabulary, a prompt longer than the context, an
    edit in what `readout=False` leaves out, a tap that gives another shape than it takes; `TypeError` for what is no tap.
    Where an index is out of range that is known only inside a trace, the result is NaN.

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
    check_selects(edits)
    check_taps(model, taps)
    if not (readout or taps) and isinstance(model, LayeredModel):
        _check_reached(model, edits, captures)
    prompts, edits, captures = on_device((prompts, of_prompts(model, prompts, edits), captures))
    result, acts, kept = with_automatic_axes(
        _run, model, prompts, edits, captures, tuple(taps), readout,
        like=prompts.ids, out_axes=_out_axes(model, captures),
    )  # fmt: skip
    # With the parameters as they are, not as copies from a compiled program.
    if readout and isinstance(model, LayeredModel):
        result = model.readout(result, prompts)  # pyright: ignore[reportArgumentType]
    return Out(result, acts, kept)  # pyright: ignore[reportArgumentType]


def check_taps(model: Model, taps: Sequence[Any]) -> None:
    """Raise for what is no tap, or one that names a site that the model has not."""
    if isinstance(taps, Tap) or not isinstance(taps, Sequence):
        raise TypeError(f"taps must be a sequence of mijax.Tap, given {type(taps).__name__}")
    for tap in taps:
        if not isinstance(tap, Tap):
            raise TypeError(
                f"a tap is a mijax.Tap, a module with `sites` and `at(point, x, state)`, given {type(tap).__name__}"
            )
        for name in tap.sites:
            site_of(name, model.sites)


def _check_reached(model: LayeredModel, edits: Edits, captures: Captures) -> None:
    """Raise `ValueError` for an edit above the last layer of which something is captured: it would never act, without a word."""
    last = _last(model, captures)
    if last is None or not is_concrete(last):
        return
    for name, several in edits.items():
        site = model.sites[name]
        for edit in several:
            layers = edit.where.layers(model.n_layers) if site.has_layer else site.layers
            first = 0 if layers is None or not is_concrete(layers) else int(np.min(np.asarray(layers)))
            if site.part == "final" or (site.is_inside and first >= int(last)):
                raise ValueError(
                    f"{type(edit).__name__} at site {name!r} acts above all that is captured, which readout=False leaves out"
                )


def check_selects(edits: Edits) -> None:
    """Raise `ValueError` for an edit that is known to select nothing: it would never act, without a word."""
    for name, several in edits.items():
        for edit in several:
            for field, mask in edit.where.masks.items():
                if is_concrete(mask) and not np.asarray(mask).any():
                    raise ValueError(
                        f"{type(edit).__name__} at site {name!r} selects nothing: its mask over {field!r} is all False"
                    )


def on_device(tree: Any) -> Any:
    """The tree with host arrays moved to the device here, where `jax.transfer_guard` can see that it is meant."""
    return jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x, tree)


def _out_axes(model: Model, captures: Captures) -> Any:
    """How a run's results are sharded where the examples are explicitly so."""
    kept = {name: model.sites[name].axes for name in captures}
    whole = lambda name: captures[name] is None or captures[name].batch is None  # pyright: ignore[reportOptionalMemberAccess]
    acts = lambda batch: {name: batch_spec(axes, batch if whole(name) else None) for name, axes in kept.items()}
    return lambda batch: (batch_spec(("batch",), batch), acts(batch), PartitionSpec())


def of_prompts(model: Model, tokens: Inputs, edits: Edits) -> Edits:
    """Checked edits in canonical form, with users' functions as they are now, for a run of all of `tokens`."""
    batch, pos = tokens.ids.shape
    edits = in_canonical_form(model, edits)
    return convert_edits(model, edits, batch, pos, pos, (model, tokens))


def in_canonical_form(model: Model, edits: Edits) -> Edits:
    """Checked edits with all axes of their sites in their operands."""
    return {name: tuple(canonical(edit, model.sites[name]) for edit in several) for name, several in edits.items()}


def check(model: Model, tokens: Inputs, edits: Edits, captures: Captures) -> None:
    """Raise for whatever is wrong and can be known before anything runs."""
    model.check_inputs(tokens)
    check_places(model, tokens, edits, captures)


def check_places(model: Model, tokens: Inputs, edits: Edits, captures: Captures) -> None:
    """Raise `ValueError` or `TypeError` for sites, places and operands that do not fit a text like `tokens`."""
    for name in (*edits, *captures):
        site = site_of(name, model.sites)
        shape = site.shape(*tokens.ids.shape)
        sizes, fields = dict(zip(site.axes, shape)), field_lengths(site, tokens)
        for edit in edits.get(name, ()):
            if not isinstance(edit.where, Where):
                raise TypeError(
                    f"expected a mijax.Where at site {name!r}, given {type(edit.where).__name__}; a grid goes to mijax.sweep"
                )
            check_structure(edit.where, name, site.axes, sizes)
            check_range(edit.where, name, fields)
            check_shapes(edit, site, shape)
        kept = captures.get(name)
        if kept is not None:
            if kept.masks:
                raise ValueError(f"capture at site {name!r} must be narrowed by indices: a mask has no fixed size")
            if np.ndim(kept.layer) == 2:
                raise ValueError(
                    f"capture at site {name!r} keeps the same layers of every example: give them as one list"
                )
            check_structure(kept, name, site.axes, sizes, zipped=False)
            check_range(kept, name, fields)


@JitNow
def _run(
    model: Model, inputs: Inputs, edits: Edits, captures: Captures, taps: tuple[Tap, ...], readout: bool
) -> tuple[Any, dict[str, Array], tuple[Any, ...]]:
    tap, frame = Chain((Editing(edits), *taps, Capturing(captures, model.n_layers))), model.frame(inputs)
    bad = faulty(model, inputs, edits, captures)
    if not isinstance(model, LayeredModel):
        zero = zero_varying_like((model, inputs, tap), model.dtype)
        out, state = model.forward(inputs, frame, tap, tap.init(model.sites, frame, zero))
        _, *kept, acts = tap.result(*tap.close(state))  # as of a single layer
        out, acts = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), (out, acts))
        return (out if readout else None), acts, tuple(kept)
    last = None if readout or taps else _last(model, captures)
    ids: Any = jnp.asarray(inputs.ids)
    x, (_, *kept, acts) = forward(model, ids, frame, tap, bad, last=last, readout=readout)
    return x, nan_where(bad, acts, model), tuple(kept)


def nan_where(bad: Bool[Array, ""], acts: dict[str, Array], model: Model) -> dict[str, Array]:
    """Activations, NaN where `bad`: NaN goes through the layers, but for what is zero at padding whatever its queries are."""
    stays = lambda site: site.is_inside and not site.zero_at_padding
    return {name: act if stays(model.sites[name]) else jnp.where(bad, jnp.nan, act) for name, act in acts.items()}


def _last(model: LayeredModel, captures: Captures) -> Any:
    """One more than the last layer of which something is captured; `None` where it is the last layer, or may be."""
    ends = [jnp.int32(0)]
    for name, where in captures.items():
        site = model.sites[name]
        if site.part == "embedding":
            continue
        some = where.layers(model.n_layers) if where is not None and site.has_layer else site.layers
        if some is None or not site.is_inside:
            return None
        ends.append(jnp.max(jnp.asarray(some, jnp.int32)) + 1)
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
) -> tuple[Stream | None, Any]:
    """The final stream of the tokens `ids`, which stand in `frame`, NaN where `bad`; and what the tap gives.

    Where these are some of a batch's tokens only, `held` are all layers' keys and values of the others. Layers from `last` on
    are not run; without `readout` neither is the final norm, and there is no final stream unless something is kept there.
    """
    zero = zero_varying_like((model, ids, tap, held), model.dtype)
    state = tap.init(model.sites, frame, zero)
    x, state = model.embed(ids, frame, tap, state)
    x = jnp.where(bad, jnp.nan, x) + zero
    layered, rest = tap.per_layer(model.sites)

    def body(layer: Any, carry: Any, xs: Any) -> Any:
        (x, state), (own, held) = carry, xs
        x, after = layer(x, frame, eqx.combine(own, rest), state, held)
        after, kept = tap.close(after)
        _check_state(tap, state, after)
        return (x, after), kept

    (x, state), stacked = model.walk(body, (x, state), (layered, held), last=last)
    final = readout or any(site.part == "final" for name, site in model.sites.items() if name in tap.sites)
    if final:
        x, state = model.final(x, frame, tap, state)
    return (jnp.where(bad, jnp.nan, x) if readout else None), tap.result(state, stacked)


def _check_state(tap: Tap, before: Any, after: Any) -> None:
    """Raise `ValueError` for a tap whose state has another structure after a layer than before."""
    for one, *states in zip(tap.taps, before, after) if isinstance(tap, Chain) else [(tap, before, after)]:
        kinds = [(jax.tree.structure(state), [(a.shape, a.dtype) for a in jax.tree.leaves(state)]) for state in states]
        if kinds[0] != kinds[1]:
            shown = [jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", state) for state in states]
            raise ValueError(
                f"the state of {type(one).__name__} must have one structure whenever a layer begins: it was {shown[0]}, and is"
                f" {shown[1]} after the layer"
            )


def as_captures(capture: Capture) -> Captures:
    """What to keep by site: `None` for all of it."""
    if isinstance(capture, str):
        raise TypeError(f"capture must be a sequence of sites, given the string {capture!r}; write ({capture!r},)")
    if not isinstance(capture, Mapping):
        return dict.fromkeys(capture)
    for site, where in capture.items():
        if not (where is None or isinstance(where, Where)):
            raise TypeError(
                f"capture must map sites to a mijax.Where or None, given {type(where).__name__} at site {site!r}"
            )
    return dict(capture)


def field_lengths(site: Site, tokens: Inputs) -> dict[str, Any]:
    """How many entries each field of `Where` chooses from at a site: a number, or `[batch]` lengths of prompts."""
    sizes = zip(site.axes, site.shape(*tokens.ids.shape))
    return {field_of(axis): tokens.lengths if axis in site.position_axes else size for axis, size in sizes}


def faulty(model: Model, tokens: Inputs, edits: Edits, captures: Captures) -> Bool[Array, ""]:
    """Whether an index is out of range, or an input none that the model takes, once values are known."""
    bad = model.bad_inputs(tokens)
    for name in (*edits, *captures):
        fields = field_lengths(model.sites[name], tokens)
        wheres = [edit.where for edit in edits.get(name, ())]
        for where in (*wheres, captures.get(name) or Where()):
            bad = bad | any_out_of_range(where, fields)
    return bad


def zero_varying_like(tree: Any, dtype) -> Float[Array, "1 1 1"]:
    """Zero, marked by `shard_map` as varying over whatever mesh axes the tree's arrays vary over.

    The scan over layers must begin with a stream that varies as it will after the first edit.
    """
    zeros = [jax.lax.full_like(a, 0, dtype, (1, 1, 1)) for a in jax.tree.leaves(tree) if eqx.is_array(a)]
    return sum(zeros, jnp.zeros((1, 1, 1), dtype))
