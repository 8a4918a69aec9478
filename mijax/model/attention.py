"""Attention (MHA, GQA and MQA) with all of its sites. No other module computes it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Asked, Bool, Float, Heads, Int, KVHeads, Stream
from mijax.model.config import Config
from mijax.model.fused import QUERIES, fused_attention
from mijax.model.norm import Norm, normalised, rms_normalised
from mijax.model.numerics import einsum
from mijax.model.rotary import rotate
from mijax.model.scores import ScoreRule, masked_softmax, weighted_values
from mijax.model.tap import State, Visit


class Attention(eqx.Module):
    """Projections, stacked over layers. The layouts let matrix products run without transposing weights."""

    W_Q: Float[Array, "layer d_model head d_head"]
    W_K: Float[Array, "layer d_model kv_head d_head"]
    W_V: Float[Array, "layer d_model kv_head d_head"]
    W_O: Float[Array, "layer head d_head d_model"]
    b_Q: Float[Array, "layer head d_head"] | None
    b_K: Float[Array, "layer kv_head d_head"] | None
    b_V: Float[Array, "layer kv_head d_head"] | None
    b_O: Float[Array, "layer d_model"] | None
    q_norm: Float[Array, "layer #head d_head"] | None
    k_norm: Float[Array, "layer #kv_head d_head"] | None
    sinks: Float[Array, "layer head"] | None


class KVCache(NamedTuple):
    """Keys and values of all tokens of a batch as attention reads them (keys rotated), of one layer or of all."""

    k: KVHeads | Float[Array, "layer batch key kv_head d_head"]
    v: KVHeads | Float[Array, "layer batch key kv_head d_head"]


class Branch(NamedTuple):
    """The input of the q, k and v projections.

    Attributes:
        params: the parameters of ln1; `None` where there is no norm before the projections.
        stream: the residual stream before ln1.
        normed: the residual stream after ln1.
    """

    params: Norm | None
    stream: Stream
    normed: Stream


def attention(
    config: Config,
    params: Attention,
    ln1: Norm | None,
    x: Stream,
    visit: Visit,
    state: State,
    held: KVCache | None = None,
) -> tuple[Asked, State]:
    """The output of attention, at the positions that the frame reads.

    Args:
        config: the architecture.
        params: the projections of one layer (no layer axis).
        ln1: the norm before them, where there is one.
        x: `[batch, pos, d_model]`, the residual stream before the layer.
        visit: the tap in this layer, with the frame of the tokens of `x`.
        state: the tap's state.
        held: keys and values of tokens that are not computed here; `None` where there are none.

    Returns:
        `[batch, query, d_model]`, the output of attention with bias; and the tap's state.
    """
    frame = visit.frame
    normed, state = normalised(config, ln1, x, "ln1", visit, state)
    branch = Branch(ln1, x, normed)
    k, state = _project(config, branch, params.W_K, params.b_K, "k", visit, state)
    v, state = _project(config, branch, params.W_V, params.b_V, "v", visit, state)
    k, state = _as_read(config, k, params.k_norm, "rot_k", visit, state)
    k, v = (frame.join(new, cached) for new, cached in zip((k, v), (None, None) if held is None else held))
    if frame.reading is not None:
        frame, index = frame.reading
        branch, visit = Branch(ln1, x[:, index], normed[:, index]), visit._replace(frame=frame)
    q, state = _project(config, branch, params.W_Q, params.b_Q, "q", visit, state)
    q, state = _as_read(config, q, params.q_norm, "rot_q", visit, state)
    z, state = _mix(config, frame.spread(q), k, v, params.sinks, visit, state, params.W_Q.dtype)
    z, state = visit("z", frame.gather(z), state)
    z, edited, state = _results(z, params.W_O, visit, state)
    # W_O is flattened to one matrix, whose transpose XLA's products read as it is; with a head axis XLA would copy it.
    out = einsum("bpi,id->bpd", z.reshape(*z.shape[:2], -1), params.W_O.reshape(-1, config.d_model))
    if params.b_O is not None:
        out = out + params.b_O.astype(out.dtype)[None, None]
    return out + edited, state


def _as_read(
    config: Config, x: Heads, norm: Array | None, name: str, visit: Visit, state: State
) -> tuple[Heads, State]:
    """Queries or keys as attention reads them (`name` is "rot_q" or "rot_k"), and the tap's state."""
    if norm is not None:
        axes = (-1,) if config.qk_norm == "head" else (-2, -1)
        x = rms_normalised(x, config.norm_eps, axes) * norm.astype(x.dtype)[None, None]
    if visit.frame.sight.rotary is not None:
        x = rotate(x, visit.frame.sight.rotary)
    return visit(name, x, state) if name in visit.sites else (x, state)


