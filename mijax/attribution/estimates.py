"""All prompts through a gradient method, in chunks that fit the memory."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mijax import chunks
from mijax._types import Array
from mijax.attribution.method import Estimates, Examples, Method
from mijax.attribution.nodes import Nodes, gates_at_entries
from mijax.attribution.side_by_side import gated, group_size
from mijax.attribution.taps import Path
from mijax.engine.driver import check_kept_model
from mijax.engine.layout import row_bytes
from mijax.engine.measure import as_programs, captures_of, checked, compiled_for, metric_bytes, values_of
from mijax.engine.per_example import check_takes, is_split, of_first, taken
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel
from mijax.model.tokens import Tokens
from mijax.programs.now import JitNow

Layout: TypeAlias = tuple[tuple[str, tuple[int, ...], int | None], ...]
"""Of each site: its name, its collapsed shape without batch, and how many cells where they are a grid's."""

CHECKPOINTS = (0, 1, 2)

MEANING = {
    "terms": "the gradient",
    "unsigned": "the gradient without a layer's",
    "gap": "the sum of the gradients along the path, or the end of the path,",
    "error": "the second derivative",
    "error_se": "the second derivative",
}
"""What each field of `Estimates` holds, in messages."""


class AttributionJob(NamedTuple):
    """What is attributed, and how."""

    model: LayeredModel
    base: Tokens
    source: Tokens | None
    metrics: Mapping[str, AnyMetric]
    nodes: Mapping[str, Nodes]
    method: Method

    @property
    def programs(self) -> dict[str, AnyMetric]:
        """The metrics as users' functions are now, for all prompts together."""
        return as_programs(self.model, self.base, self.metrics)

    @property
    def layout(self) -> Layout:
        """What of the nodes the compiled program depends on."""
        return tuple(
            (site, nodes.shape, None if nodes.grid is None else nodes.size) for site, nodes in self.nodes.items()
        )


class Schedule(NamedTuple):
    """How many prompts run together, what the backward pass computes again, and the bytes that this takes."""

    prompts: int
    checkpoint: int
    bytes: int


