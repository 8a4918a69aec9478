"""The taps of packed rows: tokens of many cells at once, each edited, and kept, as its own cell says."""

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
from mijax.model.position import Packed, Rows
from mijax.model.sites import Site
from mijax.model.tap import Point, Tap


class EditingRows(Tap):
    """Edits rows one by one, or cell by cell where an edit must see, or a site holds, all of a cell.

    `stacked` marks those arrays of `edits` that have a leading axis of cells; edits hold the arrays of all layers.
    """

    edits: dict[str, tuple[Edit, ...]]
    stacked: dict[str, tuple[Any, ...]]

    @property
    def sites(self):
        """Those that are edited."""
        return frozenset(self.edits)

    def at(self, point, x, state):
        """The edited rows."""
        site, frame = point.site, point.frame
        assert isinstance(frame, Packed)
        for edit, stacked in zip(self.edits[site.name], self.stacked[site.name]):
            if "query" in site.axes or needs_whole_cells(edit, stacked):
                moved, fixed = eqx.partition(_of_layer(edit, stacked, point), stacked)
                whole = point._replace(frame=frame.whole)
                alone = lambda moved, x, fixed=fixed, whole=whole: edited(eqx.combine(moved, fixed), whole, x)
                x = jax.vmap(alone)(moved, _cells(frame.rows, x, site)).reshape(x.shape)
            else:
                x = _edited_rows(edit, stacked, point, frame, x)
        return x, state


class CapturingRows(Tap):
    """Keeps for each cell what `Capturing` keeps for a run: the base run's activation where no row computes another.

    `base` holds the base run's activations, in full. The result has the cells in front.
    """

    captures: dict[str, Where | None]
    base: dict[str, Array]
    layered: frozenset[str] = eqx.field(static=True)
    n_layers: int = eqx.field(static=True)

    @property
    def sites(self):
        """Those that are captured."""
        return frozenset(self.captures)

    def init(self, sites, frame, zero):
        """What every cell would keep, did it change nothing."""
        assert isinstance(frame, Packed)
        kept, cells = {}, frame.rows.place.shape[0]
        for name in self.captures:
            site, base = sites[name], self.base[name]
            keep = lambda x, site=site: self._narrowed(Point(site, None, frame.whole), x)
            own = jax.vmap(keep)(base[self._layers(name)]) if site.has_layer else keep(base)
            axis = int(site.has_layer)
            kept[name] = jnp.repeat(jnp.expand_dims(own, axis), cells, axis=axis)
        return kept

    def at(self, point, x, state):
        """Keep what stands there in every cell; nothing is changed."""
        if point.copy:
            return x, state
        site, name, frame = point.site, point.site.name, point.frame
        assert isinstance(frame, Packed)
        unpack = frame.rows.unpack_queries if "query" in site.axes else frame.rows.unpack
        whole = point._replace(frame=frame.whole, heads=None)
        own = jax.vmap(lambda x: self._narrowed(whole, x))(unpack(x, self.base[name]))
        if point.layer is not None:
            slot = first_slot(self._layers(name), point.layer)
            own = state[name].at[slot].set(own, mode="drop")
        return x, {**state, name: own}

    def result(self, state, stacked):
        """By site, the cells in front."""
        of_first = lambda wanted: jnp.argmax(wanted[:, None] == wanted[None, :], axis=1)  # a layer may be listed twice
        moved = lambda name: jnp.moveaxis(state[name][of_first(self._layers(name))], 1, 0)
        return {name: moved(name) if name in self.layered else state[name] for name in state}

    def per_layer(self, sites):
        """The base run's activations."""
        own = {name: x if name in self.layered else None for name, x in self.base.items()}
        rest = {name: None if name in self.layered else x for name, x in self.base.items()}
        at = lambda tap: (tap.captures, tap.base)
        return eqx.tree_at(at, self, (None, own)), eqx.tree_at(at, self, (self.captures, rest))

    def _layers(self, name: str) -> Int[Array, " k"]:
        where = self.captures[name]
        wanted = None if where is None else where.layers(self.n_layers)
        return jnp.arange(self.n_layers, dtype=jnp.int32) if wanted is None else wanted

    def _narrowed(self, point: Point, x: Array) -> Array:
        where = self.captures[point.site.name]
        return x if where is None else narrow(x, where, point.site.inner_axes, known_axes(point, x.shape))


def needs_whole_cells(edit: Edit, stacked: Any) -> bool:
    """Whether an edit must be given all tokens of a cell: any function might look at all of them, and subspaces that
    differ between cells would be made orthonormal row by row."""
    return isinstance(edit, Apply) or any(getattr(stacked, name) for name in edit.bases)


def _of_layer(edit: Any, stacked: Any, point: Point) -> Any:
    """The edit with its operands and bases narrowed to one layer, and without an axis of them."""
    if point.layer is None:
        return edit
    for name in (*edit.operands, *edit.bases):
        leaf, axis = jnp.asarray(getattr(edit, name)), int(getattr(stacked, name))
        own = jnp.take(leaf, jnp.minimum(point.layer, leaf.shape[axis] - 1), axis=axis)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, own)
    return edit


def _edited_rows(edit: Edit, stacked: Any, point: Point, frame: Packed, x: Array) -> Array:
    """Apply an edit to rows `[1, row, ...]`: each row is a batch of one prompt of one token."""
    rows, site, layer = frame.rows, point.site, point.layer
    edit, mapped = _of_rows(_of_layer(edit, stacked, point), stacked, site, rows)
    example, position, length = rows.example, frame.positions[0], frame.whole.lengths[rows.example]
    batch = rows.place.shape[1]

    def one(edit: Edit, example, position, length, x):
        known = {axis: Axis(jnp.arange(n, dtype=jnp.int32), n) for axis, n in zip(site.inner_axes, x.shape)}
        known |= {"batch": Axis(example[None], batch), "pos": Axis(position[None, None], length[None])}
        if layer is not None:
            known["layer"] = Axis(layer[None], site.sizes["layer"], layer[None])
        return jnp.where(selection(edit.where, site.inner_axes, known), edit(x), x)

    moved, fixed = eqx.partition(edit, mapped)
    whole = lambda moved, *rest: one(eqx.combine(moved, fixed), *rest)
    return jax.vmap(whole)(moved, example, position, length, x[0][:, None, None])[None, :, 0, 0]


def _of_rows(edit: Edit, stacked: Any, site: Site, rows: Rows) -> tuple[Edit, Any]:
    """The edit with each row's part of its arrays in front, where rows differ; and, by array, whether they do."""
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
    """`[row, 1, 1, ...]` of an operand that differs between cells (`stacked`: they are in front), prompts or positions; another
    as it is."""
    tokens = {"batch": rows.example, "pos": rows.column}
    first = [axis for axis in site.inner_axes if axis in tokens]  # before all others
    sizes = operand.shape[int(stacked) :]
    index = [tokens[axis] if n > 1 else jnp.zeros_like(rows.cell) for axis, n in zip(first, sizes)]
    if not stacked and all(n == 1 for n in sizes[: len(first)]):
        return operand, False
    own = operand[(*[rows.cell] * stacked, *index)]
    return jnp.expand_dims(own, range(1, 1 + len(first))), True


def _cells(rows: Rows, x: Array, site: Site) -> Array:
    """`[cell, batch, ...]` of an activation of all cells: scores stand so already, rows do where all are there."""
    cells, batch, pos = rows.place.shape
    inner = x.shape[1:] if "query" in site.axes else (pos, *x.shape[2:])
    return x.reshape(cells, batch, *inner)
