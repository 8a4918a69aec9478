"""Which part of a site: indices that are data, so that moving an edit never recompiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Int
from mijax.model.sites import SELECTS
from mijax.model.tap import Point
from mijax.model.tokens import integers, is_concrete

FIELDS = ("layer", "batch", "pos", "head", "unit", "query", "key")


def _index(value: Any) -> Any:
    if value is None or (isinstance(value, jax.Array | np.ndarray) and value.dtype in (np.int32, np.bool_)):
        return value
    return integers(list(value) if isinstance(value, range) else value, f"an index (given {value!r})")


class Where(eqx.Module):
    """Which part of a site, one entry per axis; an axis left out is taken whole.

    An entry is `None` (all of the axis), indices, or a boolean mask over the axis. Indices are read
    by their rank: 0-d is one, `[k]` are several, `[batch, k]` several for each example. Lists on
    several axes are zipped, as in NumPy (for products there is `mijax.grid`). `pos`, `query` and
    `key` count real tokens, padding excluded; negative indices count from the end (a boolean mask is over
    the columns of the batch, as the tokens' own mask is). `unit` indexes
    the last axis of vectors: neurons, or dimensions of the stream or of a head. On sites of keys and
    values, `head` is the key/value head.

    >>> Where(layer=[0, 1], head=[3, 5])  # head 3 of layer 0, head 5 of layer 1
    Where(layer=[0, 1], head=[3, 5])

    Raises `TypeError` for indices that are not integers, `ValueError` for ragged lists. Whether they
    are in range is known once the model and the prompts are: `run` and the drivers check it.
    """

    layer: Any = eqx.field(default=None, converter=_index)
    batch: Any = eqx.field(default=None, converter=_index)
    pos: Any = eqx.field(default=None, converter=_index)
    head: Any = eqx.field(default=None, converter=_index)
    unit: Any = eqx.field(default=None, converter=_index)
    query: Any = eqx.field(default=None, converter=_index)
    key: Any = eqx.field(default=None, converter=_index)

    @property
    def given(self) -> dict[str, Any]:
        """The axes that are narrowed."""
        return {field: getattr(self, field) for field in FIELDS if getattr(self, field) is not None}

    def __repr__(self):
        show = lambda x: x.tolist() if isinstance(x, np.ndarray) else x
        return f"Where({', '.join(f'{k}={show(v)}' for k, v in self.given.items())})"


class Axis(NamedTuple):
    """What indices on one axis are compared with.

    `labels` are the indices that the axis's entries answer to, `[n]` or `[batch, n]`; `length` is how
    many there are altogether (per example, where examples differ), for counting from the end. `entries` says
    which of the whole axis's entries are there, where it is not all of them.
    """

    labels: Int[Array, "..."]
    length: Int[Array, "..."] | int
    entries: Int[Array, " n"] | None = None


def selection(where: Where, axes: Sequence[str], known: dict[str, Axis]) -> Bool[Array, "..."]:
    """True at the selected places; its rank is that of the site inside one layer, with axes of size 1
    where nothing is narrowed. `known` gives each axis's labels, the current layer's under `layer`."""
    mask = jnp.ones((1,) * (1 + len(axes)), bool)  # leading: the zipped list
    for axis in ("layer", *axes):
        index = getattr(where, SELECTS[axis])
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


def check_structure(
    where: Where, site: str, axes: Sequence[str], sizes: dict[str, int], *, zipped: bool = True
) -> None:
    """Raise `ValueError` for an axis the site lacks, ranks and lengths that do not fit together."""
    selectors = {SELECTS[axis]: axis for axis in axes}
    batch, faults, lists = sizes["batch"], [], {}
    for field, index in where.given.items():
        shape = jnp.shape(index)
        if field not in selectors:
            faults.append(f"site {site!r} has no axis {field!r}; its axes are {', '.join(selectors)}")
        elif index.dtype == bool:
            n = sizes[selectors[field]]
            per_example = field not in ("layer", "batch")
            if shape != (n,) and not (per_example and shape == (batch, n)):
                faults.append(
                    f"a mask over {field!r} must have shape ({n},){f' or ({batch}, {n})' if per_example else ''}, given {shape}"
                )
        elif len(shape) > (1 if field == "batch" else 2) or 0 in shape:
            faults.append(
                f"{field!r} must be one index, a list [k] or a list per example [batch, k], given shape {shape}"
            )
        elif len(shape) == 2 and shape[0] != batch:
            faults.append(f"{field!r} has indices for {shape[0]} examples, the batch has {batch}")
        elif shape:
            lists[field] = shape[-1]
    if zipped and len({k for k in lists.values() if k > 1}) > 1:
        faults.append(
            f"lists on several axes are zipped and must be equally long, given {lists}; products are mijax.grid"
        )
    if faults:
        raise ValueError("; ".join(faults))


def out_of_range(index: Any, length: Any) -> Any:
    """Which indices do not exist on an axis of `length`: an integer, or `[batch]` lengths of prompts.

    NumPy arrays give a NumPy array, so that what is known on the host is checked there.
    """
    if index.dtype == bool:
        return np.zeros((), bool)
    if np.ndim(length):
        length, index = length[:, None], index if index.ndim == 2 else index.reshape(1, -1)
    return (index >= length) | (index < -length)


def check_range(where: Where, site: str, lengths: dict[str, Any]) -> None:
    """Raise `ValueError` for indices that do not exist, as far as indices and lengths are known."""
    for field, index in where.given.items():
        if not (is_concrete(index) and is_concrete(lengths[field])):
            continue
        index, length = np.asarray(index), np.asarray(lengths[field])
        bad = np.argwhere(out_of_range(index, length))
        if len(bad):
            place = tuple(bad[0])
            wide = (
                index
                if index.ndim == 2 or not length.ndim
                else np.broadcast_to(index.reshape(1, -1), (len(length), index.size))
            )
            size, whose = (length[place[0]], f" of example {place[0]}") if length.ndim else (length, "")
            raise ValueError(
                f"{field}={wide[place]} is out of range at site {site!r}: the {field} axis{whose} has {size} entries"
            )


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


def narrow(x: Array, where: Where, axes: Sequence[str], known: dict[str, Axis]) -> Array:
    """Keep of `x` (inside one layer) the entries that `where` names, axis by axis; no axis is dropped."""
    for axis in sorted(axes, key=lambda axis: axis == "batch"):  # last: positions are known for the whole batch
        i = axes.index(axis)
        index = getattr(where, SELECTS[axis])
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
    return tuple(size(given[SELECTS[a]]) if SELECTS[a] in given else n for a, n in zip(axes, shape))
