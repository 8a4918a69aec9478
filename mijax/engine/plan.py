"""What a sweep need compute, on the host: where each cell begins to differ from the base, and which cells run together."""

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
    """What each cell need compute: from which half-layer on, and of each example from which column on.

    `computed` are the columns of which a cell computes any (padding is none of them), `first` is the number of columns
    where a cell changes nothing in an example. Cells that must be `whole` compute every column, padding too; edits of
    scores must find `all_queries`.
    """

    start: Int[np.ndarray, " cell"]
    first: Int[np.ndarray, "cell batch"]
    computed: Bool[np.ndarray, "batch pos"]
    whole: bool = False
    all_queries: bool = False

    def rows(self) -> Int[np.ndarray, " cell"]:
        """How many tokens each cell computes."""
        need = self.rows_by_example().sum(axis=0)
        return np.where(need > 0, self.computed.size, 0) if self.whole else need

    def slots(self) -> int:
        """How many tokens of one example a cell computes at most: to the next power of two, so that it seldom changes."""
        positions, most = self.computed.shape[1], int(self.rows_by_example().max(initial=1))
        few = 2 ** int(np.ceil(np.log2(max(1, most))))
        return positions if self.whole or self.all_queries else min(few, positions)

    def rows_by_example(self) -> Int[np.ndarray, "batch cell"]:
        """How many tokens of each example each cell computes, where it need not be whole."""
        after = np.zeros((len(self.computed), self.computed.shape[1] + 1), np.int64)
        after[:, :-1] = np.cumsum(self.computed[:, ::-1], axis=1)[:, ::-1]
        return np.take_along_axis(after, self.first.T, axis=1)


class Shape(NamedTuple):
    """What of a sweep stays as it is when its indices and prompts change: how many cells, how many starts they have
    between them at most, and whether they are at one position each."""

    cells: int
    starts: int
    by_position: bool

    @classmethod
    def of(cls, causal: bool, cells: Cells) -> "Shape":
        """Read off the grids."""
        stacked = cells.stacked
        pairs = [pair for name, several in cells.edits.items() for pair in zip(several, stacked[name])]
        moved = {field for edit, own in pairs for field in moving_fields(edit.where, own.where)}
        starts = len(cells.labels.get("layer", [0])) if "layer" in moved else 1
        return cls(cells.size, min(starts, cells.size), causal and bool(moved & {"pos", "query"}))


