"""Room for new tokens: more of it than is asked for, so that a few more new tokens are computed by the program of before."""

import dataclasses
from typing import Any

import equinox as eqx

from mijax.interventions.edits import Apply, Edit
from mijax.model.sites import Site
from mijax.model.tokens import Tokens, resized
from mijax.run import Edits

SMALLEST = 16
"""New tokens for which there is always room, where the context has it."""


def room_for(edits: Edits, sites: Any, width: int, count: int, n_ctx: int, captured: bool) -> int:
    """For how many new tokens a program is compiled, after prompts of `width` tokens, where `count` are asked for.

    The last new token is run only where something is `captured`; then results have an entry for each, and a function that
    edits attention sees all keys: there the room is as asked for. Elsewhere it is the next power of two.
    """
    sees_keys = any(
        isinstance(e, Apply) and "key" in sites[name].axes for name, several in edits.items() for e in several
    )
    wanted = count if captured or sees_keys else max(SMALLEST, 1 << (count - 1).bit_length())
    return min(wanted, n_ctx - width)


def with_columns(text: Tokens, total: int) -> Tokens:
    """A text with `total` columns: the further ones are padding."""
    return Tokens(resized(text.ids, 1, total, 0), resized(text.mask, 1, total, False))


def edits_with_columns(edits: Edits, sites: Any, before: int, total: int) -> Edits:
    """Edits in canonical form for a text of `before` columns, for one of `total`: they do nothing at the further ones."""
    fitted = lambda edit, site: _fitted(edit, site, before, total)
    return {name: tuple(fitted(edit, sites[name]) for edit in several) for name, several in edits.items()}


def _fitted(edit: Edit, site: Site, before: int, total: int) -> Edit:
    edit = dataclasses.replace(edit, where=edit.where.with_columns(total))
    for name in edit.operands:
        value = getattr(edit, name)
        for axis, size in enumerate(value.shape):
            if size == before and site.axes[axis] in site.position_axes:
                value = resized(value, axis, total, 0)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit
