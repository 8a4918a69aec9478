"""The unlabelled driver of sweeps: the base, then chunks of cells, each resumed from it where it begins to differ."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mijax import chunks
from mijax._types import Array, Int
from mijax.engine.cells import Cells, Stack, cells_of
from mijax.engine.chunk import Base, Chunk, base_of, run_chunk
from mijax.engine.examples import Prompts, groups
from mijax.engine.layout import Layout, SweepJob, job_of, layout_bytes, layout_of
from mijax.engine.measure import Metrics, Values, captures_of, checked, named, reads_activations, values_of
from mijax.engine.options import Options, Running, options_of
from mijax.engine.plan import Plan, chunk_of, columns_read, plan, work
from mijax.interventions.edits import Interventions
from mijax.memory import PeakMemory
from mijax.meshes import automatic
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel, Model
from mijax.model.tokens import Inputs
from mijax.model.transformer import Transformer
from mijax.programs.now import JitNow
from mijax.run import run


class Swept(NamedTuple):
    """The cells, the metrics `[cell, batch]` of each, those `[batch]` of the base and of what else ran, and what is told of the run."""

    cells: Cells
    values: Values
    runs: dict[str, Values]
    told: dict[str, Any]


class Start(NamedTuple):
    """What a group of prompts is swept from: its edits, the metrics of its base (and of what else ran), what cells resume from,
    and the first column of each example that a cell changes, where a driver knows better than the edits tell."""

    cells: Cells
    runs: dict[str, Values]
    base: Base | None
    first: Int[np.ndarray, "cell batch"] | None = None


Begin: TypeAlias = Callable[[Model, Prompts], Start]
"""Runs what a group of prompts is swept from."""


def from_base(model: Model, some: Prompts) -> Start:
    """The base under the edits that all cells share."""
    at_base, base, _ = kept_base(model, some.tokens, some.cells.shared(), some.metrics, first=some.first)
    return Start(some.cells, {"base": at_base}, base)


def swept(
    model: Model,
    tokens: Inputs,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    options: Options,
    *,
    source: Inputs | None = None,
    first: Int[np.ndarray, " batch"] | None = None,
    begin: Begin = from_base,
) -> Swept:
    """The metrics of the base and of every cell, unlabelled: of all prompts together, or of groups of them one after the other.

    `begin` runs what a group of prompts needs beforehand. `first` is a column of each example before which no cell changes
    anything; `source` are prompts from which `begin` takes values. Whatever can be wrong is raised before `begin` is called.
    """
    model, tokens, source, options = automatic((model, tokens, source, options))
    cells = cells._replace(edits={site: automatic(several) for site, several in cells.edits.items()})
    metrics = {name: automatic(metric) for name, metric in metrics.items()}  # not the dictionaries: JAX would sort them
    job, batch = job_of(model, tokens, cells, metrics, first, options.save), len(tokens.ids)
    store = None if options.save is None else _store(options.save, job, source)
    kept = None if store is None else store.plan
    layout = layout_of(job, options.budget) if kept is None else Layout.from_arrays(kept, batch)
    if store is not None and layout.prompts < batch:
        store.begin(layout.arrays(), _labels(job))
    count, estimate = -(-batch // layout.prompts), layout_bytes(job, layout)
    placed = _replicated(options.mesh, model)
    bar = chunks.progress_bar(cells.size * count, f"sweep {', '.join(cells.edits)}", "cell", options.progress)
    runs: list[dict[str, Values]] = []
    with PeakMemory() as peak, bar:
        for some in groups(model, tokens, job.cells, metrics, job.programs, layout.prompts):
            found = _group(job, layout, some, begin, placed, options, store, bar)
            runs.append(
                {
                    which: {name: value[..., : some.distinct] for name, value in own.items()}
                    for which, own in found.items()
                }
            )
    joined = {
        which: {name: np.concatenate([run[which][name] for run in runs], axis=-1) for name in metrics}
        for which in runs[0]
    }
    _warn_of_not_finite(cells, joined["cells"])
    told: dict[str, Any] = {
        "prompts_together": layout.prompts,
        "memory_estimate": float(estimate),
    }  # a netCDF file has no integers so large
    return Swept(
        cells, joined.pop("cells"), joined, told | ({} if peak.taken is None else {"memory_peak": float(peak.taken)})
    )


def check_sweep(
    model: Model, tokens: Inputs, interventions: Interventions | Stack, metric: Metrics, running: Running
) -> None:
    """Raise what `sweep` raises before it runs anything; for drivers that run something before they sweep."""
    options = options_of(running)
    job = job_of(model, tokens, cells_of(interventions), named(metric), None)
    if options.save is None or not chunks.is_begun(options.save):  # a folder has its own plan
        layout_of(job, options.budget)


def _group(
    job: SweepJob,
    layout: Layout,
    some: Prompts,
    begin: Begin,
    placed: Model,
    options: Options,
    store: chunks.Store | None,
    bar: Any,
) -> dict[str, Values]:
    """The metrics of a group of prompts: `[batch]` by run, and `[cell, batch]` of its `cells`. The model is `placed` where chunks run."""
    start = begin(job.model, some)
    mesh, cells, positions = options.mesh, start.cells, some.tokens.ids.shape[1]
    read = columns_read(some.metrics.values(), some.tokens)
    todo = work(placed, some.tokens, cells, read, reads_activations(some.metrics))
    first = np.maximum(todo.first, job.first[some.examples])
    first = first if start.first is None else np.maximum(first, start.first)
    first[:, some.distinct :] = positions  # a repeated prompt is not computed
    todo = todo._replace(first=first)
    order = plan(todo, layout.size)
    if store is not None:
        store = (
            store
            if len(job.tokens.ids) == layout.prompts
            else store.inside(f"prompts_{some.first:06d}_{some.distinct}")
        )
        order = Plan.from_arrays(store.begin(order.arrays(), _labels(job)))
    values = {name: np.repeat(value[None], cells.size, axis=0) for name, value in start.runs["base"].items()}
    shared: Any = (placed, *_replicated(mesh, (some.tokens, start.base, some.metrics, None if todo.whole else read)))

    def measured(numbers: Sequence[int]) -> dict[str, Array]:
        made = [chunk_of(todo, order, number) for number in numbers]
        data: Any = [(chunk, *cells.take_split(own)) for own, chunk in made]
        if mesh is None:
            alone: Any = (*shared, cells.stacked, *data[0])
            return _chunk(*alone)
        width = mesh.devices.shape[0]
        moved = [(chunk, varying) for chunk, varying, _ in data]
        moved = jax.tree.map(lambda *a: np.stack([*a, *a[-1:] * (width - len(a))]), *moved)
        moved = jax.device_put(moved, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
        together: Any = (mesh, *shared, cells.stacked, *moved, _replicated(mesh, data[0][2]))
        return _chunks(*together)

    def keep(number: int, found: Values) -> int:
        own = order.order[order.bounds[number] : order.bounds[number + 1]]
        differs = todo.first[own] < positions
        for name, value in found.items():
            values[name][own] = np.where(differs, value[: len(own)], values[name][own])
        return len(own)

    width = None if mesh is None else mesh.devices.shape[0]
    chunks.run_chunks(measured, keep, len(order.bounds) - 1, bar, width=width, store=store)
    bar.update(cells.size - len(order.order))  # cells that change nothing
    return {**start.runs, "cells": values}


def _warn_of_not_finite(cells: Cells, values: Values) -> None:
    """Statistics take NaN as a position that a prompt has not: that it is something else must be told."""
    bad = np.any([~np.isfinite(value).all(axis=-1) for value in values.values()], axis=0)
    if bad.any():
        place = map(int, np.unravel_index(int(np.argmax(bad)), cells.shape))
        told = ", ".join(f"{dim}={labels[i]}" for (dim, labels), i in zip(cells.labels.items(), place))
        warnings.warn(
            f"the metric is not finite in {bad.sum()} of {cells.size} cells, the first of them {told}: the edit is not, the model"
            " overflows, or the metric reads where its pos does not say",
            stacklevel=4,
        )


def _replicated(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays that are not on the mesh's devices are copied to all of them."""
    if mesh is None:
        return tree
    devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())
    there = lambda x: isinstance(x, jax.Array) and x.sharding.device_set == devices
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if eqx.is_array_like(x) and not there(x) else x, tree)


