"""Edits of packed rows: tokens of many cells at once, each edited as its own cell says."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.edits import Apply, Edit, by_layer
from mijax.interventions.where import Axis, selection
from mijax.model.config import Config
from mijax.model.position import Frame, Rows
from mijax.model.sites import Site


def needs_whole_cells(edit: Edit, stacked: Any) -> bool:
    """Whether an edit must be given all tokens of a cell: any function might look at all of them, and subspaces that
    differ between cells would be made orthonormal row by row."""
    return isinstance(edit, Apply) or any(getattr(stacked, name) for name in edit.bases)


def of_layer(edit: Any, stacked: Any, site: Site, layer: Int[Array, ""] | None) -> Any:
    """The edit with the arrays that differ between layers narrowed to one; arrays marked in `stacked` have a
    leading axis of cells."""
    if layer is None or not site.has_layer:
        return edit
    one = jax.tree.map(lambda leaf, s: leaf[0] if s else leaf, edit, stacked)

    def narrow(leaf, own, s):
        if not own:
            return leaf
        n = leaf.shape[1 if s else 0]
        return jnp.take(leaf, jnp.minimum(layer, n - 1), axis=1 if s else 0)

    return jax.tree.map(narrow, edit, by_layer(one, len(site.axes)), stacked)


def edit_rows(
    config: Config, frame: Frame, site: Site, layer: Int[Array, ""] | None, edit: Edit, stacked: Any, x: Array
) -> Array:
    """Apply an edit to rows `[1, row, ...]`: each row is a batch of one prompt of one token."""
    rows = frame.rows
    assert rows is not None and frame.whole is not None
    edit = of_layer(edit, stacked, site, layer)
    edit, mapped = _of_rows(edit, stacked, site, rows)
    example, position, length = rows.example, frame.positions[0], frame.whole.lengths[rows.example]
    batch = rows.place.shape[1]

    def one(edit: Edit, example, position, length, x):
        known = {axis: Axis(jnp.arange(n, dtype=jnp.int32), n) for axis, n in zip(site.inner_axes, x.shape)}
        known |= {"batch": Axis(example[None], batch), "pos": Axis(position[None, None], length[None])}
        if layer is not None:
            known["layer"] = Axis(layer[None], config.n_layers, layer[None])
        return jnp.where(selection(edit.where, site.inner_axes, known), edit(x), x)

    moved, fixed = eqx.partition(edit, mapped)
    whole = lambda moved, *rest: one(eqx.combine(moved, fixed), *rest)
    return jax.vmap(whole)(moved, example, position, length, x[0][:, None, None])[None, :, 0, 0]


def _of_rows(edit: Edit, stacked: Any, site: Site, rows: Rows) -> tuple[Edit, Any]:
    """The edit with what differs between rows gathered, and which of its arrays that is."""
    place = {"batch": rows.example, "pos": rows.column}
    mapped = jax.tree.map(lambda leaf: False, edit)
    for name in edit.operands:
        leaf, s = jnp.asarray(getattr(edit, name)), getattr(stacked, name)
        own = leaf.ndim - s
        axes = site.inner_axes[len(site.inner_axes) - own :] if own else ()
        sizes = leaf.shape[1:] if s else leaf.shape
        lead = [(axis, n) for axis, n in zip(axes, sizes) if axis in place]
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


def cells_of(frame: Frame, x: Array, site: Site) -> Array:
    """`[cell, batch, ...]` of an activation of all cells: scores stand so already, rows do where all are there."""
    assert frame.rows is not None
    cells, batch, pos = frame.rows.place.shape
    inner = x.shape[1:] if "query" in site.axes else (pos, *x.shape[2:])
    return x.reshape(cells, batch, *inner)
