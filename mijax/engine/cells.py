"""The cells of a sweep: grids and stacks of interventions as one pytree with a leading axis of choices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Int
from mijax.engine.grid import Grid
from mijax.engine.names import check_labels
from mijax.interventions.checks import check, check_no_mask, check_order, field_lengths
from mijax.interventions.edits import Apply, Interventions, as_edits
from mijax.interventions.functions import has_functions, of_prompts
from mijax.interventions.operands import canonical
from mijax.interventions.places import together
from mijax.interventions.where import check_range
from mijax.model.model import Model
from mijax.model.tokens import Inputs
from mijax.programs.convert import Converted, is_array


class Stack(NamedTuple):
    """Interventions of one structure, one for each label, with their arrays stacked along a leading axis.

    Attributes:
        dim: name of the dimension along which the interventions are stacked.
        labels: the label of each intervention.
        interventions: the stacked edits by site.
        varies: the same structure, with true for each array (which is stacked) and false for other leaves.
    """

    dim: str
    labels: tuple[Any, ...]
    interventions: dict[str, tuple[Any, ...]]
    varies: dict[str, tuple[Any, ...]]


def stack(dim: str, interventions: Mapping[Any, Interventions]) -> Stack:
    """Stack whole interventions, for a sweep over them.

    All must have the same sites, kinds of edits and shapes; only numbers may differ. Where an edit has a
    `mijax.grid`, the same one in all interventions, the sweep is over the product of the stack and the grid.

    Args:
        dim: name of the dimension.
        interventions: the interventions by label, each as `run` takes it.

    Returns:
        The stack, which `mijax.sweep` takes in place of interventions.

    Raises:
        ValueError: for an empty stack, for interventions that differ from the first ones in structure or shapes (it
            names their label), for labels that are equal in the result, and for a `dim` that results use otherwise.
        TypeError: for interventions that differ in their functions, for labels that are no strings or numbers, and
            for a `dim` that is no string.

    >>> import mijax as mj
    >>> doses = mj.stack("factor", {f: {"mlp_out": mj.Scale(f, mj.Where(layer=1))} for f in (0.0, 0.5, 1.0)})
    >>> doses.dim, doses.labels
    ('factor', (0.0, 0.5, 1.0))
    """
    if not interventions:
        raise ValueError(f"the stack {dim!r} is empty")
    labels, edits = tuple(interventions), [as_edits(value) for value in interventions.values()]
    check_labels(dim, labels)
    arrays, rest = zip(*(eqx.partition(tree, is_array) for tree in edits))
    shape = lambda tree: [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
    for label, array_tree, rest_tree in zip(labels, arrays, rest):
        same = jax.tree.structure(array_tree) == jax.tree.structure(arrays[0]) and shape(array_tree) == shape(arrays[0])
        others = zip(jax.tree.leaves(rest_tree), jax.tree.leaves(rest[0]))
        if same and any(callable(leaf) and callable(other) and leaf != other for leaf, other in others):
            raise TypeError(
                f"the interventions at {dim}={label!r} and {dim}={labels[0]!r} have different functions, which cannot be stacked:"
                " sweep each apart, or let one function read an array that differs (a field of an equinox module)"
            )
        if not same or jax.tree.leaves(rest_tree) != jax.tree.leaves(rest[0]):
            raise ValueError(
                f"the interventions at {dim}={label!r} differ in structure or shapes from those at {dim}={labels[0]!r}"
            )
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *arrays)
    varies = jax.tree.map(is_array, edits[0])
    return Stack(dim, labels, eqx.combine(stacked, rest[0]), varies)


class Cells(NamedTuple):
    """Every combination of the choices of several groups (grids, or a stack).

    Attributes:
        edits: the edits by site. An array has a leading axis of choices where `group` has the number of a group,
            and is shared by all cells where it has -1.
        group: the number of the group of each array of `edits`, or -1.
        picks: `[group, cell]`, which choice of each group a cell takes.
        labels: the labels of the choices, by dimension.
    """

    edits: dict[str, tuple[Any, ...]]
    group: dict[str, tuple[Any, ...]]
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
    def stacked(self) -> dict[str, tuple[Any, ...]]:
        """For each array of `edits`, whether it differs between cells."""
        return jax.tree.map(lambda group: group >= 0, self.group)

    def take(self, cells: Int[np.ndarray, " k"] | int) -> dict[str, tuple[Any, ...]]:
        """The edits of one cell or of several cells.

        Args:
            cells: the number of one cell, or `[k]` numbers.

        Returns:
            The edits; of several cells, each array that differs between cells has a leading axis of `k`.
        """
        pick = lambda leaf, group: leaf if group < 0 else leaf[self.picks[group, cells]]
        return jax.tree.map(pick, self.edits, self.group)

    def take_split(self, cells: Int[np.ndarray, " k"]) -> tuple[Any, Any]:
        """The edits of several cells in two pytrees.

        Args:
            cells: `[k]` numbers of cells.

        Returns:
            The arrays that differ between cells, with a leading axis of `k`, and the other leaves.
        """
        return eqx.partition(self.take(cells), self.stacked)

    def shared(self) -> dict[str, tuple[Any, ...]]:
        """The edits that are the same in all cells, which are those of the base run."""
        varies = lambda group: any(g >= 0 for g in jax.tree.leaves(group))
        shared_edits = {
            site: tuple(edit for edit, group in zip(edits, self.group[site]) if not varies(group))
            for site, edits in self.edits.items()
        }
        return {site: edits for site, edits in shared_edits.items() if edits}


def cells_of(interventions: Interventions | Stack) -> Cells:
    """The cells of interventions with grids, or of a stack.

    Args:
        interventions: interventions with a `mijax.grid` as the `where` of some edit, or a `mijax.stack`.

    Returns:
        The cells, in the row-major order of the grids' and the stack's choices.

    Raises:
        ValueError: where there is neither a grid nor a stack.
    """
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
    for site, site_edits in edits.items():
        pairs = []
        for edit, numbers in zip(site_edits, varies[site]):
            numbers = jax.tree.map(lambda v: 0 if v else -1, numbers)
            grid = edit.where
            if isinstance(grid, Grid):
                if grid.key not in groups:
                    groups[grid.key] = len(sizes)
                    sizes.append(grid.size)
                    _join(labels, grid.labels)
                number = groups[grid.key]
                edit = eqx.tree_at(lambda e: e.where, edit, grid.where)
                numbers = eqx.tree_at(lambda e: e.where, numbers, jax.tree.map(lambda _, n=number: n, grid.where))
            pairs.append((edit, numbers))
        placed[site], group[site] = tuple(e for e, _ in pairs), tuple(o for _, o in pairs)
    if not sizes:
        raise ValueError("a sweep needs a mijax.grid as the where of an edit, or a mijax.stack, given neither")
    picks = np.indices(sizes, dtype=np.int32).reshape(len(sizes), -1)
    return Cells(placed, group, picks, labels)


def check_cells(model: Model, tokens: Inputs, cells: Cells) -> None:
    """Check every cell as `run` checks interventions.

    All cells have the structure of the first one, which is checked alone; indices are checked for each.

    Args:
        model: the model.
        tokens: the prompts.
        cells: the cells.

    Raises:
        ValueError: for what `run` refuses: unknown sites and axes, shapes that do not fit, indices out of range.
        TypeError: likewise.
    """
    check(model, tokens, cells.take(0), {})
    for name, edits in cells.edits.items():
        site = model.sites[name]
        sizes = dict(zip(site.axes, site.shape(*tokens.ids.shape)))
        for edit, stacked in zip(edits, cells.stacked[name]):
            check_range(together(edit.where, stacked.where), site, field_lengths(site, tokens))
            check_order(edit, site, stacked)
            check_no_mask(edit.where, name, site.axes, sizes, stacked.where)


def canonical_cells(model: Model, cells: Cells) -> Cells:
    """Give the operands of cells an axis for each of their site's axes.

    An operand that differs between cells has the axis of choices in front of the site's axes.

    Args:
        model: the model.
        cells: cells that `check_cells` accepts.

    Returns:
        The cells with their edits in canonical form (`interventions.edits.canonical`).
    """
    edits, group = {}, {}
    for name, site_edits in cells.edits.items():
        site, stacked = model.sites[name], cells.stacked[name]
        edits[name] = tuple(canonical(edit, site, marks) for edit, marks in zip(site_edits, stacked))
        group[name] = jax.tree.unflatten(jax.tree.structure(edits[name]), jax.tree.leaves(cells.group[name]))
    return cells._replace(edits=edits, group=group)


def convert_cells(model: Model, tokens: Inputs, cells: Cells) -> Cells:
    """Convert users' functions among the edits of cells to programs, as their code is at the time of the call.

    There is one program for all cells; its arrays differ between cells where the function's arrays do.

    Args:
        model: the model.
        tokens: the prompts.
        cells: the cells.

    Returns:
        The cells with programs in place of functions; cells without functions are returned unchanged.

    Raises:
        ValueError: for a function whose result has another shape or dtype than its input.
        TypeError: for a function that takes other arguments.
        Exception: whatever a function itself raises, with a note that names its site.
    """
    if not has_functions(cells.edits):
        return cells
    first = of_prompts(model, tokens, cells.take(0))
    edits, group = {}, {}
    for site, site_edits in cells.edits.items():
        pairs = [_with_program(*pair) for pair in zip(site_edits, cells.group[site], first[site])]
        edits[site], group[site] = tuple(edit for edit, _ in pairs), tuple(number for _, number in pairs)
    return cells._replace(edits=edits, group=group)


def _with_program(edit: Any, group: Any, first: Any) -> tuple[Any, Any]:
    """An edit whose function is replaced by the program of the first cell's, and the group of each of its arrays."""
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
    """Add dimensions to `labels`; a name that exists already gets a number (`layer`, `layer_2`)."""
    for dim, choices in new.items():
        name, n = dim, 1
        while name in labels:
            n += 1
            name = f"{dim}_{n}"
        labels[name] = choices
