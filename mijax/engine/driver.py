"""The driver of sweeps, without labels: the base run, then chunks of cells, resumed from it where they differ."""

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
from mijax.engine.layout import Layout, SweepJob, job_of, layout_bytes, layout_of, operations
from mijax.engine.measure import (
    Metrics,
    Values,
    captures_of,
    checked,
    compiled_for,
    named,
    reads_activations,
    values_of,
)
from mijax.engine.names import check_metric_names
from mijax.engine.options import Options, Running, options_of
from mijax.engine.per_example import of_first
from mijax.engine.plan import Plan, chunk_of, columns_read, plan, work
from mijax.forward import run
from mijax.interventions.edits import Interventions
from mijax.memory import PeakMemory
from mijax.meshes import automatic
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel, Model
from mijax.model.tokens import Inputs
from mijax.model.transformer import Transformer
from mijax.programs.now import JitNow


class Swept(NamedTuple):
    """The result of a sweep.

    Attributes:
        cells: the cells.
        values: the metrics of the cells, `[cell, batch]` each.
        runs: the metrics of the base run and of other runs (the source's), `[batch]` each, by run and metric.
        attrs: attributes for the labelled result: the number of prompts that ran together, the bytes estimated and
            measured.
    """

    cells: Cells
    values: Values
    runs: dict[str, Values]
    attrs: dict[str, Any]


class Start(NamedTuple):
    """What the cells of a group of prompts are resumed from.

    Attributes:
        cells: the cells, with the edits of the group.
        runs: the metrics of the base run and of other runs (the source's), `[batch]` each, by run and metric.
        base: the states of the base run; `None` for a model that is run whole.
        first: the first column of each example that a cell changes, where the driver knows it better than the edits
            tell.
    """

    cells: Cells
    runs: dict[str, Values]
    base: Base | None
    first: Int[np.ndarray, "cell batch"] | None = None


Begin: TypeAlias = Callable[[Model, Prompts], Start]
"""A function that runs what the cells of a group of prompts are resumed from."""


def _from_base(model: Model, prompts: Prompts) -> Start:
    """The base run, under the edits that all cells share."""
    at_base, _, base = kept_run(model, prompts.tokens, prompts.cells.shared(), prompts.metrics, first=prompts.first)
    return Start(prompts.cells, {"base": at_base}, base)


