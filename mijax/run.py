"""The waist: one pure function from (model, tokens, interventions) to a readout and activations."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Float, Int, Logits, Stream
from mijax.interventions.edits import Edit, Interventions, as_edits, by_layer, check_shapes
from mijax.interventions.functions import convert_edits
from mijax.interventions.tap import Tap
from mijax.interventions.where import Where, check_range, check_structure, out_of_range
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.model.attention import Memory
from mijax.model.block import block
from mijax.model.config import Config
from mijax.model.numerics import accumulator
from mijax.model.parameters import check_parameters
from mijax.model.position import Frame, frame
from mijax.model.readout import Readout
from mijax.model.sites import SELECTS, SITES, site_of
from mijax.model.tokens import Tokens, as_tokens, is_concrete
from mijax.model.transformer import Transformer, embed, final_norm

Capture: TypeAlias = Iterable[str] | Mapping[str, Where | None]
Edits: TypeAlias = dict[str, tuple[Edit, ...]]
Captures: TypeAlias = dict[str, Where | None]


class Out(NamedTuple):
    """What a run gives: the readout, and the captured activations by site."""

    readout: Readout
    acts: dict[str, Array]

    @property
    def logits(self) -> Logits:
        """`[batch, pos, vocab]`, NaN at padding, computed when asked for; `readout.logits` computes fewer."""
        return self.readout.logits()


def run(
    model: Transformer,
    tokens: Tokens | ArrayLike,
    interventions: Interventions | None = None,
    *,
    capture: Capture = (),
) -> Out:
    """Run `model` on `tokens` under `interventions`, keeping the activations named in `capture`.

    A pure function of data: use it under `jit`, `vmap`, `grad`, `scan`, `checkpoint`, `shard_map`.
    Inside a function to be vmapped, return what you need of the result, not all of it.

    `interventions` maps sites to an edit, or to several that act in order. What is captured at a site
    is what stands there after its edits. `capture` names sites, or maps them to a `Where` that says
    which entries to keep, axis by axis (`{"z": Where(layer=[3, 9], pos=-1)}` keeps the last position
    of two layers); no axis is ever dropped, so that what was kept of one place broadcasts to it again.

    Raises `ValueError` for a site that does not exist, an axis that a site lacks, shapes that do not
    fit, an index out of range, a mask that selects nothing, a token outside the vocabulary, a prompt longer than the context.
    Where an index is out of range that is known only inside a trace, the result is NaN.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> clean, other = [[1, 2, 3]], [[1, 4, 3]]
    >>> source = mj.run(model, other, capture=("z",)).acts
    >>> out = mj.run(model, clean, {"z": mj.Replace(source["z"], mj.Where(layer=1, head=0))})
    >>> out.logits.shape
    (1, 3, 11)
    """
    check_parameters(model)
    prompts, edits, captures = as_tokens(tokens), as_edits(interventions), as_captures(capture)
    check(model.config, prompts, edits, captures)
    check_selects(edits)
    prompts, edits, captures = on_device((prompts, of_prompts(model, prompts, edits), captures))
    final, acts = with_automatic_axes(
        _run, model, prompts, edits, captures, like=prompts.ids, out_axes=_out_axes(captures)
    )
    return Out(Readout(final, prompts, model.unembedding, model.b_U), acts)


def check_selects(edits: Edits) -> None:
    """Raise `ValueError` for an edit that is known to select nothing: it would never act, without a word."""
    for name, several in edits.items():
        for edit in several:
            for field, index in edit.where.given.items():
                if index.dtype == bool and is_concrete(index) and not np.asarray(index).any():
                    raise ValueError(
                        f"{type(edit).__name__} at site {name!r} selects nothing: its mask over {field!r} is all False"
                    )


def on_device(tree: Any) -> Any:
    """The tree with host arrays moved to the device here, where `jax.transfer_guard` can see that it is meant."""
    return jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x, tree)


def _out_axes(captures: Captures) -> Any:
    """How a run's results are sharded where the examples are explicitly so."""
    kept = {name: SITES[name].axes for name in captures}
    whole = lambda name: captures[name] is None or captures[name].batch is None  # pyright: ignore[reportOptionalMemberAccess]
    acts = lambda batch: {name: batch_spec(axes, batch if whole(name) else None) for name, axes in kept.items()}
    return lambda batch: (batch_spec(("batch",), batch), acts(batch))


