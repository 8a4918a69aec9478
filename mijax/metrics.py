"""Metrics: functions of a run's output to one number per example, with their answers as array leaves.

Each metric computes only the logits that it needs. New answers of the same shape never recompile. A user's metric
is any function of the `Out`; wrap it in `Function` where it reads activations, or subclass `Metric` where it holds
arrays.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Float, Int, Logits, Real
from mijax.display import ShownAsTree
from mijax.forward import Out, as_captures
from mijax.interventions.places import of_examples
from mijax.interventions.where import Where
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens, as_tokens, integers, is_concrete

AnyMetric: TypeAlias = Callable[[Out], Array]
"""A function of a run's output to one number per example. Any function may declare what `Metric` declares (`name`,
`sites`, `pos`, `per_example`), by attributes of the same names."""


class Metric(ShownAsTree):
    """One number per example of a run's output; abstract.

    Attributes:
        name: the metric's name in results.
        sites: the activations that the metric reads in `out.acts`, named as by `capture` in `mijax.run`; `out.acts`
            holds no others.
        pos: the position at which the metric reads the final stream: one, or one per example as `[batch, 1]`. A
            sweep computes the final stream at no other position, and the metric reads NaN there. `None`: any
            position.
        per_example: whether every array of rank 1 or more has the examples in front, so that sweeps and attribution
            can split a batch.
    """

    name = ""
    sites = ()  # type: Any  # (an annotation would make it a field)
    pos = None
    per_example = False

    @abc.abstractmethod
    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """Measure a run.

        Args:
            out: the run's output.

        Returns:
            `[batch]`, one number per example.
        """

    def take(self, examples: Int[Array, " k"] | Int[np.ndarray, " k"]) -> "Metric":
        """The same metric for a subset of the examples.

        Args:
            examples: indices of the examples.

        Returns:
            The metric with its arrays of rank 1 or more narrowed to these examples.

        Raises:
            ValueError: where `per_example` is false, so that it is not known which arrays have the examples in
                front.
        """
        if not self.per_example:
            raise ValueError(f"metric {self.name!r} does not say that its arrays are per example")
        return jax.tree.map(lambda a: a[examples] if jnp.ndim(a) else a, self)


def position(pos: ArrayLike) -> Int[Array, "..."]:
    """Convert and check the position that a metric reads.

    Args:
        pos: one position, or one per example as `[batch, 1]`; negative from the end.

    Returns:
        The position as an integer array, `[]` or `[batch, 1]`.

    Raises:
        ValueError: for a list `[k]`, which in `Where` means k positions of every example, for any other rank, and
            for a boolean mask.

    >>> position([[3], [5]]).shape
    (2, 1)
    """
    index = jnp.asarray(integers(pos, "positions of a metric"))
    if index.ndim == 1:
        per_example = f"pos={[[int(p)] for p in index] if is_concrete(index) else 'pos[:, None]'}"
        raise ValueError(
            f"pos of shape {index.shape} could be {index.size} positions of every example, as in mijax.Where, or one per example:"
            f" a metric reads one, pos=-1 say; one per example is [batch, 1], {per_example}"
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
    """Logits `[batch, n]` of `n` answers (of the whole vocabulary, without answers) at one position of each example."""
    batch = readout.final.shape[0]
    for index in (pos, *answers):
        if index.ndim and index.shape[0] != batch:
            raise ValueError(f"the metric has {index.shape[0]} answers or positions, the batch {batch} examples")
    column = lambda index: jnp.broadcast_to(index, (batch,))[:, None]
    tokens = jnp.concatenate([column(a) for a in answers], axis=1) if answers else None
    return readout.logits(pos=pos, tokens=tokens).reshape(batch, -1)


@final
class Logit(Metric):
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
    per_example = True
    answer: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` logits."""
        return _at(_readout(self, out), self.pos, self.answer)[:, 0]


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
    per_example = True
    correct: Any = eqx.field(converter=_ids)
    wrong: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` differences of logits."""
        logits = _at(_readout(self, out), self.pos, self.correct, self.wrong)
        return logits[:, 0] - logits[:, 1]


@final
class LogProb(Metric):
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
    per_example = True
    answer: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` log-probabilities, in nats."""
        return _log_prob(_readout(self, out), self.answer, self.pos)


@final
class Prob(Metric):
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
    per_example = True
    answer: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` probabilities."""
        return jnp.exp(_log_prob(_readout(self, out), self.answer, self.pos))


