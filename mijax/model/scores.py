"""Attention scores, and the pattern that a softmax makes of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Heads, KVHeads, Scores
from mijax.model.config import Config
from mijax.model.numerics import einsum
from mijax.model.position import Frame


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
        grouped = q.reshape(batch, n_query, n_kv_heads, n_heads // n_kv_heads, d_head)
        scores = einsum("bqhge,bkhe->bhgqk", grouped, k, dtype) * self.scale
        scores = scores.reshape(batch, n_heads, n_query, n_key)
        if self.cap:
            scores = self.cap * jnp.tanh(scores / self.cap)
        if not self.slopes:
            return scores
        queries = frame.spread(frame.positions[..., None])[..., 0]
        distance = (queries[:, :, None] - frame.keys[:, None, :]).astype(scores.dtype)
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
    allowed = frame.sight.allowed[:, None] & (scores != -jnp.inf)  # NaN is not masked and stays NaN
    masked = jnp.where(allowed, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(scores.dtype)[None, :, None, None], (*scores.shape[:-1], 1))
        masked = jnp.concatenate([masked, sink], axis=-1)
    pattern = jax.nn.softmax(masked, axis=-1)[..., : scores.shape[-1]]
    # A row without any key (padding, or all keys cut) is NaN so far, and so are its derivatives: neither goes further.
    return jnp.where(allowed, pattern, 0.0)
