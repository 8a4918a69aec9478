"""What the places of a grid's cells reach, known on the host: layers, columns, and which examples.

A `Where` here has, at the fields marked in `stacked`, a leading axis of choices in front of what it describes.
"""

from typing import Any

import numpy as np

from mijax._types import Bool, Int
from mijax.interventions.where import Where
from mijax.model.sites import Site

Examples = Int[np.ndarray, " k"]


def first_half(where: Where, stacked: Any, site: Site, has_halves: bool) -> Int[np.ndarray, " choice_or_1"]:
    """The half-layer at which each choice begins to act: 0 and 1 are those of the first layer."""
    n = site.sizes.get("layer", 0)
    if not site.has_layer and site.is_inside:
        return np.array([2 * min(site.layers or (0,)) + site.half])
    if not site.has_layer:
        return np.array([0 if site.part == "embedding" else max(0, 2 * n - 1 if has_halves else 2 * n - 2)])
    if "layer" not in where.given:
        return np.array([site.half])
    layer = _by_choice(where, stacked)["layer"]
    if layer.dtype == bool:
        layer = np.where(layer.any(axis=-1), np.argmax(layer, axis=-1), n)
    layer = np.where(layer < 0, layer + n, layer)
    return 2 * layer.reshape(len(layer), -1).min(axis=1) + site.half


def first_columns(
    where: Where, stacked: Any, site: Site, mask: Bool[np.ndarray, "batch pos"], causal: bool
) -> Int[np.ndarray, "choice_or_1 batch"]:
    """The first column of each example that each choice can change; the number of columns where it changes none."""
    batch, n = mask.shape
    first, fields = np.zeros((1, batch), np.int32), _by_choice(where, stacked)
    for field in site.seen_from if causal else ():
        if field in fields:
            first = np.maximum(first, first_column(fields[field], mask))
    return np.where(_examples(fields["batch"], batch), first, n) if "batch" in fields else first


def first_column(index: np.ndarray, mask: Bool[np.ndarray, "batch pos"]) -> Int[np.ndarray, "choice batch"]:
    """The first column among the positions that an entry of `Where`, choices in front, selects."""
    batch, n = mask.shape
    if index.dtype == bool:  # over columns
        some = np.broadcast_to(index[:, None] if index.ndim == 2 else index, (len(index), batch, n))
        return np.where(some.any(axis=2), some.argmax(axis=2), n)
    lengths = mask.sum(axis=1)
    index = index.reshape(len(index), 1, -1) if index.ndim < 3 else index
    earliest = np.where(index < 0, index + lengths[:, None], index).min(axis=2)  # [choice, batch]
    real = np.argsort(~mask, axis=1, kind="stable")  # the columns of real tokens come first
    return real[np.arange(batch), np.clip(earliest, 0, lengths - 1)]


def moving_fields(where: Where, stacked: Any) -> dict[str, np.ndarray]:
    """The entries that differ between choices."""
    return {field: np.asarray(index) for field, index in where.given.items() if getattr(stacked, field)}


def together(where: Where, stacked: Any) -> Where:
    """All choices' indices at once, as one `Where` for each axis alone: what a check of ranges reads."""
    fields = {}
    for field, index in moving_fields(where, stacked).items():
        if index.dtype != bool:
            last = np.moveaxis(index, 0, -1)
            fields[field] = last.reshape(len(last), -1) if index.ndim == 3 else index.reshape(-1)
    return Where(**fields)


def zips_examples(where: Where, stacked: Any) -> bool:
    """Whether indices of examples go with lists on other axes, entry by entry."""
    lists = {f for f, i in _by_choice(where, stacked).items() if i.dtype != bool and i.ndim > 1 and i.shape[-1] > 1}
    return "batch" in lists and len(lists) > 1


def of_examples(where: Where, stacked: Any, examples: Examples, batch: int) -> Where:
    """The same places in some of the `batch` examples; where it `zips_examples` there are none."""
    fields = {}
    for field, given in where.given.items():
        index, lead = np.asarray(given), int(bool(getattr(stacked, field)))
        if field == "batch":  # a mask of the examples
            fields[field] = (_examples(index if lead else index[None], batch)[:, examples])[slice(None) if lead else 0]
        else:
            fields[field] = np.take(index, examples, axis=lead) if index.ndim - lead == 2 else index
    return Where(**fields)


def _by_choice(where: Where, stacked: Any) -> dict[str, np.ndarray]:
    """Every entry with an axis of choices in front, of size 1 where all share one."""
    lifted = lambda field, index: index if getattr(stacked, field) else index[None]
    return {field: lifted(field, np.asarray(index)) for field, index in where.given.items()}


def _examples(index: np.ndarray, batch: int) -> Bool[np.ndarray, "choice batch"]:
    """Which examples an entry selects."""
    if index.dtype == bool:
        return index
    return (index.reshape(len(index), -1, 1) % batch == np.arange(batch)).any(axis=1)
