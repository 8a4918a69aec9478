"""Which axes of a site an operand's axes are: read off its rank and sizes, or told by the user; and the form with all of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mijax.model.sites import Site, field_of


def in_full(value: Any, operand: str, told: Sequence[str] | None, site: Site, stacked: bool = False) -> Any:
    """An operand with an axis for each of the site's, of size 1 where it has none; where `stacked`, behind one of choices.

    Its axes are `told`, or the last ones. Raises `ValueError` for axes that the site lacks, or that are not as many as the
    operand's.
    """
    lead, shape = jnp.shape(value)[:stacked], jnp.shape(value)[stacked:]
    if told is None or not shape:
        return value.reshape(*lead, *(1,) * (len(site.axes) - len(shape)), *shape)
    names = {name: axis for axis in site.axes for name in (axis, field_of(axis))}
    known = [names.get(name) for name in told]
    if None in known or len(set(known)) < len(known):
        raise ValueError(f"axes={tuple(told)} must be different axes of site {site.name!r}, some of {', '.join(names)}")
    if len(shape) != len(known):
        raise ValueError(f"axes={tuple(told)} are {len(known)}, the {operand} at site {site.name!r} has shape {shape}")
    order = sorted(range(len(known)), key=lambda i: site.axes.index(known[i]))
    sizes = {known[i]: shape[i] for i in order}
    moved = value.transpose([*range(stacked), *(i + stacked for i in order)])
    return moved.reshape(*lead, *(sizes.get(axis, 1) for axis in site.axes))


def basis_in_full(basis: Any, site: Site, stacked: bool = False) -> Any:
    """A basis with the axes that a site has of layers and of heads in front of its rows, behind one of choices where `stacked`."""
    lead, (*given, k, unit) = jnp.shape(basis)[:stacked], jnp.shape(basis)[stacked:]
    wanted = [axis for axis in ("layer", site.head_axis) if axis in site.axes]
    if (
        len(given) == 1 and len(wanted) == 2
    ):  # of the layers or of the heads: `check_basis` has seen to it that one alone fits
        given = [given[0], 1] if given[0] == site.sizes["layer"] else [1, given[0]]
    return basis.reshape(*lead, *(1,) * (len(wanted) - len(given)), *given, k, unit)


def check_basis(given: tuple[int, ...], what: str, site: Site, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` for a basis that does not fit a site of `shape`, or that could be one per layer or one per head."""
    expected = f"the shape of site {site.name!r}, {' '.join(site.axes)} = {shape}"
    if not site.has_vectors:
        raise ValueError(f"{what} needs a site of vectors; the last axis of {expected} is not one")
    sizes, lead = dict(zip(site.axes, shape)), given[:-2]
    wanted = [axis for axis in ("layer", site.head_axis) if axis in sizes]
    fits = [axis for axis in wanted if lead == (sizes[axis],)]
    full = len(lead) == len(wanted) and all(n in (1, sizes[axis]) for n, axis in zip(lead, wanted))
    ways = " or ".join(["[k, unit]", *(f"[{axis}, k, unit]" for axis in wanted)])
    if given[-1] != shape[-1] or not (lead == () or fits or full):
        many = f", {ways}, or [layer, head, k, unit]" if len(wanted) == 2 else " (or one per layer)" if wanted else ""
        raise ValueError(f"{what} has shape {given}, expected [k, {shape[-1]}]{many} for {expected}")
    if len(fits) == 2:
        raise ValueError(
            f"{what} has shape {given}, which could be one per layer or one per head of {expected}: give it as"
            f" [{sizes['layer']}, 1, ...] or [1, {sizes[wanted[1]]}, ...]"
        )


def check_operand(given: tuple[int, ...], what: str, site: Site, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` where an operand does not broadcast to a site's shape, or where its axes could be others.

    At a site of vectors the last axis is the vector's. Axes of size 1 could be any, and it makes no difference.
    """
    axes = site.axes
    expected = f"the shape of site {site.name!r}, {' '.join(axes)} = {shape}"
    fits = len(given) <= len(shape) and all(n in (1, m) for n, m in zip(given[::-1], shape[::-1]))
    readings = _readings(given, site, shape) if len(given) < len(shape) else []
    as_text = lambda reading: f"axes=({', '.join(repr(field_of(axis)) for axis in reading)}{',' * (len(reading) == 1)})"
    if not fits:
        hint = f" (it would with {' or '.join(map(as_text, readings))})" if readings else ""
        raise ValueError(f"{what} has shape {given}, which does not broadcast to {expected}{hint}")
    if len(readings) > 1:
        raise ValueError(
            f"{what} has shape {given}, which fits {expected} in {len(readings)} ways: say which is meant, "
            + " or ".join(map(as_text, readings))
        )


def _readings(given: tuple[int, ...], site: Site, shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The axes that an operand of lower rank could have, in the site's order; those that differ at axes of size 1 count once."""
    axes, sizes = site.axes, dict(zip(site.axes, shape))
    of_vectors = site.has_vectors and bool(given)
    readings: dict[tuple, tuple[str, ...]] = {}
    for reading in itertools.combinations(axes, len(given)):
        fits = all(n in (1, sizes[axis]) for n, axis in zip(given, reading))
        if fits and not (of_vectors and reading[-1] != axes[-1]):
            wide = tuple((axis, n) for n, axis in zip(given, reading) if n > 1)
            readings.setdefault(wide, reading)
    return list(readings.values())