def _store(save: str | os.PathLike, job: SweepJob, source: Inputs | None) -> chunks.Store:
    """The folder of a sweep, with what it is a sweep of."""
    cells = job.cells
    grid = (cells.edits, cells.group, cells.picks, dict(cells.labels))
    if type(job.model) is not Transformer:
        raise TypeError(
            f"save= is for a mijax.Transformer: whether the code of {type(job.model).__name__} changes, a folder cannot tell"
        )
    parts = {
        "model": job.model, "prompts": (job.tokens, source), "grid of interventions": grid, "metric": dict(job.programs)
    }  # fmt: skip
    return chunks.Store(save, {name: chunks.fingerprint(part) for name, part in parts.items()})


def _labels(job: SweepJob) -> dict[str, Any]:
    """What a folder says of its sweep to a reader."""
    return {"labels": {dim: list(own) for dim, own in job.cells.labels.items()}, "metrics": list(job.metrics)}


def kept_base(
    model: Model,
    tokens: Inputs,
    edits: Any,
    metrics: Mapping[str, AnyMetric],
    capture: tuple[str, ...] = (),
    first: int = 0,
) -> tuple[Values, Base | None, dict[str, Array]]:
    """The metrics of the base, what cells resume from, and what was captured; examples are counted from `first` in errors."""
    values, kept, acts = _based(model, tokens, edits, metrics, capture)
    return checked(values, "base", first), kept, acts


