"""Which layers, columns and examples the places of a grid's cells reach, computed on the host.

In this module a `Where` has a leading axis of choices at the fields that `stacked` marks: one entry for each place
that the cells choose from.
"""

from typing import Any

import numpy as np

from mijax._types import Bool, Int
from mijax.interventions.where import Where
from mijax.model.sites import Site

Examples = Int[np.ndarray, " k"]


def first_half(where: Where, stacked: Any, site: Site, has_halves: bool) -> Int[np.ndarray, " choice_or_1"]:
    """The half-layer at which each choice begins to act: half-layers 0 and 1 are those of the first layer.

    Args:
        where: the places, with an axis of choices at the `stacked` fields.
        stacked: a `Where` of booleans that marks the fields with an axis of choices.
        site: the site at which the places are.
        has_halves: whether the layers of the model have two halves that run one after the other.

    Returns:
        `[choice]` half-layers; `[1]` where all choices share one.
    """
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
    """The first column of each example that each choice can change.

    Args:
        where: the places, with an axis of choices at the `stacked` fields.
        stacked: a `Where` of booleans that marks the fields with an axis of choices.
        site: the site at which the places are.
        mask: `[batch, pos]`, True at real tokens.
        causal: whether the model is causal; otherwise every change reaches column 0.

    Returns:
        `[choice, batch]` columns; the number of columns where a choice changes nothing in an example. The first
        axis has size 1 where all choices share the columns.
    """
    batch, n = mask.shape
    first, fields = np.zeros((1, batch), np.int32), _by_choice(where, stacked)
    for field in site.seen_from if causal else ():
        if field in fields:
            first = np.maximum(first, first_column(fields[field], mask))
    return np.where(_examples(fields["batch"], batch), first, n) if "batch" in fields else first


def first_column(index: np.ndarray, mask: Bool[np.ndarray, "batch pos"]) -> Int[np.ndarray, "choice batch"]:
    """The first column among the positions that an entry of `Where` selects.

    Args:
        index: the entry with an axis of choices in front: positions `[choice]`, `[choice, k]` or
            `[choice, batch, k]`, or a mask over columns, `[choice, pos]` or `[choice, batch, pos]`.
        mask: `[batch, pos]`, True at real tokens.

    Returns:
        `[choice, batch]` columns; the number of columns where a mask selects none.

    >>> first_column(np.array([0, -1]), np.array([[False, True, True]])).tolist()
    [[1], [2]]
    """
    batch, n = mask.shape
    if index.dtype == bool:  # over columns
        selected = np.broadcast_to(index[:, None] if index.ndim == 2 else index, (len(index), batch, n))
        return np.where(selected.any(axis=2), selected.argmax(axis=2), n)
    lengths = mask.sum(axis=1)
    index = index.reshape(len(index), 1, -1) if index.ndim < 3 else index
    earliest = np.where(index < 0, index + lengths[:, None], index).min(axis=2)  # [choice, batch]
    real = np.argsort(~mask, axis=1, kind="stable")  # the columns of real tokens come first
    return real[np.arange(batch), np.clip(earliest, 0, lengths - 1)]


def moving_fields(where: Where, stacked: Any) -> dict[str, np.ndarray]:
    """Find the fields of a `Where` that differ between choices.

    Args:
        where: the places, with an axis of choices at the `stacked` fields.
        stacked: a `Where` of booleans that marks the fields with an axis of choices.

    Returns:
        Their entries by field, with the axis of choices in front.
    """
    return {field: np.asarray(index) for field, index in where.given.items() if getattr(stacked, field)}


def together(where: Where, stacked: Any) -> Where:
    """Collect the indices of all choices in one `Where`, axis by axis: what a check of ranges reads.

    The lists of different axes do not belong together entry by entry. Masks and fields that all choices share are
    left out.

    Args:
        where: the places, with an axis of choices at the `stacked` fields.
        stacked: a `Where` of booleans that marks the fields with an axis of choices.

    Returns:
        A `Where` without an axis of choices: `[k]` indices, `[batch, k]` where they differ between examples.
    """
    fields = {}
    for field, index in moving_fields(where, stacked).items():
        if index.dtype != bool:
            last = np.moveaxis(index, 0, -1)
            fields[field] = last.reshape(len(last), -1) if index.ndim == 3 else index.reshape(-1)
    return Where(**fields)


def zips_examples(where: Where, stacked: Any) -> bool:
    """Tell whether a list of examples is zipped, entry by entry, with lists on other axes.

    Args:
        where: the places, with an axis of choices at the `stacked` fields.
        stacked: a `Where` of booleans that marks the fields with an axis of choices.

    Returns:
        Whether `batch` and another field have lists of more than one index.
    """
    lists = {f for f, i in _by_choice(where, stacked).items() if i.dtype != bool and i.ndim > 1 and i.shape[-1] > 1}
    return "batch" in lists and len(lists) > 1


def of_examples(where: Where, stacked: Any, examples: Examples, batch: int) -> Where:
    """The same places in a batch of some of the examples.

    Not defined where `zips_examples` is true.

    Args:
        where: the places, with an axis of choices at the `stacked` fields.
        stacked: a `Where` of booleans that marks the fields with an axis of choices.
        examples: `[k]` indices of the examples that the new batch holds.
        batch: the number of examples of the present batch.

    Returns:
        A `Where` whose `batch`, where it is narrowed, is a mask over the `k` examples.
    """
    fields = {}
    for field, entry in where.given.items():
        index, lead = np.asarray(entry), int(bool(getattr(stacked, field)))
        if field == "batch":  # becomes a mask over examples
            fields[field] = (_examples(index if lead else index[None], batch)[:, examples])[slice(None) if lead else 0]
        else:
            fields[field] = np.take(index, examples, axis=lead) if index.ndim - lead == 2 else index
    return Where(**fields)


def _by_choice(where: Where, stacked: Any) -> dict[str, np.ndarray]:
    """Every entry with an axis of choices in front, of size 1 where all choices share the entry."""
    lifted = lambda field, index: index if getattr(stacked, field) else index[None]
    return {field: lifted(field, np.asarray(index)) for field, index in where.given.items()}


def _examples(index: np.ndarray, batch: int) -> Bool[np.ndarray, "choice batch"]:
    """Which examples an entry for the batch axis selects, by choice."""
    if index.dtype == bool:
        return index
    return (index.reshape(len(index), -1, 1) % batch == np.arange(batch)).any(axis=1)
