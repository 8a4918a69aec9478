"""The results of a training's turns, gathered and labelled."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax.superposition.settings import SettingsGrid
from mijax.superposition.turns import JUDGED, STATE, Schedule, Turn

if TYPE_CHECKING:
    import xarray as xr


class Gathered:
    """The variables of the whole grid, which the results of turns are written into.

    Args:
        grid: the grid.
        schedule: the turns.
        parameters: the names of a model's parameters, which are the first leaves of its state.
        strict: whether a model that is no longer finite is an error.

    Attributes:
        variables: arrays `[seed, cell, ...]` by name; those recorded during the training, `log.<name>`, are
            `[seed, cell, step, ...]`.
    """

    def __init__(self, grid: SettingsGrid, schedule: Schedule, parameters: list[str], strict: bool):
        self.grid, self.schedule, self.strict = grid, schedule, strict
        self.names = {f"{STATE}{i}": name for i, name in enumerate(parameters)}
        self.variables: dict[str, np.ndarray] = {}

    def keep(self, number: int, arrays: Mapping[str, np.ndarray]) -> int:
        """Write a turn's results into the arrays of the whole grid.

        Args:
            number: number of the turn.
            arrays: its results, on the host.

        Returns:
            The number of steps of the turn.

        Raises:
            FloatingPointError: where `strict`, for a model that is no longer finite.
        """
        turn, failed_at = self.schedule[number], arrays["failed_at"]
        judged = {key.removeprefix(JUDGED): value for key, value in arrays.items() if key.startswith(JUDGED)}
        if judged:  # finite parameters may have a loss that is not finite
            failed_at = np.where((failed_at < 0) & ~np.isfinite(judged["loss"]), turn.stop, failed_at)
        if self.strict and (failed_at >= 0).any():
            raise FloatingPointError(self._failures(failed_at, turn))
        index = np.ix_(turn.seeds, turn.cells)
        if turn.is_logged:
            log_at = self.schedule.log_at
            for name, value in judged.items():
                self._variable(f"log.{name}", value, len(log_at))[(*index, log_at.index(turn.stop))] = value
        if turn.is_last:
            parameters = {name: arrays[key] for key, name in self.names.items()}
            for name, value in {"failed_at": failed_at, **judged, **parameters}.items():
                self._variable(name, value)[index] = value
        return turn.stop - turn.start

    def _variable(self, name: str, part: np.ndarray, *axes: int) -> np.ndarray:
        """The array `[seed, cell, *axes, ...]` of a variable, of which `part` is a chunk's."""
        shape = (len(self.grid.seeds), self.grid.cells, *axes, *part.shape[2:])
        return self.variables.setdefault(name, np.zeros(shape, part.dtype))

    def _failures(self, failed_at: np.ndarray, turn: Turn) -> str:
        """The error message for the chunk's `failed_at [seed, cell]`: the first five models, by step."""
        places = np.argwhere(failed_at >= 0)  # of a chunk filled up with the last cell, some several times
        models = {(int(failed_at[i, j]), int(turn.seeds[i]), int(turn.cells[j])) for i, j in places}
        labels = [f"{self.grid.label(cell, seed)} after step {step}" for step, seed, cell in sorted(models)[:5]]
        more = [f"and {len(models) - 5} more"] * (len(models) > 5)
        return f"no longer finite: {'; '.join([*labels, *more])}. nan='mask' trains the others"

    def labelled(self, dims: Mapping[str, tuple[str, ...]], attrs: Mapping[str, Any]) -> "xr.Dataset":
        """All variables with the grid's dimensions, NaN where a model failed.

        Args:
            dims: the names of the inner dimensions of variables, by variable; others are numbered.
            attrs: the attributes.

        Returns:
            The dataset.
        """
        import xarray as xr

        failed = self.variables["failed_at"] >= 0
        variables: dict[str, Any] = {}
        for name, values in self.variables.items():
            if failed.any() and name != "failed_at":
                values = np.where(failed.reshape(*failed.shape, *[1] * (values.ndim - 2)), np.nan, values)
            along = ("step",) if name.startswith("log.") else ()
            inner = dims.get(name) or tuple(f"{name}_{i}" for i in range(values.ndim - 2 - len(along)))
            variables[name] = ((*self.grid.axes, *along, *inner), self.grid.shaped(values))
        steps = {"step": self.schedule.log_at} if self.schedule.log_at else {}
        return xr.Dataset(variables, {**self.grid.axes, **steps}, attrs)
