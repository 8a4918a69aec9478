"""Metrics of a run, and what a result says of the model."""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Float, Int
from mijax.metrics import AnyMetric, Metric, position
from mijax.model.numerics import accumulator
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer
from mijax.programs.convert import Converted, convert, for_mesh_axes, shape_of
from mijax.run import run

Metrics: TypeAlias = AnyMetric | Mapping[str, AnyMetric]
Values: TypeAlias = dict[str, np.ndarray]


def named(metric: Metrics) -> dict[str, AnyMetric]:
    """Metrics by name: a single one by its own."""
    if isinstance(metric, Mapping):
        if not all(isinstance(name, str) for name in metric):
            raise TypeError(f"metrics are named by strings, given {', '.join(map(repr, metric))}")
        return dict(metric)
    return {getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__: metric}


class MetricProgram(eqx.Module):
    """A user's metric as its program, with the position that it says it reads."""

    function: Converted
    pos: Any

    def __call__(self, readout: Readout) -> Float[Array, " batch"]:
        """One number per example."""
        return self.function(readout.final, readout.tokens, readout.W_U, readout.b_U)


class _OfParts(eqx.Module):
    """A metric as a function of a readout's parts."""

    metric: Any

    def __call__(self, *parts: Any) -> Any:
        return self.metric(Readout(*parts))


def as_programs(model: Transformer, tokens: Tokens, metrics: Mapping[str, AnyMetric]) -> dict[str, AnyMetric]:
    """Metrics as users' functions are now, for runs of prompts of the shape of `tokens`; mijax's own as they are.

    Raises `TypeError` for what is no function, `ValueError` for one that gives anything but one number per example.
    """
    return {name: _as_program(model, tokens, name, metric) for name, metric in metrics.items()}


def _as_program(model: Transformer, tokens: Tokens, name: str, metric: Any) -> AnyMetric:
    if isinstance(metric, MetricProgram) or (isinstance(metric, Metric) and metric.is_own):
        return metric
    if not callable(metric):
        raise TypeError(f"metric {name!r} must be a function of a readout, given {metric!r}")
    shape, dtype = model.sites["final_in"].shape(*tokens.ids.shape), model.dtype

    def converted(keywords: dict[str, Any]) -> Converted:
        final = jax.ShapeDtypeStruct(shape, dtype, **keywords)
        return convert(_OfParts(metric), final, tokens, model.unembedding, model.b_U, name=f"metric {name!r}")

    program = for_mesh_axes(converted, (model, tokens))
    shapes = jax.tree.map(lambda out: out.shape, program.out)
    if shapes != shape[:1]:
        raise ValueError(f"metric {name!r} must give one number per example, [{shape[0]}], given shape {shapes}")
    pos = getattr(metric, "pos", None)
    return MetricProgram(program, None if pos is None else position(pos))


def measure(
    model: Transformer,
    tokens: Tokens,
    edits: Any,
    metrics: Mapping[str, AnyMetric],
    what: str,
    capture: tuple[str, ...] = (),
    first: int = 0,
) -> tuple[Values, dict[str, Array]]:
    """The metrics of one run, and what was captured; examples are counted from `first` in errors."""
    values, acts = _measured(model, tokens, edits, metrics, capture)
    return checked(values, what, first), acts


def taken(
    model: Transformer, tokens: Tokens, metrics: Mapping[str, AnyMetric], examples: Int[np.ndarray, " k"]
) -> dict[str, AnyMetric]:
    """The programs of metrics for some of the examples, whose prompts are `tokens`; each must be `per_example` (`AnyMetric`)."""
    some: Any = {name: metric.take(examples) for name, metric in metrics.items()}  # pyright: ignore[reportFunctionMemberAccess]
    return as_programs(model, tokens, some)


def is_split(metric: AnyMetric) -> bool:
    """Whether a metric says that it can be taken for some of the examples."""
    return bool(getattr(metric, "per_example", False)) and callable(getattr(metric, "take", None))


def as_floats(value: Any) -> np.ndarray:
    """A NumPy array of the same precision, but of float32 at least."""
    value = np.asarray(value)
    dtype = accumulator(value.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else np.float32
    return value.astype(dtype, copy=False)


def checked(values: Mapping[str, Any], what: str, first: int = 0) -> Values:
    """Metrics as NumPy arrays of floats; `ValueError` where one is not finite, with its example, counted from `first`."""
    found = {name: as_floats(value) for name, value in values.items()}
    for name, value in found.items():
        if not np.isfinite(value).all():
            example = int(np.argmin(np.isfinite(value)))
            raise ValueError(
                f"metric {name!r} is {value[example]} on the {what} run of example {first + example}: a position or an answer out"
                " of range, or a model that overflows"
            )
    return found


def values_of(metrics: Mapping[str, AnyMetric], readout: Readout) -> dict[str, Float[Array, " batch"]]:
    """Each metric of each example."""
    return {name: metric(readout) for name, metric in metrics.items()}


@eqx.filter_jit
def _measured(model, tokens, edits, metrics, capture):
    out = run(model, tokens, edits, capture=capture)
    return values_of(metrics, out.readout), out.acts


def metric_bytes(model: Transformer, tokens: Tokens, metrics: Mapping[str, AnyMetric]) -> int:
    """The bytes of everything that metrics compute from a readout; raises what they raise of its shape."""
    return _metric_bytes(*as_shapes(model, tokens, metrics))


def as_shapes(model: Transformer, tokens: Tokens, metrics: Mapping[str, AnyMetric]) -> tuple[tuple[Any, ...], Any]:
    """The parts of a readout and metrics, flattened, arrays as shapes: what a trace of them depends on."""
    final = jax.ShapeDtypeStruct(model.sites["final_in"].shape(*tokens.ids.shape), model.dtype)
    given = jax.tree.map(shape_of, ((final, tokens, model.unembedding, model.b_U), dict(metrics)))
    leaves, treedef = jax.tree.flatten(given)
    return tuple(leaves), treedef


@functools.lru_cache
def _metric_bytes(leaves: tuple[Any, ...], treedef: Any) -> int:
    """Both as shapes, so that it is traced but once."""
    parts, metrics = jax.tree.unflatten(treedef, leaves)
    program = eqx.filter_make_jaxpr(lambda parts, metrics: values_of(metrics, Readout(*parts)))(parts, metrics)[0]
    return sum(v.aval.size * v.aval.dtype.itemsize for eqn in program.jaxpr.eqns for v in eqn.outvars)


def described(model: Transformer) -> dict[str, str]:
    """What a saved result must say of the model, and of the software that made it."""
    return {
        "model": model.config.name or "unnamed",
        "mijax": _version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


@functools.cache
def _version() -> str:
    return importlib.metadata.version("mijax")