def swept(
    model: Model,
    tokens: Inputs,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    options: Options,
    *,
    source: Inputs | None = None,
    first: Int[np.ndarray, " batch"] | None = None,
    begin: Begin = _from_base,
) -> Swept:
    """Run the base and every cell, and measure them, without labels.

    All prompts run together, or groups of them one after the other where `options.memory` asks for it.

    Args:
        model: the model.
        tokens: the prompts.
        cells: the cells.
        metrics: the metrics by name.
        options: how the sweep is run.
        source: prompts from which `begin` takes values; with `options.save` they are a part of the folder's
            identity.
        first: a column of each example before which no cell changes anything.
        begin: runs what the cells of a group of prompts are resumed from, by default the base run.

    Returns:
        The metrics of the base and of every cell.

    Raises:
        ValueError: for what cannot be run, before `begin` is called: an edit, metric or prompt that does not fit
            the model, memory that does not hold one cell, a folder of another sweep; and where a metric is not
            finite on the base.
        TypeError: for a metric that is no function, and for `options.save` with a model other than a
            `mijax.Transformer`.
    """
    model, tokens, source, options = automatic((model, tokens, source, options))
    cells = cells._replace(edits={site: automatic(edits) for site, edits in cells.edits.items()})
    # Metrics one by one: JAX would sort the keys of a dictionary.
    metrics = {name: automatic(metric) for name, metric in metrics.items()}
    job, batch = job_of(model, tokens, cells, metrics, first, options.save), len(tokens.ids)
    store = None if options.save is None else _store(options.save, job, source)
    saved_plan = None if store is None else store.plan
    layout = layout_of(job, options.budget) if saved_plan is None else Layout.from_arrays(saved_plan, batch)
    if store is not None and layout.prompts < batch:
        store.begin(layout.arrays(), _labels(job))
    count, estimate = -(-batch // layout.prompts), layout_bytes(job, layout)
    placed = _replicated(options.mesh, model)
    bar = chunks.progress_bar(cells.size * count, f"sweep {', '.join(cells.edits)}", "cell", options.progress)
    runs: list[dict[str, Values]] = []
    with PeakMemory() as peak, bar:
        for prompts in groups(model, tokens, job.cells, metrics, job.programs, layout.prompts):
            results = _group(job, layout, prompts, begin, placed, options, store, bar)
            runs.append(
                {
                    which: {name: value[..., : prompts.distinct] for name, value in values.items()}
                    for which, values in results.items()
                }
            )
    joined = {
        which: {name: np.concatenate([run[which][name] for run in runs], axis=-1) for name in metrics}
        for which in runs[0]
    }
    _warn_of_not_finite(cells, joined["cells"])
    # Floats, because netCDF has no integers of this size.
    attrs: dict[str, Any] = {"prompts_together": layout.prompts, "memory_estimate": float(estimate)}
    return Swept(
        cells, joined.pop("cells"), joined, attrs | ({} if peak.taken is None else {"memory_peak": float(peak.taken)})
    )


def check_sweep(
    model: Model, tokens: Inputs, interventions: Interventions | Stack, metric: Metrics, running: Running
) -> None:
    """Check what `sweep` checks before it runs anything; for drivers that run something before they sweep.

    Args:
        model: the model.
        tokens: the prompts.
        interventions: the interventions with their grids, as `sweep` takes them.
        metric: the metric or metrics.
        running: the keywords of `Running`.

    Raises:
        ValueError: what `sweep` raises before anything runs.
        TypeError: likewise.
    """
    options, cells = options_of(running), cells_of(interventions)
    check_metric_names(metric, cells.labels)
    job = job_of(model, tokens, cells, named(metric), None)
    if options.save is None or not chunks.is_begun(options.save):  # a folder that was begun keeps its plan
        layout_of(job, options.budget)


def _group(
    job: SweepJob,
    layout: Layout,
    prompts: Prompts,
    begin: Begin,
    placed: Model,
    options: Options,
    store: chunks.Store | None,
    bar: Any,
) -> dict[str, Values]:
    """The metrics of a group of prompts: `[batch]` by run, and `[cell, batch]` of its `cells`.

    `placed` is the model with its arrays on the devices where chunks run.
    """
    start = begin(job.model, prompts)
    mesh, cells, positions = options.mesh, start.cells, prompts.tokens.ids.shape[1]
    read = columns_read(prompts.metrics.values(), prompts.tokens)
    todo = work(placed, prompts.tokens, cells, read, reads_activations(prompts.metrics))
    first = np.maximum(todo.first, job.first[prompts.examples])
    first = first if start.first is None else np.maximum(first, start.first)
    first[:, prompts.distinct :] = positions  # a repeated prompt is not computed
    todo = todo._replace(first=first)
    schedule = plan(todo, layout.size)
    if store is not None:
        store = (
            store
            if len(job.tokens.ids) == layout.prompts
            else store.inside(f"prompts_{prompts.first:06d}_{prompts.distinct}")
        )
        schedule = Plan.from_arrays(store.begin(schedule.arrays(), _labels(job)))
    values = {name: np.repeat(value[None], cells.size, axis=0) for name, value in start.runs["base"].items()}
    shared: Any = (
        placed,
        *_replicated(mesh, (prompts.tokens, start.base, prompts.metrics, None if todo.whole else read)),
    )

    small = operations(job) <= chunks.small_work()

    def measured(numbers: Sequence[int]) -> dict[str, Array]:
        prepared = [chunk_of(todo, schedule, number) for number in numbers]
        data: Any = [(chunk, *cells.take_split(indices)) for indices, chunk in prepared]
        if mesh is None:
            arguments: Any = (*shared, cells.stacked, *data[0])
            return _chunk.compiled("quickly" if small else "for_speed")(*arguments)
        width = mesh.devices.shape[0]
        per_device = [(chunk, varying) for chunk, varying, _ in data]
        per_device = jax.tree.map(lambda *a: np.stack([*a, *a[-1:] * (width - len(a))]), *per_device)
        per_device = jax.device_put(per_device, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
        mesh_arguments: Any = (mesh, *shared, cells.stacked, *per_device, _replicated(mesh, data[0][2]))
        return _chunks(*mesh_arguments)

    def keep(number: int, results: Values) -> int:
        indices = schedule.order[schedule.bounds[number] : schedule.bounds[number + 1]]
        differs = todo.first[indices] < positions
        for name, value in results.items():
            values[name][indices] = np.where(differs, value[: len(indices)], values[name][indices])
        return len(indices)

    width = None if mesh is None else mesh.devices.shape[0]
    chunks.run_chunks(measured, keep, len(schedule.bounds) - 1, bar, width=width, store=store)
    bar.update(cells.size - len(schedule.order))  # cells that change nothing are not run
    return {**start.runs, "cells": values}


def _warn_of_not_finite(cells: Cells, values: Values) -> None:
    """Warn of cells whose metric is not finite."""
    bad = np.any([~np.isfinite(value).all(axis=-1) for value in values.values()], axis=0)
    if bad.any():
        place = map(int, np.unravel_index(int(np.argmax(bad)), cells.shape))
        text = ", ".join(f"{dim}={labels[i]}" for (dim, labels), i in zip(cells.labels.items(), place))
        warnings.warn(
            f"the metric is not finite in {bad.sum()} of {cells.size} cells, the first of them {text}: the edit is not, the model"
            " overflows, or the metric reads where its pos does not say",
            stacklevel=4,
        )


def _replicated(mesh: Mesh | None, tree: Any) -> Any:
    """The tree, with arrays that are not on the mesh's devices copied to all of them."""
    if mesh is None:
        return tree
    devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())
    on_mesh = lambda x: isinstance(x, jax.Array) and x.sharding.device_set == devices
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if eqx.is_array_like(x) and not on_mesh(x) else x, tree)