def of_prompts(model: Transformer, tokens: Tokens, edits: Edits) -> Edits:
    """The edits with users' functions as they are now, for a run of all of `tokens`."""
    batch, pos = tokens.ids.shape
    return convert_edits(model.config, edits, batch, pos, pos, accumulator(model.W_E.dtype), (model, tokens))


def check(config: Config, tokens: Tokens, edits: Edits, captures: Captures) -> None:
    """Raise for whatever is wrong and can be known before anything runs."""
    _check_tokens(config, tokens)
    for name in (*edits, *captures):
        site = site_of(name, config)
        shape = site.shape(config, tokens)
        sizes, fields = dict(zip(site.axes, shape)), field_lengths(config, tokens, name)
        for edit in edits.get(name, ()):
            if not isinstance(edit.where, Where):
                raise TypeError(
                    f"expected a mijax.Where at site {name!r}, given {type(edit.where).__name__}; a grid goes to mijax.sweep"
                )
            check_structure(edit.where, name, site.axes, sizes)
            check_range(edit.where, name, fields)
            check_shapes(edit, name, site.axes, shape)
        kept = captures.get(name)
        if kept is not None:
            if any(index.dtype == bool for index in kept.given.values()):
                raise ValueError(f"capture at site {name!r} must be narrowed by indices: a mask has no fixed size")
            if np.ndim(kept.layer) == 2:
                raise ValueError(
                    f"capture at site {name!r} keeps the same layers of every example: give them as one list"
                )
            check_structure(kept, name, site.axes, sizes, zipped=False)
            check_range(kept, name, fields)


@eqx.filter_jit
def _run(model: Transformer, tokens: Tokens, edits: Edits, captures: Captures) -> tuple[Stream, dict[str, Array]]:
    positions = frame(model.config, tokens, accumulator(model.W_E.dtype))
    bad = faulty(model.config, tokens, edits, captures)
    return forward(model, jnp.asarray(tokens.ids), positions, edits, captures, bad)


def forward(
    model: Transformer,
    ids: Int[Array, "batch pos"],
    positions: Frame,
    edits: Edits,
    captures: Captures,
    bad: Bool[Array, ""],
    memory: Memory | None = None,
) -> tuple[Stream, dict[str, Array]]:
    """The final stream and the activations of the tokens `ids`, which stand at `positions`; NaN where `bad`.

    Where these are some of a batch's tokens only, `memory` holds all layers' keys and values of the others.
    """
    outer = Tap(model.config, positions, edits, captures)
    x = embed(model, ids, positions, outer)
    x = jnp.where(bad, jnp.nan, x) + zero_varying_like((model, edits, captures, memory), x.dtype)
    x, acts = _layers(model, x, positions, edits, captures, memory)
    x = jnp.where(bad, jnp.nan, final_norm(model, x, outer))
    # NaN goes through the layers, but for what is zero at padding whatever its queries are.
    kept = outer.acts | {name: acts[name] for name in ("pattern", "z", "result") if name in acts}
    return x, acts | {name: jnp.where(bad, jnp.nan, act) for name, act in kept.items()}


def _layers(model: Transformer, x: Stream, positions: Frame, edits: Edits, captures: Captures, memory: Memory | None):
    """Scan the one block over the layers; captured layers are stacked, or kept in the slots asked for."""
    config = model.config
    edits = {name: given for name, given in edits.items() if SITES[name].has_layer}
    captures = {name: where for name, where in captures.items() if SITES[name].has_layer}
    layered, shared = _split(edits, config.n_layers)
    narrowed = {name: where for name, where in captures.items() if where is not None and where.layer is not None}
    layers = {name: jnp.asarray(where.layer).reshape(-1) % config.n_layers for name, where in narrowed.items()}
    slots = {name: _slot_of_each_layer(wanted, config.n_layers) for name, wanted in layers.items()}

    def layer(x, scanned):
        params, index, own, held = scanned
        tap = Tap(config, positions, eqx.combine(own, shared), captures, index)
        return block(config, params, x, positions, tap, held), tap.acts

    def body(carry, scanned):
        x, kept = carry
        x, acts = layer(x, scanned)
        for name, slot in slots.items():
            kept[name] = kept[name].at[slot[scanned[1]]].set(acts.pop(name), mode="drop")
        return (x, kept), acts

    scanned = (model.blocks, jnp.arange(config.n_layers, dtype=jnp.int32), layered, memory)
    if not slots:  # the plain case carries the stream alone
        return jax.lax.scan(layer, x, scanned)
    first = jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, scanned)
    shapes = jax.eval_shape(layer, x, first)[1]
    empty = lambda name: jax.lax.full_like(x, 0, shapes[name].dtype, (layers[name].size, *shapes[name].shape))
    (x, kept), acts = jax.lax.scan(body, (x, {name: empty(name) for name in slots}), scanned)
    return x, acts | {name: kept[name][slots[name][layers[name]]] for name in slots}


