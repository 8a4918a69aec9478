"""Grids: every combination of choices on several axes, stacked so that they can be vmapped."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mijax._types import Int
from mijax.interventions.where import FIELDS, Where
from mijax.model.tokens import is_concrete


@dataclasses.dataclass(frozen=True)
class Grid:
    """Stacked places, one per cell in row-major order, and the labels of each dimension.

    The arrays of `where` have a leading axis of cells in front of what `Where` describes. Edits whose grids have one `key` move
    together in a sweep; each `mijax.grid` has its own.
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
        """What each label of a dimension stands for: its index, or the indices of each example where they differ."""
        if dim not in self.where.given:
            return list(self.labels[dim])
        index = np.asarray(getattr(self.where, dim))
        by_choice = np.moveaxis(index.reshape(*self.shape, *index.shape[1:]), self.dims.index(dim), 0)
        one_each = by_choice[(slice(None), *(0,) * (len(self.shape) - 1))]  # whatever is chosen on the other axes
        if one_each.ndim == 1:
            return one_each.tolist()
        return [[sorted(set(row)) for row in np.atleast_2d(choice).tolist()] for choice in one_each]

    def beside(self, where: Where) -> "Grid":
        """Other places for the same cells, stacked as `where` is here: edits at both move together in a sweep."""
        return Grid(where, self.labels, self.key)


def grid(**axes: Iterable[Any] | Mapping[str, Any]) -> Grid:
    """Every combination of choices on several axes of a site, in the order given.

    Each keyword is an axis of `Where`, its value the choices: numbers, or a dictionary of named ones
    (roles). A choice is anything that `Where` takes there: one index, a list of several, or a list per
    example, `[batch, k]` (so that a role with one position in each prompt is `[batch, 1]`). Lists on several axes are combined, within a cell, to every pair.

    Raises `ValueError` for an unknown axis or an axis without choices.

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
    choices = {axis: _choices(axis, given) for axis, given in axes.items()}
    stacked = {axis: _stack(axis, indices) for axis, (_, indices) in choices.items()}
    labels = {axis: labels for axis, (labels, _) in choices.items()}
    return Grid(picked(stacked, np.arange(np.prod([len(s) for s in stacked.values()]))), labels)


def picked(stacked: Mapping[str, np.ndarray], cells: Int[np.ndarray, " cell"]) -> Where:
    """Some cells of the product of the choices on each axis, by their row-major numbers."""
    picks = np.unravel_index(cells, [len(s) for s in stacked.values()])
    return Where(**_combined({axis: own[pick] for (axis, own), pick in zip(stacked.items(), picks)}))


def _choices(axis: str, given: Any) -> tuple[list[int | str], list[np.ndarray]]:
    named = isinstance(given, Mapping)
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"the choices for {axis!r} must be a list or a dictionary of named ones, given {given!r}")
    values = list(given.values() if named else given)
    if not values:
        raise ValueError(f"axis {axis!r} of the grid has no choices")
    if any(not is_concrete(v) for v in values):
        raise TypeError(f"a grid is made outside of JAX transformations, given traced indices for {axis!r}")
    indices = [np.asarray(getattr(Where(**{axis: v}), axis)) for v in values]
    if any(i.dtype == bool for i in indices):
        raise TypeError(f"the choices for {axis!r} must be indices, given a boolean mask")
    if named:
        return [str(name) for name in given], indices
    plain = all(i.ndim == 0 for i in indices)
    return [int(i) for i in indices] if plain else list(range(len(indices))), indices


def _stack(axis: str, indices: list[np.ndarray]) -> np.ndarray:
    """Give all choices one rank and one length; a shorter list repeats its last index, which selects
    nothing new."""
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
    """Where several axes hold lists, `Where` would zip them: make it every combination."""
    lists = [axis for axis, array in cells.items() if array.ndim > 1]
    if len(lists) < 2:
        return cells
    picks = np.indices([cells[axis].shape[-1] for axis in lists]).reshape(len(lists), -1)
    return cells | {axis: cells[axis][..., picks[i]] for i, axis in enumerate(lists)}


def side_by_side(wheres: list[Where]) -> Where:
    """Stacked places of several grids as one, the grids' cells in turn; a shorter list repeats its last index."""
    fields = {}
    for field in wheres[0].given:
        own = [np.asarray(where.given[field]) for where in wheres]
        rank, batch = max(i.ndim for i in own), max((i.shape[1] for i in own if i.ndim == 3), default=1)
        if rank == 3:
            own = [np.broadcast_to(_lists(i), (len(i), batch, _lists(i).shape[2])) for i in own]
        elif rank == 2:
            own = [i.reshape(len(i), -1) for i in own]
        fields[field] = own
    width = max(i.shape[-1] for own in fields.values() for i in own if i.ndim > 1) if fields else 1
    widen = lambda i: i if i.ndim == 1 else np.concatenate([i, np.repeat(i[..., -1:], width - i.shape[-1], -1)], -1)
    stacked = {field: np.stack([widen(i) for i in own], axis=1) for field, own in fields.items()}
    return Where(**{field: i.reshape(-1, *i.shape[2:]) for field, i in stacked.items()})


def _lists(index: np.ndarray) -> np.ndarray:
    """`[cell, batch or 1, k]`."""
    return index if index.ndim == 3 else index.reshape(len(index), 1, -1)
