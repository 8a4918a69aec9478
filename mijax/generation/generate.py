"""Generation under interventions: one run of the prompts, then one step per new token, with cached keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Int
from mijax.arguments import whole_number
from mijax.display import as_html
from mijax.forward import forward, nan_where, on_device
from mijax.generation.checks import check_acts, check_mixing, check_settings, stop_tokens
from mijax.generation.room import edits_with_columns, room_for, with_columns
from mijax.generation.sampling import as_sampling, sample
from mijax.interventions.capturing import Capture, Capturing, as_captures
from mijax.interventions.checks import check_places, check_selects, faulty
from mijax.interventions.editing import Editing
from mijax.interventions.edits import Edits, Interventions, as_edits
from mijax.interventions.functions import convert_edits, in_canonical_form
from mijax.interventions.selecting import known_axes, narrow
from mijax.interventions.where import Where
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.model.attention import KVCache
from mijax.model.model import LayeredModel
from mijax.model.position import Frame
from mijax.model.sites import Site, cached_sites
from mijax.model.tap import Chain, Point
from mijax.model.tokens import Tokens, is_concrete, resized
from mijax.programs.now import JitNow


class Generated(NamedTuple):
    """Prompts with their continuations, and the activations captured at all of these tokens.

    Attributes:
        ids: the ids of prompt and new tokens; new ones are -1 where an index that is known only inside a trace is
            out of range, and from where logits are NaN or infinite, which no token can be drawn from.
        mask: False at padding and after a stop token.
        acts: the captured activations by site.
    """

    ids: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"]
    acts: dict[str, Array]

    def _repr_html_(self) -> str:
        return as_html(self._asdict())  # treescope would ask the tuple itself for its page


_POSITIONS = ("pos", "query", "key", "batch")  # fields of `capture` applied to the finished text, not token by token


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

    Each token's activations are those of `run` on the finished text under the same interventions, if the
    interventions do not look ahead. For several samples of each prompt, `vmap` over keys.

    The last new token is run only where something is captured: without `capture`, a text may be one token longer
    than the context. One compilation serves a shape of prompts and up to 16 new tokens, or 32, 64, ... of them,
    whatever the values; where something is captured or a function edits attention, each number of new tokens has
    its own compilation.

    Args:
        model: the model.
        tokens: the prompts, `mijax.Tokens` or plain ids `[batch, pos]`.
        interventions: as in `run`. `pos` counts over prompt and new tokens together, from 0, and operands with a
            position axis have one entry for each column, padding included. Negative positions are refused, since the text has no end
            yet: `prompt_tokens`, `new_tokens` and `current_tokens` (those that a next token is read from, as
            `pos=-1` is in a hook) give masks for `Where(pos=...)`.
        max_new_tokens: the number of new tokens.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature).
        top_k: cut the distribution to this number of likeliest tokens.
        top_p: cut it to the fewest tokens that together have this probability.
        min_p: cut it to the tokens of at least this part of the largest probability.
        stop: tokens after which a prompt's continuation is padding; by default the end tokens of the tokenizer that
            made `tokens`, and none with `()`.
        key: the random key to draw with; needed at a temperature above 0. What a prompt draws depends on its row in
            the batch.
        capture: as in `run`, over prompt and new tokens. Negative positions count from the end of the longest
            possible text. `attn_scores` are NaN at keys that did not exist yet when the query was computed.

    Returns:
        The prompts with their continuations, `[batch, pos + max_new_tokens]`, and the captured activations.

    Raises:
        ValueError: as in `run`, for the finished text; for settings out of their range, a text that would outgrow
            the context (by how much), an edit that can act neither on a drawn token nor on a captured activation,
            and a function as edit that gives for a token alone what it does not give for it in the whole text.
        TypeError: as in `run`; for a model that is not one of tokens, or a number of new tokens that is not a whole
            number.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.generate(model, [[1, 2, 3]], {"resid_mid": mj.Add(1.0)}, max_new_tokens=4).ids.shape
    (1, 7)
    """
    if not isinstance(model, LayeredModel):
        raise TypeError(f"generation takes a model of tokens, given {type(model).__name__}")
    model.check()
    tokens, edits, captures = model.inputs(tokens), as_edits(interventions), as_captures(capture)
    count = whole_number("max_new_tokens", max_new_tokens, None)
    stop_ids = list(tokens.end_tokens) if stop is None else stop_tokens(stop)
    check_settings(model, tokens, edits, count, temperature, top_k, top_p, min_p, stop_ids, key, captures)
    text = _extended(tokens, count)
    model.check_inputs(tokens)
    check_places(model, text, edits, captures)
    check_selects(model, text, edits)
    check_acts(text, edits, captures)
    sampling, filtered = as_sampling(temperature, top_k, top_p, min_p, model.d_vocab)
    batch, width = tokens.ids.shape
    total = width + room_for(edits, model.sites, width, count, model.n_ctx, bool(captures))
    edits = edits_with_columns(in_canonical_form(model, edits), model.sites, width + count, total)
    text = with_columns(text, total)
    shapes = ((width, width), (1, total))  # (computed tokens, keys), of the run of the prompt and of each new token
    check_mixing(model, edits, batch, width + count)
    step_edits = tuple(convert_edits(model, edits, batch, *shape, (model, text)) for shape in shapes)
    text, step_edits, captures, n_steps = on_device((text, step_edits, captures, np.int32(count)))
    result = with_automatic_axes(
        _generate,
        model,
        text,
        step_edits,
        captures,
        sampling,
        *(filtered, jnp.asarray(stop_ids, jnp.int32), key, width, n_steps),
        like=tokens.ids,
        out_axes=lambda b: _out_axes(model, captures, b),
    )
    return Generated(_first_columns(result.ids, width + count), _first_columns(result.mask, width + count), result.acts)


