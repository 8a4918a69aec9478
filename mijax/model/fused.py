"""Attention for runs that do not read its scores or its pattern: those of some queries at a time are in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Heads, Int, KVHeads
from mijax.model.position import Frame, Whole
from mijax.model.scores import ScoreRule, softmax_terms, weighted_values

QUERIES = 256
"""The queries of a block: blocks of 128 to 256 take the same time (`benchmarks.long_prompts`), smaller ones more."""

SEGMENTS = 4
"""How many different numbers of keys a causal run compiles: all keys for all queries would be twice the work."""


def fused_attention(
    rule: ScoreRule,
    q: Heads,
    k: KVHeads,
    v: KVHeads,
    frame: Frame,
    dtype: Any,
    sinks: Float[Array, " head"] | None = None,
) -> Heads:
    """The pattern-weighted sum of values, computed for `QUERIES` queries at a time.

    In a causal run, queries are weighed against the keys up to the end of their segment only.

    Args:
        rule: how scores are computed.
        q: `[batch, query, head, d_head]`, grouped as `frame.spread` does.
        k: `[batch, key, kv_head, d_head]`.
        v: `[batch, key, kv_head, d_head]`.
        frame: says which keys each query may see.
        dtype: the dtype in which to multiply, usually that of the parameters.
        sinks: as in `mijax.model.scores.masked_softmax`.

    Returns:
        `[batch, query, head, d_head]`, zero for a query without any key.
    """
    n_queries, by_segment = q.shape[1], frame.in_order and frame.sight.causal
    size = QUERIES * -(-n_queries // (QUERIES * SEGMENTS)) if by_segment else n_queries
    segments = []
    for start in range(0, n_queries, size):
        stop = min(start + size, n_queries)
        n_keys = stop if by_segment else k.shape[1]

        def block(q: Heads, queries: Int[Array, "batch query"], n_keys: int = n_keys) -> Heads:
            part = Whole(queries, frame.keys[:, :n_keys], frame.lengths, frame.sight)
            return _attend(rule, q, k[:, :n_keys], v[:, :n_keys], part, dtype, sinks)

        segments.append(_in_blocks(block, q[:, start:stop], frame.queries[:, start:stop]))
    return jnp.concatenate(segments, axis=1)


def _attend(rule: ScoreRule, q: Heads, k: KVHeads, v: KVHeads, frame: Frame, dtype: Any, sinks: Array | None) -> Heads:
    # The sum is divided in place of each weight: there are fewer dimensions than keys.
    terms, total = softmax_terms(rule(q, k, frame, dtype), frame, sinks)
    return weighted_values(terms, v, dtype) / jnp.moveaxis(jnp.where(total == 0, 1.0, total), 1, 2)


def _in_blocks(function: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """`function(x, y)` of arrays `[batch, query, ...]`, called with `QUERIES` queries at a time."""
    n = x.shape[1] // QUERIES
    if n == 0 or x.shape[1] == QUERIES:
        return function(x, y)
    split = lambda x: jnp.moveaxis(x[:, : n * QUERIES].reshape(x.shape[0], n, QUERIES, *x.shape[2:]), 1, 0)
    blocks = jnp.moveaxis(jax.lax.map(lambda xy: function(*xy), (split(x), split(y))), 0, 1)
    blocks = blocks.reshape(x.shape[0], n * QUERIES, *blocks.shape[3:])
    rest = function(x[:, n * QUERIES :], y[:, n * QUERIES :]) if x.shape[1] % QUERIES else blocks[:, :0]
    return jnp.concatenate([blocks, rest], axis=1)
