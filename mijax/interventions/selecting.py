"""Which entries of an activation a `Where` selects, inside a run."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from mijax._types import Array, Bool, Int
from mijax.interventions.where import Where
from mijax.model.sites import field_of
from mijax.model.tap import Point


class Axis(NamedTuple):
    """The values with which the indices of a `Where` on one axis are compared.

    Attributes:
        labels: the index of each entry of the activation on this axis, `[n]` or `[batch, n]`.
        length: how many indices the axis has altogether, for counting from the end; `[batch]` where examples differ.
        entries: which entries of the whole axis the activation holds, `[n]`; `None` where it holds all.
    """

    labels: Int[Array, "..."]
    length: Int[Array, "..."] | int
    entries: Int[Array, " n"] | None = None


def selection(where: Where, axes: Sequence[str], known: Mapping[str, Axis]) -> Bool[Array, "..."]:
    """A mask of the selected entries.

    Args:
        where: which entries are selected.
        axes: the site's axes inside one layer.
        known: the labels of each axis, with the current layer's under `layer`.

    Returns:
        True at the selected entries; one axis for each of `axes`, of size 1 where nothing is narrowed.
    """
    mask = jnp.ones((1,) * (1 + len(axes)), bool)  # the leading axis is that of zipped lists
    for axis in ("layer", *axes):
        index = getattr(where, field_of(axis))
        if index is not None:
            mask = mask & _membership(jnp.asarray(index), axis, axes, known[axis])
    return jnp.any(mask, axis=0)


def _membership(index: Array, axis: str, axes: Sequence[str], known: Axis) -> Bool[Array, "..."]:
    """`[k, *axes]`: True at the entries of the axis that the k-th index selects."""
    labels = known.labels if known.labels.ndim == 2 else known.labels[None, :]  # [batch or 1, n]
    if index.dtype == bool:
        rows = index if index.ndim == 2 else index[None, :]
        member = (rows if known.entries is None else rows[:, known.entries])[None]
    else:
        length = jnp.reshape(jnp.asarray(known.length, jnp.int32), (1, -1, 1))
        targets = (
            index.reshape(1, 1, 1)
            if index.ndim == 0
            else index[:, None, None]
            if index.ndim == 1
            else index.T[:, :, None]
        )
        member = (labels[None] == targets) | (labels[None] - length == targets)
    shape = [member.shape[0]] + [1] * len(axes)
    if axis == "batch":
        shape[1 + axes.index("batch")] = member.shape[2]
    else:
        shape[1 + axes.index("batch")] = member.shape[1]
        if axis != "layer":
            shape[1 + axes.index(axis)] = member.shape[2]
    return member.reshape(shape)


def known_axes(point: Point, shape: tuple[int, ...]) -> dict[str, Axis]:
    """The labels with which a `Where` is compared at a point.

    Args:
        point: the site, the layer, and the positions of the tokens.
        shape: the shape of the activation inside one layer.

    Returns:
        An `Axis` for each of the site's inner axes, and for `layer` at sites with a layer axis.
    """
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
    """The entries of an activation that a `Where` names, axis by axis; no axis is dropped.

    Args:
        x: the activation inside one layer, `[*axes]`.
        where: which entries are kept.
        axes: the site's axes inside one layer.
        known: the labels of each axis.

    Returns:
        The kept entries, of the shape that `narrowed_shape` gives.
    """
    for axis in sorted(axes, key=lambda axis: axis == "batch"):  # batch last: positions differ between examples
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
    """Compute the shape of the result of `narrow`.

    Args:
        where: which entries are kept, by indices; `None` for all.
        axes: the axes of the activation.
        shape: their sizes.

    Returns:
        The size of each axis: the number of its indices in `where`, or its size in `shape` where it has none there.

    >>> narrowed_shape(Where(pos=[0, -1], head=3), ("batch", "pos", "head", "d_head"), (4, 9, 8, 16))
    (4, 2, 1, 16)
    """
    entries = {} if where is None else where.given
    size = lambda index: jnp.shape(index)[-1] if jnp.ndim(index) else 1
    return tuple(size(entries[field_of(a)]) if field_of(a) in entries else n for a, n in zip(axes, shape))
