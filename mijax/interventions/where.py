"""Which part of a site: indices are data, so that moving an edit never recompiles."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Int
from mijax.model.sites import Site, field_of
from mijax.model.tokens import integers, is_concrete, resized

FIELDS = ("layer", "batch", "pos", "head", "expert", "unit", "query", "key")


def _index(value: Any) -> Any:
    if value is None or (isinstance(value, jax.Array) and value.dtype in (np.int32, np.bool_)):
        return value
    return integers(list(value) if isinstance(value, range) else value, f"an index (given {value!r})")


class Where(eqx.Module):
    """Which part of a site, one entry per axis; an axis left out is taken whole.

    An entry is `None` (all of the axis), indices, or a boolean mask over the axis. Indices are read by their rank:
    a 0-d entry is one index, `[k]` are several, `[batch, k]` several for each example. Lists on several axes are
    zipped, as in NumPy (for products there is `mijax.grid`). Negative indices count from the end. Whether indices
    are in range is known once the model and the prompts are: `run` and the drivers check it.

    Args:
        layer: layers.
        batch: examples.
        pos: positions. `pos`, `query` and `key` count real tokens, padding excluded; a boolean mask over them is
            over the columns of the batch, as the tokens' mask is.
        head: heads; on sites of keys and values, key/value heads.
        expert: experts of a mixture.
        unit: entries of the last axis of vectors: neurons, or dimensions of the stream or of a head.
        query: positions of queries, on sites of scores and patterns.
        key: positions of keys, on the same sites.

    Raises:
        TypeError: for indices that are not integers.
        ValueError: for ragged lists.

    >>> Where(layer=[0, 1], head=[3, 5])  # head 3 of layer 0, head 5 of layer 1
    Where(layer=[0, 1], head=[3, 5])
    """

    layer: Any = eqx.field(default=None, converter=_index)
    batch: Any = eqx.field(default=None, converter=_index)
    pos: Any = eqx.field(default=None, converter=_index)
    head: Any = eqx.field(default=None, converter=_index)
    expert: Any = eqx.field(default=None, converter=_index)
    unit: Any = eqx.field(default=None, converter=_index)
    query: Any = eqx.field(default=None, converter=_index)
    key: Any = eqx.field(default=None, converter=_index)

    @property
    def given(self) -> dict[str, Any]:
        """The entries of the axes that are narrowed, by field."""
        return {field: getattr(self, field) for field in FIELDS if getattr(self, field) is not None}

    def narrows(self, field: str) -> bool:
        """Whether an axis is not taken whole.

        Args:
            field: the field of the axis.
        """
        return getattr(self, field) is not None

    def only(self, *fields: str) -> "Where":
        """The same entries for some of the axes, with all others taken whole.

        Args:
            fields: the fields that stay.
        """
        return Where(**{field: index for field, index in self.given.items() if field in fields})

    def with_columns(self, n: int) -> "Where":
        """The same places in a batch of another number of columns.

        Args:
            n: the number of columns. Masks over tokens are cut to it, or extended by columns that they do not
                select.
        """
        columns = lambda field, index: field in ("pos", "query", "key") and index.dtype == bool
        fields = {f: resized(i, -1, n, False) if columns(f, i) else i for f, i in self.given.items()}
        return Where(**fields)

    def also(self, **fields: Any) -> "Where":
        """The same places with further axes narrowed.

        Args:
            fields: entries by field, of axes that are taken whole so far.
        """
        return Where(**self.given, **fields)

    def without(self, *fields: str) -> "Where":
        """The same entries with some of the axes taken whole.

        Args:
            fields: the fields that are left out.
        """
        return Where(**{field: index for field, index in self.given.items() if field not in fields})

    def layers(self, n: int) -> Int[Array, " k"] | None:
        """The numbers of the selected layers.

        Args:
            n: the number of layers of the model.

        Returns:
            `[k]` layers, counted from 0, in the order of the list; `None` where all are taken, or they are selected
            by a mask.
        """
        return _numbers(self.layer, n)

    def heads(self, n: int) -> Int[Array, " k"] | None:
        """The numbers of the heads that are selected for any example.

        Args:
            n: the number of heads of the site.

        Returns:
            `[k]` heads, counted from 0; `None` where all are taken, or they are selected by a mask.
        """
        return _numbers(self.head, n)

    @property
    def positions(self) -> dict[str, Any]:
        """The entries of the axes of tokens that are narrowed by indices, by field."""
        return {f: i for f, i in self.given.items() if f in ("pos", "query", "key") and i.dtype != bool}

    @property
    def masks(self) -> dict[str, Any]:
        """The entries of the axes that are narrowed by masks, by field."""
        return {field: index for field, index in self.given.items() if index.dtype == bool}

    def __repr__(self) -> str:
        show = lambda x: x.tolist() if isinstance(x, np.ndarray) else x
        return f"Where({', '.join(f'{k}={show(v)}' for k, v in self.given.items())})"


def _numbers(index: Any, n: int) -> Any:
    return None if index is None or index.dtype == bool else jnp.asarray(index).reshape(-1) % n


def check_structure(
    where: Where, site: str, axes: Sequence[str], sizes: dict[str, int], *, zipped: bool = True
) -> None:
    """Check that a `Where` fits the axes of a site, as far as shapes tell.

    Args:
        where: the places.
        site: the name of the site, for errors.
        axes: the axes of the site.
        sizes: the size of each axis, `batch` included.
        zipped: whether lists on several axes must be equally long.

    Raises:
        ValueError: for an axis that the site lacks, an index of the wrong rank, a mask of the wrong shape, and
            lists whose lengths do not fit together; all faults in one message.
    """
    selectors = {field_of(axis): axis for axis in axes}
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


def _out_of_range(index: Any, length: Any) -> Any:
    """Which indices do not exist on an axis of `length`: an integer, or `[batch]` lengths of prompts.

    NumPy arrays give a NumPy array, so that a check of values known on the host runs there.
    """
    if index.dtype == bool:
        return np.zeros((), bool)
    if np.ndim(length):
        length, index = length[:, None], index if index.ndim == 2 else index.reshape(1, -1)
    return (index >= length) | (index < -length)


def any_out_of_range(where: Where, site: Site, lengths: Mapping[str, Any]) -> Bool[Array, ""]:
    """Tell whether some index does not exist.

    Args:
        where: the places.
        site: their site.
        lengths: by field, the length of the axis: an integer, or `[batch]` lengths of prompts.

    Returns:
        `[]`, a boolean; a traced value inside a trace.
    """
    bad = jnp.zeros((), bool)
    for field, index in where.given.items():
        bad = bad | jnp.any(_out_of_range(index, lengths[field]))
        if field == "layer" and site.layers is not None and index.dtype != bool:
            bad = bad | ~jnp.all(jnp.isin(index % lengths[field], jnp.asarray(site.layers, jnp.int32)))
    return bad


def check_range(where: Where, site: Site, lengths: Mapping[str, Any]) -> None:
    """Check that indices exist, as far as indices and lengths are known outside a trace.

    Args:
        where: the places.
        site: their site.
        lengths: by field, the length of the axis: an integer, or `[batch]` lengths of prompts.

    Raises:
        ValueError: for the first index that is out of range, or the first layer that lacks the site.
    """
    for field, index in where.given.items():
        if not (is_concrete(index) and is_concrete(lengths[field])):
            continue
        index, length = np.asarray(index), np.asarray(lengths[field])
        bad = np.argwhere(_out_of_range(index, length))
        if len(bad):
            place = tuple(bad[0])
            wide = (
                index
                if index.ndim == 2 or not length.ndim
                else np.broadcast_to(index.reshape(1, -1), (len(length), index.size))
            )
            size, whose = (length[place[0]], f" of example {place[0]}") if length.ndim else (length, "")
            raise ValueError(
                f"{field}={wide[place]} is out of range at site {site.name!r}: the {field} axis{whose} has {size} entries"
            )
        if field == "layer" and site.layers is not None and index.dtype != bool:
            absent = np.setdiff1d(index % length, site.layers)
            if absent.size:
                raise ValueError(f"layer {absent[0]} has no site {site.name!r}, which is in layers {list(site.layers)}")
