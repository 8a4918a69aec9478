"""Generation under interventions, with cached keys and values, as one scan over new tokens."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Int, Logits
from mijax.interventions.capturing import Capturing
from mijax.interventions.editing import Editing
from mijax.interventions.edits import Apply, Interventions, as_edits
from mijax.interventions.functions import convert_edits
from mijax.interventions.selecting import known_axes, narrow
from mijax.interventions.where import Where
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.model.attention import KVCache
from mijax.model.model import LayeredModel
from mijax.model.position import Frame
from mijax.model.sites import Site, cached_sites
from mijax.model.tap import Chain, Point
from mijax.model.tokens import Tokens, as_tokens, is_concrete
from mijax.programs.now import JitNow
from mijax.run import (
    Capture,
    Edits,
    as_captures,
    check,
    check_selects,
    faulty,
    forward,
    in_canonical_form,
    nan_where,
    on_device,
)


class Generated(NamedTuple):
    """Prompts with what was added to them, and the activations captured at all of these tokens.

    `mask` is False at padding and after a stop token. `ids` are -1 where an index was out of range that was
    known only inside a trace.
    """

    ids: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"]
    acts: dict[str, Array]


_POSITIONS = ("pos", "query", "key", "batch")  # narrowed when all tokens are there


class _Sampling(NamedTuple):
    """Numbers, so that new ones compile nothing."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


def generate(
    model: LayeredModel,
    tokens: Tokens | ArrayLike,
    interventions: Interventions | None = None,
    *,
    max_new_tokens: SupportsIndex,
    temperature: ArrayLike = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: SupportsIndex | Sequence[int] | None = None,
    key: Array | None = None,
    capture: Capture = (),
) -> Generated:
    """Continue prompts by `max_new_tokens` tokens each, under interventions on prompt and new tokens alike.

    Every token sees what it would see in `run` on the finished text under the same interventions, if those do not
    look ahead: `pos` counts over prompt and new tokens together, from 0, and values with a position axis have one entry for
    each. The end of a text that is being written is nowhere yet, so that edits take no negative positions: `prompt_tokens`,
    `new_tokens` and `current_tokens` (those that the next token is read from, as `pos=-1` is in a hook) give masks for
    `Where(pos=...)`. `capture` works as in `run`, over prompt and new tokens, negative positions counting from the end of the
    longest possible text; `attn_scores` are NaN at keys that were not there yet.

    `temperature` 0 takes the likeliest token; above, `key` draws from the distribution, cut to the `top_k`
    likeliest tokens, to the fewest that have probability `top_p` together, and to those of at least `min_p` times
    the largest. After a token of `stop` (by default the end tokens of the tokenizer that made `tokens`; `()` is none), a
    prompt's continuation is padding. For several samples of each prompt, `vmap` over keys. One compilation serves a shape,
    whatever the numbers.

    Raises what `run` raises, for the finished text; `ValueError` for settings out of their range, for a text that
    would outgrow the context (by how much), for an edit that cannot act on a new token or what is captured, and for a callable edit
    that says it mixes positions.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.generate(model, [[1, 2, 3]], {"resid_mid": mj.Add(1.0)}, max_new_tokens=4).ids.shape
    (1, 7)
    """
    if not isinstance(model, LayeredModel):
        raise TypeError(f"generation takes a model of tokens, given {type(model).__name__}")
    model.check()
    tokens, edits, captures = model.inputs(tokens), as_edits(interventions), as_captures(capture)
    count = _whole_number(max_new_tokens)
    stop_ids: Any = tokens.end_tokens if stop is None else np.atleast_1d(np.asarray(stop)).tolist()
    _check_settings(model, tokens, edits, count, temperature, top_k, top_p, min_p, stop_ids, key)
    whole = _extended(tokens, count)
    check(model, whole, edits, captures)
    check_selects(edits)
    _check_acts(whole, edits, captures)
    greedy = is_concrete(temperature) and bool(np.all(np.asarray(temperature) == 0))
    off = (model.d_vocab, 1.0, 0.0)
    filters = [o if given is None else given for o, given in zip(off, (top_k, top_p, min_p))]
    filtered = any(given is not None for given in (top_k, top_p, min_p))
    sampling = None if greedy else _Sampling(jnp.asarray(temperature, jnp.float32), *(jnp.asarray(f) for f in filters))
    batch, width = tokens.ids.shape
    shapes = ((width, width), (1, width + count))  # of the prompt, and of each new token: computed tokens, and keys
    edits = in_canonical_form(model, edits)
    ways = tuple(convert_edits(model, edits, batch, *shape, (model, whole)) for shape in shapes)
    whole, ways, captures = on_device((whole, ways, captures))
    fixed = filtered, jnp.asarray(stop_ids, jnp.int32), key, count
    return with_automatic_axes(
        _generate,
        model,
        whole,
        ways,
        captures,
        sampling,
        *fixed,
        like=tokens.ids,
        out_axes=lambda b: _out_axes(model, captures, b),
    )


