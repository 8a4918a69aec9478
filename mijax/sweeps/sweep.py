"""Sweeps: a metric at every cell of a grid of edits, each resumed from the base run where it begins to differ."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, overload

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mijax import chunks
from mijax._types import Array, ArrayLike, Int
from mijax.interventions.edits import Interventions
from mijax.memory import PeakMemory, default_memory
from mijax.metrics import AnyMetric
from mijax.model.numerics import accumulator
from mijax.model.readout import Readout
from mijax.model.sites import PER_HEAD_COPIES
from mijax.model.tokens import Tokens, as_tokens
from mijax.model.transformer import Transformer
from mijax.sweeps.cells import Cells, Stack, cells_of, check_cells, convert_cells
from mijax.sweeps.engine import Base, Chunk, base_of, run_chunk
from mijax.sweeps.measure import Metrics, Values, as_programs, checked, described, metric_bytes, named, values_of
from mijax.sweeps.plan import Plan, Shape, Work, capacity, chunk_of, columns_read, plan, work

if TYPE_CHECKING:
    import xarray as xr


class Running(TypedDict, total=False):
    """How a sweep is run; every driver that stands on `sweep` takes these.

    `memory`: the bytes that one chunk of cells may take, by default chosen for the device. `progress`: show a bar on work
    of more than a second. `save`: a folder to which finished chunks are written; the same call after a crash goes on from
    there, to the same values bit by bit, with the plan that the folder was begun with, and is refused where model, prompts,
    interventions or metric are others. `mesh`: devices, along whose first axis each gets its own chunks; the parameters may be
    sharded over other axes.
    """

    memory: int | None
    progress: bool
    save: str | os.PathLike | None
    mesh: Mesh | None


class Swept(NamedTuple):
    """The cells, the metrics `[batch]` of the base and those `[cell, batch]` of the cells, and what was captured."""

    cells: Cells
    base: Values
    values: Values
    memory: dict[str, float]


@overload
def sweep(model: Transformer, tokens: Tokens | ArrayLike, interventions: Interventions | Stack, metric: AnyMetric,
          **running: Unpack[Running]) -> "xr.DataArray": ...  # fmt: skip
@overload
def sweep(model: Transformer, tokens: Tokens | ArrayLike, interventions: Interventions | Stack,
          metric: Mapping[str, AnyMetric], **running: Unpack[Running]) -> "xr.Dataset": ...  # fmt: skip
def sweep(
    model: Transformer,
    tokens: Tokens | ArrayLike,
    interventions: Interventions | Stack,
    metric: Metrics,
    **running: Unpack[Running],
) -> Any:
    """Run every cell of a grid of edits and measure each: one compilation, one labelled result.

    `interventions` are those of `run`, where a `mijax.grid` stands in place of the `Where` of an edit; or a
    `mijax.stack` of interventions. Edits with the same grid move together, different grids are multiplied (pairs of
    heads: one edit with one grid, another with a second one). Values are each cell's metric, per example, with
    dimensions `grid.dims + ("batch",)`; the coordinate `base` is the metric with only the edits that are the same in all
    cells. A dictionary of metrics is read from one run of each cell and gives a Dataset, whose coordinates are then
    `base.<name>`.

    Only what differs from the base is computed: a cell is resumed at its first edited layer and position, and of the
    last layer only the positions are computed that the metric's `pos` names. A bidirectional model, an edit at the
    embedding, a callable, or a metric without `pos` take more, and give the same. New indices, values, answers and prompts
    of one shape compile nothing, except that work of many seconds gets a program of its own for cells that are twice as short
    or long. `memory`, `progress`, `save` and `mesh` are told in `mijax.sweeps.sweep.Running`.

    Raises what `run` raises, for all cells, before anything runs; and `ValueError` where there is no
    grid, where the metric is not finite on the base, or where `memory` does not hold one cell.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> heads = mj.grid(layer=range(2), head=range(2))
    >>> result = mj.sweep(model, [[1, 2, 3]], {"z": mj.Replace(0.0, heads)}, mj.metrics.logit(7))
    >>> dict(result.sizes)
    {'layer': 2, 'head': 2, 'batch': 1}
    """
    tokens, metrics = as_tokens(tokens), named(metric)
    cells = cells_of(interventions)
    done = swept(model, tokens, cells, metrics, **running)
    attrs = {"sites": " ".join(cells.edits), **described(model)}
    return labelled(done, {"base": done.base}, single=not isinstance(metric, Mapping), attrs=attrs)


def swept(
    model: Transformer,
    tokens: Tokens,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    *,
    base: tuple[Values, Base] | None = None,
    first: Int[np.ndarray, "cell batch"] | None = None,
    memory: int | None = None,
    progress: bool = True,
    save: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
) -> Swept:
    """The metrics of the base and of every cell, unlabelled.

    `first` is the first column of each example that a cell changes, where a driver knows better than the edits tell; the
    number of columns where it changes none: the metric is then the base's, and is not computed.
    """
    check_cells(model.config, tokens, cells)
    programs = lambda: (convert_cells(model, tokens, cells), as_programs(model, tokens, metrics))
    cells, metrics = chunks.repeatable(programs, save)
    at_base, kept = base or kept_base(model, tokens, cells.shared(), metrics)[:2]
    read = columns_read(metrics.values(), tokens)
    todo = work(model.config, tokens, cells, read)
    if first is not None:
        todo = todo._replace(first=np.maximum(first, todo.first))
    budget = default_memory() if memory is None else memory
    each = row_bytes(model, cells.edits), cell_bytes(model, tokens, metrics)
    shape = Shape.of(model.config, cells)
    long = _operations(model, todo) > chunks.long_work()  # the time saved is then more than another compilation takes
    order = plan(todo, capacity(todo, shape, *each, budget, chunks.full_rows(), specialise=long))
    store = None if save is None else _store(save, model, tokens, cells, metrics, order)
    order = order if store is None else Plan.from_arrays(store.plan)
    values = {name: np.repeat(value[None], cells.size, axis=0) for name, value in at_base.items()}
    shared: Any = _replicated(mesh, (model, tokens, kept, metrics, None if todo.whole else read))

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
        differs = todo.first[own] < tokens.ids.shape[1]
        for name, value in found.items():
            values[name][own] = np.where(differs, value[: len(own)], values[name][own])
        return len(own)

    estimate = order.size.rows * each[0] + order.size.cells * each[1]
    with PeakMemory(estimate) as peak:
        chunks.run_chunks(
            measured, keep, len(order.bounds) - 1, len(order.order), label=f"sweep {', '.join(cells.edits)}",
            progress=progress, width=None if mesh is None else mesh.devices.shape[0], store=store,
        )  # fmt: skip
    told = {"memory_estimate": float(estimate)}  # a netCDF file has no integers of this size
    return Swept(cells, at_base, values, told if peak.taken is None else {**told, "memory_peak": float(peak.taken)})


def _replicated(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays that are not on the mesh's devices are copied to all of them."""
    if mesh is None:
        return tree
    devices, everywhere = set(mesh.devices.flat), NamedSharding(mesh, PartitionSpec())
    there = lambda x: isinstance(x, jax.Array) and x.sharding.device_set == devices
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if eqx.is_array_like(x) and not there(x) else x, tree)


