"""Whether edits and captures fit a model and its inputs: errors where values are known, NaN inside a trace."""

from typing import Any

import numpy as np

from mijax._types import Array, Bool
from mijax.interventions.capturing import Captures
from mijax.interventions.edits import Edits, check_shapes
from mijax.interventions.where import Where, any_out_of_range, check_range, check_structure
from mijax.model.model import Model
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
        ValueError: for a site that the model lacks, an axis that a site lacks, an index out of range, an operand
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
            check_range(edit.where, name, fields)
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
            check_range(captured, name, fields)


def check_selects(edits: Edits) -> None:
    """Check that edits select something.

    Args:
        edits: edits by site.

    Raises:
        ValueError: for an edit with an empty mask whose values are known: it would silently never act.
    """
    for name, site_edits in edits.items():
        for edit in site_edits:
            for field, mask in edit.where.masks.items():
                if is_concrete(mask) and not np.asarray(mask).any():
                    raise ValueError(
                        f"{type(edit).__name__} at site {name!r} selects nothing: its mask over {field!r} is all False"
                    )


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
            bad = bad | any_out_of_range(where, fields)
    return bad
