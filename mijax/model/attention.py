"""Attention, the only statement of it: MHA, GQA and MQA, with every site inside it."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Asked, Bool, Float, Heads, Int, KVHeads, Scores, Stream
from mijax.model.config import Config
from mijax.model.norm import Norm, normalise
from mijax.model.numerics import einsum
from mijax.model.position import Frame, rotate
from mijax.model.sites import Tap


class Attention(eqx.Module):
    """Projections, stacked over layers. The layouts let products run without transposing weights."""

    W_Q: Float[Array, "layer d_model head d_head"]
    W_K: Float[Array, "layer d_model kv_head d_head"]
    W_V: Float[Array, "layer d_model kv_head d_head"]
    W_O: Float[Array, "layer head d_head d_model"]
    b_Q: Float[Array, "layer head d_head"] | None
    b_K: Float[Array, "layer kv_head d_head"] | None
    b_V: Float[Array, "layer kv_head d_head"] | None
    b_O: Float[Array, "layer d_model"] | None


class Memory(NamedTuple):
    """Keys and values of one layer for all tokens of a batch, as they were when those were computed."""

    k: KVHeads
    v: KVHeads


class Branch(NamedTuple):
    """The stream on its way into q, k and v: as it is, and after ln1."""

    params: Norm
    stream: Stream
    normed: Stream


def attention(
    config: Config, params: Attention, ln1: Norm, x: Stream, frame: Frame, tap: Tap, memory: Memory | None = None
) -> Asked:
    """What attention adds to the residual stream `x`, at `frame.asked` if that is given.

    Where `x` holds only `frame.columns` or `frame.rows` of the tokens, the keys and values of the others come from
    `memory`.
    """
    branch = Branch(ln1, x, normalise(config, ln1, x, "ln1", tap))
    k = _project(config, branch, params.W_K, params.b_K, "k", tap)
    v = _project(config, branch, params.W_V, params.b_V, "v", tap)
    if config.positions == "rotary":
        k = tap("rot_k", rotate(config, k, frame))
    if memory is not None and frame.rows is not None:
        k, v = frame.rows.fill(k, memory.k), frame.rows.fill(v, memory.v)
    elif memory is not None:
        k, v = (held.at[:, frame.columns].set(own) for held, own in zip(memory, (k, v)))
    if frame.asked is not None:
        frame, index = frame.asked
        branch, tap = Branch(ln1, branch.stream[:, index], branch.normed[:, index]), tap.at(frame)
    q = _project(config, branch, params.W_Q, params.b_Q, "q", tap)
    if config.positions == "rotary":
        q = tap("rot_q", rotate(config, q, frame))
    if frame.rows is None:
        z = _mix(config, q, k, v, frame, tap, params.W_Q.dtype)
    else:
        z = frame.rows.gather(_mix(config, frame.rows.spread(q), k, v, frame, tap, params.W_Q.dtype))
    z = tap("z", z)
    # As one matrix, whose transpose XLA's products take as it is; with an axis of heads it would be copied.
    out = einsum("bpi,id->bpd", z.reshape(*z.shape[:2], -1), params.W_O.reshape(-1, config.d_model))
    if params.b_O is not None:
        out = out + params.b_O.astype(out.dtype)[None, None]
    return tap("attn_out", out + _result_change(z, params.W_O, tap))


def _mix(config: Config, q: Heads, k: KVHeads, v: KVHeads, frame: Frame, tap: Tap, dtype) -> Heads:
    """Scores, pattern, and the values that the pattern gathers; a query with no key gathers zero."""
    batch, n_query = q.shape[:2]
    scores = tap("attn_scores", scaled_scores(config, q, k, dtype))
    pattern = tap("pattern", masked_softmax(scores, frame))
    # An edit may attend to any token, the future included, but padding is none.
    pattern = jnp.where((frame.keys >= 0)[:, None, None, :], pattern, 0.0)
    by_group = pattern.reshape(batch, config.n_kv_heads, -1, n_query, k.shape[1])
    # 0 * inf is NaN: a value that is not finite must reach the queries that attend to it, and no others.
    finite = jnp.isfinite(v)
    z = einsum("bhgqk,bkhe->bqhge", by_group, jnp.where(finite, v, 0.0), dtype)
    broken = jnp.moveaxis(~jnp.all(finite, axis=-1), 1, 2)[:, :, None, None]  # [batch, kv_head, 1, 1, key]
    reached = jnp.moveaxis(jnp.any(broken & (by_group != 0), axis=-1), 3, 1).reshape(q.shape[:3])
    return jnp.where(reached[..., None], jnp.nan, z.reshape(q.shape))


def scaled_scores(config: Config, q: Heads, k: KVHeads, dtype) -> Scores:
    """Queries times the keys of their key/value head, scaled."""
    batch, n_query, _, d_head = q.shape
    grouped = (batch, n_query, config.n_kv_heads, config.n_heads // config.n_kv_heads, d_head)
    scores = einsum("bqhge,bkhe->bhgqk", q.reshape(grouped), k, dtype) * config.attn_scale
    return scores.reshape(batch, config.n_heads, n_query, k.shape[1])


def masked_softmax(scores: Scores, frame: Frame) -> Scores:
    """The pattern of scores over the keys that each query may see."""
    allowed = frame.allowed[:, None] & (scores != -jnp.inf)  # an edit may cut a key by -inf; NaN stays NaN
    # A row without any key (padding, or all cut) comes out uniform here and zero below, never NaN.
    pattern = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(allowed, pattern, 0.0)


def _project(config: Config, branch: Branch, W: Array, b: Array | None, name: str, tap: Tap) -> Heads:
    flat = einsum("bpd,di->bpi", branch.normed, W.reshape(config.d_model, -1))
    out = flat.reshape(*flat.shape[:2], *W.shape[1:])
    if b is not None:
        out = out + b.astype(out.dtype)[None, None]
    heads = tap.heads(f"{name}_input")
    if heads is not None:
        before = jnp.broadcast_to(branch.stream[:, :, None], (*branch.stream.shape[:2], heads.size, config.d_model))
        after = tap(f"{name}_input", before, heads)
        norm = jax.vmap(lambda x: normalise(config, branch.params, x, "ln1", tap.edited), in_axes=2, out_axes=2)
        change = einsum("bpjd,dje->bpje", norm(after) - branch.normed[:, :, None], W[:, heads])
        out = out.at[:, :, heads].add(jnp.where(_first_of_each(heads), change, 0.0))
    return tap(name, out)


def _result_change(z: Heads, W_O: Float[Array, "head d_head d_model"], tap: Tap) -> Stream | float:
    """What edits of `result` change in the sum over heads, computed for the edited heads only."""
    heads = tap.heads("result")
    if heads is None:
        return 0.0
    before = einsum("bpje,jed->bpjd", z[:, :, heads], W_O[heads])
    change = tap("result", before, heads) - before
    return jnp.sum(jnp.where(_first_of_each(heads), change, 0.0), axis=2)


def _first_of_each(heads: Int[Array, " k"]) -> Bool[Array, "1 1 k 1"]:
    """Where a head is listed for the first time: one listed twice must count once."""
    seen = jnp.tril(heads[:, None] == heads[None, :], k=-1)
    return ~jnp.any(seen, axis=1)[None, None, :, None]
