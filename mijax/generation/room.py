"""Room for new tokens: more columns than asked for, so that one compiled program serves many numbers of new tokens."""

import dataclasses
from typing import Any

import equinox as eqx

from mijax.interventions.edits import Apply, Edit, Edits
from mijax.model.sites import Site
from mijax.model.tokens import Tokens, resized

SMALLEST = 16
"""The least number of new tokens for which a program is compiled, where the context has room for them."""


def room_for(edits: Edits, sites: Any, width: int, count: int, n_ctx: int, captured: bool) -> int:
    """The number of new tokens for which a program is compiled: the next power of two.

    It is exactly `count` where something is captured, since results then have an entry for each new token, and
    where a function edits attention, since it sees all keys.

    Args:
        edits: edits by site.
        sites: the model's table of sites.
        width: the number of columns of the prompts.
        count: the number of new tokens asked for.
        n_ctx: the length of the context.
        captured: whether something is captured; the last new token is run only then.

    Returns:
        The number of new tokens, cut to the length of the context.
    """
    sees_keys = any(
        isinstance(e, Apply) and "key" in sites[name].axes for name, site_edits in edits.items() for e in site_edits
    )
    room = count if captured or sees_keys else max(SMALLEST, 1 << (count - 1).bit_length())
    return min(room, n_ctx - width)


def with_columns(text: Tokens, total: int) -> Tokens:
    """Extend a text by columns of padding.

    Args:
        text: the text.
        total: the number of columns of the result.

    Returns:
        The text with `total` columns.
    """
    return Tokens(resized(text.ids, 1, total, 0), resized(text.mask, 1, total, False))


def edits_with_columns(edits: Edits, sites: Any, before: int, total: int) -> Edits:
    """Extend edits to a text with more columns, at which they do nothing.

    Args:
        edits: edits by site in canonical form, for a text of `before` columns.
        sites: the model's table of sites.
        before: the number of columns of the text.
        total: the number of columns of the extended text.

    Returns:
        The edits by site, for a text of `total` columns.
    """
    fitted = lambda edit, site: _fitted(edit, site, before, total)
    return {name: tuple(fitted(edit, sites[name]) for edit in site_edits) for name, site_edits in edits.items()}


def _fitted(edit: Edit, site: Site, before: int, total: int) -> Edit:
    edit = dataclasses.replace(edit, where=edit.where.with_columns(total))
    for name in edit.operands:
        value = getattr(edit, name)
        for axis, size in enumerate(value.shape):
            if size == before and site.axes[axis] in site.position_axes:
                value = resized(value, axis, total, 0)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit
