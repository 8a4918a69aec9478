"""How many prompts and cells of a sweep run together, and the bytes that this takes: computed before anything runs."""

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mijax import chunks
from mijax._types import Int
from mijax.arguments import check_known
from mijax.engine.cells import Cells, canonical_cells, check_cells, convert_cells
from mijax.engine.examples import tokens_of, why_together
from mijax.engine.measure import as_programs, metric_bytes, read_by, reads_activations
from mijax.engine.per_example import taken
from mijax.engine.plan import Shape, Size, Work, capacity, columns_read, tokens_of_cell, work
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs


class SweepJob(NamedTuple):
    """A sweep after its checks.

    Attributes:
        model: the model.
        tokens: the prompts.
        cells: the cells, in canonical form and with users' functions converted.
        metrics: the metrics by name.
        programs: the metrics of all prompts together as programs, as users' functions are at the time of the call.
        first: a column of each example before which no cell changes anything, whatever its edits say.
        work: what cells compute at most.
    """

    model: Model
    tokens: Inputs
    cells: Cells
    metrics: Mapping[str, AnyMetric]
    programs: Mapping[str, AnyMetric]
    first: Int[np.ndarray, " batch"]
    work: Work


class Layout(NamedTuple):
    """The division of a sweep.

    Attributes:
        prompts: how many prompts run together.
        size: the size of each chunk of their cells.
    """

    prompts: int
    size: Size

    def arrays(self) -> dict[str, np.ndarray]:
        """The layout as arrays, to be saved."""
        return {"prompts": np.asarray(self.prompts), "size": np.asarray(self.size)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], batch: int) -> "Layout":
        """The layout that `arrays` saved.

        Args:
            arrays: the saved arrays; a plan for all prompts together has a size only.
            batch: the number of all prompts.
        """
        return cls(int(arrays.get("prompts", batch)), Size(*map(int, arrays["size"])))


def job_of(
    model: Model,
    tokens: Inputs,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    first: Int[np.ndarray, " batch"] | None,
    save: Any = None,
) -> SweepJob:
    """Check a sweep, and convert users' functions.

    Args:
        model: the model.
        tokens: the prompts.
        cells: the cells.
        metrics: the metrics by name.
        first: a column of each example before which no cell changes anything.
        save: the folder of the sweep, if any; users' functions must then convert to the same program twice.

    Returns:
        The sweep.

    Raises:
        ValueError: for any fault of model, prompts, edits or metrics that can be known before anything runs.
        TypeError: likewise.
    """
    check_known("a sweep", (model, tokens, cells.edits))
    model.check()
    check_cells(model, tokens, cells)
    cells = canonical_cells(model, cells)
    convert = lambda: (convert_cells(model, tokens, cells), as_programs(model, tokens, metrics))
    cells, programs = chunks.repeatable(convert, save)
    check_known("a sweep", (cells.edits, programs))
    first = np.zeros(len(tokens.ids), np.int32) if first is None else first
    todo = work(model, tokens, cells, columns_read(programs.values(), tokens), reads_activations(programs))
    return SweepJob(model, tokens, cells, metrics, programs, first, todo._replace(first=np.maximum(todo.first, first)))


def layout_of(job: SweepJob, memory: int) -> Layout:
    """The division of a sweep that `memory` allows.

    As many prompts run together as it holds one cell of, in groups of equal size, and of these prompts as many
    cells as it holds.

    Args:
        job: the sweep.
        memory: bytes.

    Returns:
        The layout.

    Raises:
        ValueError: where `memory` does not hold one cell, of one prompt or of all prompts that must run together.
    """
    # Where the work is long, a program for the sweep's own lengths saves more time than its compilation takes.
    batch, long = len(job.tokens.ids), operations(job) > chunks.long_work()

    def smallest(prompts: int) -> int:
        per_row, per_cell = unit_bytes(job, prompts)
        return tokens_of_cell(job.work, prompts, long) * per_row + per_cell

    prompts = batch
    if smallest(batch) > memory:
        reason = why_together(job.cells, job.metrics)
        fits = 0 if reason else bisect.bisect_right(range(1, batch), memory, key=smallest)
        if not fits:
            note = f"the prompts run together: {reason}" if reason else "that is of one prompt"
            raise ValueError(
                f"one cell takes about {smallest(batch if reason else 1):,} bytes, memory={memory:,} allows none ({note})"
            )
        prompts = -(-batch // -(-batch // fits))  # groups of equal size
    shape = Shape.of(job.model.causal, job.cells)
    return Layout(
        prompts, capacity(job.work, shape, *unit_bytes(job, prompts), memory, chunks.full_rows(), long, prompts)
    )


def layout_bytes(job: SweepJob, layout: Layout) -> int:
    """Estimate the memory that a chunk takes.

    Args:
        job: the sweep.
        layout: its layout.

    Returns:
        The size in bytes.
    """
    per_row, per_cell = unit_bytes(job, layout.prompts)
    return layout.size.rows * per_row + layout.size.cells * per_cell


def unit_bytes(job: SweepJob, prompts: int) -> tuple[int, int]:
    """The bytes of the units of a chunk.

    Args:
        job: the sweep.
        prompts: how many prompts run together.

    Returns:
        The bytes of a row (a token of a cell), and those of a cell of so many prompts in addition to its rows.
    """
    tokens, metrics = job.tokens, job.programs
    if prompts < len(job.tokens.ids):
        examples = np.arange(prompts, dtype=np.int32)
        tokens = tokens_of(job.tokens, examples)
        metrics = taken(job.model, tokens, job.metrics, examples)
    return row_bytes(job.model, job.cells.edits), cell_bytes(job.model, tokens, metrics)


def row_bytes(model: Model, sites: Iterable[str]) -> int:
    """Estimate the memory that one row (a token of a cell) takes while a layer runs.

    Args:
        model: the model.
        sites: the sites that are edited.

    Returns:
        The size in bytes.
    """
    return model.numbers_per_token(sites) * model.dtype.itemsize


def cell_bytes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> int:
    """Estimate the memory that a cell takes in addition to its rows.

    It is that of attention over all tokens of the cell, and of what the metrics read and compute.

    Args:
        model: the model.
        tokens: the prompts that run together.
        metrics: the metrics by name.

    Returns:
        The size in bytes.

    Raises:
        Exception: what a metric raises for outputs of these shapes.
    """
    read = {site for metric in metrics.values() for site in read_by(metric)}
    whole = sum(math.prod(model.sites[site].shape(*tokens.ids.shape)[model.sites[site].has_layer :]) for site in read)
    numbers = model.numbers_per_batch(*tokens.ids.shape) + whole  # of one layer, before it is narrowed
    return numbers * model.dtype.itemsize + metric_bytes(model, tokens, metrics)


def operations(job: SweepJob) -> float:
    """Count the multiplications and additions in the matrix products of all cells.

    Args:
        job: the sweep.

    Returns:
        The number of floating-point operations, over the layers and tokens that each cell computes.
    """
    halves = job.work.start / 2
    return 2.0 * job.model.products_per_token * float(job.work.rows() @ (job.model.n_layers - halves))
