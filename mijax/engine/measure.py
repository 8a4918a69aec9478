"""Metrics of a run, and what a result says of the model."""

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Float
from mijax.chunks import small_work
from mijax.forward import Out
from mijax.interventions.capturing import Captures, Capturing, as_captures
from mijax.interventions.checks import check
from mijax.interventions.selecting import narrowed_shape
from mijax.metrics import AnyMetric, position
from mijax.model.model import Model
from mijax.model.numerics import accumulator
from mijax.model.tokens import Inputs
from mijax.programs.convert import Converted, convert, for_mesh_axes, shape_of
from mijax.programs.now import How

Metrics: TypeAlias = AnyMetric | Mapping[str, AnyMetric]
Values: TypeAlias = dict[str, np.ndarray]


def named(metric: Metrics) -> dict[str, AnyMetric]:
    """Give every metric a name.

    A single metric has the name that it says (`name`), or else that of its function or its class.

    Args:
        metric: one metric, or metrics by name.

    Returns:
        The metrics by name, in the order given.

    Raises:
        TypeError: for names that are no strings.
    """
    if isinstance(metric, Mapping):
        if not all(isinstance(name, str) for name in metric):
            raise TypeError(f"metrics are named by strings, given {', '.join(map(repr, metric))}")
        return dict(metric)
    function = getattr(metric, "function", None)
    names = [getattr(metric, "name", None), *(getattr(f, "__name__", None) for f in (metric, function))]
    return {next((name for name in names if name), type(metric).__name__): metric}


def read_by(metric: Any) -> Captures:
    """Tell which activations a metric reads.

    Args:
        metric: a metric; one without an attribute `sites` reads none.

    Returns:
        The place that it reads by site; `None` is all of the site.

    Raises:
        TypeError: for `sites` that are a bare string, or that map a site to anything but a `Where` or `None`.
    """
    return as_captures(getattr(metric, "sites", ()))


def reads_activations(metrics: Mapping[str, AnyMetric]) -> bool:
    """Tell whether some metric reads activations, and not only the readout.

    Args:
        metrics: the metrics by name.

    Returns:
        Whether one does.

    Raises:
        TypeError: what `read_by` raises for the `sites` of a metric.
    """
    return any(read_by(metric) for metric in metrics.values())