def schedule(job: AttributionJob, memory: int) -> Schedule:
    """Choose how many prompts run together, and what the backward pass computes again.

    As little is computed again as `memory` allows for as many prompts as fill the device. Prompts are split, into
    chunks of equal size, only where every metric can be (`AnyMetric`).

    Args:
        job: what is attributed.
        memory: the bytes that the prompts that run together may take.

    Returns:
        The schedule.

    Raises:
        ValueError: where `memory` does not hold one prompt, or all prompts where these cannot be split.
    """
    batch, pos = job.base.ids.shape
    splits = all(map(is_split, job.metrics.values()))
    full = min(batch, -(-chunks.full_rows() // pos)) if splits else batch
    read, fixed = 2 * metric_bytes(job.model, job.base, job.programs), layers_bytes(job.model)
    fits, prompt, checkpoint = 0, 0, 0
    for checkpoint in CHECKPOINTS:
        prompt = -(-read // batch) + prompt_bytes(job, checkpoint)
        fits = min(batch, max(0, memory - fixed) // prompt)
        if fits >= full:
            break
    prompts = _equal(batch, fits) if splits and fits else batch
    if fits < prompts:
        raise ValueError(
            f"{'one prompt takes' if splits else 'the prompts take'} about {fixed + prompt * (1 if splits else batch):,} bytes,"
            f" memory={memory:,} allows none"
        )
    return Schedule(prompts, checkpoint, fixed + prompt * prompts)


def _equal(batch: int, most: int) -> int:
    """The size of as many chunks of equal size as it takes."""
    return -(-batch // -(-batch // most))


def layers_bytes(model: LayeredModel) -> int:
    """Compute the size of the parameters of two layers.

    XLA makes copies of a layer's parameters as it comes to it, forwards and backwards.

    Args:
        model: the model.

    Returns:
        The size in bytes.
    """
    return 2 * model.layer_bytes


def prompt_bytes(job: AttributionJob, checkpoint: int) -> int:
    """Estimate the memory that one more prompt takes.

    It is that of what the backward pass finds stored, of what a layer works with, and of gates.

    Args:
        job: what is attributed.
        checkpoint: what the backward pass computes again: 0, 1 or 2, as in `side_by_side.gated`.

    Returns:
        The size in bytes, without what the metrics read and compute (`metric_bytes`).
    """
    pos, sites = job.base.ids.shape[1], job.model.sites
    n, itemsize, path = max(1, job.model.n_layers), job.model.dtype.itemsize, job.method.path(1)
    if checkpoint == 0:
        stored = _stored(job, 0)
    else:
        streams = _stored(job, 1) / n
        stored = streams * (n if checkpoint == 1 else n // group_size(n) + group_size(n))
    runs = 4 if path.inputs is not None else 3  # forwards and backwards
    scores = sites["pattern"].sizes["head"] * pos**2 * itemsize * (48 if path.recompute else 4 * runs)
    layer = runs * pos * row_bytes(job.model, job.nodes) + scores
    gates = sum(int(np.prod(shape if cells is None else (cells,))) for _, shape, cells in job.layout) * itemsize
    several = job.method.second_order or path.recompute
    return int((stored + layer) * (2.5 if job.method.second_order else 1)) + gates * (4 if several else 3)


def _stored(job: AttributionJob, checkpoint: int) -> int:
    """The bytes that are stored for the backward pass of one prompt."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(_shape_of, (job.model, job.method)))
    return _stored_bytes(tuple(leaves), treedef, job.base.ids.shape[1], job.source is None, job.layout, checkpoint)


@functools.lru_cache(maxsize=256)
def _stored_bytes(leaves: tuple[Any, ...], treedef: Any, pos: int, alone: bool, layout: Layout, checkpoint: int) -> int:
    """As `_stored`, read off the trace of one prompt's gradient: its residuals less the model's parameters."""
    model, method = jax.tree.unflatten(treedef, leaves)

    def residuals(gates, ids, parameters):
        tokens = Tokens.tree_unflatten(None, (ids, jnp.ones(ids.shape, bool)))
        model = jax.tree.unflatten(structure, parameters)
        others = None if alone else ids
        at = lambda gates: gated(
            model, tokens, others, gates_at_entries(model.sites, gates, {}, {}), method.path(1), checkpoint
        )
        return jax.vjp(lambda gates: jnp.sum(at(gates)[0].readout.final), gates)[1]

    parameters, structure = jax.tree.flatten(model)
    gates = {site: jax.ShapeDtypeStruct((1, *shape), model.dtype) for site, shape, _ in layout}
    jaxpr = jax.make_jaxpr(residuals)(gates, jax.ShapeDtypeStruct((1, pos), jnp.int32), parameters).jaxpr
    inputs = set(map(id, jaxpr.invars))
    arrays = {id(x): x.aval for x in jaxpr.outvars if id(x) not in inputs}
    return sum(aval.size * aval.dtype.itemsize for aval in arrays.values())


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def estimated(
    job: AttributionJob, order: Schedule, *, progress: bool, save: str | os.PathLike[str] | None
) -> tuple[Estimates, Schedule]:
    """Run all prompts.

    Args:
        job: what is attributed.
        order: how many prompts run together; a folder's own schedule takes its place.
        progress: whether to show a bar.
        save: the folder to save chunks of prompts in.

    Returns:
        The estimates of all prompts, as NumPy arrays with the examples in front; and the schedule by which they were made.

    Raises:
        ValueError: for a metric, a term or an error that is not finite, and for a folder of another job.
    """
    batch = len(job.base.ids)
    store = None if save is None else _store(save, job)
    if store is not None:
        plan = {name: np.asarray(value) for name, value in order._asdict().items()}
        saved = store.begin(plan, {"sites": list(job.nodes)})
        order = Schedule(*(int(saved[name]) for name in Schedule._fields))
    whole, programs = order.prompts == batch, job.programs
    if not whole:
        check_takes(job.model, job.base, job.metrics)
    key = jax.random.key(jnp.asarray(job.method.seed))
    parts: list[Estimates] = []
    # forwards and backwards, at several points or by several probes
    how = compiled_for(job.model, job.base, runs=30)
    if how == "for_speed" and order.checkpoint and jax.default_backend() == "cpu":  # memory is short
        how = "in_little_memory"

    def run(numbers: Sequence[int]) -> Mapping[str, Array]:
        first = numbers[0] * order.prompts
        examples: Any = np.minimum(np.arange(first, first + order.prompts, dtype=np.int32), batch - 1)
        some = lambda tree: tree if whole else jax.tree.map(lambda a: np.asarray(a)[examples], tree)
        metrics: Any = programs if whole else taken(job.model, some(job.base), job.metrics, examples)
        members: Any = {site: n.members[examples] for site, n in job.nodes.items() if n.members is not None}
        source: Any = None if job.source is None else jnp.asarray(some(job.source.ids))
        together = Examples(examples, key)
        return _chunk.compiled(how)(
            job.method, job.model, some(job.base), source, metrics, members, together, job.layout, order.checkpoint
        )

    def keep(number: int, arrays: Mapping[str, np.ndarray]) -> int:
        first = number * order.prompts
        count = min(order.prompts, batch - first)
        part = _nested({name: value[:count] for name, value in arrays.items()}, list(job.metrics), list(job.nodes))
        _check_finite(part, first)
        parts.append(part)
        return count

    with chunks.progress_bar(batch, "attribute", "prompt", progress) as bar:
        chunks.run_chunks(run, keep, -(-batch // order.prompts), bar, store=store)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts), order


def _check_finite(estimates: Estimates, first: int) -> None:
    """Raise `ValueError` for a metric, a term, or an error that is not finite; the examples count from `first`."""
    checked(estimates.base, "base", first)
    checked(estimates.source, "source", first)
    for field, meaning in MEANING.items():
        for metric, value in (getattr(estimates, field) or {}).items():
            for site, array in value.items() if isinstance(value, dict) else [("", value)]:
                bad = np.argwhere(~np.isfinite(array))
                if len(bad):
                    where = f" at site {site!r}" if site else ""
                    raise ValueError(
                        f"{meaning} of metric {metric!r}{where} is not finite in example {first + int(bad[0][0])}: the"
                        " metric has no slope where the run is (a root at zero, say), or the model overflows"
                    )


def _store(save: Any, job: AttributionJob) -> chunks.Store:
    grids = {site: (nodes.axes, nodes.members) for site, nodes in job.nodes.items()}
    check_kept_model(job.model)
    if job.method.users_code:
        raise TypeError(
            f"save= is for mijax's own methods: whether the code of {type(job.method).__name__} changes, a folder cannot tell"
        )
    parts = {"model": job.model, "prompts": (job.base, job.source), "sites": (job.layout, grids)}
    parts |= {"method": job.method}
    parts |= {"metric": (chunks.repeatable(lambda: job.programs, save), of_first(job.model, job.base, job.metrics))}
    return chunks.Store(save, {name: chunks.fingerprint(part) for name, part in parts.items()})


@JitNow
def _chunk(
    method: Method, model: LayeredModel, tokens: Tokens, source: Array | None, metrics: Any, members: dict[str, Array],
    examples: Examples, layout: Layout, checkpoint: int,
) -> dict[str, Array]:  # fmt: skip
    """The estimates of prompts that run together, by `_name`."""
    dtype, shapes = model.dtype, {site: shape for site, shape, _ in layout}
    batch = len(examples.numbers)
    gates = {s: jnp.zeros((batch, *(shape if cells is None else (cells,))), dtype) for s, shape, cells in layout}

    def measured(gates: dict[str, Array], path: Path):
        read, spread = captures_of(model, metrics), gates_at_entries(model.sites, gates, shapes, members)
        runs = gated(model, tokens, source, spread, path, checkpoint, read)
        base, other = ({} if out is None else values_of(metrics, out.readout, out.taps) for out in runs)
        return base, other

    estimates = method(measured, gates, model.sites, examples)
    leaves = jax.tree_util.tree_flatten_with_path(estimates)[0]
    key = lambda entry: entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else entry.key
    return {_name(*map(key, path)): x for path, x in leaves}


def _name(field: str, metric: str, site: str = "") -> str:
    """The name of one array of `Estimates` among all that a chunk gives."""
    return f"{field}:{metric}:{site}" if site else f"{field}:{metric}"


def _nested(arrays: Mapping[str, np.ndarray], metrics: list[str], sites: list[str]) -> Estimates:
    """The estimates that `_name` names."""
    by_metric = lambda field: {m: arrays[_name(field, m)] for m in metrics if _name(field, m) in arrays}
    by_site = lambda field, m: {s: arrays[_name(field, m, s)] for s in sites if _name(field, m, s) in arrays}
    values = {field: by_metric(field) for field in ("base", "source", "gap")}
    terms = {
        field: {m: by_site(field, m) for m in metrics if by_site(field, m)}
        for field in ("terms", "unsigned", "error", "error_se")
    }
    fields = {name: value for name, value in (values | terms).items() if value}
    return Estimates(**{"source": {}, **fields})