class Plan(NamedTuple):
    """Cells in the order in which they run, where each chunk of them begins, and the size of all chunks."""

    order: Int[np.ndarray, " cell"]
    bounds: Int[np.ndarray, " chunk_plus_one"]
    size: "Size"

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays, to be saved."""
        return {name: np.asarray(value) for name, value in self._asdict().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Plan":
        """What `arrays` gave."""
        return cls(arrays["order"], arrays["bounds"], Size(*map(int, arrays["size"])))


def work(
    model: Model, tokens: Inputs, cells: Cells, read: Int[np.ndarray, "batch read"] | None, padding: bool = False
) -> Work:
    """Read off the edits what each cell need compute for the columns `read`; everything, where an edit allows no less.

    `padding` is computed too where somebody may look at it.
    """
    mask = np.asarray(tokens.mask)
    if not isinstance(model, LayeredModel):
        zeros = np.zeros((cells.size, len(mask)), np.int32)
        return Work(zeros[:, 0], zeros, np.ones_like(mask), whole=True)
    start = np.full(cells.size, 2 * model.n_layers, np.int32)
    first = np.full((cells.size, *mask.shape[:1]), mask.shape[1], np.int32)
    whole = False
    for name, given in cells.edits.items():
        site = model.sites[name]
        for edit, group in zip(given, cells.group[name]):
            stacked = jax.tree.map(lambda g: g >= 0, group)
            whole |= needs_whole_cells(edit, stacked)
            if any(jax.tree.leaves(stacked)):
                place, number = (edit.where, stacked.where), max(jax.tree.leaves(group.where), default=-1)
                by_cell = lambda choices, n=number: choices[cells.picks[n]] if len(choices) > 1 else choices
                start = np.minimum(start, by_cell(first_half(*place, site, model.has_halves)))
                first = np.minimum(first, by_cell(first_columns(*place, site, mask, model.causal)))
    if whole:
        return Work(start, np.zeros_like(first), np.ones_like(mask), whole=True)
    if read is not None and model.causal:  # what comes after the last token that is read
        first = np.where(first > read.max(axis=1), mask.shape[1], first)
    all_queries = any("query" in model.sites[name].axes for name in cells.edits)
    return Work(start, first, np.ones_like(mask) if padding else mask, all_queries=all_queries)


def columns_read(metrics: Iterable[AnyMetric], tokens: Inputs) -> Int[np.ndarray, "batch read"] | None:
    """The columns at which the metrics read; `None` where one of them may read any."""
    mask, found = np.asarray(tokens.mask), []
    for metric in metrics:
        pos = getattr(metric, "pos", None)
        if pos is None or read_by(metric):
            return None
        found.append(first_column(np.broadcast_to(np.asarray(pos).reshape(-1, 1), (len(mask), 1))[None], mask)[0])
    return np.stack(found, axis=1).astype(np.int32)


class Size(NamedTuple):
    """The shape of a chunk: how many cells, rows, and slots for the rows of one example."""

    cells: int
    rows: int
    slots: int


def tokens_of_cell(work: Work, prompts: int, specialise: bool) -> int:
    """How many tokens a cell of so many prompts may compute: all of their columns; to `specialise`, the real tokens of the longest."""
    if work.whole or not specialise:
        return prompts * work.computed.shape[1]
    return int(np.sort(work.computed.sum(axis=1))[-prompts:].sum())


def capacity(
    work: Work, shape: Shape, bytes_per_row: int, bytes_per_cell: int, memory: int, most_rows: int, specialise: bool,
    prompts: int | None = None,
) -> Size:  # fmt: skip
    """The size of every chunk: what `memory` holds, but no more rows than `most_rows` (one cell's, at the least).

    It follows from the sweep's shape alone, so that moving a grid or other prompts keep the compiled program; only to
    `specialise` does it look at how many of its tokens a cell computes in the mean, to the nearest power of two. A chunk holds
    whole starts, or an equal part of one, so that no cell is resumed earlier than it must. Where not all prompts run together,
    `prompts` are how many do, and `bytes_per_cell` is of these.

    `memory` must hold one cell: the rows of `tokens_of_cell`, and `bytes_per_cell`.
    """
    batch, positions = work.computed.shape
    total = tokens_of_cell(work, batch if prompts is None else prompts, specialise)
    slots, level = (
        positions,
        int(shape.by_position and not work.whole),
    )  # a cell at each position computes half of them in the mean
    if specialise and not work.whole:
        need, slots = work.rows(), work.slots()
        share = need[need > 0].mean() / work.computed.sum() if need.any() else 1.0
        level = int(np.clip(np.round(-np.log2(share)), 0, np.log2(positions)))
    mean = -(-total * (positions + 2**level - 1) // (positions * 2**level))  # half of 1 .. n is (n + 1) / 2
    quarters = 5 if level else 4  # room for a fourth more cells than those of the mean length
    # rows with their share of cells, quarters * rows / (4 * mean), in memory: in whole numbers, so that nothing is rounded up
    fits = 4 * mean * memory // (4 * mean * bytes_per_row + quarters * bytes_per_cell)
    most = max(total, min(fits, most_rows))
    group = -(-shape.cells // shape.starts)  # cells of one start
    hold = most // mean  # cells of the mean length
    together = min(hold // group * group, shape.cells) if group <= hold else -(-group // -(-group // hold))
    rows = max(together * mean, total)
    cells = min(shape.cells, quarters * rows // (4 * mean), (memory - rows * bytes_per_row) // bytes_per_cell)
    return Size(cells, rows, slots)


def plan(work: Work, size: Size) -> Plan:
    """Put cells of one start together, long ones beside short ones, as many as a chunk holds cells and rows."""
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
    """Within each start, alternate between the cells from either end of the order."""
    _, begins, counts = np.unique(start[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(begins, counts)
    from_end = np.repeat(counts, counts) - 1 - rank
    key = np.where(rank <= from_end, 2 * rank, 2 * from_end + 1)
    return order[np.lexsort((key, start[order]))]


def chunk_of(work: Work, plan: Plan, number: int) -> tuple[np.ndarray, Chunk]:
    """The cells of a chunk, filled up by its first one without any tokens, and what it computes."""
    own = plan.order[plan.bounds[number] : plan.bounds[number + 1]]
    count, size = len(own), plan.size
    cells = np.concatenate([own, np.full(size.cells - count, own[0])])
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