def _check_read(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> None:
    """Raise for activations that a run cannot give to a metric, or that are not of every example."""
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
    """Make the taps that keep what the metrics read.

    Args:
        model: the model.
        metrics: the metrics by name.

    Returns:
        One tap for each metric, in the order of the metrics.

    Raises:
        TypeError: what `read_by` raises for the `sites` of a metric.
    """
    return tuple(Capturing(read_by(metric), model.n_layers) for metric in metrics.values())


def values_of(
    metrics: Mapping[str, AnyMetric],
    readout: Any,
    acts: Sequence[dict[str, Array]] | Mapping[str, dict[str, Array]],
) -> dict[str, Float[Array, " batch"]]:
    """The metrics of a run.

    Args:
        metrics: the metrics by name.
        readout: the readout of the run.
        acts: the activations that each metric reads, in the order of the metrics or by their names.

    Returns:
        `[batch]` by name.
    """
    acts_by_name = acts if isinstance(acts, Mapping) else dict(zip(metrics, acts, strict=True))
    return {name: metric(Out(readout, acts_by_name[name])) for name, metric in metrics.items()}


class MetricProgram(eqx.Module):
    """A user's metric as a program.

    Attributes:
        function: the program, of a readout and activations.
        sites: the activations that the metric reads.
        pos: the position at which it reads the final stream; `None` for any.
    """

    users_code = False
    function: Converted
    sites: Any
    pos: Any

    def __call__(self, out: Out) -> Float[Array, " batch"]:
        """One number per example."""
        return self.function(out.readout, out.acts)


class _OfParts(eqx.Module):
    """A metric as a function of a run's readout and activations."""

    metric: Any

    def __call__(self, readout: Any, acts: Any) -> Any:
        return self.metric(Out(readout, acts))


def as_programs(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> dict[str, AnyMetric]:
    """Convert users' metrics to programs, as their code is at the time of the call.

    mijax's own metrics stay as they are. A program is for runs of prompts of the shape of `tokens`.

    Args:
        model: the model.
        tokens: the prompts.
        metrics: the metrics by name.

    Returns:
        The metrics by name.

    Raises:
        TypeError: for a metric that is no function.
        ValueError: for a metric that gives anything but one number per example, or that reads what a run cannot
            give.
    """
    _check_read(model, tokens, metrics)
    return {name: _as_program(model, tokens, name, metric) for name, metric in metrics.items()}


def _as_program(model: Model, tokens: Inputs, name: str, metric: Any) -> AnyMetric:
    """One metric, converted."""
    if not is_users(metric):
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
    if jnp.issubdtype(program.out.dtype, jnp.complexfloating):  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(f"metric {name!r} must give real numbers, given {program.out.dtype}")  # pyright: ignore[reportAttributeAccessIssue]
    pos = getattr(metric, "pos", None)
    return MetricProgram(program, read_by(metric), None if pos is None else position(pos))


def output_like(model: Model, tokens: Inputs, metric: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
    """What a metric sees of a run, with shapes (`jax.ShapeDtypeStruct`) for what differs between runs.

    Args:
        model: the model.
        tokens: the prompts.
        metric: the metric.
        keywords: further arguments of `jax.ShapeDtypeStruct`.

    Returns:
        The readout, and the activations that the metric reads.
    """
    shaped = lambda shape: jax.ShapeDtypeStruct(shape, model.dtype, **keywords)
    whole = lambda site: site.shape(*tokens.ids.shape)
    of = lambda site, where: shaped(narrowed_shape(where, site.axes, whole(site)))
    acts = {name: of(model.sites[name], where) for name, where in read_by(metric).items()}
    return model.output_like(tokens, **keywords), acts


def is_users(metric: AnyMetric) -> bool:
    """Tell whether a metric's code is the user's, of which nothing is known.

    Args:
        metric: the metric.

    Returns:
        False for mijax's own classes and for programs.
    """
    return getattr(metric, "users_code", True)


def as_floats(value: Any) -> np.ndarray:
    """Convert a value to a NumPy array of floating point, of the same precision but of float32 at least.

    Args:
        value: an array or a number.

    Returns:
        The array; float32 where `value` is not of floating point.

    >>> as_floats(np.array([1, 2])).dtype, as_floats(np.float16(0.5)).dtype
    (dtype('float32'), dtype('float32'))
    """
    value = np.asarray(value)
    dtype = accumulator(value.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else np.float32
    return value.astype(dtype, copy=False)


def checked(values: Mapping[str, Any], what: str, first: int = 0) -> Values:
    """Convert metrics to NumPy arrays of floating point, and check that they are finite.

    Args:
        values: the metrics, `[batch]` by name.
        what: name of the run, for error messages.
        first: number of the first example, for error messages.

    Returns:
        The metrics, `[batch]` by name.

    Raises:
        ValueError: where a metric is not finite; it names the metric and the example.
    """
    arrays = {name: as_floats(value) for name, value in values.items()}
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            example = int(np.argmin(np.isfinite(value)))
            raise ValueError(
                f"metric {name!r} is {value[example]} on the {what} run of example {first + example}: a position or an answer out"
                " of range, or a model that overflows"
            )
    return arrays


def compiled_for(model: Model, tokens: Inputs, runs: int = 1) -> How:
    """How a program of some runs of prompts is to be compiled.

    Args:
        model: the model.
        tokens: the prompts.
        runs: the number of runs.

    Returns:
        `"quickly"` where it is so little work that only the time of compiling matters (`mijax.chunks.small_work`).
    """
    work = 2.0 * model.products_per_token * model.n_layers * np.size(tokens.mask) * runs
    return "quickly" if work <= small_work() else "for_speed"


def metric_bytes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> int:
    """Compute the size of everything that metrics compute from a run, and of the activations that they read.

    Args:
        model: the model.
        tokens: the prompts.
        metrics: the metrics by name.

    Returns:
        The size in bytes, of all prompts together.

    Raises:
        Exception: what a metric raises for outputs of these shapes.
    """
    return _metric_bytes(*as_shapes(model, tokens, metrics))


def as_shapes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> tuple[tuple[Any, ...], Any]:
    """The metrics and what they see of a run, with shapes for arrays: everything on which a trace of them depends.

    Args:
        model: the model.
        tokens: the prompts.
        metrics: the metrics by name.

    Returns:
        The leaves, which can be hashed, and the structure of (readout, activations by metric, metrics).
    """
    acts = {name: output_like(model, tokens, metric)[1] for name, metric in metrics.items()}
    shapes = jax.tree.map(shape_of, (model.output_like(tokens), acts, dict(metrics)))
    leaves, treedef = jax.tree.flatten(shapes)
    return tuple(leaves), treedef


@functools.lru_cache
def _metric_bytes(leaves: tuple[Any, ...], treedef: Any) -> int:
    """The bytes for arguments that can be hashed, so that metrics are traced once for the same shapes."""
    readout, acts, metrics = jax.tree.unflatten(treedef, leaves)
    compute: Any = lambda readout, acts, metrics: values_of(metrics, readout, acts)
    program = eqx.filter_make_jaxpr(compute)(readout, acts, metrics)[0]
    size = lambda a: a.size * a.dtype.itemsize
    return sum(size(v.aval) for eqn in program.jaxpr.eqns for v in eqn.outvars) + sum(map(size, jax.tree.leaves(acts)))


def described(model: Model) -> dict[str, str]:
    """Describe the model of a result, and the software and the device that made it.

    Args:
        model: the model.

    Returns:
        Attributes of the result by name: `model`, the versions of `mijax` and `jax`, and `device`.
    """
    return {
        "model": model.name,
        "mijax": _version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


@functools.cache
def _version() -> str:
    return importlib.metadata.version("mijax")
