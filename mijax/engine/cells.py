"""The cells of a sweep: grids and stacks of interventions as one pytree whose arrays have a leading axis of choices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Int
from mijax.engine.grid import Grid
from mijax.interventions.edits import Apply, Interventions, as_edits, canonical
from mijax.interventions.functions import has_functions
from mijax.interventions.places import together
from mijax.interventions.where import check_range
from mijax.model.model import Model
from mijax.model.tokens import Inputs
from mijax.programs.convert import Converted, is_array
from mijax.run import check, field_lengths, of_prompts


class Stack(NamedTuple):
    """Interventions of one structure, one for each label along `dim`, their arrays stacked along a leading axis."""

    dim: str
    labels: tuple[Any, ...]
    interventions: dict[str, tuple]
    varies: dict[str, tuple]


def stack(dim: str, interventions: Mapping[Any, Interventions]) -> Stack:
    """Interventions to be swept over as they are: `{label: interventions}`, for `mijax.sweep`.

    All must have the same sites, kinds of edits and shapes; what differs between them are numbers. Where an edit has a
    `mijax.grid`, the same one in all, the sweep is over the product.

    Raises `ValueError` naming the first whose structure differs.

    >>> import mijax as mj
    >>> doses = mj.stack("factor", {f: {"mlp_out": mj.Scale(f, mj.Where(layer=1))} for f in (0.0, 0.5, 1.0)})
    >>> doses.dim, doses.labels
    ('factor', (0.0, 0.5, 1.0))
    """
    if not interventions:
        raise ValueError(f"the stack {dim!r} is empty")
    labels, edits = tuple(interventions), [as_edits(given) for given in interventions.values()]
    arrays, rest = zip(*(eqx.partition(own, is_array) for own in edits))
    shape = lambda tree: [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
    for label, own, other in zip(labels, arrays, rest):
        same = jax.tree.structure(own) == jax.tree.structure(arrays[0]) and shape(own) == shape(arrays[0])
        if not same or jax.tree.leaves(other) != jax.tree.leaves(rest[0]):
            raise ValueError(
                f"the interventions at {dim}={label!r} differ in structure or shapes from those at {dim}={labels[0]!r}"
            )
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *arrays)
    varies = jax.tree.map(is_array, edits[0])
    return Stack(dim, labels, eqx.combine(stacked, rest[0]), varies)


class Cells(NamedTuple):
    """Every combination of the choices of several groups (grids, or a stack).

    `edits` hold arrays with a leading axis of a group's choices where `group` has that group's number, and arrays that all
    cells share where it has -1. `picks` says which choice of each group a cell is.
    """

    edits: dict[str, tuple]
    group: dict[str, tuple]
    picks: Int[np.ndarray, "group cell"]
    labels: dict[str, Sequence[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of choices in each dimension."""
        return tuple(len(labels) for labels in self.labels.values())

    @property
    def size(self) -> int:
        """The number of cells."""
        return self.picks.shape[1]

    @property
    def stacked(self) -> dict[str, tuple]:
        """Marks the arrays that differ between cells."""
        return jax.tree.map(lambda group: group >= 0, self.group)

    def take(self, cells: Int[np.ndarray, " k"] | int) -> dict[str, tuple]:
        """The edits of one cell; or of several, each array that differs with a leading axis of them."""
        pick = lambda leaf, group: leaf if group < 0 else leaf[self.picks[group, cells]]
        return jax.tree.map(pick, self.edits, self.group)

    def take_split(self, cells: Int[np.ndarray, " k"]) -> tuple[Any, Any]:
        """The same in two pytrees: the arrays that differ between cells, and the rest."""
        return eqx.partition(self.take(cells), self.stacked)

    def shared(self) -> dict[str, tuple]:
        """The edits that are the same in all cells: those of the base."""
        varies = lambda group: any(g >= 0 for g in jax.tree.leaves(group))
        kept = {
            site: tuple(edit for edit, group in zip(given, self.group[site]) if not varies(group))
            for site, given in self.edits.items()
        }
        return {site: given for site, given in kept.items() if given}


