"""How many prompts and cells of a sweep run together, and the bytes that this takes: told before anything runs."""

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mijax import chunks
from mijax._types import Int
from mijax.engine.cells import Cells, canonical_cells, check_cells, convert_cells
from mijax.engine.examples import tokens_of, why_together
from mijax.engine.measure import as_programs, metric_bytes, read_by, reads_activations, taken
from mijax.engine.plan import Shape, Size, Work, capacity, columns_read, tokens_of_cell, work
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.tokens import Inputs


class SweepJob(NamedTuple):
    """What is swept. `programs` are the metrics of all prompts together, as users' functions are now; `first` is a column of each
    example before which no cell changes anything, whatever its edits say; `work` is what cells compute at most."""

    model: Model
    tokens: Inputs
    cells: Cells
    metrics: Mapping[str, AnyMetric]
    programs: Mapping[str, AnyMetric]
    first: Int[np.ndarray, " batch"]
    work: Work


class Layout(NamedTuple):
    """How many prompts run together, and the size of each chunk of their cells."""

    prompts: int
    size: Size

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        return {"prompts": np.asarray(self.prompts), "size": np.asarray(self.size)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], batch: int) -> "Layout":
        """What `arrays` gave; the plan of a sweep of all `batch` prompts together has a size only."""
        return cls(int(arrays.get("prompts", batch)), Size(*map(int, arrays["size"])))


def job_of(
    model: Model,
    tokens: Inputs,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    first: Int[np.ndarray, " batch"] | None,
    save: Any = None,
) -> SweepJob:
    """A sweep that is checked: raises what can be known of model, prompts, edits and metrics before anything runs.

    Users' functions are converted; with a folder `save`, they must come out the same twice.
    """
    model.check()
    check_cells(model, tokens, cells)
    cells = canonical_cells(model, cells)
    convert = lambda: (convert_cells(model, tokens, cells), as_programs(model, tokens, metrics))
    cells, programs = chunks.repeatable(convert, save)
    first = np.zeros(len(tokens.ids), np.int32) if first is None else first
    todo = work(model, tokens, cells, columns_read(programs.values(), tokens), reads_activations(programs))
    return SweepJob(model, tokens, cells, metrics, programs, first, todo._replace(first=np.maximum(todo.first, first)))


def layout_of(job: SweepJob, memory: int) -> Layout:
    """As many prompts as `memory` holds one cell of, and of these as many cells as it holds.

    Raises `ValueError` where it does not hold one cell, of one prompt or of all that must run together.
    """
    batch, long = (
        len(job.tokens.ids),
        _operations(job) > chunks.long_work(),
    )  # then time saved is more than another compilation takes

    def smallest(prompts: int) -> int:
        per_row, per_cell = unit_bytes(job, prompts)
        return tokens_of_cell(job.work, prompts, long) * per_row + per_cell

    prompts = batch
    if smallest(batch) > memory:
        reason = why_together(job.cells, job.metrics)
        fits = 0 if reason else bisect.bisect_right(range(1, batch), memory, key=smallest)
        if not fits:
            told = f"the prompts run together: {reason}" if reason else "that is of one prompt"
            raise ValueError(
                f"one cell takes about {smallest(batch if reason else 1):,} bytes, memory={memory:,} allows none ({told})"
            )
        prompts = -(-batch // -(-batch // fits))  # groups of equal size
    shape = Shape.of(job.model.causal, job.cells)
    return Layout(
        prompts, capacity(job.work, shape, *unit_bytes(job, prompts), memory, chunks.full_rows(), long, prompts)
    )


def layout_bytes(job: SweepJob, layout: Layout) -> int:
    """The bytes that a chunk takes."""
    per_row, per_cell = unit_bytes(job, layout.prompts)
    return layout.size.rows * per_row + layout.size.cells * per_cell


def unit_bytes(job: SweepJob, prompts: int) -> tuple[int, int]:
    """The bytes of a row, and those that a cell of so many prompts takes beside its rows."""
    some, metrics = job.tokens, job.programs
    if prompts < len(job.tokens.ids):
        examples = np.arange(prompts, dtype=np.int32)
        some = tokens_of(job.tokens, examples)
        metrics = taken(job.model, some, job.metrics, examples)
    return row_bytes(job.model, job.cells.edits), cell_bytes(job.model, some, metrics)


def row_bytes(model: Model, sites: Iterable[str]) -> int:
    """The bytes that one row (a token of a cell) takes while a layer runs."""
    return model.numbers_per_token(sites) * model.dtype.itemsize


def cell_bytes(model: Model, tokens: Inputs, metrics: Mapping[str, AnyMetric]) -> int:
    """The bytes that a cell takes beyond its rows: attention over all of its tokens, and what the metrics read and compute."""
    read = {site for metric in metrics.values() for site in read_by(metric)}
    whole = sum(math.prod(model.sites[site].shape(*tokens.ids.shape)[model.sites[site].has_layer :]) for site in read)
    numbers = model.numbers_per_batch(*tokens.ids.shape) + whole  # of one layer, before it is narrowed
    return numbers * model.dtype.itemsize + metric_bytes(model, tokens, metrics)


def _operations(job: SweepJob) -> float:
    """Multiplications and additions in the matrix products of all cells."""
    halves = job.work.start / 2
    return 2.0 * job.model.products_per_token * float(job.work.rows() @ (job.model.n_layers - halves))
