"""Whether edits and captures fit a model and its inputs: errors where values are known, NaN inside a trace."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Int
from mijax.interventions.capturing import Captures
from mijax.interventions.edits import Edit, Edits
from mijax.interventions.operands import canonical, check_shapes
from mijax.interventions.where import Where, any_out_of_range, check_range, check_structure
from mijax.model.model import LayeredModel, Model
from mijax.model.sites import Site, field_of, site_of
from mijax.model.tokens import Inputs, is_concrete


def check(model: Model, tokens: Inputs, edits: Edits, captures: Captures) -> None:
    """Check inputs, edits and captures, as far as is possible before anything runs.

    Args:
        model: what is run.
        tokens: its inputs.
        edits: edits by site.
        captures: what to keep by site.

    Raises:
        ValueError: for inputs that the model does not take, and for what `check_places` refuses.
        TypeError: for what `check_places` refuses.
    """
    model.check_inputs(tokens)
    check_places(model, tokens, edits, captures)


def check_places(model: Model, tokens: Inputs, edits: Edits, captures: Captures) -> None:
    """Check that sites, places and operands fit inputs of the shape and padding of `tokens`.

    Args:
        model: what is run.
        tokens: inputs, of which ids are not read.
        edits: edits by site.
        captures: what to keep by site.

    Raises:
        ValueError: for a site that the model lacks, an axis that a site lacks, an index out of range, a layer that lacks the site, an operand
            that does not broadcast to its site, a capture narrowed by a mask or by different layers for each
            example.
        TypeError: for a place that is no `Where`.
    """
    for name in (*edits, *captures):
        site = site_of(name, model.sites)
        shape = site.shape(*tokens.ids.shape)
        sizes, fields = dict(zip(site.axes, shape)), field_lengths(site, tokens)
        for edit in edits.get(name, ()):
            if not isinstance(edit.where, Where):
                raise TypeError(
                    f"expected a mijax.Where at site {name!r}, given {type(edit.where).__name__}; a grid goes to mijax.sweep"
                )
            check_structure(edit.where, name, site.axes, sizes)
            check_range(edit.where, site, fields)
            check_shapes(edit, site, shape)
        captured = captures.get(name)
        if captured is not None:
            if captured.masks:
                raise ValueError(f"capture at site {name!r} must be narrowed by indices: a mask has no fixed size")
            if np.ndim(captured.layer) == 2:
                raise ValueError(
                    f"capture at site {name!r} keeps the same layers of every example: give them as one list"
                )
            check_structure(captured, name, site.axes, sizes, zipped=False)
            check_no_mask(captured, name, site.axes, sizes)
            check_range(captured, site, fields)


def check_selects(model: Model, tokens: Inputs, edits: Edits) -> None:
    """Check that edits select something, and say which value goes where: faults that would be silent.

    Args:
        model: what is run.
        tokens: its inputs.
        edits: edits by site, which `check_places` accepts.

    Raises:
        ValueError: where values are known, for an edit with an empty mask, or one that selects padding alone; for an
            operand with a value for each entry of an axis that `where` lists in another order; and for a mask of zeros
            and ones.
    """
    for name, site_edits in edits.items():
        for edit in site_edits:
            site = model.sites[name]
            check_order(edit, site)
            check_no_mask(edit.where, name, site.axes, dict(zip(site.axes, site.shape(*tokens.ids.shape))))
            what = f"{type(edit).__name__} at site {name!r}"
            for field, mask in edit.where.masks.items():
                if is_concrete(mask) and not np.asarray(mask).any():
                    raise ValueError(f"{what} selects nothing: its mask over {field!r} is all False")
                if (
                    field == "layer"
                    and site.layers
                    and is_concrete(mask)
                    and not np.asarray(mask)[list(site.layers)].any()
                ):
                    raise ValueError(
                        f"{what} selects nothing: the site is in layers {list(site.layers)}, which its mask leaves out"
                    )
            if is_concrete(tokens.mask):
                _selected(model.sites[name], np.asarray(tokens.mask), edit.where, what)


def check_sees(model: Model, site: Site, mask: Bool[np.ndarray, "batch pos"], where: Where, what: str) -> None:
    """Check that scores are of keys that some query can see.

    (A run does not check this, so that a loop over all pairs of positions is a sweep.)

    Args:
        model: what is run.
        site: the site of the scores.
        mask: `[batch, pos]`, True at real tokens.
        where: the places.
        what: what is at these places, for errors.

    Raises:
        ValueError: for places at padding alone, or scores of keys alone that come after the queries.
    """
    columns = _selected(site, mask, where, what)
    if not model.causal:
        return
    last_query = mask.shape[1] - 1 - columns["query"][:, ::-1].argmax(axis=1)
    sees = columns["query"].any(axis=1) & columns["key"].any(axis=1) & (columns["key"].argmax(axis=1) <= last_query)
    if not sees.any():
        raise ValueError(f"{what} never acts: its queries come before its keys, which they cannot see")


def _selected(site: Site, mask: Bool[np.ndarray, "batch pos"], where: Where, what: str) -> dict[str, np.ndarray]:
    """The selected columns along each axis of positions, `[batch, pos]`; `ValueError` where there are none."""
    columns = {}
    for field in map(field_of, site.position_axes):
        selected = selected_columns(where, field, mask)
        columns[field] = mask if selected is None else selected
        columns[field] = columns[field] & _examples(where, len(mask))[:, None]
        if not columns[field].any():
            raise ValueError(
                f"{what} selects nothing: {field!r} is at padding alone, or in examples that it leaves out"
            )
    return columns


def _examples(where: Where, batch: int) -> Bool[np.ndarray, " batch"]:
    """The examples that are selected; all where that is known only inside a trace."""
    index = where.batch
    if index is None or not is_concrete(index):
        return np.ones(batch, bool)
    index = np.asarray(index)
    return index if index.dtype == bool else np.isin(np.arange(batch), index % batch)


def check_order(edit: Edit, site: Site, stacked: Any = None) -> None:
    """Check that the entries of an operand cannot be meant in the order of the axis as well as of a list.

    Args:
        edit: the edit.
        site: its site.
        stacked: marks arrays with an axis of choices in front, as in `canonical`.

    Raises:
        ValueError: for an operand with a value for each entry of an axis that `where` lists in another order.
    """
    full, marked = canonical(edit, site, stacked), lambda tree, name: bool(tree is not None and getattr(tree, name))
    shapes = [jnp.shape(getattr(full, name))[marked(stacked, name) :] for name in edit.operands]
    for axis, *sizes in zip(site.axes, *shapes):
        field = field_of(axis)
        index = edit.where.given.get(field)
        by_choice = stacked is not None and marked(stacked.where, field)
        if index is None or index.dtype == bool or not is_concrete(index) or np.ndim(index) - by_choice == 0:
            continue
        rows = np.asarray(index).reshape(-1, np.shape(index)[-1])
        n = rows.shape[1]
        rows = np.where(rows < 0, rows + n, rows)
        if by_choice and n > 1:
            rows = rows[rows[:, -1] != rows[:, -2]]  # without a grid's shorter lists, which repeat their last index
        if n > 1 and n in sizes and (rows != np.arange(n)).any() and (rows < n).all():
            raise ValueError(
                f"{type(edit).__name__} at site {site.name!r} has {n} values along {axis!r}, and its Where lists {n} entries in another"
                " order: a value belongs to the entry of the axis, not of the list; list the entries in the order of the axis, or select them by a mask"
            )


def check_no_mask(
    where: Where, site: str, axes: Sequence[str], sizes: Mapping[str, int], stacked: Where | None = None
) -> None:
    """Check that a list of positions is no mask of zeros and ones, which would select positions 0 and 1.

    Lists that are zipped with others may be.

    Args:
        where: the places.
        site: the name of the site, for errors.
        axes: the axes of the site.
        sizes: the size of each axis.
        stacked: a `Where` of booleans that marks the fields with an axis of choices, of which shorter lists repeat
            their last index.

    Raises:
        ValueError: for a list of zeros and ones that is as long as the axis.
    """
    selectors = {field_of(axis): axis for axis in axes}
    by_choice = {field: stacked is not None and bool(getattr(stacked, field)) for field in where.given}
    lists = {
        field: np.asarray(index)
        for field, index in where.given.items()
        if is_concrete(index) and index.dtype != bool and np.ndim(index) > by_choice[field] and np.shape(index)[-1] > 1
    }
    for field in {"pos", "query", "key"} & set(lists):
        rows = lists[field].reshape(len(lists[field]) if by_choice[field] else 1, -1, lists[field].shape[-1])
        binary = np.isin(rows, (0, 1)).all(axis=-1)
        filled_up = (rows[..., -1] == rows[..., -2]) & by_choice[field]
        if (
            len(lists) == 1
            and rows.shape[-1] == sizes[selectors[field]] > 2
            and (binary.all() or (binary & ~filled_up).any())
        ):
            raise ValueError(
                f"{field!r} at site {site!r} holds only 0 and 1, one for every column: a mask is given as booleans,"
                " mask.astype(bool), and positions 0 and 1 as [0, 1]"
            )


def selected_columns(
    where: Where, field: str, mask: Bool[np.ndarray, "batch pos"]
) -> Bool[np.ndarray, "batch pos"] | None:
    """Find the columns of real tokens that an entry over positions selects.

    Args:
        where: the places, whose indices are in range.
        field: "pos", "query" or "key".
        mask: `[batch, pos]`, True at real tokens.

    Returns:
        `[batch, pos]`; `None` where the axis is taken whole, or the entry is known only inside a trace.
    """
    entry = where.only(field).given.get(field)
    if entry is None or not is_concrete(entry):
        return None
    entry = np.asarray(entry)
    if entry.dtype == bool:
        return mask & entry
    place = np.cumsum(mask, axis=1) - 1  # of each column among the real ones of its row
    entry = entry if entry.ndim == 2 else entry.reshape(1, -1)
    entry = np.where(entry < 0, entry + mask.sum(axis=1, keepdims=True), entry)
    return mask & (place[:, :, None] == entry[:, None]).any(axis=2)


def check_reached(model: LayeredModel, edits: Edits, captures: Captures) -> None:
    """Check that every edit acts on something that is captured, in a run that computes nothing above that.

    Args:
        model: what is run.
        edits: edits by site.
        captures: what is kept by site.

    Raises:
        ValueError: where layers are known, for an edit above all captures: it would silently never act.
    """
    order, n = list(model.sites), model.n_layers
    top = (-1, -1)
    for name, where in captures.items():
        layers = _layers(model.sites[name], where, n)
        if layers is None:
            return
        top = max(top, (int(np.max(layers)), order.index(name)))
    for name, site_edits in edits.items():
        for edit in site_edits:
            layers = _layers(model.sites[name], edit.where, n)
            if layers is not None and (int(np.min(layers)), order.index(name)) > top:
                raise ValueError(
                    f"{type(edit).__name__} at site {name!r} acts above all that is captured, which readout=False leaves out"
                )


def _layers(site: Site, where: Where | None, n: int) -> Int[np.ndarray, " k"] | None:
    """The layers of places at a site, -1 before all and `n` after all; `None` where they are known only in a trace."""
    if not site.is_inside:
        return np.array([-1 if site.part == "embedding" else n])
    having, index = np.arange(n) if site.layers is None else np.asarray(site.layers), None
    if where is not None and site.has_layer:
        index = where.layer
    if index is None:
        return having
    if not is_concrete(index):
        return None
    index = np.asarray(index)
    return np.intersect1d(np.flatnonzero(index), having) if index.dtype == bool else index.reshape(-1) % n


def field_lengths(site: Site, tokens: Inputs) -> dict[str, Any]:
    """The number of entries that each field of `Where` indexes at a site.

    Args:
        site: the site.
        tokens: the inputs.

    Returns:
        The number by field; along positions the lengths of the prompts, `[batch]`.
    """
    sizes = zip(site.axes, site.shape(*tokens.ids.shape))
    return {field_of(axis): tokens.lengths if axis in site.position_axes else size for axis, size in sizes}


def faulty(model: Model, tokens: Inputs, edits: Edits, captures: Captures) -> Bool[Array, ""]:
    """Find, inside a trace, the faults that depend on values.

    Args:
        model: what is run.
        tokens: its inputs.
        edits: edits by site.
        captures: what to keep by site.

    Returns:
        Whether an index is out of range, or an input is one that the model does not take.
    """
    bad = model.bad_inputs(tokens)
    for name in (*edits, *captures):
        fields = field_lengths(model.sites[name], tokens)
        wheres = [edit.where for edit in edits.get(name, ())]
        for where in (*wheres, captures.get(name) or Where()):
            bad = bad | any_out_of_range(where, model.sites[name], fields)
    return bad
