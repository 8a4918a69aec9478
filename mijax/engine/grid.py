"""Grids: every combination of choices on several axes, stacked so that they can be vmapped."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mijax._types import Int
from mijax.interventions.where import FIELDS, Where
from mijax.model.tokens import is_concrete


@dataclasses.dataclass(frozen=True)
class Grid:
    """The places of a grid's cells, stacked in row-major order, and the labels of its dimensions.

    Attributes:
        where: the places; its arrays have a leading axis of cells in front of the axes that `Where` describes.
        labels: the labels of the choices, by dimension.
        key: identity of the grid. Edits whose grids have one `key` move together in a sweep; each call of
            `mijax.grid` makes a new one.
    """

    where: Where
    labels: Mapping[str, Sequence[int | str]]
    key: object = dataclasses.field(default_factory=object, repr=False, compare=False)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions."""
        return tuple(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of choices in each dimension."""
        return tuple(len(labels) for labels in self.labels.values())

    @property
    def size(self) -> int:
        """The number of cells."""
        return int(np.prod(self.shape))

    def places(self, dim: str) -> list[Any]:
        """The index that each label of a dimension stands for.

        Args:
            dim: name of the dimension.

        Returns:
            One entry per label: an index; or, where a choice has several indices, a list for each example (of one
            list where all examples share it). The labels themselves where `where` has no axis of that name.
        """
        if dim not in self.where.given:
            return list(self.labels[dim])
        index = np.asarray(getattr(self.where, dim))
        by_choice = np.moveaxis(index.reshape(*self.shape, *index.shape[1:]), self.dims.index(dim), 0)
        choices = by_choice[(slice(None), *(0,) * (len(self.shape) - 1))]  # the first choice on all other axes
        if choices.ndim == 1:
            return choices.tolist()
        return [[sorted(set(row)) for row in np.atleast_2d(choice).tolist()] for choice in choices]

    def beside(self, where: Where) -> "Grid":
        """A grid of other places with the same cells and key, so that edits at both grids move together.

        Args:
            where: the places, stacked as in this grid's `where`.
        """
        return Grid(where, self.labels, self.key)


def grid(**axes: Iterable[Any] | Mapping[str, Any]) -> Grid:
    """Every combination of choices on several axes of a site.

    Lists of indices on several axes are combined, within a cell, to every pair (`Where` alone would zip them).

    Args:
        axes: for each axis of `Where`, its choices: numbers, or a dictionary of named choices (roles). A choice is
            anything that `Where` takes there: one index, a list of several, or a list per example, `[batch, k]` (so
            that a role with one position in each prompt is `[batch, 1]`).

    Returns:
        The grid, with a dimension per axis in the order of the keywords. Labels are the indices, the names of a
        dictionary, or the numbers of the choices where some choice is a list.

    Raises:
        ValueError: for an unknown axis, for `batch`, for an axis without choices, for names that are equal as text,
            and for choices with indices for different numbers of examples.
        TypeError: for choices that are no list or dictionary, boolean masks, and traced indices.

    >>> grid(layer=range(12), pos={"subject": [[3], [4]], "end": -1}).shape
    (12, 2)
    """
    if not axes:
        raise ValueError("a grid needs at least one axis")
    if "batch" in axes:
        raise ValueError("a grid has no axis 'batch': a sweep gives every example's metric in any case")
    unknown = [axis for axis in axes if axis not in FIELDS]
    if unknown:
        raise ValueError(f"unknown axis {', '.join(map(repr, unknown))}; the axes are {', '.join(FIELDS)}")
    choices = {axis: _choices(axis, values) for axis, values in axes.items()}
    stacked = {axis: _stack(axis, indices) for axis, (_, indices) in choices.items()}
    labels = {axis: labels for axis, (labels, _) in choices.items()}
    return Grid(picked(stacked, np.arange(np.prod([len(s) for s in stacked.values()]))), labels)


def picked(stacked: Mapping[str, np.ndarray], cells: Int[np.ndarray, " cell"]) -> Where:
    """The places of some cells of the product of the choices on each axis.

    Args:
        stacked: for each axis, the indices of its choices, stacked along the leading axis.
        cells: row-major numbers of the cells.

    Returns:
        A `Where` whose entries have a leading axis of cells.

    >>> picked({"layer": np.array([4, 5]), "head": np.array([0, 1, 2])}, np.array([0, 5]))
    Where(layer=[4, 5], head=[0, 2])
    """
    picks = np.unravel_index(cells, [len(s) for s in stacked.values()])
    return Where(**_combined({axis: indices[pick] for (axis, indices), pick in zip(stacked.items(), picks)}))


def _choices(axis: str, choices: Any) -> tuple[list[int | str], list[np.ndarray]]:
    """The labels and the indices of the choices on one axis."""
    named = isinstance(choices, Mapping)
    if not isinstance(choices, Iterable) or isinstance(choices, str):
        raise TypeError(f"the choices for {axis!r} must be a list or a dictionary of named ones, given {choices!r}")
    values = list(choices.values() if named else choices)
    if not values:
        raise ValueError(f"axis {axis!r} of the grid has no choices")
    if any(not is_concrete(v) for v in values):
        raise TypeError(f"a grid is made outside of JAX transformations, given traced indices for {axis!r}")
    indices = [np.asarray(getattr(Where(**{axis: v}), axis)) for v in values]
    if any(i.dtype == bool for i in indices):
        raise TypeError(f"the choices for {axis!r} must be indices, given a boolean mask")
    if named:
        return _names(axis, choices), indices
    plain = all(i.ndim == 0 for i in indices)
    return [int(i) for i in indices] if plain else list(range(len(indices))), indices


def _names(axis: str, choices: Iterable[Any]) -> list[int | str]:
    """The names of choices as text, in which 1 and "1" would be one label."""
    names: list[int | str] = [str(name) for name in choices]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"axis {axis!r} of the grid has several choices named {', '.join(map(repr, twice))}")
    return names


def _stack(axis: str, indices: list[np.ndarray]) -> np.ndarray:
    """The indices of all choices as one array, of one rank and length.

    A shorter list repeats its last index, which selects nothing new.
    """
    rank = max(i.ndim for i in indices)
    batches = {len(i) for i in indices if i.ndim == 2}
    if len(batches) > 1:
        raise ValueError(f"the choices for {axis!r} have indices for different numbers of examples: {sorted(batches)}")
    if rank == 2:
        wide = [
            np.broadcast_to(i if i.ndim == 2 else i.reshape(1, -1), (*batches, i.size if i.ndim < 2 else i.shape[1]))
            for i in indices
        ]
    else:
        wide = [i.reshape((-1,) * rank) for i in indices]
    if rank:
        k = max(i.shape[-1] for i in wide)
        wide = [np.concatenate([i, np.repeat(i[..., -1:], k - i.shape[-1], axis=-1)], axis=-1) for i in wide]
    return np.stack(wide)


def _combined(cells: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The indices of the cells, with lists on several axes expanded to every pair (`Where` would zip them)."""
    lists = [axis for axis, array in cells.items() if array.ndim > 1]
    if len(lists) < 2:
        return cells
    picks = np.indices([cells[axis].shape[-1] for axis in lists]).reshape(len(lists), -1)
    return cells | {axis: cells[axis][..., picks[i]] for i, axis in enumerate(lists)}


def side_by_side(wheres: list[Where]) -> Where:
    """The stacked places of several grids of equal size as one grid's.

    The first cell of every grid comes first, then the second cell of every grid, and so on. A shorter list of
    indices repeats its last index.

    Args:
        wheres: the places of the grids, which narrow the same axes.

    Returns:
        A `Where` whose leading axis counts cell times grid, row-major.
    """
    fields = {}
    for field in wheres[0].given:
        indices = [np.asarray(where.given[field]) for where in wheres]
        rank, batch = max(i.ndim for i in indices), max((i.shape[1] for i in indices if i.ndim == 3), default=1)
        if rank == 3:
            indices = [np.broadcast_to(_lists(i), (len(i), batch, _lists(i).shape[2])) for i in indices]
        elif rank == 2:
            indices = [i.reshape(len(i), -1) for i in indices]
        fields[field] = indices
    width = max(i.shape[-1] for indices in fields.values() for i in indices if i.ndim > 1) if fields else 1
    widen = lambda i: i if i.ndim == 1 else np.concatenate([i, np.repeat(i[..., -1:], width - i.shape[-1], -1)], -1)
    stacked = {field: np.stack([widen(i) for i in indices], axis=1) for field, indices in fields.items()}
    return Where(**{field: i.reshape(-1, *i.shape[2:]) for field, i in stacked.items()})


def _lists(index: np.ndarray) -> np.ndarray:
    """`[cell, batch or 1, k]` of indices with the cells along the leading axis."""
    return index if index.ndim == 3 else index.reshape(len(index), 1, -1)
