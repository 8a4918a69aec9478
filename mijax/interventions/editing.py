"""The tap that edits."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.selecting import Axis, known_axes, selection
from mijax.model.sites import Site
from mijax.model.tap import Point, Tap, all_heads


class Editing(Tap):
    """Applies the edits of each site, in their order, to what they select; their operands are `canonical`."""

    edits: dict[str, tuple[Edit, ...]]

    @property
    def sites(self):
        """Those that are edited."""
        return frozenset(self.edits)

    def at(self, point, x, state):
        """The edited activation."""
        for edit in self.edits[point.site.name]:
            x = edited(edit, point, x)
        return x, state

    def heads(self, site):
        """Those that the edits select."""
        every = all_heads(site)
        lists = [None if isinstance(edit, Apply) else edit.where.heads(every.size) for edit in self.edits[site.name]]
        named = [heads for heads in lists if heads is not None]
        return every if len(named) < len(lists) or sum(h.size for h in named) >= every.size else jnp.concatenate(named)

    def per_layer(self, sites):
        """Operands and bases with an axis of layers."""
        own, rest = {}, {}
        for name, several in self.edits.items():
            pairs = [_per_layer(edit, sites[name]) for edit in several]
            own[name], rest[name] = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
        return Editing(own), Editing(rest)


def _per_layer(edit: Edit, site: Site) -> tuple[Any, Any]:
    """What of an edit differs between layers, with an axis of them in front; and the rest, without one."""
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
    """What stands at a point after an edit, whose operands hold this layer's entries only."""
    axes = known_axes(point, x.shape)
    if isinstance(edit, Apply):
        new = edit(x, point.site.name, point.layer, point.frame.positions)
    else:
        new = _narrowed(edit, point.site.inner_axes, axes)(x)
    return jnp.where(selection(edit.where, point.site.inner_axes, axes), new, x)


def _narrowed(edit: Edit, axes: Sequence[str], known: Mapping[str, Axis]) -> Any:
    """The edit with its operands narrowed to the entries that are there, of axes that are not whole."""
    for name in (*edit.operands, *edit.bases):
        value = jnp.asarray(getattr(edit, name))
        own = axes if name in edit.operands else [axis for axis in axes if axis in ("head", "kv_head")]
        for i, axis in enumerate(own):
            entries = known[axis].entries
            if entries is not None and value.shape[i] > 1:
                value = jnp.take(value, entries, axis=i)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit
