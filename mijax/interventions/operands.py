"""Which axes of its site an operand has, from its rank and sizes or named by the user; operands with all axes."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mijax._types import Array
from mijax.interventions.edits import Edit
from mijax.model.sites import Site, field_of


def canonical(edit: Edit, site: Site, stacked: Any = None) -> Edit:
    """The edit with operands that have all axes of the site, and bases that have the site's axes of layers and heads.

    Args:
        edit: an edit that `check_shapes` accepts.
        site: the site that it acts at.
        stacked: a pytree of booleans of the structure of the edit, which marks arrays with an axis of choices in
            front; this axis stays in front. `None` where no array has one.

    Returns:
        The edit, with axes of size 1 where an array had none, and `axes=None`.
    """
    marked = lambda name: bool(stacked is not None and getattr(stacked, name))
    full = {name: in_full(getattr(edit, name), name, edit.axes, site, marked(name)) for name in edit.operands}
    full |= {name: basis_in_full(getattr(edit, name), site, marked(name)) for name in edit.bases}
    for name, value in full.items():
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit if edit.axes is None else dataclasses.replace(edit, axes=None)


def check_shapes(edit: Edit, site: Site, shape: tuple[int, ...]) -> None:
    """Check that the operands and bases of an edit fit a site, in one way only.

    Args:
        edit: the edit.
        site: the site that it acts at.
        shape: the shape of the site.

    Raises:
        ValueError: for an operand or a basis that does not broadcast to the site, or does so in two ways.
    """
    kind = type(edit).__name__
    for name in edit.operands:
        value = getattr(edit, name)
        if edit.axes is not None:
            value = in_full(value, name, edit.axes, site)
        check_operand(jnp.shape(value), f"{kind}'s {name}", site, shape)
    for name in edit.bases:
        check_basis(jnp.shape(getattr(edit, name)), kind if not site.has_vectors else f"{kind}'s {name}", site, shape)


def in_full(
    value: Any, operand: str, names: Sequence[str] | None, site: Site, stacked: bool = False
) -> Array | np.ndarray:
    """An operand with one axis for each axis of the site, of size 1 where the operand has no such axis.

    Args:
        value: the operand, an array of at most the site's rank (besides the axis of choices).
        operand: its name, for errors.
        names: the names of the operand's axes, as the user gave them; `None` for the last axes of the site.
        site: the site that the operand acts at.
        stacked: whether the operand has an axis of choices in front, which stays in front.

    Returns:
        The operand, `[*site.axes]`, behind the axis of choices where `stacked`.

    Raises:
        ValueError: for axes that the site lacks, or whose number is not the rank of the operand.
    """
    lead, shape = jnp.shape(value)[:stacked], jnp.shape(value)[stacked:]
    if names is None or not shape:
        return value.reshape(*lead, *(1,) * (len(site.axes) - len(shape)), *shape)
    axis_of = {name: axis for axis in site.axes for name in (axis, field_of(axis))}
    axes = [axis_of.get(name) for name in names]
    if None in axes or len(set(axes)) < len(axes):
        raise ValueError(
            f"axes={tuple(names)} must be different axes of site {site.name!r}, some of {', '.join(axis_of)}"
        )
    if len(shape) != len(axes):
        raise ValueError(f"axes={tuple(names)} are {len(axes)}, the {operand} at site {site.name!r} has shape {shape}")
    order = sorted(range(len(axes)), key=lambda i: site.axes.index(axes[i]))
    sizes = {axes[i]: shape[i] for i in order}
    moved = value.transpose([*range(stacked), *(i + stacked for i in order)])
    return moved.reshape(*lead, *(sizes.get(axis, 1) for axis in site.axes))


def basis_in_full(basis: Any, site: Site, stacked: bool = False) -> Array | np.ndarray:
    """A basis with the layer and head axes of the site in front of its rows, of size 1 where the basis has none.

    Args:
        basis: `[k, unit]`, `[layer, k, unit]`, `[head, k, unit]` or `[layer, head, k, unit]`, as checked by
            `check_basis`.
        site: the site that the basis acts at.
        stacked: whether the basis has an axis of choices in front, which stays in front.

    Returns:
        The basis, `[layer, head, k, unit]` with those of the two axes that the site has, behind the axis of choices
        where `stacked`.
    """
    lead, (*sizes, k, unit) = jnp.shape(basis)[:stacked], jnp.shape(basis)[stacked:]
    lead_axes = [axis for axis in ("layer", site.head_axis) if axis in site.axes]
    if len(sizes) == 1 and len(lead_axes) == 2:  # `check_basis` made sure that it fits only layers or only heads
        sizes = [sizes[0], 1] if sizes[0] == site.sizes["layer"] else [1, sizes[0]]
    return basis.reshape(*lead, *(1,) * (len(lead_axes) - len(sizes)), *sizes, k, unit)


def check_basis(dims: tuple[int, ...], what: str, site: Site, shape: tuple[int, ...]) -> None:
    """Check that the shape of a basis fits a site, in one way only.

    Args:
        dims: the shape of the basis.
        what: its name, for errors.
        site: the site that the basis acts at.
        shape: the shape of the site.

    Raises:
        ValueError: for a basis that does not fit the site, one at a site without vectors, or one that could be one
            per layer or one per head.
    """
    expected = f"the shape of site {site.name!r}, {' '.join(site.axes)} = {shape}"
    if not site.has_vectors:
        raise ValueError(f"{what} needs a site of vectors; the last axis of {expected} is not one")
    sizes, lead = dict(zip(site.axes, shape)), dims[:-2]
    lead_axes = [axis for axis in ("layer", site.head_axis) if axis in sizes]
    fits = [axis for axis in lead_axes if lead == (sizes[axis],)]
    full = len(lead) == len(lead_axes) and all(n in (1, sizes[axis]) for n, axis in zip(lead, lead_axes))
    ways = " or ".join(["[k, unit]", *(f"[{axis}, k, unit]" for axis in lead_axes)])
    if dims[-1] != shape[-1] or not (lead == () or fits or full):
        many = (
            f", {ways}, or [layer, head, k, unit]"
            if len(lead_axes) == 2
            else " (or one per layer)"
            if lead_axes
            else ""
        )
        raise ValueError(f"{what} has shape {dims}, expected [k, {shape[-1]}]{many} for {expected}")
    if len(fits) == 2:
        raise ValueError(
            f"{what} has shape {dims}, which could be one per layer or one per head of {expected}: give it as"
            f" [{sizes['layer']}, 1, ...] or [1, {sizes[lead_axes[1]]}, ...]"
        )


def check_operand(dims: tuple[int, ...], what: str, site: Site, shape: tuple[int, ...]) -> None:
    """Check that the shape of an operand broadcasts to a site, in one way only.

    At a site of vectors the last axis of the operand is that of the vectors. An axis of size 1 could be any axis,
    which makes no difference.

    Args:
        dims: the shape of the operand.
        what: its name, for errors.
        site: the site that the operand acts at.
        shape: the shape of the site.

    Raises:
        ValueError: for an operand that does not broadcast to the site, or whose axes could be different axes of the
            site.
    """
    axes = site.axes
    expected = f"the shape of site {site.name!r}, {' '.join(axes)} = {shape}"
    fits = len(dims) <= len(shape) and all(n in (1, m) for n, m in zip(dims[::-1], shape[::-1]))
    readings = _readings(dims, site, shape) if len(dims) < len(shape) else []
    as_text = lambda reading: f"axes=({', '.join(repr(field_of(axis)) for axis in reading)}{',' * (len(reading) == 1)})"
    if not fits:
        hint = f" (it would with {' or '.join(map(as_text, readings))})" if readings else ""
        raise ValueError(f"{what} has shape {dims}, which does not broadcast to {expected}{hint}")
    if len(readings) > 1:
        raise ValueError(
            f"{what} has shape {dims}, which fits {expected} in {len(readings)} ways: say which is meant, "
            + " or ".join(map(as_text, readings))
        )


def _readings(operand_shape: tuple[int, ...], site: Site, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The axes that an operand of lower rank could have, in the site's order.

    Readings that differ only in which axes the operand's axes of size 1 are count once.
    """
    axes, sizes = site.axes, dict(zip(site.axes, shape))
    of_vectors = site.has_vectors and bool(operand_shape)
    readings: dict[tuple, tuple[str, ...]] = {}
    for reading in itertools.combinations(axes, len(operand_shape)):
        fits = all(n in (1, sizes[axis]) for n, axis in zip(operand_shape, reading))
        if fits and not (of_vectors and reading[-1] != axes[-1]):
            wide = tuple((axis, n) for n, axis in zip(operand_shape, reading) if n > 1)
            readings.setdefault(wide, reading)
    return list(readings.values())