def _out_axes(model: LayeredModel, captures: dict[str, Where | None], batch: Any) -> Any:
    """How what is generated is sharded where the examples are explicitly so."""
    tokens, narrowed = batch_spec(("batch",), batch), lambda where: where is not None and where.narrows("batch")
    acts = {
        site: batch_spec(model.sites[site].axes, None if narrowed(where) else batch) for site, where in captures.items()
    }
    return Generated(tokens, tokens, acts)  # pyright: ignore[reportArgumentType]


def new_tokens(tokens: Tokens | ArrayLike, max_new_tokens: int) -> Bool[np.ndarray, "batch pos"]:
    """The mask of every new token, for `Where(pos=new_tokens(prompts, n))` in `generate`.

    >>> new_tokens([[1, 2]], 3).tolist()
    [[False, False, True, True, True]]
    """
    return np.pad(np.zeros(as_tokens(tokens).ids.shape, bool), ((0, 0), (0, max_new_tokens)), constant_values=True)


def prompt_tokens(tokens: Tokens | ArrayLike, max_new_tokens: int) -> Bool[np.ndarray, "batch pos"]:
    """The mask of the prompts' own tokens among prompt and new ones, for `Where(pos=...)` in `generate`.

    >>> prompt_tokens([[1, 2]], 3).tolist()
    [[True, True, False, False, False]]
    """
    return np.pad(np.asarray(as_tokens(tokens).mask), ((0, 0), (0, max_new_tokens)))


def current_tokens(tokens: Tokens | ArrayLike, max_new_tokens: int) -> Bool[np.ndarray, "batch pos"]:
    """The mask of each prompt's last token and every new one: those that a next token is read from, in `generate`.

    >>> current_tokens([[1, 2]], 3).tolist()
    [[False, True, True, True, True]]
    """
    mask = np.asarray(as_tokens(tokens).mask)
    last = np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True)
    return np.pad(mask & last, ((0, 0), (0, max_new_tokens)), constant_values=True)


def _whole_number(count: Any) -> int:
    try:
        return operator.index(count)
    except TypeError as error:
        raise TypeError(
            f"max_new_tokens must be a whole number that is known before anything is compiled, given {count!r}"
        ) from error


def _extended(tokens: Tokens, count: int) -> Tokens:
    """The finished text's mask; its ids are known for the prompt only."""
    xp = np if is_concrete(tokens.ids) and is_concrete(tokens.mask) else jnp
    pad = lambda x, value: xp.pad(xp.asarray(x), ((0, 0), (0, count)), constant_values=value)
    return Tokens(pad(tokens.ids, 0), pad(tokens.mask, True))


