"""All prompts through a gradient method, in chunks that fit the memory."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mijax import chunks
from mijax._types import Array, Int
from mijax.attribution.curvature import curvature
from mijax.attribution.method import Method
from mijax.attribution.nodes import Nodes, spread
from mijax.attribution.side_by_side import gated, group_size
from mijax.attribution.taps import Path
from mijax.engine.layout import row_bytes
from mijax.engine.measure import as_programs, captures_of, checked, is_split, metric_bytes, taken, values_of
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel
from mijax.model.tokens import Tokens
from mijax.programs.now import JitNow

Layout: TypeAlias = tuple[tuple[str, tuple[int, ...], int | None], ...]
"""Of each site: its name, its collapsed shape without batch, and how many cells where they are a grid's."""

CHECKPOINTS = (0, 1, 2)

MEANING = {
    "term": "the gradient",
    "unsigned": "the gradient without a layer's",
    "gap": "the sum of the gradients along the path, or the end of the path,",
    "error": "the second derivative",
    "error_se": "the second derivative",
}
"""What is told by each kind of array."""


class AttributionJob(NamedTuple):
    """What is attributed, and how."""

    model: LayeredModel
    base: Tokens
    source: Tokens | None
    metrics: Mapping[str, AnyMetric]
    nodes: Mapping[str, Nodes]
    method: Method
    probes: int
    seed: int

    @property
    def programs(self) -> dict[str, AnyMetric]:
        """The metrics as users' functions are now, for all prompts together."""
        return as_programs(self.model, self.base, self.metrics)

    @property
    def layout(self) -> Layout:
        """What of the nodes the compiled program depends on."""
        return tuple((site, own.shape, None if own.grid is None else own.size) for site, own in self.nodes.items())


class Schedule(NamedTuple):
    """How many prompts run together, what the backward pass computes again, and the bytes that this takes."""

    prompts: int
    checkpoint: int
    bytes: int


