"""The tap that edits."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.selecting import Axis, known_axes, selection
from mijax.model.sites import Site
from mijax.model.tap import Point, State, Tap, all_heads


class Editing(Tap):
    """Applies the edits of each site, in their order, to the entries that each edit selects.

    Args:
        edits: the edits of each site; their operands and bases are in the form that `edits.canonical` gives.
    """

    edits: dict[str, tuple[Edit, ...]]

    @property
    def sites(self) -> frozenset[str]:
        """The edited sites."""
        return frozenset(self.edits)

    def at(self, point: Point, x: Array, state: State) -> tuple[Array, State]:
        """The edited activation."""
        for edit in self.edits[point.site.name]:
            x = edited(edit, point, x)
        return x, state

    def heads(self, site: Site) -> Int[Array, " k"]:
        """The heads that the edits select."""
        full = all_heads(site)
        lists = [None if isinstance(edit, Apply) else edit.where.heads(full.size) for edit in self.edits[site.name]]
        selected = [heads for heads in lists if heads is not None]
        return (
            full
            if len(selected) < len(lists) or sum(h.size for h in selected) >= full.size
            else jnp.concatenate(selected)
        )

    def per_layer(self, sites: Mapping[str, Site]) -> tuple["Editing", "Editing"]:
        """Split off the operands and bases that have an axis of layers."""
        layered, rest = {}, {}
        for name, site_edits in self.edits.items():
            pairs = [_per_layer(edit, sites[name]) for edit in site_edits]
            layered[name], rest[name] = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
        return Editing(layered), Editing(rest)


def _per_layer(edit: Edit, site: Site) -> tuple[Any, Any]:
    """The arrays of an edit that differ between layers, with the layer axis in front; and the others, without one."""
    spec: Any = jax.tree.map(lambda _: False, edit)
    if not site.has_layer:
        return eqx.partition(edit, spec)
    for name in (*edit.operands, *edit.bases):
        at = lambda e, name=name: getattr(e, name)
        if len(at(edit)) > 1:
            spec = eqx.tree_at(at, spec, True)
        else:
            edit = eqx.tree_at(at, edit, at(edit)[0])
    return eqx.partition(edit, spec)


def edited(edit: Edit, point: Point, x: Array) -> Array:
    """The activation at a point after one edit.

    Args:
        edit: the edit; its operands and bases hold the current layer's entries only.
        point: the site, the layer and the positions of the tokens.
        x: the activation inside one layer, with the site's inner axes.

    Returns:
        The activation, in which the entries that `edit.where` selects are edited, with the shape of `x`.
    """
    axes = known_axes(point, x.shape)
    selected = selection(edit.where, point.site.inner_axes, axes)
    if isinstance(edit, Apply):
        return jnp.where(selected, edit(x, point.site.name, point.layer, point.frame.positions), x)
    edit, entries = _narrowed(edit, point.site.inner_axes, axes), x
    if not edit.bases and edit.where.given:
        # What is not selected goes into no product either: the derivative of one, 0 times inf, would be NaN.
        for name in edit.operands:
            operand = jnp.where(selected, getattr(edit, name), 0.0)
            edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, operand)
        entries = jnp.where(selected, x, 0.0)
    return jnp.where(selected, edit(entries), x)


def _narrowed(edit: Edit, axes: Sequence[str], known: Mapping[str, Axis]) -> Any:
    """The edit with operands and bases narrowed to the entries of the activation, on axes that it holds in part."""
    for name in (*edit.operands, *edit.bases):
        value = jnp.asarray(getattr(edit, name))
        value_axes = axes if name in edit.operands else [axis for axis in axes if axis in ("head", "kv_head")]
        for i, axis in enumerate(value_axes):
            entries = known[axis].entries
            if entries is not None and value.shape[i] > 1:
                value = jnp.take(value, entries, axis=i)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit
