"""Metrics of answers: their logits, probabilities and ranks at one position."""

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, ArrayLike, Float, Int, Logits
from mijax.forward import Out
from mijax.metrics.metric import Metric, position, readout_of
from mijax.model.readout import Readout
from mijax.model.tokens import integers


def _ids(value: ArrayLike) -> Int[Array, "..."]:
    value = jnp.asarray(integers(value, "answers of a metric"))
    if value.ndim > 1 or value.dtype == bool:
        raise ValueError(f"answers of a metric are one for all, or one per example, given shape {value.shape}")
    return value


class OfAnswer(Metric):
    """A metric of one answer's logit among all logits at one position; abstract.

    Args:
        answer: one token id, or one per example (`[batch]`).
        pos: one position, negative from the end; or one per example, shaped `[batch, 1]` as in `Where`.

    Raises:
        ValueError: for an answer or a position of another rank.
    """

    per_example = True
    answer: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)


@final
class Logit(OfAnswer):
    """The logit of `answer` at `pos`.

    Args:
        answer: one token id, or one per example (`[batch]`).
        pos: one position, negative from the end; or one per example, shaped `[batch, 1]` as in `Where`.

    Raises:
        ValueError: for an answer or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> out = mj.run(model, [[1, 2, 3], [4, 5, 6]])
    >>> values, last = mj.metrics.logit([7, 8])(out), out.readout.logits(pos=-1)
    >>> bool(jax.numpy.allclose(values, last[jax.numpy.arange(2), jax.numpy.array([7, 8])]))
    True
    """

    name = "logit"
    users_code = False

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` logits."""
        return logits_at(readout_of(self, out), self.pos, self.answer)[:, 0]


@final
class LogitDiff(Metric):
    """The logit of `correct` minus that of `wrong`, at `pos`.

    Args:
        correct: one token id, or one per example (`[batch]`).
        wrong: the token id, or ids, of which the logit is subtracted.
        pos: as in `logit`.

    Raises:
        ValueError: for an answer or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.logit_diff(7, 8)(mj.run(model, [[1, 2, 3]])).shape
    (1,)
    """

    name = "logit_diff"
    users_code = False
    per_example = True
    correct: Any = eqx.field(converter=_ids)
    wrong: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` differences of logits."""
        logits = logits_at(readout_of(self, out), self.pos, self.correct, self.wrong)
        return logits[:, 0] - logits[:, 1]


@final
class LogProb(OfAnswer):
    """The natural logarithm of the probability of `answer` at `pos`.

    Args:
        answer: one token id, or one per example (`[batch]`).
        pos: as in `logit`.

    Raises:
        ValueError: for an answer or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.log_prob(7)(mj.run(model, [[1, 2, 3]])).shape
    (1,)
    """

    name = "log_prob"
    users_code = False

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` log-probabilities, in nats."""
        return _log_prob(readout_of(self, out), self.answer, self.pos)


@final
class Prob(OfAnswer):
    """The probability of `answer` at `pos`.

    Args:
        answer: one token id, or one per example (`[batch]`).
        pos: as in `logit`.

    Raises:
        ValueError: for an answer or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.prob(7, pos=0)(mj.run(model, [[1, 2, 3]])).shape
    (1,)
    """

    name = "prob"
    users_code = False

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` probabilities."""
        return jnp.exp(_log_prob(readout_of(self, out), self.answer, self.pos))


@final
class Rank(OfAnswer):
    """The number of tokens that have a larger logit than `answer` at `pos` (0: the answer is on top).

    Args:
        answer: one token id, or one per example (`[batch]`).
        pos: as in `logit`.

    Raises:
        ValueError: for an answer or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.rank(7)(mj.run(model, [[1, 2, 3]])).shape
    (1,)
    """

    name = "rank"
    users_code = False

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` ranks as floats, NaN where a logit is NaN."""
        return _rank(readout_of(self, out), self.answer, self.pos)


@final
class Accuracy(OfAnswer):
    """1 where no token has a larger logit than `answer` at `pos`, else 0.

    Args:
        answer: one token id, or one per example (`[batch]`).
        pos: as in `logit`.

    Raises:
        ValueError: for an answer or a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.accuracy(7)(mj.run(model, [[1, 2, 3]])).shape
    (1,)
    """

    name = "accuracy"
    users_code = False

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` zeros and ones as floats, NaN where a logit is NaN."""
        larger = _rank(readout_of(self, out), self.answer, self.pos)
        return jnp.where(jnp.isnan(larger), larger, jnp.where(larger == 0, 1.0, 0.0).astype(larger.dtype))


def logits_at(readout: Readout, pos: Int[Array, "..."], *answers: Int[Array, "..."]) -> Logits:
    """Compute the logits of answers at one position of each example.

    Args:
        readout: the readout of a run.
        pos: one position, negative from the end; or one per example as `[batch, 1]`.
        answers: `n` answers, each one token id, or one per example (`[batch]`); without answers, the whole vocabulary.

    Returns:
        `[batch, n]` logits, in the order of the answers; `[batch, vocab]` without answers.

    Raises:
        ValueError: for a position or an answer per example of another number of examples than the batch has.
        IndexError: for a position that a prompt does not have, or a token outside the vocabulary. Inside a trace,
            where values are not known, these logits are NaN instead.
    """
    batch = readout.final.shape[0]
    for index in (pos, *answers):
        if index.ndim and index.shape[0] != batch:
            raise ValueError(f"the metric has {index.shape[0]} answers or positions, the batch {batch} examples")
    column = lambda index: jnp.broadcast_to(index, (batch,))[:, None]
    tokens = jnp.concatenate([column(a) for a in answers], axis=1) if answers else None
    return readout.logits(pos=pos, tokens=tokens).reshape(batch, -1)


def _log_prob(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    return logits_at(readout, pos, answer)[:, 0] - jax.nn.logsumexp(logits_at(readout, pos), axis=-1)


def _rank(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    logits = logits_at(readout, pos)
    no_distribution = ~jnp.isfinite(jnp.max(logits, axis=-1))  # NaN, or a logit of infinity
    failed = no_distribution | jnp.isnan(logits_at(readout, pos, answer)[:, 0])
    answer_logit = jnp.take_along_axis(logits, jnp.broadcast_to(answer, logits.shape[:1])[:, None], axis=1, mode="clip")
    larger = jnp.sum(logits > answer_logit, axis=-1).astype(logits.dtype)
    # A comparison with NaN is False: a failed run would have the best rank.
    return jnp.where(failed, jnp.nan, larger)