def schedule(job: AttributionJob, memory: int) -> Schedule:
    """As little computed again as `memory` allows for as many prompts as fill the device.

    Prompts are split only where every metric can be (`AnyMetric`). Raises `ValueError` where not one prompt fits.
    """
    batch, pos = job.base.ids.shape
    splits = all(map(is_split, job.metrics.values()))
    full = min(batch, -(-chunks.full_rows() // pos)) if splits else batch
    read, fixed = 2 * metric_bytes(job.model, job.base, job.programs), layers_bytes(job.model)
    fits, each, checkpoint = 0, 0, 0
    for checkpoint in CHECKPOINTS:
        each = -(-read // batch) + prompt_bytes(job, checkpoint)
        fits = min(batch, max(0, memory - fixed) // each)
        if fits >= full:
            break
    prompts = _equal(batch, fits) if splits and fits else batch
    if fits < prompts:
        raise ValueError(
            f"{'one prompt takes' if splits else 'the prompts take'} about {fixed + each * (1 if splits else batch):,} bytes,"
            f" memory={memory:,} allows none"
        )
    return Schedule(prompts, checkpoint, fixed + each * prompts)


def _equal(batch: int, most: int) -> int:
    """The size of as many chunks of equal size as it takes."""
    return -(-batch // -(-batch // most))


def layers_bytes(model: LayeredModel) -> int:
    """The bytes of the parameters of two layers, of which XLA makes copies as it comes to them, forwards and backwards."""
    return 2 * model.layer_bytes


def prompt_bytes(job: AttributionJob, checkpoint: int) -> int:
    """The bytes that one more prompt takes: what the backward pass finds kept, what a layer works with, and gates."""
    pos, sites = job.base.ids.shape[1], job.model.sites
    leaves, treedef = jax.tree.flatten(jax.tree.map(_shape_of, job.model))
    kept = functools.partial(_kept, tuple(leaves), treedef, pos, job.source is None, job.layout, job.method)
    n, itemsize = max(1, job.model.n_layers), job.model.dtype.itemsize
    streams = kept(1) / n
    held = kept(0) if checkpoint == 0 else streams * (n if checkpoint == 1 else n // group_size(n) + group_size(n))
    recomputed = job.method.path(1).recompute
    runs = 4 if job.method.path(1).inputs is not None else 3  # forwards and backwards
    scores = sites["pattern"].sizes["head"] * pos**2 * itemsize * (48 if recomputed else 4 * runs)
    layer = runs * pos * row_bytes(job.model, job.nodes) + scores
    gates = sum(int(np.prod(shape if cells is None else (cells,))) for _, shape, cells in job.layout) * itemsize
    return int((held + layer) * (2.5 if job.probes else 1)) + gates * (4 if job.probes or recomputed else 3)


@functools.lru_cache(maxsize=256)
def _kept(
    leaves: tuple[Any, ...], treedef: Any, pos: int, alone: bool, layout: Layout, method: Method, checkpoint: int
) -> int:
    """The bytes that are kept of one prompt for the backward pass: read off its trace, for two prompts and for one."""
    model = jax.tree.unflatten(treedef, leaves)

    def residuals(batch: int) -> int:
        ids = jax.ShapeDtypeStruct((batch, pos), jnp.int32)
        gates = {site: jax.ShapeDtypeStruct((batch, *shape), model.dtype) for site, shape, _ in layout}

        def kept(gates, model, ids):
            tokens = Tokens.tree_unflatten(None, (ids, jnp.ones(ids.shape, bool)))
            at = lambda gates: gated(
                model,
                tokens,
                None if alone else ids,
                spread(model.sites, gates, {}, {}),
                method.path(batch),
                checkpoint,
            )
            return jax.vjp(lambda gates: jnp.sum(at(gates)[0].readout.final), gates)[1]

        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(kept, gates, model, ids)))

    return residuals(2) - residuals(1)


def _shape_of(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def estimated(
    job: AttributionJob, order: Schedule, *, progress: bool, save: str | os.PathLike | None
) -> tuple[dict[str, np.ndarray], Schedule]:
    """Everything found, examples in front, by `kind:metric` or `kind:metric:site`; and the schedule by which it was, that of the folder."""
    batch = len(job.base.ids)
    store = None if save is None else _store(save, job)
    if store is not None:
        kept = store.begin(
            {name: np.asarray(value) for name, value in order._asdict().items()}, {"sites": list(job.nodes)}
        )
        order = Schedule(*(int(kept[name]) for name in Schedule._fields))
    whole, count, programs = order.prompts == batch, -(-batch // order.prompts), job.programs
    found: dict[str, list[np.ndarray]] = {}

    def run(numbers: Sequence[int]) -> Mapping[str, Array]:
        first = numbers[0] * order.prompts
        examples: Any = np.minimum(np.arange(first, first + order.prompts, dtype=np.int32), batch - 1)
        some = lambda tree: tree if whole else jax.tree.map(lambda a: np.asarray(a)[examples], tree)
        metrics: Any = programs if whole else taken(job.model, some(job.base), job.metrics, examples)
        members: Any = {site: own.members[examples] for site, own in job.nodes.items() if own.members is not None}
        source: Any = None if job.source is None else jnp.asarray(some(job.source.ids))
        key = jax.random.key(job.seed)
        return _chunk(
            job.method, job.model, some(job.base), source, metrics, members, examples, key, job.layout, job.probes,
            order.checkpoint,
        )  # fmt: skip

    def keep(number: int, own: Mapping[str, np.ndarray]) -> int:
        count = min(order.prompts, batch - number * order.prompts)
        own = {name: value[:count] for name, value in own.items()}
        _check_finite(own, number * order.prompts)
        for name, value in own.items():
            found.setdefault(name, []).append(value)
        return count

    with chunks.progress_bar(batch, "attribute", "prompt", progress) as bar:
        chunks.run_chunks(run, keep, count, bar, store=store)
    return {name: np.concatenate(parts) for name, parts in found.items()}, order


def _check_finite(found: Mapping[str, np.ndarray], first: int) -> None:
    """Raise `ValueError` where a metric, a term, or what is told of their error is not finite; the examples count from `first`."""
    for run in ("base", "source"):
        checked({k.partition(":")[2]: v for k, v in found.items() if k.startswith(f"{run}:")}, run, first)
    for name, value in found.items():
        bad = np.argwhere(~np.isfinite(value))
        if len(bad):
            kind, _, of = name.partition(":")
            metric, _, site = of.partition(":")
            raise ValueError(
                f"{MEANING[kind]} of metric {metric!r}{f' at site {site!r}' if site else ''} is not finite in example {first + int(bad[0][0])}: the"
                " metric has no slope where the run is (a root at zero, say), or the model overflows"
            )


def _store(save: Any, job: AttributionJob) -> chunks.Store:
    grids = {site: (own.axes, own.members) for site, own in job.nodes.items()}
    parts = {"model": job.model, "prompts": (job.base, job.source), "sites": (job.layout, grids)}
    parts |= {"metric": chunks.repeatable(lambda: job.programs, save), "method": job.method}
    parts |= {"probes": (job.probes, job.seed)} if job.probes else {}
    return chunks.Store(save, {name: chunks.fingerprint(part) for name, part in parts.items()})


@JitNow
def _chunk(
    method: Method, model: LayeredModel, tokens: Tokens, source: Array | None, metrics: Any, members: dict[str, Array],
    examples: Int[Array, " batch"], key: Array, layout: Layout, probes: int, checkpoint: int,
) -> dict[str, Array]:  # fmt: skip
    """What is found for a chunk of prompts."""
    dtype, shapes = model.dtype, {site: shape for site, shape, _ in layout}
    gates = {
        s: jnp.zeros((len(examples), *(shape if cells is None else (cells,))), dtype) for s, shape, cells in layout
    }

    def measured(gates: dict[str, Array], path: Path):
        read, opened = captures_of(model, metrics), spread(model.sites, gates, shapes, members)
        own, other = gated(model, tokens, source, opened, path, checkpoint, read)
        of = lambda out: {} if out is None else values_of(metrics, out.readout, out.taps)
        return of(own), of(other)

    found = method(measured, gates, model.sites)
    flat = {f"{run}:{name}": v for run, own in zip(("base", "source"), found.runs) for name, v in own.items()}
    flat |= {f"gap:{name}": v for name, v in (found.gap or {}).items()}
    by_site = {"term": found.terms, "unsigned": found.unsigned}
    if probes:
        by_site["error"], by_site["error_se"] = curvature(measured, gates, key, examples, probes)
    for kind, terms in by_site.items():
        flat |= {f"{kind}:{name}:{site}": t for name, own in (terms or {}).items() for site, t in own.items()}
    return flat
