"""Metrics of a part of the examples, of which alone a split sweep or attribution asks."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from mijax._types import Array, Float, Int
from mijax.engine.measure import as_programs, is_users, output_like
from mijax.forward import Out
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs


def taken(
    model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric], examples: Int[np.ndarray, " k"]
) -> dict[str, AnyMetric]:
    """Convert metrics to programs for some of the examples.

    Args:
        model: the model.
        tokens: the prompts of these examples.
        metrics: the metrics of all examples, each of which must be `per_example` (see `mijax.metrics.AnyMetric`).
        examples: the numbers of the examples.

    Returns:
        The metrics of these examples by name, as `as_programs` returns them.

    Raises:
        Exception: what `as_programs` raises, with a note on what a `per_example` metric must do.
    """
    narrowed: Any = {name: metric.take(examples) for name, metric in metrics.items()}  # pyright: ignore[reportFunctionMemberAccess]
    try:
        return as_programs(model, tokens, narrowed)
    except Exception as error:
        error.add_note(
            f"for {len(examples)} of the examples: a metric that is `per_example` must work for any part of the batch, so that an array"
            " with an entry for each example may not be an outer variable of it; make it a field of a mijax.metrics.Metric of your own,"
            " whose `take` narrows it, or leave `per_example` out and give more memory"
        )
        raise


def of_first(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> dict[str, AnyMetric]:
    """Convert users' metrics to programs for the first example alone, by their `take`, which a folder must know too.

    Args:
        model: the model.
        tokens: the prompts.
        metrics: the metrics by name.

    Returns:
        The programs by name, of those metrics that can be taken for some of the examples.
    """
    users = {name: metric for name, metric in metrics.items() if is_users(metric) and is_split(metric)}
    first = np.zeros(1, np.int32)
    return taken(model, jax.tree.map(lambda a: np.asarray(a)[first], tokens), users, first)


def check_takes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> None:
    """Check that a user's metric gives for each half of the examples what it gives for all, on a random output.

    Args:
        model: the model.
        tokens: the prompts.
        metrics: the metrics by name, each of which is `per_example`.

    Raises:
        ValueError: for a metric that does not.
        Exception: what `taken` raises.
    """
    batch, rng = len(tokens.ids), np.random.default_rng(0)
    for name, metric in metrics.items():
        if not is_users(metric):
            continue
        like = output_like(model, tokens, metric)
        whole = jax.tree.map(
            lambda a: rng.normal(size=a.shape).astype(a.dtype) if _is_shape(a) else a, like, is_leaf=_is_shape
        )
        values = np.asarray(_applied(as_programs(model, tokens, {name: metric})[name], whole))
        for examples in np.array_split(np.arange(batch, dtype=np.int32), 2):
            some = jax.tree.map(lambda a, examples=examples: np.asarray(a)[examples], tokens)
            program = taken(model, some, {name: metric}, examples)[name]
            part = _part(model, output_like(model, some, metric), whole, examples)
            of_part = np.asarray(_applied(program, part))
            size = np.nanmax(np.abs(values), initial=0.0)
            if not np.allclose(of_part, values[examples], rtol=1e-2, atol=1e-3 * size, equal_nan=True):
                raise ValueError(
                    f"metric {name!r} says that it is per example, and gives other numbers for a part of the batch than for all: an"
                    " example's number must depend on that example alone, and arrays with an entry for each be fields that `take`"
                    " narrows; or leave `per_example` out"
                )


def _part(model: Model, like: Any, whole: Any, examples: Int[np.ndarray, " k"]) -> Any:
    """Of an output of all examples, that of some, whose shapes are `like`."""
    (readout, acts), (all_readout, all_acts) = like, whole
    take = lambda small, large: large[examples] if _is_shape(small) else small
    axis = {name: model.sites[name].axes.index("batch") for name in acts}
    acts = {name: np.take(all_acts[name], examples, axis=axis[name]) for name in acts}
    return jax.tree.map(take, readout, all_readout, is_leaf=_is_shape), acts


@eqx.filter_jit
def _applied(program: Any, parts: Any) -> Float[Array, " batch"]:
    return program(Out(*parts))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def is_split(metric: AnyMetric) -> bool:
    """Tell whether a metric can be taken for some of the examples.

    Args:
        metric: the metric.

    Returns:
        Whether it says so by a true `per_example`, and has a method `take`.
    """
    return bool(getattr(metric, "per_example", False)) and callable(getattr(metric, "take", None))
