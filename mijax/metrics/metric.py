"""What a metric is: any function of a run's output; and the classes to subclass or to wrap a function in."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Float, Int
from mijax.display import ShownAsTree
from mijax.forward import Out
from mijax.interventions.capturing import as_captures
from mijax.interventions.places import of_examples
from mijax.interventions.where import Where
from mijax.model.readout import Readout
from mijax.model.tokens import integers, is_concrete
from mijax.programs.now import UsersCode

AnyMetric: TypeAlias = Callable[[Out], Array]
"""A function of a run's output to one number per example. Any function may declare what `Metric` declares (`name`,
`sites`, `pos`, `per_example`), by attributes of the same names."""


class Metric(UsersCode, ShownAsTree):
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


def readout_of(metric: Metric, out: Any) -> Readout:
    """Get the readout of a run's output.

    A bare readout is accepted too, since the metrics that call this read only logits.

    Args:
        metric: the metric that reads it, whose name is in the error message.
        out: the run's output, or a readout.

    Returns:
        The readout.

    Raises:
        TypeError: for anything that is no `Readout` and has none.
    """
    readout = out if isinstance(out, Readout) else getattr(out, "readout", None)
    if not isinstance(readout, Readout):
        raise TypeError(f"metric {metric.name!r} reads a run's output, mijax.run(...), given {type(out).__name__}")
    return readout