@JitNow
def _based(model, tokens, edits, metrics, capture):
    read = captures_of(model, metrics)
    if isinstance(model, LayeredModel):
        out, base = base_of(model, tokens, edits, capture, read)
    else:
        out, base = run(model, tokens, edits, capture=capture, taps=read), None
    return values_of(metrics, out.readout, out.taps), base, {site: out.acts[site] for site in capture}


@JitNow
def _chunk(model, tokens, base: Base | None, metrics, columns, stacked, chunk: Chunk, varying, fixed):
    """The metrics `[cell, batch]` of a chunk of cells."""
    edits, read = eqx.combine(varying, fixed), captures_of(model, metrics)
    if base is None:

        def cell(varying: Any) -> Any:
            out = run(model, tokens, eqx.combine(varying, fixed), taps=read)
            return values_of(metrics, out.readout, out.taps)

        return jax.vmap(cell)(varying)
    final, acts = run_chunk(model, tokens, base, chunk, edits, stacked, columns, read)
    return jax.vmap(lambda final, acts: values_of(metrics, model.readout(final, tokens), acts))(final, acts)


@JitNow
def _chunks(mesh: Mesh, model, tokens, base, metrics, read, stacked, chunk: Chunk, varying, fixed):
    """The same of several chunks at once, each on the devices at one place of the mesh's first axis."""
    axis = mesh.axis_names[0]
    shared, rest = eqx.partition((model, tokens, base, metrics, read, fixed), eqx.is_array)

    def one(shared, moved):
        model, tokens, base, metrics, read, fixed = eqx.combine(shared, rest)
        chunk, varying = jax.tree.map(lambda a: a[0], moved)
        found = _chunk(model, tokens, base, metrics, read, stacked, chunk, varying, fixed)
        return jax.tree.map(lambda a: a[None], found)

    everywhere, own = PartitionSpec(), PartitionSpec(axis)
    mapped = jax.shard_map(
        one, mesh=mesh, in_specs=(everywhere, own), out_specs=own, axis_names={axis},
        check_vma=False,  # cells never meet, and programs were made outside, where nothing varies
    )  # fmt: skip
    return mapped(shared, (chunk, varying))
