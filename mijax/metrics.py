"""Metrics: functions from a readout to one number per example, with their answers as array leaves.

Each computes only the logits that it needs. New answers of the same shape never recompile. A
metric of your own is any function of the `Readout`; make it an Equinox module, or a
`jax.tree_util.Partial`, where it holds arrays.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Float, Int, Logits, Real
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens, as_tokens, integers, is_concrete

AnyMetric: TypeAlias = Callable[[Readout], Array]
"""A function from a readout to one number per example. Where it has an attribute `pos` (one position, or one per
example as `[batch, 1]`, as metrics here take them), a sweep computes no other positions' final stream, and it finds NaN there. Where its
attribute `per_example` is true, a method `take(examples)` gives the metric of some of the examples, and sweeps and attribution can
split a batch."""


class Metric(eqx.Module):
    """A named function of a readout and of arrays; `metric(readout)` gives `[batch]`.

    `per_example` says that every array of rank 1 or more has the examples in front.
    """

    name: str = eqx.field(static=True)
    function: Callable[..., Float[Array, " batch"]] = eqx.field(static=True)
    arguments: dict[str, Any]
    per_example: bool = eqx.field(static=True, default=False)

    def __call__(self, readout: Readout) -> Float[Array, " batch"]:
        """One number per example."""
        if not isinstance(readout, Readout):
            raise TypeError(
                f"metric {self.name!r} reads a run's readout, mijax.run(...).readout, given {type(readout).__name__}"
            )
        return self.function(readout, **self.arguments)

    @property
    def is_own(self) -> bool:
        """Whether the function is one of mijax's, which reads nothing but its arguments."""
        return self.function.__module__ == __name__

    @property
    def pos(self) -> Int[Array, "..."] | None:
        """The position that is read, or one per example; `None` where all may be."""
        return self.arguments.get("pos")

    def take(self, examples: Int[Array, " k"] | Int[np.ndarray, " k"]) -> "Metric":
        """The metric of some of the examples; `ValueError` where it is not said which arrays are theirs."""
        if not self.per_example:
            raise ValueError(f"metric {self.name!r} does not say that its arrays are per example")
        own = jax.tree.map(lambda a: a[examples] if jnp.ndim(a) else a, self.arguments)
        return Metric(self.name, self.function, own, self.per_example)

    def __repr__(self):
        return f"{self.name}({', '.join(self.arguments)})"


def logit(answer: ArrayLike, pos: ArrayLike = -1) -> Metric:
    """The logit of `answer` at `pos`.

    `answer` is one token id, or one per example (`[batch]`); `pos` one position, negative from the end, or one per example,
    as `Where` takes it: `[batch, 1]`. Raises `ValueError` for other ranks.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> readout = mj.run(model, [[1, 2, 3], [4, 5, 6]]).readout
    >>> given, wanted = mj.metrics.logit([7, 8])(readout), readout.logits(pos=-1)[jax.numpy.arange(2), jax.numpy.array([7, 8])]
    >>> bool(jax.numpy.allclose(given, wanted))
    True
    """
    return Metric("logit", _logit, {"answer": _ids(answer), "pos": position(pos)}, per_example=True)


def logit_diff(correct: ArrayLike, wrong: ArrayLike, pos: ArrayLike = -1) -> Metric:
    """The logit of `correct` minus that of `wrong`; indices as in `logit`.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.logit_diff(7, 8)(mj.run(model, [[1, 2, 3]]).readout).shape
    (1,)
    """
    return Metric(
        "logit_diff",
        _logit_diff,
        {"correct": _ids(correct), "wrong": _ids(wrong), "pos": position(pos)},
        per_example=True,
    )


def log_prob(answer: ArrayLike, pos: ArrayLike = -1) -> Metric:
    """The natural logarithm of the probability of `answer`; indices as in `logit`.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.log_prob(7)(mj.run(model, [[1, 2, 3]]).readout).shape
    (1,)
    """
    return Metric("log_prob", _log_prob, {"answer": _ids(answer), "pos": position(pos)}, per_example=True)


def prob(answer: ArrayLike, pos: ArrayLike = -1) -> Metric:
    """The probability of `answer`; indices as in `logit`.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.prob(7, pos=0)(mj.run(model, [[1, 2, 3]]).readout).shape
    (1,)
    """
    return Metric("prob", _prob, {"answer": _ids(answer), "pos": position(pos)}, per_example=True)


def rank(answer: ArrayLike, pos: ArrayLike = -1) -> Metric:
    """How many tokens have a larger logit than `answer` (0: it is on top); indices as in `logit`.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.rank(7)(mj.run(model, [[1, 2, 3]]).readout).shape
    (1,)
    """
    return Metric("rank", _rank, {"answer": _ids(answer), "pos": position(pos)}, per_example=True)


def accuracy(answer: ArrayLike, pos: ArrayLike = -1) -> Metric:
    """1 where no token has a larger logit than `answer`, else 0; indices as in `logit`.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.accuracy(7)(mj.run(model, [[1, 2, 3]]).readout).shape
    (1,)
    """
    return Metric("accuracy", _accuracy, {"answer": _ids(answer), "pos": position(pos)}, per_example=True)


