"""The cells of a site's grid as gates: one number for each cell and example."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Float, Int
from mijax.engine.axes import POSITIONS, axes_of, in_positions, places_of
from mijax.engine.cells import cells_of, check_cells
from mijax.engine.grid import Grid
from mijax.interventions.edits import Replace
from mijax.interventions.selecting import known_axes, selection
from mijax.interventions.where import Where
from mijax.model.model import LayeredModel
from mijax.model.sites import Site, field_of, site_of
from mijax.model.tap import Point
from mijax.model.tokens import Tokens

Over: TypeAlias = Sequence[str] | Grid | None
Sites: TypeAlias = Sequence[str] | Mapping[str, Over]


MASK_BYTES = 2**26
"""Of the masks that say which entries a cell holds, at once."""


class Nodes(NamedTuple):
    """The cells of one site.

    Gates have the examples in front. Behind, those of cells over axes have the site's other axes, collapsed to `shape`, positions
    being columns; those of a grid's cells are in a row, and `members[example]` lists which entries of the
    site each holds: `(cell, index along each of the site's axes but batch)`, filled up by a cell that does not exist.
    """

    site: Site
    axes: Mapping[str, int]
    shape: tuple[int, ...]
    grid: Grid | None = None
    members: Int[np.ndarray, "batch k n"] | None = None

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """Those of each dimension of the result, batch left out."""
        return {axis: range(n) for axis, n in self.axes.items()} if self.grid is None else self.grid.labels

    @property
    def places(self) -> Mapping[str, Any]:
        """What each label stands for: along an axis of the site its indices, those of each example where they differ."""
        return {dim: list(own) if self.grid is None else self.grid.places(dim) for dim, own in self.labels.items()}

    @property
    def size(self) -> int:
        """The number of cells."""
        return int(np.prod([len(own) for own in self.labels.values()], dtype=np.int64))

    def by_cell(self, gates: np.ndarray, tokens: Tokens) -> np.ndarray:
        """`[*dims, batch]` of what has the gates' shape; anything at positions that a prompt has not."""
        if self.grid is not None:
            return gates.T.reshape(*(len(own) for own in self.labels.values()), -1)
        place = {}
        for i, axis in enumerate(_without_batch(self.site), start=1):
            place |= {axis: i, field_of(axis): i}
        for axis in (a for a in POSITIONS if a in self.axes):
            gates = in_positions(gates, tokens, place[axis])
        order = [*(place[dim] for dim in self.labels), 0]
        rest = [i for i in range(gates.ndim) if i not in order]
        return gates.transpose(*order, *rest).reshape([gates.shape[i] for i in order])

    def where(self, cells: Int[np.ndarray, " cell"], tokens: Tokens) -> Where:
        """Some cells by their row-major numbers, stacked."""
        if self.grid is not None:
            return jax.tree.map(lambda index: index[cells], self.grid.where)
        return places_of(tokens, self.axes, cells)


def nodes_of(model: LayeredModel, tokens: Tokens, sites: Sites) -> dict[str, Nodes]:
    """The cells of every site; raises `ValueError` for what no run would take."""
    if isinstance(sites, str) or not isinstance(sites, Sequence | Mapping) or not sites:
        raise ValueError(
            f"sites must be some names of sites, or map these to what their cells are over, given {sites!r}"
        )
    given = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites)
    return {site: _nodes(model, tokens, site, over) for site, over in given.items()}


