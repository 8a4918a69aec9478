"""Which axes of a site an operand's axes are: read off its rank and sizes, or told by the user."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mijax.model.sites import SELECTS, SITES, UNITS


def site_axes(site: str) -> tuple[str, ...] | None:
    """The axes of a site; `None` for one that does not exist, which other checks tell."""
    return SITES[site].axes if site in SITES else None


def in_full(value: Any, operand: str, told: Sequence[str], site: str, axes: Sequence[str]) -> Any:
    """An operand whose axes are `told`, with an axis for each of the site's: of size 1 where it has none.

    A number stays as it is. Raises `ValueError` for axes that the site lacks, or that are not as many as the operand's.
    """
    names = {name: axis for axis in axes for name in (axis, SELECTS[axis])}
    known = [names.get(name) for name in told]
    if None in known or len(set(known)) < len(known):
        raise ValueError(f"axes={tuple(told)} must be different axes of site {site!r}, some of {', '.join(names)}")
    if jnp.ndim(value) == 0:
        return value
    if jnp.ndim(value) != len(known):
        raise ValueError(
            f"axes={tuple(told)} are {len(known)}, the {operand} at site {site!r} has shape {jnp.shape(value)}"
        )
    order = sorted(range(len(known)), key=lambda i: axes.index(known[i]))
    sizes = {known[i]: jnp.shape(value)[i] for i in order}
    return value.transpose(order).reshape([sizes.get(axis, 1) for axis in axes])


def check_operand(given: tuple[int, ...], what: str, site: str, axes: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raise `ValueError` where an operand does not broadcast to a site's shape, or where its axes could be others.

    At a site of vectors the last axis is the vector's. Axes of size 1 could be any, and it makes no difference.
    """
    expected = f"the shape of site {site!r}, {' '.join(axes)} = {shape}"
    fits = len(given) <= len(shape) and all(n in (1, m) for n, m in zip(given[::-1], shape[::-1]))
    readings = _readings(given, axes, shape) if len(given) < len(shape) else []
    as_text = lambda reading: f"axes=({', '.join(repr(SELECTS[axis]) for axis in reading)}{',' * (len(reading) == 1)})"
    if not fits:
        hint = f" (it would with {' or '.join(map(as_text, readings))})" if readings else ""
        raise ValueError(f"{what} has shape {given}, which does not broadcast to {expected}{hint}")
    if len(readings) > 1:
        raise ValueError(
            f"{what} has shape {given}, which fits {expected} in {len(readings)} ways: say which is meant, "
            + " or ".join(map(as_text, readings))
        )


def _readings(given: tuple[int, ...], axes: Sequence[str], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The axes that an operand of lower rank could have, in the site's order; those that differ at axes of size 1 count once."""
    sizes = dict(zip(axes, shape))
    of_vectors = axes[-1] in UNITS and bool(given)
    readings: dict[tuple, tuple[str, ...]] = {}
    for reading in itertools.combinations(axes, len(given)):
        fits = all(n in (1, sizes[axis]) for n, axis in zip(given, reading))
        if fits and not (of_vectors and reading[-1] != axes[-1]):
            wide = tuple((axis, n) for n, axis in zip(given, reading) if n > 1)
            readings.setdefault(wide, reading)
    return list(readings.values())