def check_kept_model(model: Model) -> None:
    """Check that a folder can hold results of a model.

    Args:
        model: the model.

    Raises:
        TypeError: for any class but `mijax.Transformer`.
    """
    if type(model) is not Transformer:
        raise TypeError(
            f"save= is for a mijax.Transformer: whether the code of {type(model).__name__} changes, a folder cannot tell"
        )


def _store(save: str | os.PathLike[str], job: SweepJob, source: Inputs | None) -> chunks.Store:
    """The folder of a sweep, identified by model, prompts, grid and metrics."""
    cells = job.cells
    grid = (cells.edits, cells.group, cells.picks, dict(cells.labels))
    check_kept_model(job.model)
    parts = {
        "model": job.model, "prompts": (job.tokens, source), "grid of interventions": grid, "metric": (dict(job.programs), of_first(job.model, job.tokens, job.metrics)),
    }  # fmt: skip
    return chunks.Store(save, {name: chunks.fingerprint(part) for name, part in parts.items()})


def _labels(job: SweepJob) -> dict[str, Any]:
    """What a folder tells a reader of its sweep."""
    return {"labels": {dim: list(choices) for dim, choices in job.cells.labels.items()}, "metrics": list(job.metrics)}


def kept_run(
    model: Model,
    tokens: Inputs,
    edits: Any,
    metrics: Mapping[str, AnyMetric],
    capture: tuple[str, ...] = (),
    first: int = 0,
    what: str = "base",
) -> tuple[Values, dict[str, Array], Base | None]:
    """Run the base, under the edits that all cells share; or the source of a pair.

    Args:
        model: the model.
        tokens: the prompts.
        edits: the edits.
        metrics: the metrics by name.
        capture: sites of which the activations are returned too.
        first: number of the first example, for error messages.
        what: which run this is, for error messages.

    Returns:
        The metrics, the activations of `capture`, and the states that cells resume from (`None` for a model that
        is run whole).

    Raises:
        ValueError: where a metric is not finite.
    """
    values, base, acts = _based.compiled(compiled_for(model, tokens))(model, tokens, edits, metrics, capture)
    return checked(values, what, first), acts, base


@JitNow
def _based(model, tokens, edits, metrics, capture):
    """The metrics of the base run, the states that cells resume from, and the activations of `capture`."""
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
    """The metrics `[chunk, cell, batch]` of several chunks, each at one place of the mesh's first axis."""
    axis = mesh.axis_names[0]
    shared, rest = eqx.partition((model, tokens, base, metrics, read, fixed), eqx.is_array)

    def on_devices(shared, per_device):
        model, tokens, base, metrics, read, fixed = eqx.combine(shared, rest)
        chunk, varying = jax.tree.map(lambda a: a[0], per_device)
        results = _chunk(model, tokens, base, metrics, read, stacked, chunk, varying, fixed)
        return jax.tree.map(lambda a: a[None], results)

    replicated, split = PartitionSpec(), PartitionSpec(axis)
    mapped = jax.shard_map(
        on_devices, mesh=mesh, in_specs=(replicated, split), out_specs=split, axis_names={axis},
        check_vma=False,  # cells do not communicate, and programs were traced where nothing varies over the mesh
    )  # fmt: skip
    return mapped(shared, (chunk, varying))
