"""The turns of a training: which steps of which models come when, and what runs them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mijax import chunks
from mijax._types import Array
from mijax.superposition.job import Programs, State, advance, begin, judge
from mijax.superposition.settings import SettingsGrid

TURNS, STEPS = 20, 100
"""The largest number of turns that a chunk's steps are divided into, and the least number of steps of several turns.

A turn is saved when it is done.
"""
JUDGED, STATE = "judged.", "state."
"""What the names of a turn's results begin with: the judged quantities, and the leaves of the state by number."""


def parts_of(grid: SettingsGrid, models: int, width: int) -> dict[str, np.ndarray] | None:
    """The division of a grid's models into chunks of the same size.

    A chunk has as many cells as fit before it has several seeds, since the cells of one seed share its draws.

    Args:
        grid: the grid.
        models: the largest number of models on a device.
        width: the number of devices.

    Returns:
        The indices `cells [part, cell]` and `seeds [part, seed]`: a chunk is a row of each. `None` for `models`
        below 1.

    >>> grid = SettingsGrid({"a": np.arange(3)}, {"a": np.arange(3)}, np.arange(1))
    >>> parts_of(grid, 2, 1)["cells"].tolist()  # the last cell twice, so that the chunks are of one size
    [[0, 1], [2, 2]]
    """
    if models < 1:
        return None
    cells = _equal(grid.cells, models * width, width)
    return {"cells": cells, "seeds": _equal(len(grid.seeds), max(1, models * width // cells.shape[1]), 1)}


def _equal(count: int, limit: int, multiple: int) -> np.ndarray:
    """The numbers below `count` in rows of at most `limit`, a multiple of `multiple`, padded with the last number."""
    rows = -(-count // limit)
    width = -(-count // rows)
    width = -(-width // multiple) * multiple
    rows = -(-count // width)
    return np.minimum(np.arange(rows * width), count - 1).reshape(rows, width)


class Turn(NamedTuple):
    """Some steps of the models of a chunk.

    Attributes:
        seeds: `[seed]`, indices of the chunk's seeds.
        cells: `[cell]`, indices of the chunk's cells.
        start: the number of steps before the turn.
        stop: that after it.
        is_first: whether the models begin with it.
        is_last: whether they end with it.
        is_logged: whether the loss and the logged quantities are recorded after it.
    """

    seeds: np.ndarray
    cells: np.ndarray
    start: int
    stop: int
    is_first: bool
    is_last: bool
    is_logged: bool


class Schedule:
    """All turns of a training by number: one chunk after the other, each from its first step to its last.

    Args:
        parts: the chunks (`parts_of`).
        steps: the number of steps.
        log_at: the sorted numbers of steps after which quantities are recorded.
    """

    def __init__(self, parts: dict[str, np.ndarray], steps: int, log_at: list[int]):
        turns = max(1, min(TURNS, steps // STEPS))
        self.log_at = log_at
        self.ends = sorted({*log_at, *(np.arange(1, turns + 1) * steps // turns).tolist()})
        self.chunks = list(itertools.product(parts["seeds"], parts["cells"]))

    def __len__(self) -> int:
        return len(self.chunks) * len(self.ends)

    def __getitem__(self, number: int) -> Turn:
        chunk, turn = divmod(number, len(self.ends))
        start, stop = self.ends[turn - 1] if turn else 0, self.ends[turn]
        return Turn(*self.chunks[chunk], start, stop, turn == 0, turn == len(self.ends) - 1, stop in self.log_at)


class Trainer:
    """Runs the turns of a schedule, in order: what `mijax.chunks.run_chunks` calls.

    Args:
        programs: the programs of one model.
        grid: the grid.
        schedule: the turns.
        store: where turns are saved, if they are.
        mesh: the devices.
    """

    def __init__(
        self, programs: Programs, grid: SettingsGrid, schedule: Schedule, store: chunks.Store | None, mesh: Mesh | None
    ):
        self.programs, self.grid, self.schedule, self.store, self.mesh = programs, grid, schedule, store, mesh
        self._after: dict[int, State] = {}  # the state after the turn that ran last, by that turn's number

    def __call__(self, numbers: Sequence[int]) -> dict[str, Array]:
        """Run a turn.

        Args:
            numbers: the number of the turn, in a list.

        Returns:
            `failed_at` `[seed, cell]`; after the last turn of a chunk and where it is logged, what is judged, as
            `judged.<name>`; after the last and where turns are saved, the leaves of the state, as `state.<i>`.
        """
        number, turn = numbers[0], self.schedule[numbers[0]]
        inputs = self._inputs(turn)
        state = begin(self.programs, self.mesh, *inputs) if turn.is_first else self._state_after(number - 1)
        state = advance(self.programs, self.mesh, *inputs, state, turn.start, turn.stop)
        self._after = {number: state}
        results = {"failed_at": state.failed_at}
        if turn.is_last or turn.is_logged:
            judged = judge(self.programs, self.mesh, *inputs, state)
            results |= {f"{JUDGED}{name}": value for name, value in judged.items()}
        if turn.is_last or self.store is not None:
            results |= {f"{STATE}{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        return results

    def _inputs(self, turn: Turn) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The settings `[cell]` and the seeds `[seed]` of a turn's models."""
        return self.grid.at(turn.cells), self.grid.seeds[turn.seeds].astype(np.uint32)

    def _state_after(self, number: int) -> State:
        """The state after a turn, in memory or saved."""
        if number in self._after:
            return self._after[number]
        arrays = self.store.load(number) if self.store else None
        assert arrays is not None  # turns run in order, and a damaged one is run again before the next
        structure = jax.tree.structure(self.programs.begin.out)
        return jax.tree.unflatten(structure, [arrays[f"{STATE}{i}"] for i in range(structure.num_leaves)])
