"""The tap of one layer: applies the edits of each site and keeps what is captured."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.rows import cells_of, edit_rows, needs_whole_cells, of_layer
from mijax.interventions.where import Axis, Where, narrow, selection
from mijax.model.config import Config
from mijax.model.position import Frame
from mijax.model.sites import SITES, Site


class Tap:
    """Called by the forward pass at every site; a fresh one for each layer, and one around them.

    `edits` hold this layer's arrays only. `acts` fills with what is captured, narrowed as asked.
    Over packed rows, `stacked` marks those arrays of `edits` that have a leading axis of cells, and edits hold the arrays
    of all layers.
    """

    def __init__(
        self,
        config: Config,
        frame: Frame,
        edits: Mapping[str, Sequence[Edit]],
        capture: Mapping[str, Where | None],
        layer: Int[Array, ""] | None = None,
        stacked: Mapping[str, Sequence[Any]] | None = None,
    ):
        self.config, self.frame, self.edits, self.capture, self.layer = config, frame, edits, capture, layer
        self.stacked = stacked or {}
        self.acts: dict[str, Array] = {}

    def __call__(self, site: str, x: Array, heads: Int[Array, " k"] | None = None) -> Array:
        """Edit, then keep."""
        x = self._edit(site, x, heads)
        if site in self.capture:
            where = self.capture[site]
            axes = SITES[site].inner_axes
            self.acts[site] = x if where is None else narrow(x, where, axes, self._axes(SITES[site], x.shape))
        return x

    def edited(self, site: str, x: Array) -> Array:
        """Edit only."""
        return self._edit(site, x, None)

    def at(self, frame: Frame) -> "Tap":
        """The same for another frame; what is captured goes to the same place."""
        tap = Tap(self.config, frame, self.edits, self.capture, self.layer, self.stacked)
        tap.acts = self.acts
        return tap

    def heads(self, site: str) -> Int[Array, " k"] | None:
        """The heads that the edits of a per-head copy select; all where it is captured, or where cells differ."""
        edits = self.edits.get(site, ())
        if not edits and site not in self.capture:
            return None
        n = head_count(SITES[site], self.config)
        lists = [None if isinstance(edit, Apply) else edit.where.head for edit in edits]
        if site in self.capture or self.stacked or any(i is None or i.dtype == bool for i in lists):
            return jnp.arange(n, dtype=jnp.int32)
        heads = jnp.concatenate([jnp.asarray(i).reshape(-1) for i in lists])
        return jnp.arange(n, dtype=jnp.int32) if heads.size >= n else jnp.where(heads < 0, heads + n, heads)

    def _edit(self, name: str, x: Array, heads: Int[Array, " k"] | None) -> Array:
        site = SITES[name]
        if self.frame.rows is not None:
            return self._edit_cells(site, x)
        for edit in self.edits.get(name, ()):
            axes = self._axes(site, x.shape, heads)
            if isinstance(edit, Apply):
                new = edit(x, name, self.layer, self.frame.positions)
            else:
                new = _narrowed(edit, site.inner_axes, axes)(x)
            x = jnp.where(selection(edit.where, site.inner_axes, axes), new, x)
        return x

    def _edit_cells(self, site: Site, x: Array) -> Array:
        """Edit packed rows one by one, or cell by cell where an edit must see, or a site holds, all of a cell."""
        layer = self.layer if site.has_layer else None
        for edit, stacked in zip(self.edits.get(site.name, ()), self.stacked.get(site.name, ())):
            if "query" in site.axes or needs_whole_cells(edit, stacked):
                own = of_layer(edit, stacked, site, layer)
                moved, fixed = eqx.partition(own, stacked)
                alone = lambda moved, x, fixed=fixed: self._alone(eqx.combine(moved, fixed), site, x)
                x = jax.vmap(alone)(moved, cells_of(self.frame, x, site)).reshape(x.shape)
            else:
                x = edit_rows(self.config, self.frame, site, layer, edit, stacked, x)
        return x

    def _alone(self, edit: Edit, site: Site, x: Array) -> Array:
        """One cell's edit of its whole batch."""
        assert self.frame.whole is not None
        return Tap(self.config, self.frame.whole, {site.name: (edit,)}, {}, self.layer).edited(site.name, x)

    def _axes(self, site: Site, shape: tuple[int, ...], heads: Int[Array, " k"] | None = None) -> dict[str, Axis]:
        return known_axes(self.config, self.frame, site, shape, self.layer, heads)


def head_count(site: Site, config: Config) -> int:
    """How many heads the site's head axis has."""
    return config.n_kv_heads if "kv_head" in site.axes else config.n_heads


def known_axes(
    config: Config,
    frame: Frame,
    site: Site,
    shape: tuple[int, ...],
    layer: Int[Array, ""] | None,
    heads: Int[Array, " k"] | None = None,
) -> dict[str, Axis]:
    """What `Where` is compared with at a site of (inner) `shape`: every axis's labels, and the layer."""
    axes = {}
    for axis, n in zip(site.inner_axes, shape):
        if axis in ("pos", "query"):
            axes[axis] = Axis(frame.positions, frame.lengths, frame.columns)
        elif axis == "key":
            axes[axis] = Axis(frame.keys, frame.lengths)
        elif axis in ("head", "kv_head") and heads is not None:
            axes[axis] = Axis(heads, head_count(site, config), heads)
        else:
            axes[axis] = Axis(jnp.arange(n, dtype=jnp.int32), n)
    if layer is not None:
        axes["layer"] = Axis(layer[None], config.n_layers, layer[None])
    return axes


def _narrowed(edit: Edit, axes: Sequence[str], known: Mapping[str, Axis]) -> Any:
    """The edit with its operands narrowed to the entries that are there, of axes that are not whole."""
    for name in edit.operands:
        value = jnp.asarray(getattr(edit, name))
        for back, axis in enumerate(reversed(axes), start=1):
            entries = known[axis].entries
            if entries is not None and value.ndim >= back and value.shape[-back] > 1:
                value = jnp.take(value, entries, axis=-back)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit
