"""Metrics of a run, and what a result says of the model."""

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Float, Int
from mijax.interventions.capturing import Capturing
from mijax.interventions.selecting import narrowed_shape
from mijax.metrics import OWN, AnyMetric, position
from mijax.model.model import Model
from mijax.model.numerics import accumulator
from mijax.model.tokens import Inputs
from mijax.programs.convert import Converted, convert, for_mesh_axes, shape_of
from mijax.programs.now import JitNow
from mijax.run import Captures, Out, as_captures, check, run

Metrics: TypeAlias = AnyMetric | Mapping[str, AnyMetric]
Values: TypeAlias = dict[str, np.ndarray]


def named(metric: Metrics) -> dict[str, AnyMetric]:
    """Metrics by name: a single one by its own."""
    if isinstance(metric, Mapping):
        if not all(isinstance(name, str) for name in metric):
            raise TypeError(f"metrics are named by strings, given {', '.join(map(repr, metric))}")
        return dict(metric)
    function = getattr(metric, "function", None)
    names = [getattr(metric, "name", None), *(getattr(f, "__name__", None) for f in (metric, function))]
    return {next((name for name in names if name), type(metric).__name__): metric}


def read_by(metric: Any) -> Captures:
    """The activations that a metric reads."""
    return as_captures(getattr(metric, "sites", ()))


def reads_activations(metrics: Mapping[str, AnyMetric]) -> bool:
    """Whether some metric reads more than the readout."""
    return any(read_by(metric) for metric in metrics.values())


