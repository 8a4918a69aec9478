"""Attention with one query or one key exchanged, for all of them at once (Kramar et al. 2024, AtP*).

Where attention is saturated, the pattern does not change with small changes of a query or key: its gradient is
correct, but says nothing of a large change. The pattern with the query or key of the source run is cheap to compute
exactly.
"""

import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Heads, KVHeads, Scores
from mijax.model.position import Frame
from mijax.model.scores import ScoreRule, masked_softmax


def queries_changed(
    frame: Frame, rule: ScoreRule, k: KVHeads, pattern: Scores, source: Heads, gate: Float[Array, "batch #pos #head 1"]
) -> Scores:
    """The change of the pattern where queries are exchanged, each weighted by its gate.

    Args:
        frame: the positions, with the mask of keys that a query may attend to.
        rule: how scores are computed.
        k: the base run's keys.
        pattern: the base run's pattern.
        source: the source run's queries.
        gate: one gate for each query.

    Returns:
        `[batch, head, query, key]`, the gate of each query times the change of its row.
    """
    new = masked_softmax(rule(source, k, frame, source.dtype), frame)
    return jnp.moveaxis(gate[..., 0], 1, 2)[..., None] * (new - pattern)


def keys_changed(
    frame: Frame,
    rule: ScoreRule,
    q: Heads,
    scores: Scores,
    pattern: Scores,
    source: KVHeads,
    gate: Float[Array, "batch #key #kv_head 1"],
) -> Scores:
    """The change of the pattern where keys are exchanged, each weighted by its gate, summed over keys.

    Args:
        frame: the positions, with the mask of keys that a query may attend to.
        rule: how scores are computed.
        q: the base run's queries.
        scores: the base run's scores, before the mask.
        pattern: the base run's pattern.
        source: the source run's keys.
        gate: one gate for each key, which are then exchanged one by one; or one for all keys, which are then
            exchanged together.

    Returns:
        `[batch, head, query, key]`.
    """
    new = rule(q, source, frame, source.dtype)
    gate = jnp.moveaxis(gate[..., 0], 1, 2)[:, :, None]  # [batch, kv_head, 1, key]
    if gate.shape[1] > 1:
        gate = jnp.repeat(gate, q.shape[2] // source.shape[2], axis=1)
    if gate.shape[3] == 1 and new.shape[3] > 1:
        return gate * (masked_softmax(new, frame) - pattern)
    return _one_key_changed(scores, new, frame, pattern, gate)


def _one_key_changed(
    scores: Scores, new: Scores, frame: Frame, pattern: Scores, gate: Float[Array, "batch #head 1 key"]
) -> Scores:
    """Sum over keys t of gate[t] * (pattern with key t's score new - pattern), without an array of query x key x key.

    In a row with scores s and weights p, where key t alone is exchanged, its weight becomes w[t], and the other
    keys share the remaining weight in their former proportions:

        w[t] = sigmoid(new[t] - log(sum over i != t of exp(s[i])))        p'[j] = p[j] (1 - w[t]) / (1 - p[t])

    So key j gains `gate[j] (w[j] - p[j])` from the exchange of j itself, and `p[j] gate[t] (p[t] - w[t]) / (1 -
    p[t])` from that of each other key t. Where p[t] is near 1, rounding dominates that quotient. Only the largest
    weight of a row can exceed 1/2: for this key alone, the shares of the other keys are computed as a softmax over
    these.
    """
    allowed = frame.sight.allows(frame.queries, frame.keys)[:, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    keys = jnp.arange(scores.shape[-1]).reshape(1, 1, 1, -1)
    largest = keys == jnp.argmax(scores, axis=-1, keepdims=True)
    of_largest = lambda x: jnp.sum(jnp.where(largest, x, 0.0), axis=-1, keepdims=True)
    log_sum = lambda s: jax.nn.logsumexp(s, axis=-1, keepdims=True)

    smaller = jnp.where(largest, -jnp.inf, scores)
    small = jnp.where(largest, 0.0, pattern)  # weights of at most 1/2
    log_others = jnp.where(largest, log_sum(smaller), log_sum(scores) + jnp.log1p(-small))
    w = jnp.where(allowed, jax.nn.sigmoid(new - log_others), 0.0)

    from_itself = gate * (w - pattern)
    growth = gate * jnp.where(largest | ~allowed, 0.0, (small - w) / (1 - small))
    from_smaller = pattern * (jnp.sum(growth, axis=-1, keepdims=True) - growth)
    total = log_sum(smaller)
    shares = jnp.where(jnp.isfinite(total), jnp.exp(smaller - jnp.where(jnp.isfinite(total), total, 0.0)), 0.0)
    from_largest = of_largest(gate) * jnp.where(largest, 0.0, (1 - of_largest(w)) * shares - pattern)
    return from_itself + from_smaller + from_largest