@final
class Rank(Metric):
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
    per_example = True
    answer: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` ranks as floats, NaN where a logit is NaN."""
        return _rank(_readout(self, out), self.answer, self.pos)


@final
class Accuracy(Metric):
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
    per_example = True
    answer: Any = eqx.field(converter=_ids)
    pos: Any = eqx.field(converter=position, default=-1)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` zeros and ones as floats, NaN where a logit is NaN."""
        larger = _rank(_readout(self, out), self.answer, self.pos)
        return jnp.where(jnp.isnan(larger), larger, jnp.where(larger == 0, 1.0, 0.0).astype(larger.dtype))


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
    per_example = True
    reference: Any = eqx.field(converter=jnp.asarray)
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
        return _kl(_readout(self, out), self.reference, self.pos)


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
    per_example = True
    tokens: Tokens = eqx.field(converter=as_tokens)

    def __check_init__(self) -> None:
        if is_concrete(self.tokens.mask):
            lengths = np.asarray(self.tokens.mask).sum(axis=1)
            if (lengths < 2).any():
                raise ValueError(f"example {int(np.argmin(lengths))} has fewer than two tokens, so none to predict")

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]` mean losses, in nats."""
        return _cross_entropy(_readout(self, out), self.tokens)


@final
class Function(Metric):
    """A user's function of a run's output, with the activations and the position that it reads.

    Args:
        function: `function(out)` gives one number per example, `[batch]`.
        sites: the activations that it reads, as in `Metric`.
        pos: the position at which it reads the final stream, as in `Metric`.
        name: its name in results; by default that of the function.
        per_example: whether the batch can be split, as in `Metric`.

    Raises:
        ValueError: for a position of another rank.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> size = lambda out: jax.numpy.linalg.norm(out.acts["resid_mid"][0, :, 0], axis=-1)
    >>> norm = mj.metrics.Function(size, sites={"resid_mid": mj.Where(layer=1, pos=-1)}, name="norm")
    >>> heads = mj.grid(layer=range(2), head=range(2))
    >>> mj.sweep(model, [[1, 2, 3]], {"z": mj.Replace(0.0, heads)}, norm).sizes["head"]
    2
    """

    function: Callable[[Out], Array]
    sites: Any = eqx.field(converter=as_captures, default=())
    pos: Any = eqx.field(converter=lambda pos: None if pos is None else position(pos), default=None)
    name: str = eqx.field(static=True, default="")
    per_example: bool = eqx.field(static=True, default=False)

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """`[batch]`, the function's result."""
        return self.function(out)

    def take(self, examples: Int[Array, " k"] | Int[np.ndarray, " k"]) -> "Function":
        """The same function (which may hold no data of single examples), its per-example positions narrowed."""
        if not self.per_example:
            raise ValueError(f"metric {self.name!r} does not say that its arrays are per example")
        narrowed = lambda where: where and of_examples(where, Where(), np.asarray(examples), 0)
        pos = self.pos[examples] if self.pos is not None and self.pos.ndim else self.pos
        sites = {site: narrowed(where) for site, where in self.sites.items()}
        return Function(self.function, sites, pos, self.name, self.per_example)


logit = Logit
logit_diff = LogitDiff
log_prob = LogProb
prob = Prob
rank = Rank
accuracy = Accuracy
kl = KL
cross_entropy = CrossEntropy
OWN = (Logit, LogitDiff, LogProb, Prob, Rank, Accuracy, KL, CrossEntropy)
"""The metrics whose result depends only on their arrays and on the run's output."""


def _readout(metric: Metric, out: Any) -> Readout:
    """The readout of a run's output; a bare readout is accepted too, since these metrics read only logits."""
    readout = out if isinstance(out, Readout) else getattr(out, "readout", None)
    if not isinstance(readout, Readout):
        raise TypeError(f"metric {metric.name!r} reads a run's output, mijax.run(...), given {type(out).__name__}")
    return readout


def _log_prob(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    return _at(readout, pos, answer)[:, 0] - jax.nn.logsumexp(_at(readout, pos), axis=-1)


def _rank(readout: Readout, answer: Array, pos: Array) -> Float[Array, " batch"]:
    logits = _at(readout, pos)
    failed = jnp.isnan(_at(readout, pos, answer)[:, 0]) | jnp.any(jnp.isnan(logits), axis=-1)
    answer_logit = jnp.take_along_axis(logits, jnp.broadcast_to(answer, logits.shape[:1])[:, None], axis=1, mode="clip")
    larger = jnp.sum(logits > answer_logit, axis=-1).astype(logits.dtype)
    # A comparison with NaN is False: without this, a failed run would have the best rank.
    return jnp.where(failed, jnp.nan, larger)


def _kl(readout: Readout, reference: Logits, pos: Array | None) -> Float[Array, " batch"]:
    logits = readout.logits() if pos is None else _at(readout, pos)
    if reference.shape != logits.shape:
        raise ValueError(f"kl's reference has shape {reference.shape}, the run's logits {logits.shape}")
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference.astype(logits.dtype))
    p = jnp.exp(log_p)
    divergence = jnp.sum(jnp.where(p == 0, 0.0, p * (log_p - log_q)), axis=-1)  # p = NaN is not 0, and stays NaN
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