def _mix(
    config: Config, q: Heads, k: KVHeads, v: KVHeads, sinks: Array | None, visit: Visit, state: State, dtype: Any
) -> tuple[Heads, State]:
    """`z`, the pattern-weighted sum of values (zero for a query without any key), and the tap's state."""
    rule, frame = ScoreRule.of(config), visit.frame
    if q.shape[1] > QUERIES and visit.tap.sites.isdisjoint({"attn_scores", "pattern"}):
        return fused_attention(rule, q, k, v, frame, dtype, sinks), state
    scores, state = visit("attn_scores", rule(q, k, frame, dtype), state)
    pattern, state = visit("pattern", masked_softmax(scores, frame, sinks), state)
    # An edited pattern may attend to any real token, future ones included, but never to padding.
    pattern = jnp.where((frame.keys >= 0)[:, None, None, :], pattern, 0.0)
    return weighted_values(pattern, v, dtype), state


def _project(
    config: Config, branch: Branch, W: Array, b: Array | None, name: str, visit: Visit, state: State
) -> tuple[Heads, State]:
    """Queries, keys or values (`name` is "q", "k" or "v"), and the tap's state.

    Where the tap is called at the heads' input site (`q_input`, ...), each listed head whose input is edited has the
    projection of that input. (Where it is not, the change of zero is projected: its derivative is that of the input.)
    """
    flat = einsum("bpd,di->bpi", branch.normed, W.reshape(config.d_model, -1))
    out = flat.reshape(*flat.shape[:2], *W.shape[1:])
    heads = visit.heads(f"{name}_input")
    if heads is not None:
        before = jnp.broadcast_to(branch.stream[:, :, None], (*branch.stream.shape[:2], heads.size, config.d_model))
        after, state = visit(f"{name}_input", before, state, heads)
        copy = visit._replace(copy=True)
        norm = jax.vmap(lambda x: normalised(config, branch.params, x, "ln1", copy, state)[0], in_axes=2, out_axes=2)
        edited, new = _differ(after, before), norm(after)
        new = einsum("bpjd,dje->bpje", new - jnp.where(edited, 0.0, branch.normed[:, :, None]), W[:, heads])
        out = out.at[:, :, heads].set(jnp.where(edited, 0.0, out[:, :, heads]))
        out = out.at[:, :, heads].add(jnp.where(_first_of_each(heads), new, 0.0))
    if b is not None:
        out = out + b.astype(out.dtype)[None, None]
    return visit(name, out, state)


def _results(
    z: Heads, W_O: Float[Array, "head d_head d_model"], visit: Visit, state: State
) -> tuple[Heads, Stream | float, State]:
    """`z` without the heads whose `result` is edited, the sum of these heads' results, and the tap's state.

    (Of listed heads that are not edited, the sum has the change of zero: its derivative is that of the result.)
    """
    heads = visit.heads("result")
    if heads is None:
        return z, 0.0, state
    before = einsum("bpje,jed->bpjd", z[:, :, heads], W_O[heads])
    after, state = visit("result", before, state, heads)
    edited = _differ(after, before)
    results = jnp.where(_first_of_each(heads), after - jnp.where(edited, 0.0, before), 0.0)
    return z.at[:, :, heads].set(jnp.where(edited, 0.0, z[:, :, heads])), jnp.sum(results, axis=2), state


def _differ(after: Array, before: Array) -> Bool[Array, "batch pos k 1"]:
    """Which heads' vectors an edit has changed; NaN differs from itself."""
    return jnp.any(after != before, axis=-1, keepdims=True)


def _first_of_each(heads: Int[Array, " k"]) -> Bool[Array, "1 1 k 1"]:
    """Where a head is listed for the first time: a head listed twice must count once."""
    repeats = jnp.tril(heads[:, None] == heads[None, :], k=-1)
    return ~jnp.any(repeats, axis=1)[None, None, :, None]