def _first_columns(x: Array, n: int) -> Array:
    """The first `n` columns, cut on the host where possible, since slicing on the device compiles a program."""
    if not is_concrete(x) or not x.is_fully_addressable:
        return x[:, :n]
    return jax.device_put(np.asarray(x)[:, :n], x.sharding)


def _out_axes(model: LayeredModel, captures: dict[str, Where | None], batch: Any) -> Any:
    """The sharding of the result where the batch axis has explicit sharding."""
    token_spec, narrowed = batch_spec(("batch",), batch), lambda where: where is not None and where.narrows("batch")
    acts = {
        site: batch_spec(model.sites[site].axes, None if narrowed(where) else batch) for site, where in captures.items()
    }
    return Generated(token_spec, token_spec, acts)  # pyright: ignore[reportArgumentType]


def _extended(tokens: Tokens, count: int) -> Tokens:
    """The finished text: its mask, and the ids of the prompt (those of new tokens are 0)."""
    total = tokens.ids.shape[1] + count
    return Tokens(resized(tokens.ids, 1, total, 0), resized(tokens.mask, 1, total, True))


@JitNow
def _generate(
    model, text, step_edits, captures: dict[str, Where | None], sampling, filtered, stop, key, width, count
) -> Generated:
    """`step_edits` are the edits for the prompt and for a new token: users' functions get other shapes in each."""
    bad = faulty(model, text, step_edits[0], captures) | _negative(step_edits[0])
    cached = cached_sites(model.sites)
    per_token = {name: where and where.without(*_POSITIONS) for name, where in captures.items()} | dict.fromkeys(cached)

    def run_columns(columns, ids, cache=None):
        """Run some columns: their final stream, the captured activations, and their keys and values."""
        frame = model.frame_of(text, columns, alone=cache is None)  # the prompt attends to itself alone
        edits = step_edits[0 if cache is None else 1]
        tap = Chain((Editing(edits), Capturing(per_token, model.n_layers)))
        final, (_, acts) = forward(model, ids, frame, tap, bad, held=cache)
        assert final is not None
        acts = nan_where(bad, acts, model)
        return final, {name: acts[name] for name in captures}, KVCache(*(acts[site] for site in cached))

    def draw(final, step):
        """The next token of each example, from its final stream `[batch, 1, d_model]`; -1 where its logits are NaN or infinite."""
        logits = model.readout(final, Tokens(jnp.zeros(final.shape[:2], jnp.int32))).logits()[:, 0]
        if sampling is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = sample(logits, sampling, filtered, jax.random.fold_in(key, step))
        return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), token, -1).astype(jnp.int32)

    prompt = jnp.arange(width, dtype=jnp.int32)
    final, acts, computed = run_columns(prompt, text.ids[:, :width])
    last = jnp.max(jnp.where(text.mask[:, :width], prompt[None], 0), axis=1)  # each prompt's last real column
    token = draw(jnp.take_along_axis(final, last[:, None, None], axis=1), 0)
    room = text.ids.shape[1] - width
    cache = KVCache(*(jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))) for x in computed))

    def step(carry, i):
        """Run the new token `i` and draw the next."""
        cache, token = carry
        final, acts, computed = run_columns((width + i)[None], jnp.maximum(token, 0)[:, None], cache)
        acts = {name: _nan_at(token < 0, act, model.sites[name]) for name, act in acts.items()}
        cache = KVCache(*(c.at[:, :, width + i].set(x[:, :, 0]) for c, x in zip(cache, computed)))
        following = jnp.where(token < 0, -1, draw(final, i + 1))  # nothing follows a token that was not
        return (cache, following), (token, acts)

    if captures:
        _, (new_ids, new_acts) = jax.lax.scan(step, (cache, token), jnp.arange(room, dtype=jnp.int32))
        new_ids = new_ids.T
    else:
        new_ids, new_acts = _until_the_end(step, (cache, token), stop, room, count), {}
    ids = jnp.concatenate([text.ids[:, :width], jnp.where(bad, -1, new_ids)], axis=1)
    frame = model.frame(text)
    for name, where in captures.items():
        site = model.sites[name]
        acts[name] = _joined(acts[name], new_acts[name], site)
        if name == "attn_scores":
            acts[name] = jnp.where(_was_there(width, text.ids.shape[1]), acts[name], jnp.nan)
        if where is not None:
            remaining = where if name in cached else where.only(*_POSITIONS)  # other fields were applied token by token
            acts[name] = _narrowed(acts[name], remaining, site, frame)
    return Generated(*_stopped(ids, jnp.asarray(text.mask)[:, :width], stop), acts)


