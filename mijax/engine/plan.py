"""The plan of a sweep, made on the host: what each cell must compute, and which cells run together."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mijax._types import Bool, Int
from mijax.engine.cells import Cells
from mijax.engine.chunk import Chunk
from mijax.engine.measure import read_by
from mijax.interventions.places import first_column, first_columns, first_half, moving_fields
from mijax.interventions.rows import needs_whole_cells
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel, Model
from mijax.model.position import Rows
from mijax.model.tokens import Inputs


class Work(NamedTuple):
    """What each cell must compute.

    Attributes:
        start: the half-layer at which each cell starts.
        first: `[cell, batch]`, the first column that a cell computes in each example; the number of columns where
            it changes nothing.
        computed: `[batch, pos]`, the columns of which cells compute any; no padding, unless a metric may read it.
        whole: whether cells compute every column, padding too.
        all_queries: whether chunks have a slot for every query, which edits of attention scores need.
    """

    start: Int[np.ndarray, " cell"]
    first: Int[np.ndarray, "cell batch"]
    computed: Bool[np.ndarray, "batch pos"]
    whole: bool = False
    all_queries: bool = False

    def rows(self) -> Int[np.ndarray, " cell"]:
        """`[cell]`, the number of tokens that each cell computes."""
        need = self.rows_by_example().sum(axis=0)
        return np.where(need > 0, self.computed.size, 0) if self.whole else need

    def slots(self) -> int:
        """The most tokens of one example in a cell, rounded up to a power of two so that it seldom changes."""
        positions, longest = self.computed.shape[1], int(self.rows_by_example().max(initial=1))
        rounded = 2 ** int(np.ceil(np.log2(max(1, longest))))
        return positions if self.whole or self.all_queries else min(rounded, positions)

    def rows_by_example(self) -> Int[np.ndarray, "batch cell"]:
        """`[batch, cell]`, the number of tokens of each example that a cell computes unless it is whole."""
        after = np.zeros((len(self.computed), self.computed.shape[1] + 1), np.int64)
        after[:, :-1] = np.cumsum(self.computed[:, ::-1], axis=1)[:, ::-1]
        return np.take_along_axis(after, self.first.T, axis=1)


class Shape(NamedTuple):
    """The facts of a sweep that stay the same when its indices and prompts change.

    Attributes:
        cells: the number of cells.
        starts: the number of half-layers at which cells start, at most.
        by_position: whether the model is causal, and cells act at different positions.
    """

    cells: int
    starts: int
    by_position: bool

    @classmethod
    def of(cls, causal: bool, cells: Cells) -> "Shape":
        """Read the facts off the grids.

        Args:
            causal: whether the model is causal.
            cells: the cells.
        """
        stacked = cells.stacked
        pairs = [pair for name, edits in cells.edits.items() for pair in zip(edits, stacked[name])]
        moving = {field for edit, marks in pairs for field in moving_fields(edit.where, marks.where)}
        starts = len(cells.labels.get("layer", [0])) if "layer" in moving else 1
        return cls(cells.size, min(starts, cells.size), causal and bool(moving & {"pos", "query"}))


class Plan(NamedTuple):
    """The order in which cells run, and their division into chunks.

    Attributes:
        order: the numbers of the cells that run, in that order.
        bounds: where in `order` each chunk begins, and the end.
        size: the size of all chunks.
    """

    order: Int[np.ndarray, " cell"]
    bounds: Int[np.ndarray, " chunk_plus_one"]
    size: "Size"

    def arrays(self) -> dict[str, np.ndarray]:
        """The plan as arrays, to be saved."""
        return {name: np.asarray(value) for name, value in self._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Plan":
        """The plan that `arrays` saved.

        Args:
            arrays: the saved arrays.
        """
        return cls(arrays["order"], arrays["bounds"], Size(*map(int, arrays["size"])))


def work(
    model: Model, tokens: Inputs, cells: Cells, read: Int[np.ndarray, "batch read"] | None, padding: bool = False
) -> Work:
    """Read off the edits what each cell must compute.

    Where an edit allows no less, cells compute everything.

    Args:
        model: the model.
        tokens: the prompts.
        cells: the cells.
        read: the columns at which the metrics read the final stream, `[batch, read]`; `None` for all.
        padding: whether padding is computed too, because a metric may read activations there.

    Returns:
        What each cell must compute.
    """
    mask = np.asarray(tokens.mask)
    if not isinstance(model, LayeredModel):
        zeros = np.zeros((cells.size, len(mask)), np.int32)
        return Work(zeros[:, 0], zeros, np.ones_like(mask), whole=True)
    start = np.full(cells.size, 2 * model.n_layers, np.int32)
    first = np.full((cells.size, *mask.shape[:1]), mask.shape[1], np.int32)
    whole = False
    for name, edits in cells.edits.items():
        site = model.sites[name]
        for edit, group in zip(edits, cells.group[name]):
            stacked = jax.tree.map(lambda g: g >= 0, group)
            whole |= needs_whole_cells(edit, stacked)
            if any(jax.tree.leaves(stacked)):
                place, number = (edit.where, stacked.where), max(jax.tree.leaves(group.where), default=-1)
                by_cell = lambda choices, n=number: choices[cells.picks[n]] if len(choices) > 1 else choices
                start = np.minimum(start, by_cell(first_half(*place, site, model.has_halves)))
                first = np.minimum(first, by_cell(first_columns(*place, site, mask, model.causal)))
    if whole:
        return Work(start, np.zeros_like(first), np.ones_like(mask), whole=True)
    if read is not None and model.causal:  # what follows the last token that is read has no effect
        first = np.where(first > read.max(axis=1), mask.shape[1], first)
    all_queries = any("query" in model.sites[name].axes for name in cells.edits)
    return Work(start, first, np.ones_like(mask) if padding else mask, all_queries=all_queries)


def columns_read(metrics: Iterable[AnyMetric], tokens: Inputs) -> Int[np.ndarray, "batch read"] | None:
    """The columns at which the metrics read the final stream.

    Args:
        metrics: the metrics.
        tokens: the prompts.

    Returns:
        `[batch, read]`; `None` where some metric may read any column, or reads activations.
    """
    mask, columns = np.asarray(tokens.mask), []
    for metric in metrics:
        pos = getattr(metric, "pos", None)
        if pos is None or read_by(metric):
            return None
        columns.append(first_column(np.broadcast_to(np.asarray(pos).reshape(-1, 1), (len(mask), 1))[None], mask)[0])
    return np.stack(columns, axis=1).astype(np.int32)


class Size(NamedTuple):
    """The shape of a chunk.

    Attributes:
        cells: the number of cells.
        rows: the number of rows (tokens of cells).
        slots: the number of slots for the rows of one example of a cell.
    """

    cells: int
    rows: int
    slots: int


def tokens_of_cell(work: Work, prompts: int, specialise: bool) -> int:
    """Count the tokens that a cell may compute.

    A cell that must be whole computes all columns in any case.

    Args:
        work: what cells must compute.
        prompts: the number of prompts that run together.
        specialise: whether to count only the real tokens, in the longest prompts, instead of all columns.

    Returns:
        The number of tokens in all of these prompts.
    """
    if work.whole or not specialise:
        return prompts * work.computed.shape[1]
    return int(np.sort(work.computed.sum(axis=1))[-prompts:].sum())


def capacity(
    work: Work, shape: Shape, bytes_per_row: int, bytes_per_cell: int, memory: int, most_rows: int, specialise: bool,
    prompts: int | None = None,
) -> Size:  # fmt: skip
    """Choose the size of every chunk: what `memory` holds, but at most `most_rows` rows, or those of one cell.

    It follows from the sweep's shape alone, so that the compiled program is kept when a grid moves or prompts
    change. Only with `specialise` does it depend on the share of the tokens that cells compute on average, to the
    nearest power of two. A chunk holds all cells of one or several starts, or an equal part of the cells of one, so
    that no cell is resumed earlier than it must be.

    Args:
        work: what cells must compute.
        shape: the shape of the sweep.
        bytes_per_row: the bytes of a row.
        bytes_per_cell: the bytes of a cell of `prompts` prompts in addition to its rows.
        memory: bytes; it must hold one cell, which has `tokens_of_cell` rows.
        most_rows: the number of rows that fill the device.
        specialise: whether the program may depend on the share of tokens that cells compute.
        prompts: the number of prompts that run together; by default all.

    Returns:
        The numbers of cells and of rows of a chunk, and of slots for each example of a cell.
    """
    batch, positions = work.computed.shape
    most = tokens_of_cell(work, batch if prompts is None else prompts, specialise)
    level, slots = _share(work, shape, specialise)
    # The rows of an average cell: the mean of 1 .. n is (n + 1) / 2.
    average = -(-most * (positions + 2**level - 1) // (positions * 2**level))
    quarters = 5 if level else 4  # room for a quarter more cells than the rows hold of average length
    # The rows that memory holds together with their share of cells, quarters * rows / (4 * average), in integer
    # arithmetic, so that nothing is rounded up.
    fits = 4 * average * memory // (4 * average * bytes_per_row + quarters * bytes_per_cell)
    rows = max(_together(shape, max(most, min(fits, most_rows)) // average) * average, most)
    cells = min(shape.cells, quarters * rows // (4 * average), (memory - rows * bytes_per_row) // bytes_per_cell)
    return Size(cells, rows, slots)


def _share(work: Work, shape: Shape, specialise: bool) -> tuple[int, int]:
    """The level at which cells compute about 2**-level of their tokens on average, and the slots for an example's rows.

    By the shape alone the level is 1, half of the tokens, where there is a cell at each position.
    """
    positions = work.computed.shape[1]
    if work.whole or not specialise:
        return int(shape.by_position and not work.whole), positions
    need = work.rows()
    share = need[need > 0].mean() / work.computed.sum() if need.any() else 1.0
    return int(np.clip(np.round(-np.log2(share)), 0, np.log2(positions))), work.slots()


def _together(shape: Shape, room: int) -> int:
    """How many cells of average length go into a chunk that has room for `room` of them.

    All cells of one or several starts, or an equal part of the cells of one.
    """
    same_start = -(-shape.cells // shape.starts)
    if same_start <= room:
        return min(room // same_start * same_start, shape.cells)
    return -(-same_start // -(-same_start // room))


def plan(work: Work, size: Size) -> Plan:
    """Divide the cells into chunks: those of one start together, long ones beside short ones.

    Args:
        work: what cells must compute.
        size: the size of a chunk.

    Returns:
        The plan, with as many cells in each chunk as it has room and rows for. Cells that compute nothing are left
        out.
    """
    need = work.rows()
    order = np.flatnonzero(need)
    order = order[np.lexsort((need[order], work.start[order]))]
    order = _mixed(order, work.start)
    total = np.concatenate([[0], np.cumsum(need[order])])
    bounds = [0]
    while bounds[-1] < len(order):
        begin = bounds[-1]
        end = np.searchsorted(total, total[begin] + size.rows, side="right") - 1
        bounds.append(int(min(end, begin + size.cells)))
    return Plan(order, np.asarray(bounds), size)


def _mixed(order: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The order of cells with those of each start taken in turn from the two ends."""
    _, begins, counts = np.unique(start[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(begins, counts)
    from_end = np.repeat(counts, counts) - 1 - rank
    key = np.where(rank <= from_end, 2 * rank, 2 * from_end + 1)
    return order[np.lexsort((key, start[order]))]


def chunk_of(work: Work, plan: Plan, number: int) -> tuple[np.ndarray, Chunk]:
    """The cells of a chunk, and what it computes.

    Args:
        work: what cells must compute.
        plan: the plan.
        number: the number of the chunk.

    Returns:
        The numbers of the cells, filled up to the chunk's size by the first one (which computes no tokens there),
        and the chunk.
    """
    members = plan.order[plan.bounds[number] : plan.bounds[number + 1]]
    count, size = len(members), plan.size
    cells = np.concatenate([members, np.full(size.cells - count, members[0])])
    columns = np.arange(work.computed.shape[1])
    computed = work.computed[None] & (columns >= work.first[cells][:, :, None])
    computed[count:] = False
    if work.whole:
        computed[:] = True
    cell, example, column = (index.astype(np.int32) for index in np.nonzero(computed))
    place: Any = np.where(computed, np.cumsum(computed).reshape(computed.shape) - 1, -1).astype(np.int32)
    if size.slots == len(columns):
        slot, index = place, column
    else:
        index = (np.cumsum(computed, axis=2) - 1)[computed].astype(np.int32)
        slot: Any = np.full((*computed.shape[:2], size.slots), -1, np.int32)
        slot[cell, example, index] = np.arange(len(cell))
    pad: Any = lambda index: np.pad(index, (0, size.rows - len(index)))
    start: Any = np.int32(work.start[cells[:count]].min())
    return cells, Chunk(start, Rows(pad(cell), pad(example), pad(column), place, slot, pad(index)))
