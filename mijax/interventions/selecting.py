"""Which entries of an activation a `Where` selects, inside a run."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from mijax._types import Array, Bool, Int
from mijax.interventions.where import Where
from mijax.model.position import Rows
from mijax.model.sites import field_of
from mijax.model.tap import Point


class Axis(NamedTuple):
    """What indices on one axis are compared with.

    `labels` are the indices that the axis's entries answer to, `[n]` or `[batch, n]`; `length` is how
    many there are altogether (per example, where examples differ), for counting from the end. `entries` says
    which of the whole axis's entries are there, where it is not all of them.
    """

    labels: Int[Array, "..."]
    length: Int[Array, "..."] | int
    entries: Int[Array, " n"] | None = None


def selection(where: Where, axes: Sequence[str], known: Mapping[str, Axis]) -> Bool[Array, "..."]:
    """True at the selected places; its rank is that of the site inside one layer, with axes of size 1
    where nothing is narrowed. `known` gives each axis's labels, the current layer's under `layer`."""
    mask = jnp.ones((1,) * (1 + len(axes)), bool)  # leading: the zipped list
    for axis in ("layer", *axes):
        index = getattr(where, field_of(axis))
        if index is not None:
            mask = mask & _membership(jnp.asarray(index), axis, axes, known[axis])
    return jnp.any(mask, axis=0)


def _membership(index: Array, axis: str, axes: Sequence[str], known: Axis) -> Bool[Array, "..."]:
    """`[k, *axes]`: which entries of the axis the k-th index means."""
    labels = known.labels if known.labels.ndim == 2 else known.labels[None, :]  # [batch or 1, n]
    if index.dtype == bool:
        rows = index if index.ndim == 2 else index[None, :]
        member = (rows if known.entries is None else rows[:, known.entries])[None]
    else:
        length = jnp.reshape(jnp.asarray(known.length, jnp.int32), (1, -1, 1))
        wanted = (
            index.reshape(1, 1, 1)
            if index.ndim == 0
            else index[:, None, None]
            if index.ndim == 1
            else index.T[:, :, None]
        )
        member = (labels[None] == wanted) | (labels[None] - length == wanted)
    shape = [member.shape[0]] + [1] * len(axes)
    if axis == "batch":
        shape[1 + axes.index("batch")] = member.shape[2]
    else:
        shape[1 + axes.index("batch")] = member.shape[1]
        if axis != "layer":
            shape[1 + axes.index(axis)] = member.shape[2]
    return member.reshape(shape)


def known_axes(point: Point, shape: tuple[int, ...]) -> dict[str, Axis]:
    """What `Where` is compared with at a point whose activation has (inner) `shape`: every axis's labels, and the layer."""
    site, frame, axes = point.site, point.frame, {}
    for axis, n in zip(site.inner_axes, shape):
        if axis in ("pos", "query"):
            axes[axis] = Axis(frame.positions, frame.lengths, frame.entries)
        elif axis == "key":
            axes[axis] = Axis(frame.keys, frame.lengths)
        elif axis == site.head_axis and point.heads is not None:
            axes[axis] = Axis(point.heads, site.sizes[axis], point.heads)
        else:
            axes[axis] = Axis(jnp.arange(n, dtype=jnp.int32), n)
    if point.layer is not None:
        axes["layer"] = Axis(point.layer[None], site.sizes["layer"], point.layer[None])
    return axes


def narrow(x: Array, where: Where, axes: Sequence[str], known: Mapping[str, Axis]) -> Array:
    """Keep of `x` (inside one layer) the entries that `where` names, axis by axis; no axis is dropped."""
    for axis in sorted(axes, key=lambda axis: axis == "batch"):  # last: positions are known for the whole batch
        i = axes.index(axis)
        index = getattr(where, field_of(axis))
        if index is None:
            continue
        index = jnp.asarray(index).reshape(-1) if jnp.ndim(index) < 2 else index
        member = _membership(index, axis, axes, known[axis])  # [k, *axes]
        place = jnp.argmax(member, axis=1 + i).astype(jnp.int32)  # [k, *other axes]
        x = jnp.take_along_axis(x, jnp.moveaxis(place, 0, i), axis=i)
    return x


def narrowed_shape(where: Where | None, axes: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what `narrow` gives."""
    given = {} if where is None else where.given
    size = lambda index: jnp.shape(index)[-1] if jnp.ndim(index) else 1
    return tuple(size(given[field_of(a)]) if field_of(a) in given else n for a, n in zip(axes, shape))


def index_of_rows(index: Array, stacked: bool, field: str, rows: Rows) -> tuple[Array, bool]:
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