@JitNow
def _generate(model, whole, ways, captures: dict[str, Where | None], sampling, filtered, stop, key, count) -> Generated:
    """`ways` are the edits for the prompt and for one new token: they differ in what users' functions are given."""
    width = whole.ids.shape[1] - count
    bad = faulty(model, whole, ways[0], captures) | _negative(ways[0])
    cached = cached_sites(model.sites)
    per_token = {name: where and where.without(*_POSITIONS) for name, where in captures.items()} | dict.fromkeys(cached)

    def at(columns, ids, held=None):
        """Run some columns; gives their final stream, what is captured there, and their keys and values."""
        positions = model.frame_of(whole, columns, alone=held is None)  # the prompt sees itself alone
        edits = ways[0 if held is None else 1]
        tap = Chain((Editing(edits), Capturing(per_token, model.n_layers)))
        final, (_, acts) = forward(model, ids, positions, tap, bad, held=held)
        assert final is not None
        acts = nan_where(bad, acts, model)
        return final, {name: acts[name] for name in captures}, KVCache(*(acts[site] for site in cached))

    def draw(final, step):
        """The next token after each example's last computed one."""
        logits = model.readout(final, Tokens(jnp.zeros(final.shape[:2], jnp.int32))).logits()[:, 0]
        if sampling is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _sample(logits, sampling, filtered, jax.random.fold_in(key, step)).astype(jnp.int32)

    prompt = jnp.arange(width, dtype=jnp.int32)
    final, acts, own = at(prompt, whole.ids[:, :width])
    last = jnp.max(jnp.where(whole.mask[:, :width], prompt[None], 0), axis=1)  # each prompt's last real column
    token = draw(jnp.take_along_axis(final, last[:, None, None], axis=1), 0)
    cache = KVCache(*(jnp.pad(x, ((0, 0), (0, 0), (0, count), (0, 0), (0, 0))) for x in own))

    def step(carry, column):
        cache, token = carry
        final, acts, own = at(column[None], token[:, None], cache)
        cache = KVCache(*(c.at[:, :, column].set(o[:, :, 0]) for c, o in zip(cache, own)))
        return (cache, draw(final, column - width + 1)), (token, acts)

    _, (added, later) = jax.lax.scan(step, (cache, token), width + jnp.arange(count, dtype=jnp.int32))
    ids = jnp.concatenate([whole.ids[:, :width], jnp.where(bad, -1, added.T)], axis=1)
    frame = model.frame(whole)
    for name, where in captures.items():
        site = model.sites[name]
        acts[name] = _joined(acts[name], later[name], site)
        if name == "attn_scores":
            acts[name] = jnp.where(_was_there(width, whole.ids.shape[1]), acts[name], jnp.nan)
        if where is not None:
            left = where if name in cached else where.only(*_POSITIONS)  # the rest was narrowed token by token
            acts[name] = _narrowed(acts[name], left, site, frame)
    return Generated(*_stopped(ids, jnp.asarray(whole.mask), stop, width), acts)


def _was_there(width: int, total: int) -> Bool[np.ndarray, "query key"]:
    """Which keys were there when a query was computed: the prompt's together, the others one by one."""
    column = np.arange(total)
    return column[None, :] <= np.maximum(column[:, None], width - 1)


def _joined(prompt: Array, later: Array, site: Site) -> Array:
    """One array of all tokens, from the prompt's and those of each new token (which come stacked in front)."""
    axis = site.axes.index(site.position_axes[0])
    if "key" in site.axes:  # the prompt's tokens attend to none of the later ones
        gap = later.shape[-1] - prompt.shape[-1]
        prompt = jnp.pad(prompt, [(0, 0)] * (prompt.ndim - 1) + [(0, gap)])
    return jnp.concatenate([prompt, jnp.moveaxis(jnp.squeeze(later, axis + 1), 0, axis)], axis=axis)


def _narrowed(x: Array, where: Where, site: Site, frame: Frame) -> Array:
    """Keep of a whole activation what `where` names."""
    layers = where.layers(site.sizes["layer"]) if site.has_layer else None
    x = x if layers is None else x[layers]
    keep = lambda x: narrow(x, where, site.inner_axes, known_axes(Point(site, None, frame), x.shape))
    return jax.vmap(keep)(x) if site.has_layer else keep(x)


def _stopped(ids: Array, mask: Array, stop: Int[Array, " k"], width: int) -> tuple[Array, Array]:
    """Make padding of what follows a stop token."""
    ends = jnp.any(ids[:, width:, None] == stop[None, None, :], axis=-1)
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends.astype(jnp.int32)
    mask = mask.at[:, width:].set(before == 0)
    return jnp.where(mask | (jnp.arange(ids.shape[1]) < width)[None], ids, 0), mask