def _until_the_end(step, carry, stop: Int[Array, " k"], room: int, count: Int[Array, ""]) -> Int[Array, "batch new"]:
    """The `count` new tokens, of which the last is drawn and not run; zeros after every text has stopped."""

    def body(state):
        i, carry, ids, ended = state
        carry, _ = step(carry, i)
        token = carry[1]
        return i + 1, carry, ids.at[:, i + 1].set(token), ended | jnp.isin(token, stop)

    token = carry[1]
    ids = jnp.pad(token[:, None], ((0, 0), (0, room)))  # one more token than is run
    state = (jnp.int32(0), carry, ids, jnp.isin(token, stop))
    return jax.lax.while_loop(lambda s: (s[0] < count - 1) & ~jnp.all(s[3]), body, state)[2]


def _was_there(width: int, total: int) -> Bool[np.ndarray, "query key"]:
    """Which keys existed when a query was computed: a prompt is computed at once, new tokens one by one."""
    column = np.arange(total)
    return column[None, :] <= np.maximum(column[:, None], width - 1)


def _nan_at(lacking: Bool[Array, " batch"], act: Array, site: Site) -> Array:
    """An activation with NaN at the examples that have no new token."""
    batch_axis = site.axes.index("batch")
    return jnp.where(lacking.reshape(-1, *(1,) * (act.ndim - batch_axis - 1)), jnp.nan, act)


def _joined(prompt: Array, new: Array, site: Site) -> Array:
    """The activations of all tokens, from those of the prompt and those of the new tokens, stacked in front."""
    axis = site.axes.index(site.position_axes[0])
    if "key" in site.axes:  # the prompt's tokens attend to no new ones
        gap = new.shape[-1] - prompt.shape[-1]
        prompt = jnp.pad(prompt, [(0, 0)] * (prompt.ndim - 1) + [(0, gap)])
    return jnp.concatenate([prompt, jnp.moveaxis(jnp.squeeze(new, axis + 1), 0, axis)], axis=axis)


def _narrowed(x: Array, where: Where, site: Site, frame: Frame) -> Array:
    """The entries of a whole text's activation that `where` selects."""
    layers = where.layers(site.sizes["layer"]) if site.has_layer else None
    x = x if layers is None else x[layers]
    keep = lambda x: narrow(x, where, site.inner_axes, known_axes(Point(site, None, frame), x.shape))
    return jax.vmap(keep)(x) if site.has_layer else keep(x)


def _stopped(ids: Array, mask: Array, stop: Int[Array, " k"]) -> tuple[Array, Array]:
    """Turn the tokens after a stop token into padding: the text's ids and mask. `mask` is that of the prompts."""
    width = mask.shape[1]
    ends = jnp.any(ids[:, width:, None] == stop[None, None, :], axis=-1)
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends.astype(jnp.int32)
    mask = jnp.concatenate([mask, before == 0], axis=1)
    return jnp.where(mask | (jnp.arange(ids.shape[1]) < width)[None], ids, 0), mask


def _negative(edits: Edits) -> Bool[Array, ""]:
    """Whether a position counts from the end, once values are known."""
    wheres = [edit.where for site_edits in edits.values() for edit in site_edits]
    indices = [jnp.asarray(index) for where in wheres for index in where.positions.values()]
    return jnp.any(jnp.asarray([jnp.any(index < 0) for index in indices] or [False]))
