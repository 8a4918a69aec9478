"""Attention scores, the pattern that a softmax makes of them, and the sum of values that it weighs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mijax._types import Array, Bool, Float, Heads, KVHeads, Scores
from mijax.model.config import Config
from mijax.model.numerics import einsum
from mijax.model.position import Frame

MANY = 2**16
"""The number of a head's weights from which on they are searched only where a value is not finite: 5 % of a forward pass of
1,024 tokens, for .4 s of compilation."""


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """How scores are computed from queries and keys.

    Attributes:
        scale: the factor of their products.
        cap: where above 0, a score `s` becomes `cap * tanh(s / cap)`.
        slopes: of each head, by how much a score decreases with each token between query and key (ALiBi); empty for
            none.
        sinks: whether a further score takes its share of the softmax.
    """

    scale: float = 1.0
    cap: float = 0.0
    slopes: tuple[float, ...] = ()
    sinks: bool = False

    @classmethod
    def of(cls, config: Config) -> "ScoreRule":
        """The rule of a transformer.

        Args:
            config: the architecture.
        """
        slopes = alibi_slopes(config.n_heads) if config.positions == "alibi" else ()
        return cls(config.attn_scale, config.scores_cap, slopes, config.sinks)

    def __call__(self, q: Heads, k: KVHeads, frame: Frame, dtype: Any) -> Scores:
        """The scores of each query with the keys of its key/value head, before the mask.

        Args:
            q: `[batch, query, head, d_head]`, grouped as `frame.spread` does.
            k: `[batch, key, kv_head, d_head]`; the heads of `q` are `kv_head` groups of equal size.
            frame: the positions of the tokens.
            dtype: the dtype in which to multiply, usually that of the parameters.

        Returns:
            `[batch, head, query, key]`.
        """
        (batch, n_query, n_heads, d_head), (_, n_key, n_kv_heads, _) = q.shape, k.shape
        # Queries are put into the order of the scores first: XLA's products would write the scores in another order, and
        # move them, which are many more.
        grouped = jnp.moveaxis(q.reshape(batch, n_query, n_kv_heads, n_heads // n_kv_heads, d_head), 1, 3)
        scores = einsum("bhgqe,bhke->bhgqk", grouped, jnp.moveaxis(k, 1, 2), dtype) * self.scale
        scores = scores.reshape(batch, n_heads, n_query, n_key)
        if self.cap:
            scores = self.cap * jnp.tanh(scores / self.cap)
        if not self.slopes:
            return scores
        distance = (frame.queries[:, :, None] - frame.keys[:, None, :]).astype(scores.dtype)
        return scores - jnp.asarray(self.slopes, scores.dtype)[None, :, None, None] * distance[:, None]


def alibi_slopes(n_heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi (Press et al. 2022): powers of `2 ** (-8 / n)`, with `n` the number of heads.

    Where it is no power of two, those of the next smaller one, and then every second of twice as many.

    Args:
        n_heads: the number of heads.

    Returns:
        One slope for each head.

    >>> alibi_slopes(2), alibi_slopes(3)
    ((0.0625, 0.00390625), (0.0625, 0.00390625, 0.25))
    """
    n = 2 ** int(math.log2(n_heads))
    powers = lambda n: [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    return (*powers(n), *powers(2 * n)[::2][: n_heads - n])


def masked_softmax(scores: Scores, frame: Frame, sinks: Float[Array, " head"] | None = None) -> Scores:
    """The attention pattern: softmax of the scores over the keys that each query may see.

    A key with a score of -inf is cut, as an edit may do. A query without any key has a pattern of zeros.

    Args:
        scores: `[batch, head, query, key]`, before the causal and padding mask.
        frame: says which keys each query may see.
        sinks: for each head a further score, whose share of the softmax is dropped.

    Returns:
        `[batch, head, query, key]`, rows that sum to one (with sinks: to less), or to zero.
    """
    masked, allowed = _masked(scores, frame)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(scores.dtype)[None, :, None, None], (*scores.shape[:-1], 1))
        masked = jnp.concatenate([masked, sink], axis=-1)
    pattern = jax.nn.softmax(masked, axis=-1)[..., : scores.shape[-1]]
    # A row without any key (padding, or all keys cut) is NaN so far, and so are its derivatives: neither goes further.
    return jnp.where(allowed, pattern, 0.0)


def softmax_terms(
    scores: Scores, frame: Frame, sinks: Float[Array, " head"] | None = None
) -> tuple[Scores, Float[Array, "batch head query 1"]]:
    """The terms of the softmax over the keys that each query may see, and their sum: the pattern is their quotient.

    Args:
        scores: `[batch, head, query, key]`, before the causal and padding mask.
        frame: says which keys each query may see.
        sinks: as in `masked_softmax`.

    Returns:
        `[batch, head, query, key]`, exponentials of the scores, divided by that of the row's largest; and their sum,
        with that of the sink. Both are zero for a query without any key.
    """
    masked, _ = _masked(scores, frame)
    largest = jnp.max(jax.lax.stop_gradient(masked), axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(scores.dtype)[None, :, None, None]
        largest = jnp.maximum(largest, jax.lax.stop_gradient(sinks))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    terms = jnp.exp(masked - largest)
    total = jnp.sum(terms, axis=-1, keepdims=True)
    return terms, total if sinks is None else total + jnp.exp(sinks - largest)


def _masked(scores: Scores, frame: Frame) -> tuple[Scores, Bool[Array, "batch head query key"]]:
    """The scores, -inf where a query may not see a key, and where it may."""
    allowed = frame.sight.allows(frame.queries, frame.keys)[:, None] & (scores != -jnp.inf)  # NaN stays NaN
    return jnp.where(allowed, scores, -jnp.inf), allowed


def weighted_values(weights: Scores, v: KVHeads, dtype: Any) -> Heads:
    """The sum of the values of all keys, weighted.

    Args:
        weights: `[batch, head, query, key]`.
        v: `[batch, key, kv_head, d_head]`; a value that is not finite makes NaN of the queries that give it a weight,
            and of no others, although 0 * inf is NaN.
        dtype: the dtype in which to multiply.

    Returns:
        `[batch, query, head, d_head]`.
    """
    batch, n_heads, n_query, n_key = weights.shape
    by_group = weights.reshape(batch, v.shape[2], -1, n_query, n_key)
    finite = jnp.isfinite(v.astype(dtype))  # which may have fewer bits, and no place for a large value
    z = einsum("bhgqk,bhke->bhgqe", by_group, jnp.moveaxis(jnp.where(finite, v, 0.0), 1, 2), dtype)
    bad_keys = jnp.moveaxis(~jnp.all(finite, axis=-1), 1, 2)[:, :, None, None]  # [batch, kv_head, 1, 1, key]
    weighed = lambda weights: jnp.any(bad_keys & (weights != 0), axis=-1)
    none = lambda weights: jnp.zeros_like(weights[..., 0], dtype=bool)
    few = n_query * n_key < MANY
    bad = weighed(by_group) if few else jax.lax.cond(jnp.any(bad_keys), weighed, none, by_group)
    z = jnp.where(bad[..., None], jnp.nan, z)
    return jnp.moveaxis(z, 3, 1).reshape(batch, n_query, n_heads, v.shape[3])