def _sample(logits: Logits, sampling: _Sampling, filtered: bool, key: Array) -> Int[Array, " batch"]:
    """Draw from softmax(logits / temperature), cut as asked (in the order in which transformers cuts)."""
    temperature, top_k, top_p, min_p = sampling
    logits = logits / temperature.astype(logits.dtype)
    if filtered:
        ordered = -jnp.sort(-logits, axis=-1)
        keep = (jnp.arange(logits.shape[-1]) < top_k)[None]
        probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        keep = keep & ((before < top_p.astype(logits.dtype)) | (top_p >= 1))
        keep = keep & (probs >= min_p.astype(logits.dtype) * probs[:, :1])
        logits = jnp.where(
            logits >= jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True), logits, -jnp.inf
        )
    return jax.random.categorical(key, logits, axis=-1)


def _negative(edits: Edits) -> Bool[Array, ""]:
    """Whether a position counts from the end, once values are known."""
    wheres = [edit.where for several in edits.values() for edit in several]
    indices = [jnp.asarray(index) for where in wheres for index in where.positions.values()]
    return jnp.any(jnp.asarray([jnp.any(index < 0) for index in indices] or [False]))


def _check_acts(whole: Tokens, edits: Edits, captures: dict[str, Where | None]) -> None:
    """Raise `ValueError` for positions from the end, and for an edit that acts on nothing that is sampled or kept."""
    for site, several in edits.items():
        for edit in several:
            for field, index in edit.where.positions.items():
                if not is_concrete(index):
                    continue
                if (np.asarray(index) < 0).any():
                    raise ValueError(
                        f"{field}={np.asarray(index).tolist()} at site {site!r} counts from the end of a text that is not there yet:"
                        " name tokens from 0, or by a mask: mijax.prompt_tokens(tokens, n) the prompt's, mijax.new_tokens(tokens, n) the"
                        " generated ones, mijax.current_tokens(tokens, n) those that the next token is read from"
                    )
                rows = np.asarray(index).reshape(1, -1) if np.ndim(index) < 2 else np.asarray(index)
                late = is_concrete(whole.mask) and (rows >= np.asarray(whole.lengths)[:, None] - 1).all()
                if field != "key" and late and not captures:
                    raise ValueError(
                        f"{type(edit).__name__} at site {site!r} acts on the last new token alone, from which nothing is read or kept"
                    )


def _check_settings(model, tokens, edits, count, temperature, top_k, top_p, min_p, stop_ids, key) -> None:
    faults = []
    if not model.causal:
        faults.append("a bidirectional model cannot generate")
    if count < 1:
        faults.append(f"max_new_tokens must be at least 1, given {count}")
    width = tokens.ids.shape[1] + count
    if width > model.n_ctx:
        faults.append(
            f"prompts of {tokens.ids.shape[1]} tokens and {count} new ones exceed the context of {model.n_ctx} by {width - model.n_ctx}"
        )
    hot = not is_concrete(temperature) or bool(np.any(np.asarray(temperature) != 0))
    if is_concrete(temperature) and not (np.ndim(temperature) == 0 and 0 <= float(np.asarray(temperature)) < np.inf):
        faults.append(f"temperature must be one number, at least 0, given {temperature}")
    if hot and key is None:
        faults.append("sampling (temperature above 0) needs a key")
    if not hot and any(given is not None for given in (top_k, top_p, min_p)):
        faults.append("top_k, top_p and min_p cut a distribution, which temperature 0 does not draw from")
    if top_k is not None and top_k < 1:
        faults.append(f"top_k must be at least 1, given {top_k}")
    faults += [f"{n} must be in {r}, given {v}" for n, v, ok, r in (
        ("top_p", top_p, lambda p: 0 < p <= 1, "(0, 1]"), ("min_p", min_p, lambda p: 0 <= p <= 1, "[0, 1]"),
    ) if v is not None and not ok(v)]  # fmt: skip
    faults += [
        f"stop token {t} is outside the vocabulary of {model.d_vocab}" for t in stop_ids if not 0 <= t < model.d_vocab
    ]
    for site, given in edits.items():
        if any(isinstance(e, Apply) and getattr(e.function, "mixes_positions", False) for e in given):
            faults.append(
                f"the callable edit at site {site!r} mixes positions, which generation computes one at a time"
            )
    if faults:
        raise ValueError("; ".join(faults))
