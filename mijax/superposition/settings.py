"""Grids of settings: the values of a training's settings in each cell, by name."""

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, SupportsIndex

import jax.numpy as jnp
import numpy as np

from mijax._types import ArrayLike


class SettingsGrid(NamedTuple):
    """The product of all settings: cells, each of which is trained with every seed.

    Attributes:
        axes: the values of each axis, in the user's order, `seed` included where the user gives it.
        settings: `[cell]` values of each setting, in all cells.
        seeds: `[seed]`, the seeds; 0 where the user gives none.
    """

    axes: dict[str, np.ndarray]
    settings: dict[str, np.ndarray]
    seeds: np.ndarray

    @property
    def cells(self) -> int:
        """The number of cells; seeds do not count."""
        return len(next(iter(self.settings.values()), np.zeros(1)))

    def at(self, cells: np.ndarray) -> dict[str, np.ndarray]:
        """The settings of some cells, in JAX's default precision.

        Args:
            cells: `[k]` indices of cells.

        Returns:
            `[k]` values of each setting. A grid of seeds alone has one cell and no setting; a dummy setting named
            "" then carries the cell axis.
        """
        kinds = {k: jnp.result_type(int if v.dtype.kind in "iub" else float) for k, v in self.settings.items()}
        return {k: v[cells].astype(kinds[k]) for k, v in self.settings.items()} or {"": np.zeros(len(cells), np.int32)}

    def label(self, cell: SupportsIndex, seed: SupportsIndex | None = None) -> str:
        """The settings of a cell as text, for error messages.

        Args:
            cell: index of the cell.
            seed: index of the seed; `None` leaves it out.

        Returns:
            The text, for example "density 0.1, seed 3".
        """
        parts = [f"{name} {values[cell]:.6g}" for name, values in self.settings.items()]
        return ", ".join([*parts, *([] if seed is None else [f"seed {self.seeds[seed]}"])])

    def shaped(self, values: np.ndarray) -> np.ndarray:
        """Replace the axes of seeds and cells by the axes of the grid.

        Args:
            values: `[seed, cell, ...]`.

        Returns:
            `[*axes, ...]`, in the order of `axes`; without the axis of seeds where the user gives no seed.
        """
        sizes = [len(axis) for name, axis in self.axes.items() if name != "seed"]
        values = values.reshape(len(self.seeds), *sizes, *values.shape[2:])
        return (
            np.moveaxis(values, 0, list(self.axes).index("seed"))
            if "seed" in self.axes
            else values.reshape(values.shape[1:])
        )


def grid_of(over: Mapping[str, ArrayLike], takers: Mapping[str, Callable[..., Any]]) -> SettingsGrid:
    """The product of all settings.

    Args:
        over: the values of each setting, lists of numbers; `seed` holds the seeds.
        takers: the functions that take settings by parameter name, under the names that errors call them by.

    Returns:
        The grid.

    Raises:
        ValueError: for a setting that no function takes, a parameter without default that the grid lacks, values
            that are no list of numbers, integers beyond JAX's default integer dtype, and seeds that are not
            different integers from 0 to 2^32 - 1.
    """
    axes = {name: np.asarray(values) for name, values in over.items()}
    for name, values in axes.items():
        if values.ndim != 1 or not values.size or values.dtype.kind not in "iufb":
            raise ValueError(f"{name}: a list of numbers is expected, got shape {values.shape} of {values.dtype}")
    faults = [
        f"{name!r} is taken by none of {', '.join(f'{who}{inspect.signature(f)}' for who, f in takers.items())}"
        for name in axes
        if name != "seed" and not any(name in inspect.signature(f).parameters for f in takers.values())
    ]
    faults += [
        f"{who} takes {p.name!r}, which the grid lacks"
        for who, function in takers.items()
        for p in inspect.signature(function).parameters.values()
        if p.name not in (*axes, "seed") and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    seeds = axes.get("seed", np.zeros(1, int))
    if (
        seeds.dtype.kind not in "iu"
        or len(set(seeds.tolist())) < len(seeds)
        or not ((seeds >= 0) & (seeds < 2**32)).all()
    ):
        faults.append(f"seeds are different integers from 0 to 2^32 - 1, got {seeds.tolist()}")
    largest = np.iinfo(jnp.result_type(int)).max
    faults += [
        f"{name!r} has integers beyond {largest}, which JAX does not hold"
        for name, values in axes.items()
        if name != "seed" and values.dtype.kind in "iu" and (np.abs(values.astype(float)) > largest).any()
    ]
    if faults:
        raise ValueError("; ".join(faults))
    others = {name: values for name, values in axes.items() if name != "seed"}
    columns = zip(*itertools.product(*others.values()))
    return SettingsGrid(axes, {name: np.array(c, others[name].dtype) for name, c in zip(others, columns)}, seeds)