def cells_of(interventions: Interventions | Stack) -> Cells:
    """Take grids and stacks out of interventions; `ValueError` where there are none."""
    labels: dict[str, Sequence[Any]] = {}
    sizes: list[int] = []
    if isinstance(interventions, Stack):
        edits, varies = interventions.interventions, interventions.varies
        _join(labels, {interventions.dim: interventions.labels})
        sizes.append(len(interventions.labels))
    else:
        edits = as_edits(interventions)
        varies = jax.tree.map(lambda leaf: False, edits)
    groups: dict[object, int] = {}
    placed, group = {}, {}
    for site, given in edits.items():
        pairs = []
        for edit, own in zip(given, varies[site]):
            own = jax.tree.map(lambda v: 0 if v else -1, own)
            grid = edit.where
            if isinstance(grid, Grid):
                if grid.key not in groups:
                    groups[grid.key] = len(sizes)
                    sizes.append(grid.size)
                    _join(labels, grid.labels)
                number = groups[grid.key]
                edit = eqx.tree_at(lambda e: e.where, edit, grid.where)
                own = eqx.tree_at(lambda e: e.where, own, jax.tree.map(lambda _, n=number: n, grid.where))
            pairs.append((edit, own))
        placed[site], group[site] = tuple(e for e, _ in pairs), tuple(o for _, o in pairs)
    if not sizes:
        raise ValueError("a sweep needs a mijax.grid as the where of an edit, or a mijax.stack, given neither")
    picks = np.indices(sizes, dtype=np.int32).reshape(len(sizes), -1)
    return Cells(placed, group, picks, labels)


def check_cells(model: Model, tokens: Inputs, cells: Cells) -> None:
    """Raise what `run` would raise at any cell: all have the first one's structure, each its own indices."""
    check(model, tokens, cells.take(0), {})
    for name, given in cells.edits.items():
        for edit, stacked in zip(given, cells.stacked[name]):
            check_range(together(edit.where, stacked.where), name, field_lengths(model.sites[name], tokens))


def canonical_cells(model: Model, cells: Cells) -> Cells:
    """Checked cells with all axes of their sites in their operands, behind an axis of choices where there is one."""
    edits, group = {}, {}
    for name, given in cells.edits.items():
        site, stacked = model.sites[name], cells.stacked[name]
        edits[name] = tuple(canonical(edit, site, own) for edit, own in zip(given, stacked))
        group[name] = jax.tree.unflatten(jax.tree.structure(edits[name]), jax.tree.leaves(cells.group[name]))
    return cells._replace(edits=edits, group=group)


def convert_cells(model: Model, tokens: Inputs, cells: Cells) -> Cells:
    """The cells with users' functions as they are now: a program for all cells, whose arrays differ where the function's do."""
    if not has_functions(cells.edits):
        return cells
    first = of_prompts(model, tokens, cells.take(0))
    edits, group = {}, {}
    for site, given in cells.edits.items():
        pairs = [_with_program(*pair) for pair in zip(given, cells.group[site], first[site])]
        edits[site], group[site] = tuple(edit for edit, _ in pairs), tuple(number for _, number in pairs)
    return cells._replace(edits=edits, group=group)


def _with_program(edit: Any, group: Any, first: Any) -> tuple[Any, Any]:
    """An edit with the function of the first cell's in place of its own, and the group of each of its arrays."""
    if not isinstance(edit, Apply) or isinstance(edit.function, Converted):
        return edit, group
    pairs = zip(jax.tree.leaves(edit.function), jax.tree.leaves(group.function))
    arrays = [(leaf, number) for leaf, number in pairs if is_array(leaf)]
    function = lambda leaves, constants: Converted(leaves, constants, first.function.program)
    constants = first.function.constants
    at = lambda e: e.function
    moved = eqx.tree_at(at, edit, function([leaf for leaf, _ in arrays], constants))
    return moved, eqx.tree_at(at, group, function([number for _, number in arrays], [-1] * len(constants)))


def _join(labels: dict[str, Sequence[Any]], new: Mapping[str, Sequence[Any]]) -> None:
    """Add dimensions; one whose name is there already gets a number (`layer`, `layer_2`)."""
    for dim, own in new.items():
        name, n = dim, 1
        while name in labels:
            n += 1
            name = f"{dim}_{n}"
        labels[name] = own
