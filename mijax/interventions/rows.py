"""The tap that edits packed rows: tokens of many cells at once, each edited as its own cell says."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array
from mijax.interventions.editing import edited
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.where import Axis, selection
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
    """The edit with what differs between rows gathered, and which of its arrays that is."""
    place = {"batch": rows.example, "pos": rows.column}
    mapped = jax.tree.map(lambda leaf: False, edit)
    for name in edit.operands:
        leaf, s = jnp.asarray(getattr(edit, name)), bool(getattr(stacked, name))
        lead = [(axis, n) for axis, n in zip(site.inner_axes, leaf.shape[s:]) if axis in place]
        if s or any(n > 1 for _, n in lead):
            index = ([rows.cell] if s else []) + [place[axis] if n > 1 else 0 * rows.cell for axis, n in lead]
            leaf = leaf[tuple(index)]
            leaf = leaf.reshape(leaf.shape[0], *(1,) * len(lead), *leaf.shape[1:])
            mapped = eqx.tree_at(lambda e, name=name: getattr(e, name), mapped, True)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, leaf)
    for field, index in edit.where.given.items():
        index, per_row = _index_of_rows(jnp.asarray(index), getattr(stacked.where, field), field, rows)
        edit = eqx.tree_at(lambda e, field=field: getattr(e.where, field), edit, index)
        mapped = eqx.tree_at(lambda e, field=field: getattr(e.where, field), mapped, per_row)
    return edit, mapped


def _index_of_rows(index: Array, stacked: bool, field: str, rows: Rows) -> tuple[Array, bool]:
    """What an entry of `Where` says to each row, and whether that differs between rows."""
    rank, mask = index.ndim - stacked, index.dtype == bool
    lead = [rows.cell] if stacked else []
    if mask and field == "batch":
        return index[(*lead, rows.example)][:, None], True
    if mask and field == "pos":
        return index[(*lead, *([rows.example] if rank == 2 else []), rows.column)][:, None], True
    if rank == 2:
        return index[(*lead, rows.example)][:, None], True
    return (index[rows.cell], True) if stacked else (index, False)


def _cells(rows: Rows, x: Array, site: Site) -> Array:
    """`[cell, batch, ...]` of an activation of all cells: scores stand so already, rows do where all are there."""
    cells, batch, pos = rows.place.shape
    inner = x.shape[1:] if "query" in site.axes else (pos, *x.shape[2:])
    return x.reshape(cells, batch, *inner)