def check_read(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> None:
    """Raise for activations that no run could give a metric, or that are not of every example."""
    for name, metric in metrics.items():
        try:
            sites = read_by(metric)
            check(model, tokens, {}, sites)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the sites of metric {name!r}: {error}") from error
        for site, where in sites.items():
            if where is not None and where.narrows("batch"):
                raise ValueError(f"the sites of metric {name!r}: a metric reads all examples at site {site!r}")


def captures_of(model: Model, metrics: Mapping[str, AnyMetric]) -> tuple[Capturing, ...]:
    """The tap of each metric."""
    return tuple(Capturing(read_by(metric), model.n_layers) for metric in metrics.values())


def values_of(
    metrics: Mapping[str, AnyMetric],
    readout: Any,
    acts: Sequence[dict[str, Array]] | Mapping[str, dict[str, Array]],
) -> dict[str, Float[Array, " batch"]]:
    """Each metric of each example; `acts` holds what each one reads, in the metrics' order or by their names."""
    read = acts if isinstance(acts, Mapping) else dict(zip(metrics, acts, strict=True))
    return {name: metric(Out(readout, read[name])) for name, metric in metrics.items()}


class MetricProgram(eqx.Module):
    """A user's metric as its program, with what it says that it reads."""

    function: Converted
    sites: Any
    pos: Any

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """One number per example."""
        return self.function(out.readout, out.acts)


class _OfParts(eqx.Module):
    """A metric as a function of a run's parts."""

    metric: Any

    def __call__(self, readout: Any, acts: Any) -> Any:
        return self.metric(Out(readout, acts))


def as_programs(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> dict[str, AnyMetric]:
    """Metrics as users' functions are now, for runs of prompts of the shape of `tokens`; mijax's own as they are.

    Raises `TypeError` for what is no function, `ValueError` for one that gives anything but one number per example, or
    that reads what no run gives.
    """
    check_read(model, tokens, metrics)
    return {name: _as_program(model, tokens, name, metric) for name, metric in metrics.items()}


def _as_program(model: Model, tokens: Inputs, name: str, metric: Any) -> AnyMetric:
    if isinstance(metric, (MetricProgram, *OWN)):
        return metric
    if not callable(metric):
        raise TypeError(f"metric {name!r} must be a function of a run's output, given {metric!r}")
    batch = len(tokens.ids)

    def converted(keywords: dict[str, Any]) -> Converted:
        parts = output_like(model, tokens, metric, **keywords)
        return convert(_OfParts(metric), *parts, name=f"metric {name!r}")

    try:
        program = for_mesh_axes(converted, (model, tokens))
    except Exception as error:
        error.add_note(
            f"in metric {name!r}, called with a run's output (mijax.Out): out.readout.logits(pos=-1), or out.acts of the sites that it names"
        )
        raise
    shapes = jax.tree.map(lambda out: out.shape, program.out)
    if shapes != (batch,):
        raise ValueError(f"metric {name!r} must give one number per example, [{batch}], given shape {shapes}")
    pos = getattr(metric, "pos", None)
    return MetricProgram(program, read_by(metric), None if pos is None else position(pos))


def output_like(model: Model, tokens: Inputs, metric: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
    """What a metric sees of a run, with shapes for what differs between runs: the readout, and the activations."""
    shaped = lambda shape: jax.ShapeDtypeStruct(shape, model.dtype, **keywords)
    whole = lambda site: site.shape(*tokens.ids.shape)
    of = lambda site, where: shaped(narrowed_shape(where, site.axes, whole(site)))
    acts = {name: of(model.sites[name], where) for name, where in read_by(metric).items()}
    return model.output_like(tokens, **keywords), acts


def measure(
    model: Model,
    tokens: Inputs,
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
    model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric], examples: Int[np.ndarray, " k"]
) -> dict[str, AnyMetric]:
    """The programs of metrics for some of the examples, whose prompts are `tokens`; each must be `per_example` (`AnyMetric`)."""
    some: Any = {name: metric.take(examples) for name, metric in metrics.items()}  # pyright: ignore[reportFunctionMemberAccess]
    try:
        return as_programs(model, tokens, some)
    except Exception as error:
        error.add_note(
            f"for {len(examples)} of the examples: a metric that is `per_example` must work for any part of the batch, so that an array"
            " with an entry for each example may not be an outer variable of it; make it a field of a mijax.metrics.Metric of your own,"
            " whose `take` narrows it, or leave `per_example` out and give more memory"
        )
        raise


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


@JitNow
def _measured(model, tokens, edits, metrics, capture):
    out = run(model, tokens, edits, capture=capture, taps=captures_of(model, metrics))
    return values_of(metrics, out.readout, out.taps), out.acts


def metric_bytes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> int:
    """The bytes of everything that metrics compute from a run, and of the activations that they read; raises what they raise
    of its shape."""
    return _metric_bytes(*as_shapes(model, tokens, metrics))


def as_shapes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> tuple[tuple[Any, ...], Any]:
    """What metrics see of a run and they themselves, flattened, arrays as shapes: what a trace of them depends on."""
    acts = {name: output_like(model, tokens, metric)[1] for name, metric in metrics.items()}
    given = jax.tree.map(shape_of, (model.output_like(tokens), acts, dict(metrics)))
    leaves, treedef = jax.tree.flatten(given)
    return tuple(leaves), treedef


@functools.lru_cache
def _metric_bytes(leaves: tuple[Any, ...], treedef: Any) -> int:
    """All as shapes, so that it is traced but once."""
    readout, acts, metrics = jax.tree.unflatten(treedef, leaves)
    of: Any = lambda readout, acts, metrics: values_of(metrics, readout, acts)
    program = eqx.filter_make_jaxpr(of)(readout, acts, metrics)[0]
    size = lambda a: a.size * a.dtype.itemsize
    return sum(size(v.aval) for eqn in program.jaxpr.eqns for v in eqn.outvars) + sum(map(size, jax.tree.leaves(acts)))


def described(model: Model) -> dict[str, str]:
    """What a saved result must say of the model, and of the software that made it."""
    return {
        "model": model.name,
        "mijax": _version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


@functools.cache
def _version() -> str:
    return importlib.metadata.version("mijax")