def _nodes(model: LayeredModel, tokens: Tokens, site: str, over: Over) -> Nodes:
    found = site_of(site, model.sites)
    full = found.shape(*tokens.ids.shape)
    if not isinstance(over, Grid):
        every = tuple(axis for axis in found.axes if axis != "batch" and field_of(axis) != "unit")
        axes = axes_of(model, tokens, site, every if over is None else over)
        kept = lambda axis: axis in axes or field_of(axis) in axes
        return Nodes(found, axes, tuple(n if kept(axis) else 1 for axis, n in zip(found.axes, full) if axis != "batch"))
    check_cells(model, tokens, cells_of({site: Replace(0.0, over)}))
    kept = lambda axis: axis == "batch" or over.where.narrows(field_of(axis))
    whole = tuple(n if kept(axis) else 1 for axis, n in zip(found.axes, full))
    members = _members(model, tokens, found, over, whole)
    return Nodes(found, {}, tuple(n for axis, n in zip(found.axes, whole) if axis != "batch"), over, members)


def _members(model: LayeredModel, tokens: Tokens, site: Site, grid: Grid, shape: tuple[int, ...]) -> np.ndarray:
    """The entries of each cell, by example."""
    batch = site.axes.index("batch")
    step = max(1, MASK_BYTES // int(np.prod(shape)))
    some = lambda begin: jax.tree.map(lambda index: index[begin : begin + step], grid.where)
    found = []
    for begin in range(0, grid.size, step):
        mask = np.asarray(_masks(model, site, tokens, some(begin)))
        own = np.argwhere(np.broadcast_to(mask, (len(mask), *shape)))
        found.append(own + np.eye(1, own.shape[1], dtype=int) * begin)
    every = np.concatenate(found)
    example, rest = every[:, 1 + batch], np.delete(every, 1 + batch, axis=1)
    most = np.bincount(example, minlength=shape[batch]).max()
    members = np.zeros((shape[batch], most, rest.shape[1]), np.int32)
    members[:, :, 0] = grid.size
    for i in range(shape[batch]):
        own = rest[example == i]
        members[i, : len(own)] = own
    return members


@eqx.filter_jit
def _masks(model: LayeredModel, site: Site, tokens: Tokens, where: Where) -> Bool[Array, "cell ..."]:
    """Which entries of a site, its axes collapsed that the grid does not narrow, each cell holds."""
    frame, inner = model.frame(tokens), site.shape(*tokens.ids.shape)[site.has_layer :]

    def cell(where: Where) -> Bool[Array, "..."]:
        def layer(index: Int[Array, ""] | None) -> Bool[Array, "..."]:
            return selection(where, site.inner_axes, known_axes(Point(site, index, frame), inner))

        if not site.has_layer:
            return layer(None)
        layers = site.sizes["layer"] if where.narrows("layer") else 1
        return jax.lax.map(layer, jnp.arange(layers, dtype=jnp.int32))

    return jax.lax.map(cell, where)


def spread(
    sites: Mapping[str, Site],
    gates: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    members: Mapping[str, Array],
) -> dict[str, Array]:
    """Gates by entry of each site, in the order of its axes: those of the cells that hold it, added up."""
    return {
        site: jnp.moveaxis(
            _spread(gate, shapes[site], members[site]) if site in members else gate, 0, sites[site].axes.index("batch")
        )
        for site, gate in gates.items()
    }


def _spread(gate: Float[Array, "batch cell"], shape: tuple[int, ...], members: Int[Array, "batch k n"]) -> Array:
    cell, *index = jnp.moveaxis(members, -1, 0)
    example = jnp.broadcast_to(jnp.arange(len(gate), dtype=jnp.int32)[:, None], cell.shape)
    own = gate.at[example, cell].get(mode="fill", fill_value=0)
    return jnp.zeros((len(gate), *shape), gate.dtype).at[(example, *index)].add(own)


def _without_batch(site: Site) -> tuple[str, ...]:
    return tuple(axis for axis in site.axes if axis != "batch")


def overlap(nodes: Nodes) -> bool:
    """Whether an entry of the site is in several cells."""
    if nodes.members is None or nodes.grid is None:
        return False
    real = nodes.members[:, :, 0] < nodes.grid.size
    return any(len(np.unique(own[there, 1:], axis=0)) < there.sum() for own, there in zip(nodes.members, real))