def kl(reference: ArrayLike, pos: ArrayLike | None = -1) -> Metric:
    """The divergence KL(reference || run) in nats of the next-token distributions.

    `reference` are logits (or log-probabilities): `[batch, vocab]` with `pos` as in `logit`; or
    `[batch, pos, vocab]` with `pos=None`, which gives the mean over real tokens.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> out = mj.run(model, [[1, 2, 3]])
    >>> abs(float(mj.metrics.kl(out.logits, pos=None)(out.readout)[0])) < 1e-6
    True
    """
    reference, expected = jnp.asarray(reference), 3 if pos is None else 2
    if reference.ndim != expected:
        raise ValueError(f"with pos={pos}, reference must be logits of rank {expected}, given shape {reference.shape}")
    return Metric("kl", _kl, {"reference": reference, "pos": None if pos is None else position(pos)}, per_example=True)


def cross_entropy(tokens: Tokens | ArrayLike) -> Metric:
    """The mean loss in nats over the prompt's own next tokens; padding, at either end or between tokens, excluded.

    Raises `ValueError` for a prompt of fewer than two real tokens, which has no next token.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.metrics.cross_entropy([[1, 2, 3]])(mj.run(model, [[1, 2, 3]]).readout).shape
    (1,)
    """
    tokens = as_tokens(tokens)
    if is_concrete(tokens.mask):
        lengths = np.asarray(tokens.mask).sum(axis=1)
        if (lengths < 2).any():
            raise ValueError(f"example {int(np.argmin(lengths))} has fewer than two tokens, so none to predict")
    return Metric("cross_entropy", _cross_entropy, {"tokens": tokens}, per_example=True)


def position(pos: ArrayLike) -> Int[Array, "..."]:
    """The position that a metric reads: one, or one per example, `[batch, 1]`.

    Raises `ValueError` for a list `[k]`, which in `Where` means k positions of every example, and for any other rank.

    >>> position([[3], [5]]).shape
    (2, 1)
    """
    index = jnp.asarray(integers(pos, "positions of a metric"))
    if index.ndim == 1:
        one_each = f"pos={[[int(p)] for p in index] if is_concrete(index) else 'pos[:, None]'}"
        raise ValueError(
            f"pos of shape {index.shape} could be {index.size} positions of every example, as in mijax.Where, or one per example:"
            f" a metric reads one, pos=-1 say; one per example is [batch, 1], {one_each}"
        )
    if index.ndim > 2 or index.shape[1:] not in ((), (1,)) or index.dtype == bool:
        raise ValueError(f"pos must be one position, or one per example as [batch, 1], given shape {index.shape}")
    return index


def _ids(value: ArrayLike) -> Int[Array, "..."]:
    value = jnp.asarray(integers(value, "answers of a metric"))
    if value.ndim > 1 or value.dtype == bool:
        raise ValueError(f"answers of a metric are one for all, or one per example, given shape {value.shape}")
    return value


def _at(readout: Readout, pos: Int[Array, "..."], *answers: Int[Array, "..."]) -> Logits:
    """Logits `[batch, n]` of the answers (of the whole vocabulary, without any) at one position each."""
    batch = readout.final.shape[0]
    for index in (pos, *answers):
        if index.ndim and index.shape[0] != batch:
            raise ValueError(f"the metric has {index.shape[0]} answers or positions, the batch {batch} examples")
    each = lambda index: jnp.broadcast_to(index, (batch,))[:, None]
    tokens = jnp.concatenate([each(a) for a in answers], axis=1) if answers else None
    return readout.logits(pos=pos, tokens=tokens).reshape(batch, -1)


def _logit(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    return _at(readout, pos, answer)[:, 0]


def _logit_diff(readout: Readout, correct: Array, wrong: Array, pos: Array) -> Float[Array, " batch"]:
    logits = _at(readout, pos, correct, wrong)
    return logits[:, 0] - logits[:, 1]


def _log_prob(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    return _logit(readout, answer, pos) - jax.nn.logsumexp(_at(readout, pos), axis=-1)


def _prob(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    return jnp.exp(_log_prob(readout, answer, pos))


def _rank(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    logits = _at(readout, pos)
    failed = jnp.isnan(_logit(readout, answer, pos)) | jnp.any(jnp.isnan(logits), axis=-1)
    own = jnp.take_along_axis(logits, jnp.broadcast_to(answer, logits.shape[:1])[:, None], axis=1, mode="clip")
    larger = jnp.sum(logits > own, axis=-1).astype(logits.dtype)
    # A comparison with NaN is False, which would make a failed run the best of all.
    return jnp.where(failed, jnp.nan, larger)


def _accuracy(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    larger = _rank(readout, answer, pos)
    return jnp.where(jnp.isnan(larger), larger, jnp.where(larger == 0, 1.0, 0.0).astype(larger.dtype))


def _kl(readout: Readout, reference: Logits, pos: Array | None) -> Float[Array, " batch"]:
    logits = readout.logits() if pos is None else _at(readout, pos)
    if reference.shape != logits.shape:
        raise ValueError(f"kl's reference has shape {reference.shape}, the run's logits {logits.shape}")
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference.astype(logits.dtype))
    p = jnp.exp(log_p)
    divergence = jnp.sum(jnp.where(p == 0, 0.0, p * (log_p - log_q)), axis=-1)  # NaN stays NaN
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