def _store(save: Any, model: Transformer, tokens: Tokens, cells: Cells, metrics: Any, order: Plan) -> chunks.Store:
    """The folder of a sweep, with what it is a sweep of."""
    grid = (cells.edits, cells.group, cells.picks, dict(cells.labels))
    parts = {"model": (model, model.config), "prompts": tokens, "grid of interventions": grid, "metric": metrics}
    identity = {name: chunks.fingerprint(part) for name, part in parts.items()}
    labels = {"labels": {dim: list(own) for dim, own in cells.labels.items()}, "metrics": list(metrics)}
    return chunks.Store(save, identity, order.arrays(), labels)


def kept_base(
    model: Transformer, tokens: Tokens, edits: Any, metrics: Mapping[str, AnyMetric], capture: tuple[str, ...] = ()
) -> tuple[Values, Base, dict[str, Array]]:
    """The metrics of the base, what cells resume from, and what was captured."""
    values, kept, acts = _based(model, tokens, edits, metrics, capture)
    return checked(values, "base"), kept, acts


@eqx.filter_jit
def _based(model, tokens, edits, metrics, capture):
    readout, acts, base = base_of(model, tokens, edits, capture)
    return values_of(metrics, readout), base, {site: acts[site] for site in capture}


@eqx.filter_jit
def _chunk(model, tokens, base: Base, metrics, read, stacked, chunk: Chunk, varying, fixed):
    """The metrics `[cell, batch]` of a chunk of cells."""
    final = run_chunk(model, tokens, base, chunk, eqx.combine(varying, fixed), stacked, read)
    cell = lambda final: values_of(metrics, Readout(final, tokens, model.unembedding, model.b_U))
    return jax.vmap(cell)(final)


@eqx.filter_jit
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


def _operations(model: Transformer, todo: Work) -> float:
    """Multiplications and additions in the matrix products of all cells."""
    matrices = sum(a.size for a in jax.tree.leaves(model.blocks) if a.ndim > 2) // max(1, model.config.n_layers)
    layers = model.config.n_layers - todo.start / 2
    return 2.0 * matrices * float(todo.rows() @ layers)


def row_bytes(model: Transformer, sites: Iterable[str]) -> int:
    """The bytes that one row (a token of a cell) takes while a layer runs."""
    c = model.config
    heads = (c.n_heads + c.n_kv_heads) * c.d_head
    numbers = 8 * c.d_model + 4 * heads + (3 if c.mlp == "gated" else 2) * c.d_mlp
    numbers += 3 * c.n_heads * c.d_model * any(site in PER_HEAD_COPIES for site in sites)
    return numbers * accumulator(model.W_E.dtype).itemsize


def cell_bytes(model: Transformer, tokens: Tokens, metrics: Mapping[str, AnyMetric]) -> int:
    """The bytes that a cell takes beyond its rows: attention over all of its tokens, and what the metrics compute."""
    c, (batch, pos) = model.config, tokens.ids.shape
    per_token = 2 * (c.n_heads + 2 * c.n_kv_heads) * c.d_head + c.d_model + 3 * c.n_heads * pos
    return batch * pos * per_token * accumulator(model.W_E.dtype).itemsize + metric_bytes(model, tokens, metrics)


def labelled(done: Swept, runs: dict[str, Values], *, single: bool, attrs: dict) -> Any:
    """A DataArray (one metric) or Dataset (several): cells, examples, the base and source metrics beside."""
    import xarray as xr

    labels, shape = done.cells.labels, done.cells.shape
    coords: dict[str, Any] = {dim: (dim, np.asarray(own)) for dim, own in labels.items()}
    coords["batch"] = ("batch", np.arange(next(iter(done.base.values())).shape[-1]))
    for which, metrics in runs.items():
        for name, value in metrics.items():
            coords[which if single else f"{which}.{name}"] = ("batch", value)
    attrs = {**attrs, **done.memory}
    arrays = {
        name: xr.DataArray(
            value.reshape(*shape, -1), coords, (*labels, "batch"), name=name, attrs={**attrs, "metric": name}
        )
        for name, value in done.values.items()
    }
    return next(iter(arrays.values())) if single else xr.Dataset(arrays, attrs=attrs)
