"""Users' functions among edits, converted for the shapes that a run calls them with."""

import inspect
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax.interventions.edits import Apply, Edit, Edits
from mijax.interventions.operands import canonical
from mijax.model.model import Model
from mijax.model.sites import Site
from mijax.model.tokens import Inputs
from mijax.programs.convert import Converted, convert, for_mesh_axes, name_of

SIGNATURE = "(x, site, layer, positions)"


def of_prompts(model: Model, tokens: Inputs, edits: Edits) -> Edits:
    """Prepare checked edits for a run of all of `tokens`.

    Args:
        model: what is run.
        tokens: its inputs.
        edits: edits that `check` accepts.

    Returns:
        The edits in canonical form, each of the user's functions converted to the program that it computes at this
        call.
    """
    batch, pos = tokens.ids.shape
    edits = in_canonical_form(model, edits)
    return convert_edits(model, edits, batch, pos, pos, (model, tokens))


def in_canonical_form(model: Model, edits: Edits) -> Edits:
    """Give the operands of checked edits an axis for each axis of their site.

    Args:
        model: whose sites are edited.
        edits: edits that `check` accepts.

    Returns:
        The edits by site.
    """
    return {
        name: tuple(canonical(edit, model.sites[name]) for edit in site_edits) for name, site_edits in edits.items()
    }


def has_functions(edits: Mapping[str, tuple[Edit, ...]]) -> bool:
    """Tell whether some edit is a function that is not converted yet.

    Args:
        edits: the edits of each site.

    Returns:
        Whether one is.
    """
    return any(_unconverted(edit) for site_edits in edits.values() for edit in site_edits)


def convert_edits(
    model: Model, edits: Mapping[str, tuple[Edit, ...]], batch: int, pos: int, keys: int, beside: Any
) -> dict[str, tuple[Edit, ...]]:
    """The edits with every function converted to a program (`programs.convert`).

    Inside `shard_map`, activations vary over the mesh axes over which the arrays of `beside` and of the edits vary.

    Args:
        model: the model whose sites are edited.
        edits: the edits of each site.
        batch: the number of prompts.
        pos: the number of tokens computed of each prompt.
        keys: the number of tokens that these attend to.
        beside: a pytree of the arrays that the run takes besides the edits.

    Returns:
        The edits by site; edits without functions are returned unchanged.

    Raises:
        ValueError: for a function whose result has another shape or dtype than its input.
        TypeError: for a function that takes other arguments.
        Exception: whatever a function itself raises, with a note that names its site.
    """
    if not has_functions(edits):
        return dict(edits)
    converted = lambda keywords: _converted(model, edits, (batch, pos, keys), keywords)
    return for_mesh_axes(converted, beside)


def _converted(model: Model, edits: Any, sizes: tuple[int, int, int], keywords: dict[str, Any]):
    shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, **keywords)
    positions = shaped(sizes[:2], jnp.int32)

    def of_site(edit: Edit, site: Site) -> Edit:
        if not isinstance(edit, Apply) or isinstance(edit.function, Converted):
            return edit
        x = shaped(site.shape(*sizes)[site.has_layer :], model.dtype)
        layer = shaped((), jnp.int32) if site.has_layer else None
        return eqx.tree_at(lambda e: e.function, edit, _function(edit.function, site, x, layer, positions))

    return {name: tuple(of_site(edit, model.sites[name]) for edit in site_edits) for name, site_edits in edits.items()}


def _function(function: Any, site: Site, x: jax.ShapeDtypeStruct, layer: Any, positions: Any) -> Converted:
    """One function as a program, checked for its signature and for the shape and dtype of its result."""
    _check_signature(function, site.name)
    try:
        converted = convert(function, x, site.name, layer, positions)
    except jax.errors.TracerBoolConversionError as error:
        error.add_note(
            f"in {name_of(function)}, the edit at site {site.name!r}: x, layer and positions are traced, so that no `if` can look at"
            " them; to edit one layer, give mijax.Apply(function, Where(layer=...))"
        )
        raise
    except Exception as error:
        error.add_note(f"in {name_of(function)}, the edit at site {site.name!r}, called with {SIGNATURE}")
        raise
    result = converted.out
    if jax.tree.structure(result) != jax.tree.structure(x) or (result.shape, result.dtype) != (x.shape, x.dtype):
        returned = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", result)
        raise ValueError(
            f"the callable edit at site {site.name!r} returned {returned}, expected {x.dtype}{list(x.shape)}"
        )
    return converted


def _check_signature(function: Any, site: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable that is not written in Python may have no signature to inspect
        return
    try:
        signature.bind(None, site, None, None)
    except TypeError as error:
        raise TypeError(
            f"an edit that is a function is called with {SIGNATURE}; {name_of(function)} at site {site!r} takes {signature}"
        ) from error


def _unconverted(edit: Edit) -> bool:
    return isinstance(edit, Apply) and not isinstance(edit.function, Converted)
