"""The taps of packed rows: the tokens of many cells at once, edited and captured as each token's cell prescribes."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.capturing import first_slot
from mijax.interventions.editing import edited
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.selecting import known_axes, narrow
from mijax.interventions.where import Where
from mijax.model.position import Frame, Packed, Rows
from mijax.model.sites import Site
from mijax.model.tap import Point, Result, State, Tap


class EditingRows(Tap):
    """Applies edits to the tokens of each cell, as a run of this cell alone would.

    The rows are put back into the whole batches of their cells, edited there, and packed again.

    Args:
        edits: the edits of each site, with the arrays of all layers.
        stacked: for each edit, a pytree of booleans that marks its arrays with a leading axis of cells.
    """

    edits: dict[str, tuple[Edit, ...]]
    stacked: dict[str, tuple[Any, ...]]

    @property
    def sites(self) -> frozenset[str]:
        """The edited sites."""
        return frozenset(self.edits)

    def at(self, point: Point, x: Array, state: State) -> tuple[Array, State]:
        """The edited rows."""
        site, frame = point.site, point.frame
        assert isinstance(frame, Packed)
        whole, by_query = point._replace(frame=frame.whole), "query" in site.axes
        cells = _by_cell(frame.rows, x) if by_query else frame.rows.unpack(x)
        for edit, stacked in zip(self.edits[site.name], self.stacked[site.name]):
            by_cell, shared = eqx.partition(_of_layer(edit, stacked, point), stacked)
            edit_cell = lambda by_cell, x, shared=shared: edited(eqx.combine(by_cell, shared), whole, x)
            cells = jax.vmap(edit_cell)(by_cell, cells)
        return cells.reshape(x.shape) if by_query else frame.rows.pack(cells), state


class CapturingRows(Tap):
    """Keeps for each cell the activations that `Capturing` keeps for a run.

    A token that no row computes has the activation of the base run. The result holds the activations by site, with
    the cells in front.

    Args:
        captures: for each captured site, which entries are kept; `None` for the whole site.
        base: the base run's activations by site, in full.
        layered: the captured sites that have a layer axis.
        n_layers: the number of layers of the model.
    """

    captures: dict[str, Where | None]
    base: dict[str, Array]
    layered: frozenset[str] = eqx.field(static=True)
    n_layers: int = eqx.field(static=True)

    @property
    def sites(self) -> frozenset[str]:
        """The captured sites."""
        return frozenset(self.captures)

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> dict[str, Array]:
        """The base run's activations, once for each cell: the result of a cell that changes nothing."""
        assert isinstance(frame, Packed)
        state, cells = {}, frame.rows.place.shape[0]
        for name in self.captures:
            site, base = sites[name], self.base[name]
            keep = lambda x, site=site: self._narrowed(Point(site, None, frame.whole), x)
            narrowed = jax.vmap(keep)(base[self._layers(name)]) if site.has_layer else keep(base)
            axis = int(site.has_layer)
            state[name] = jnp.repeat(jnp.expand_dims(narrowed, axis), cells, axis=axis)
        return state

    def at(self, point: Point, x: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Keep the activation in every cell, and return it unchanged."""
        if point.copy:
            return x, state
        site, name, frame = point.site, point.site.name, point.frame
        assert isinstance(frame, Packed)
        unpack = frame.rows.unpack_queries if "query" in site.axes else frame.rows.unpack
        whole = point._replace(frame=frame.whole, heads=None)
        activation = jax.vmap(lambda x: self._narrowed(whole, x))(unpack(x, self.base[name]))
        if point.layer is not None:
            slot = first_slot(self._layers(name), point.layer)
            activation = state[name].at[slot].set(activation, mode="drop")
        return x, {**state, name: activation}

    def result(self, state: dict[str, Array], stacked: Result) -> dict[str, Array]:
        """The activations by site, with the cells in front."""
        of_first = lambda layers: jnp.argmax(layers[:, None] == layers[None, :], axis=1)  # a layer may be listed twice
        moved = lambda name: jnp.moveaxis(state[name][of_first(self._layers(name))], 1, 0)
        return {name: moved(name) if name in self.layered else state[name] for name in state}

    def per_layer(self, sites: Mapping[str, Site]) -> tuple["CapturingRows", "CapturingRows"]:
        """Split off the base run's activations at sites with a layer axis."""
        layered = {name: x if name in self.layered else None for name, x in self.base.items()}
        rest = {name: None if name in self.layered else x for name, x in self.base.items()}
        at = lambda tap: (tap.captures, tap.base)
        return eqx.tree_at(at, self, (None, layered)), eqx.tree_at(at, self, (self.captures, rest))

    def _layers(self, name: str) -> Int[Array, " k"]:
        """The captured layers of a site, one for each slot."""
        where = self.captures[name]
        layers = None if where is None else where.layers(self.n_layers)
        return jnp.arange(self.n_layers, dtype=jnp.int32) if layers is None else layers

    def _narrowed(self, point: Point, x: Array) -> Array:
        where = self.captures[point.site.name]
        return x if where is None else narrow(x, where, point.site.inner_axes, known_axes(point, x.shape))


def needs_whole_cells(edit: Edit, stacked: Any) -> bool:
    """Tell whether an edit must be given all tokens of a cell.

    A user's function may look at all tokens. A basis that differs between cells would be made orthonormal for each
    row rather than once for each cell.

    Args:
        edit: the edit.
        stacked: a pytree of booleans that marks the arrays of the edit that differ between cells.

    Returns:
        Whether it is a user's function, or has a basis that differs between cells.
    """
    return isinstance(edit, Apply) or any(getattr(stacked, name) for name in edit.bases)


def _of_layer(edit: Any, stacked: Any, point: Point) -> Any:
    """The edit with its operands and bases narrowed to the point's layer, and without their layer axis."""
    if point.layer is None:
        return edit
    for name in (*edit.operands, *edit.bases):
        leaf, axis = jnp.asarray(getattr(edit, name)), int(getattr(stacked, name))
        value = jnp.take(leaf, jnp.minimum(point.layer, leaf.shape[axis] - 1), axis=axis)
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit


def _by_cell(rows: Rows, scores: Array) -> Array:
    """Scores or patterns `[cell, batch, head, query, key]`, where every query of a cell has a slot."""
    return scores.reshape(*rows.place.shape[:2], *scores.shape[1:])