def _slot_of_each_layer(wanted: Int[Array, " k"], n_layers: int) -> Int[Array, " layer"]:
    """Where a layer's capture goes: to its first place among the wanted ones, or out of range, where it is dropped."""
    hits = wanted[None, :] == jnp.arange(n_layers, dtype=jnp.int32)[:, None]
    return jnp.where(jnp.any(hits, axis=1), jnp.argmax(hits, axis=1).astype(jnp.int32), wanted.size)


def _split(edits: Edits, n_layers: int) -> tuple[Any, Any]:
    """Separate the arrays that differ between layers, to be scanned over, from the rest."""
    layered, shared = {}, {}
    for name, given in edits.items():
        rank = len(SITES[name].axes)
        pairs = [eqx.partition(_squeezed(edit, by_layer(edit, rank), n_layers), by_layer(edit, rank)) for edit in given]
        layered[name], shared[name] = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    return layered, shared


def _squeezed(edit: Any, spec: Any, n_layers: int) -> Any:
    """Give arrays with a layer axis of size 1 the full axis (of which XLA makes no copy)."""
    return jax.tree.map(
        lambda leaf, own: jnp.broadcast_to(leaf, (n_layers, *leaf.shape[1:])) if own else leaf, edit, spec
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


def _check_tokens(config: Config, tokens: Tokens) -> None:
    if tokens.ids.ndim != 2:
        raise ValueError(f"tokens must be [batch, pos], given shape {tokens.ids.shape}")
    if tokens.ids.shape[1] > config.n_ctx:
        raise ValueError(f"the prompts have {tokens.ids.shape[1]} tokens, the model's context {config.n_ctx}")
    if is_concrete(tokens.ids) and is_concrete(tokens.mask):
        ids, mask = np.asarray(tokens.ids), np.asarray(tokens.mask)
        bad = np.argwhere(mask & ((ids < 0) | (ids >= config.d_vocab)))  # padding may be anything
        if len(bad):
            example, column = map(int, bad[0])
            raise ValueError(
                f"token {ids[example, column]} (example {example}, column {column}) is outside the vocabulary of {config.d_vocab}"
            )
        if not mask.any(axis=1).all():
            raise ValueError(f"example {int(np.argmin(mask.any(axis=1)))} is all padding")


def field_lengths(config: Config, tokens: Tokens, site: str) -> dict[str, Any]:
    """How many entries each field of `Where` chooses from at a site: a number, or `[batch]` lengths of prompts."""
    sizes = zip(SITES[site].axes, SITES[site].shape(config, tokens))
    return {SELECTS[axis]: tokens.lengths if axis in ("pos", "query", "key") else size for axis, size in sizes}


def faulty(config: Config, tokens: Tokens, edits: Edits, captures: Captures) -> Bool[Array, ""]:
    """Whether an index is out of range, a token outside the vocabulary, or a prompt empty, once values are known."""
    bad = jnp.any(tokens.mask & ((tokens.ids < 0) | (tokens.ids >= config.d_vocab)))
    bad = bad | ~jnp.all(jnp.any(jnp.asarray(tokens.mask), axis=1))
    for name in (*edits, *captures):
        fields = field_lengths(config, tokens, name)
        wheres = [edit.where for edit in edits.get(name, ())]
        for where in (*wheres, captures.get(name) or Where()):
            for field, index in where.given.items():
                bad = bad | jnp.any(out_of_range(index, fields[field]))
    return bad


def zero_varying_like(tree: Any, dtype) -> Float[Array, "1 1 1"]:
    """Zero, marked by `shard_map` as varying over whatever mesh axes the tree's arrays vary over.

    The scan over layers must begin with a stream that varies as it will after the first edit.
    """
    zeros = [jax.lax.full_like(a, 0, dtype, (1, 1, 1)) for a in jax.tree.leaves(tree) if eqx.is_array(a)]
    return sum(zeros, jnp.zeros((1, 1, 1), dtype))
