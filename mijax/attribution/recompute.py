"""Attention with one query or one key exchanged, for all of them at once (Kramar et al. 2024, AtP*).

Where attention is saturated, the pattern does not change with small changes of a query or key, and its gradient is
honest and useless. The pattern with the query or key of the source run is cheap to compute exactly.
"""

import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Heads, KVHeads, Scores
from mijax.model.attention import masked_softmax, scaled_scores
from mijax.model.position import Frame


def queries_changed(
    frame: Frame, scale: float, k: KVHeads, pattern: Scores, source: Heads, gate: Float[Array, "batch #pos #head 1"]
) -> Scores:
    """The gate of each query times what its row of the pattern changes by."""
    new = masked_softmax(scaled_scores(source, k, scale, source.dtype), frame)
    return jnp.moveaxis(gate[..., 0], 1, 2)[..., None] * (new - pattern)


def keys_changed(
    frame: Frame,
    scale: float,
    q: Heads,
    scores: Scores,
    pattern: Scores,
    source: KVHeads,
    gate: Float[Array, "batch #key #kv_head 1"],
) -> Scores:
    """The gate of each key times what the pattern changes by, summed over keys; where a gate stands for all keys,
    they are exchanged together."""
    new = scaled_scores(q, source, scale, source.dtype)
    gate = jnp.moveaxis(gate[..., 0], 1, 2)[:, :, None]  # [batch, kv_head, 1, key]
    if gate.shape[1] > 1:
        gate = jnp.repeat(gate, q.shape[2] // source.shape[2], axis=1)
    if gate.shape[3] == 1 and new.shape[3] > 1:
        return gate * (masked_softmax(new, frame) - pattern)
    return one_key_changed(scores, new, frame, pattern, gate)


def one_key_changed(
    scores: Scores, new: Scores, frame: Frame, pattern: Scores, gate: Float[Array, "batch #head 1 key"]
) -> Scores:
    """Sum over keys t of gate[t] * (pattern with key t's score new - pattern), without the cube of positions.

    With key t's score new, its weight is w[t] = sigmoid(new[t] - logsumexp of the others' scores), and the others share
    1 - w[t] as they shared 1 - p[t]. Only a row's largest weight can be over a half, so only for it 1 - p[t] is lost to
    rounding, and what the others share is computed without it.
    """
    allowed = frame.sight.allowed[:, None]
    some = jnp.any(allowed, axis=-1, keepdims=True)
    masked = jnp.where(allowed, scores, -jnp.inf)
    keys = jnp.arange(scores.shape[-1]).reshape(1, 1, 1, -1)
    largest = keys == jnp.argmax(masked, axis=-1, keepdims=True)
    without = jnp.where(largest, -jnp.inf, masked)
    total = lambda s: jax.nn.logsumexp(jnp.where(some, s, 0.0), axis=-1, keepdims=True)
    rest = 1 - jnp.where(largest, 0.0, pattern)
    others = jnp.where(largest, total(without), total(masked) + jnp.log(rest))
    w = jnp.where(allowed, jax.nn.sigmoid(new - others), 0.0)
    shared = jnp.where(
        allowed & ~largest, jnp.exp(without - jnp.where(jnp.isfinite(total(without)), total(without), 0.0)), 0.0
    )
    scale = jnp.where(largest | ~allowed, 0.0, (pattern - w) / rest)  # by which the others grow
    scaled, of_largest = gate * scale, lambda x: jnp.sum(jnp.where(largest, x, 0.0), axis=-1, keepdims=True)
    change = gate * (w - pattern) + pattern * (jnp.sum(scaled, axis=-1, keepdims=True) - scaled)
    moved = of_largest(gate * jnp.ones_like(w)) * ((1 - of_largest(w)) * shared - pattern)
    return change + jnp.where(largest, 0.0, moved)
