"""The taps of packed rows: the tokens of many cells at once, edited and captured as each token's cell prescribes."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.capturing import first_slot
from mijax.interventions.editing import edited
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.selecting import Axis, index_of_rows, known_axes, narrow, selection
from mijax.interventions.where import Where
from mijax.model.position import Frame, Packed, Rows
from mijax.model.sites import Site
from mijax.model.tap import Point, Result, State, Tap


class EditingRows(Tap):
    """Edits packed rows one by one.

    Rows are edited cell by cell where an edit must see all of a cell, or where the site has the axes of all of a
    cell (scores and patterns).

    Args:
        edits: the edits of each site, with the arrays of all layers.
        stacked: for each edit, a pytree of booleans that marks its arrays with a leading axis of cells.
    """

    edits: dict[str, tuple[Edit, ...]]
    stacked: dict[str, tuple[Any, ...]]

    @property
    def sites(self) -> frozenset[str]:
        """The edited sites."""
        return frozenset(self.edits)

    def at(self, point: Point, x: Array, state: State) -> tuple[Array, State]:
        """The edited rows."""
        site, frame = point.site, point.frame
        assert isinstance(frame, Packed)
        for edit, stacked in zip(self.edits[site.name], self.stacked[site.name]):
            if "query" in site.axes or needs_whole_cells(edit, stacked):
                moved, fixed = eqx.partition(_of_layer(edit, stacked, point), stacked)
                whole = point._replace(frame=frame.whole)
                edit_cell = lambda moved, x, fixed=fixed, whole=whole: edited(eqx.combine(moved, fixed), whole, x)
                x = jax.vmap(edit_cell)(moved, _cells(frame.rows, x, site)).reshape(x.shape)
            else:
                x = _edited_rows(edit, stacked, point, frame, x)
        return x, state


class CapturingRows(Tap):
    """Keeps for each cell the activations that `Capturing` keeps for a run.

    A token that no row computes has the activation of the base run. The result holds the activations by site, with
    the cells in front.

    Args:
        captures: for each captured site, which entries are kept; `None` for the whole site.
        base: the base run's activations by site, in full.
        layered: the captured sites that have a layer axis.
        n_layers: the number of layers of the model.
    """

    captures: dict[str, Where | None]
    base: dict[str, Array]
    layered: frozenset[str] = eqx.field(static=True)
    n_layers: int = eqx.field(static=True)

    @property
    def sites(self) -> frozenset[str]:
        """The captured sites."""
        return frozenset(self.captures)

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> dict[str, Array]:
        """The base run's activations, once for each cell: the result of a cell that changes nothing."""
        assert isinstance(frame, Packed)
        state, cells = {}, frame.rows.place.shape[0]
        for name in self.captures:
            site, base = sites[name], self.base[name]
            keep = lambda x, site=site: self._narrowed(Point(site, None, frame.whole), x)
            narrowed = jax.vmap(keep)(base[self._layers(name)]) if site.has_layer else keep(base)
            axis = int(site.has_layer)
            state[name] = jnp.repeat(jnp.expand_dims(narrowed, axis), cells, axis=axis)
        return state

    def at(self, point: Point, x: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Keep the activation in every cell, and return it unchanged."""
        if point.copy:
            return x, state
        site, name, frame = point.site, point.site.name, point.frame
        assert isinstance(frame, Packed)
        unpack = frame.rows.unpack_queries if "query" in site.axes else frame.rows.unpack
        whole = point._replace(frame=frame.whole, heads=None)
        activation = jax.vmap(lambda x: self._narrowed(whole, x))(unpack(x, self.base[name]))
        if point.layer is not None:
            slot = first_slot(self._layers(name), point.layer)
            activation = state[name].at[slot].set(activation, mode="drop")
        return x, {**state, name: activation}

    def result(self, state: dict[str, Array], stacked: Result) -> dict[str, Array]:
        """The activations by site, with the cells in front."""
        of_first = lambda layers: jnp.argmax(layers[:, None] == layers[None, :], axis=1)  # a layer may be listed twice
        moved = lambda name: jnp.moveaxis(state[name][of_first(self._layers(name))], 1, 0)
        return {name: moved(name) if name in self.layered else state[name] for name in state}

    def per_layer(self, sites: Mapping[str, Site]) -> tuple["CapturingRows", "CapturingRows"]:
        """Split off the base run's activations at sites with a layer axis."""
        layered = {name: x if name in self.layered else None for name, x in self.base.items()}
        rest = {name: None if name in self.layered else x for name, x in self.base.items()}
        at = lambda tap: (tap.captures, tap.base)
        return eqx.tree_at(at, self, (None, layered)), eqx.tree_at(at, self, (self.captures, rest))

    def _layers(self, name: str) -> Int[Array, " k"]:
        """The captured layers of a site, one for each slot."""
        where = self.captures[name]
        layers = None if where is None else where.layers(self.n_layers)
        return jnp.arange(self.n_layers, dtype=jnp.int32) if layers is None else layers

    def _narrowed(self, point: Point, x: Array) -> Array:
        where = self.captures[point.site.name]
        return x if where is None else narrow(x, where, point.site.inner_axes, known_axes(point, x.shape))


def needs_whole_cells(edit: Edit, stacked: Any) -> bool:
    """Tell whether an edit must be given all tokens of a cell.

    A user's function may look at all tokens. A basis that differs between cells would be made orthonormal for each
    row rather than once for each cell.

    Args:
        edit: the edit.
        stacked: a pytree of booleans that marks the arrays of the edit that differ between cells.

    Returns:
        Whether it is a user's function, or has a basis that differs between cells.
    """
    return isinstance(edit, Apply) or any(getattr(stacked, name) for name in edit.bases)


def _of_layer(edit: Any, stacked: Any, point: Point) -> Any:
    """The edit with its operands and bases narrowed to the point's layer, and without their layer axis."""
    if point.layer is None:
        return edit
    for name in (*edit.operands, *edit.bases):
        leaf, axis = jnp.asarray(getattr(edit, name)), int(getattr(stacked, name))
        value = jnp.take(leaf, jnp.minimum(point.layer, leaf.shape[axis] - 1), axis=axis)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit


def _edited_rows(edit: Edit, stacked: Any, point: Point, frame: Packed, x: Array) -> Array:
    """Apply an edit to rows `[1, row, ...]`: each row is a batch of one prompt of one token."""
    rows, site, layer = frame.rows, point.site, point.layer
    edit, mapped = _of_rows(_of_layer(edit, stacked, point), stacked, site, rows)
    example, position, length = rows.example, frame.positions[0], frame.whole.lengths[rows.example]
    batch = rows.place.shape[1]

    def edit_row(edit: Edit, example, position, length, x):
        known = {axis: Axis(jnp.arange(n, dtype=jnp.int32), n) for axis, n in zip(site.inner_axes, x.shape)}
        known |= {"batch": Axis(example[None], batch), "pos": Axis(position[None, None], length[None])}
        if layer is not None:
            known["layer"] = Axis(layer[None], site.sizes["layer"], layer[None])
        return jnp.where(selection(edit.where, site.inner_axes, known), edit(x), x)

    moved, fixed = eqx.partition(edit, mapped)
    whole = lambda moved, *rest: edit_row(eqx.combine(moved, fixed), *rest)
    return jax.vmap(whole)(moved, example, position, length, x[0][:, None, None])[None, :, 0, 0]


def _of_rows(edit: Edit, stacked: Any, site: Site, rows: Rows) -> tuple[Edit, Any]:
    """The edit with a leading axis of rows in the arrays that differ between rows, and which arrays these are."""
    parts = {}
    for name in edit.operands:
        operand = jnp.asarray(getattr(edit, name))
        parts[lambda e, name=name: getattr(e, name)] = _operand_of_rows(operand, getattr(stacked, name), site, rows)
    for field, index in edit.where.given.items():
        part = index_of_rows(jnp.asarray(index), getattr(stacked.where, field), field, rows)
        parts[lambda e, field=field: getattr(e.where, field)] = part
    differs = jax.tree.map(lambda leaf: False, edit)
    for at, (part, by_row) in parts.items():
        edit, differs = eqx.tree_at(at, edit, part), eqx.tree_at(at, differs, by_row)
    return edit, differs


def _operand_of_rows(operand: Array, stacked: bool, site: Site, rows: Rows) -> tuple[Array, bool]:
    """An operand by row, `[row, 1, 1, ...]`, where it differs between cells, prompts or positions; otherwise unchanged.

    `stacked` says that the operand has a leading axis of cells. The second result says whether it differs between
    rows.
    """
    tokens = {"batch": rows.example, "pos": rows.column}
    first = [axis for axis in site.inner_axes if axis in tokens]  # these come before all other axes
    sizes = operand.shape[int(stacked) :]
    index = [tokens[axis] if n > 1 else jnp.zeros_like(rows.cell) for axis, n in zip(first, sizes)]
    if not stacked and all(n == 1 for n in sizes[: len(first)]):
        return operand, False
    by_row = operand[(*[rows.cell] * stacked, *index)]
    return jnp.expand_dims(by_row, range(1, 1 + len(first))), True


def _cells(rows: Rows, x: Array, site: Site) -> Array:
    """`[cell, batch, ...]` of an activation that holds every token of every cell.

    Scores and patterns are ordered by cell and example already; so are packed rows when none is left out.
    """
    cells, batch, pos = rows.place.shape
    inner = x.shape[1:] if "query" in site.axes else (pos, *x.shape[2:])
    return x.reshape(cells, batch, *inner)
