"""Metrics of whole next-token distributions: divergence from a reference, and loss on the prompts."""

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Float, Int, Logits, Real
from mijax.forward import Out
from mijax.metrics.answers import logits_at
from mijax.metrics.metric import Metric, position, readout_of
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens, as_tokens, is_concrete


@final
class KL(Metric):
    """The divergence KL(reference || run), in nats, of the next-token distributions.

    Args:
        reference: logits or log-probabilities: `[batch, vocab]` for one position, `[batch, pos, vocab]` with
            `pos=None`.
        pos: as in `logit`; or `None`, which gives the mean over real tokens.

    Raises:
        ValueError: for a reference whose rank does not go with `pos`, or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> out = mj.run(model, [[1, 2, 3]])
    >>> abs(float(mj.metrics.kl(out.logits, pos=None)(out)[0])) < 1e-6
    True
    """

    name = "kl"
    users_code = False
    per_example = True
    reference: Any = eqx.field(converter=lambda x: x if isinstance(x, jax.Array) else jnp.array(x))
    pos: Any = eqx.field(converter=lambda pos: None if pos is None else position(pos), default=-1)

    def __check_init__(self) -> None:
        expected = 3 if self.pos is None else 2
        if self.reference.ndim != expected:
            shown = "None" if self.pos is None else "one position"
            raise ValueError(
                f"with pos={shown}, reference must be logits of rank {expected}, given shape {self.reference.shape}"
            )

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` divergences, in nats."""
        return _kl(readout_of(self, out), self.reference, self.pos)


@final
class CrossEntropy(Metric):
    """The mean loss, in nats, of predicting each prompt's next tokens.

    Padding is excluded, at either end or between tokens.

    Args:
        tokens: the prompts of the run.

    Raises:
        ValueError: for a prompt of fewer than two real tokens, which has no next token.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.cross_entropy([[1, 2, 3]])(mj.run(model, [[1, 2, 3]])).shape
    (1,)
    """

    name = "cross_entropy"
    users_code = False
    per_example = True
    tokens: Tokens = eqx.field(converter=as_tokens)

    def __check_init__(self) -> None:
        if is_concrete(self.tokens.mask):
            lengths = np.asarray(self.tokens.mask).sum(axis=1)
            if (lengths < 2).any():
                raise ValueError(f"example {int(np.argmin(lengths))} has fewer than two tokens, so none to predict")

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` mean losses, in nats."""
        return _cross_entropy(readout_of(self, out), self.tokens)


def _kl(readout: Readout, reference: Logits, pos: Array | None) -> Float[Array, " batch"]:
    logits = readout.logits() if pos is None else logits_at(readout, pos)
    if reference.shape != logits.shape:
        raise ValueError(f"kl's reference has shape {reference.shape}, the run's logits {logits.shape}")
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference.astype(logits.dtype))
    p = jnp.exp(log_p)
    log_ratio = jnp.where(p == 0, 0.0, log_p) - jnp.where(p == 0, 0.0, log_q)  # p = NaN is not 0, and stays NaN
    divergence = jnp.sum(p * log_ratio, axis=-1)
    return _mean(divergence, jnp.asarray(readout.tokens.mask)) if pos is None else divergence


def _cross_entropy(readout: Readout, tokens: Tokens) -> Float[Array, " batch"]:
    logits = readout.logits()
    if tokens.ids.shape != logits.shape[:2]:
        raise ValueError(f"cross_entropy was given tokens of shape {tokens.ids.shape}, the run has {logits.shape[:2]}")
    ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
    outside = mask & ((ids < 0) | (ids >= logits.shape[-1]))
    if is_concrete(outside) and np.any(outside):
        raise IndexError(
            f"token {np.asarray(ids)[np.asarray(outside)][0]} is outside the vocabulary of {logits.shape[-1]}"
        )
    following, has_next = _next_real(mask)
    take = lambda x: jnp.take_along_axis(x, following, axis=1)
    targets = take(jnp.where(outside | ~mask, 0, ids))
    loss = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.where(take(outside), jnp.nan, loss)
    return _mean(loss, mask & has_next)


def _next_real(mask: Bool[Array, "batch pos"]) -> tuple[Int[Array, "batch pos"], Bool[Array, "batch pos"]]:
    """The column of the next real token after each column, and whether there is one."""
    n = mask.shape[1]
    columns = jnp.where(mask, jnp.arange(n, dtype=jnp.int32)[None], n)
    after = jnp.pad(columns[:, 1:], ((0, 0), (0, 1)), constant_values=n)
    following = jax.lax.cummin(after, axis=1, reverse=True)
    return jnp.minimum(following, n - 1), following < n


def _mean(x: Real[Array, "batch pos"], mask: Array) -> Float[Array, " batch"]:
    return jnp.sum(jnp.where(mask, x, 0.0), axis=1) / jnp.sum(mask, axis=1).astype(x.dtype)
