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
"""The most bytes of the masks of cells over a site's entries that are computed at once."""


class Nodes(NamedTuple):
    """The cells of one site.

    Gates have the examples in front. Behind these, the gates of cells over axes have the site's other axes, with
    sizes `shape` and positions as columns; the gates of a grid's cells have one axis of cells.

    Attributes:
        site: the site.
        axes: the axes that the cells are over, with the index of each cell there; empty for a grid.
        shape: the sizes of the site's axes but batch, 1 where the cells are not over an axis.
        grid: the grid of cells, where one is given.
        members: which entries of the site each cell of a grid holds: for each example rows `(cell, index along each
            of the site's axes but batch)`, filled up with rows of a cell that does not exist.
    """

    site: Site
    axes: Mapping[str, Sequence[int]]
    shape: tuple[int, ...]
    grid: Grid | None = None
    members: Int[np.ndarray, "batch k n"] | None = None

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """The labels along each dimension of the result but batch."""
        return self.axes if self.grid is None else self.grid.labels

    @property
    def places(self) -> Mapping[str, Any]:
        """The indices along an axis of the site that each label stands for, by example where they differ."""
        return {
            dim: list(labels) if self.grid is None else self.grid.places(dim) for dim, labels in self.labels.items()
        }

    @property
    def size(self) -> int:
        """The number of cells."""
        return int(np.prod([len(labels) for labels in self.labels.values()], dtype=np.int64))

    def by_cell(self, gates: np.ndarray, tokens: Tokens) -> np.ndarray:
        """Arrange values of the gates' shape by the dimensions of the result.

        Args:
            gates: the values, examples in front.
            tokens: the base prompts.

        Returns:
            `[*dims, batch]`, with arbitrary values at positions that a prompt lacks.
        """
        if self.grid is not None:
            return gates.T.reshape(*(len(labels) for labels in self.labels.values()), -1)
        axis_of = {}
        for i, axis in enumerate(_without_batch(self.site), start=1):
            axis_of |= {axis: i, field_of(axis): i}
        for axis in (a for a in POSITIONS if a in self.axes):
            gates = in_positions(gates, tokens, axis_of[axis])
        order = [*(axis_of[dim] for dim in self.labels), 0]
        rest = [i for i in range(gates.ndim) if i not in order]
        by_dim = gates.transpose(*order, *rest).reshape([gates.shape[i] for i in order])
        for i, (dim, indices) in enumerate(self.axes.items()):
            by_dim = by_dim if dim in POSITIONS else np.take(by_dim, indices, axis=i)
        return by_dim

    def where(self, cells: Int[np.ndarray, " cell"], tokens: Tokens) -> Where:
        """The places of some cells.

        Args:
            cells: the row-major numbers of the cells.
            tokens: the base prompts.

        Returns:
            A `Where` with an axis of cells in front.
        """
        if self.grid is not None:
            return jax.tree.map(lambda index: index[cells], self.grid.where)
        return places_of(tokens, self.axes, cells)


def nodes_of(model: LayeredModel, tokens: Tokens, sites: Sites) -> dict[str, Nodes]:
    """The cells of every site.

    Args:
        model: the model.
        tokens: the base prompts.
        sites: names of sites; or sites mapped to the axes or the grid of their cells, `None` for all axes but
            units.

    Returns:
        The cells by site.

    Raises:
        ValueError: for an unknown site, an axis that a site lacks, and cells that no run would accept.
    """
    if isinstance(sites, str) or not isinstance(sites, Sequence | Mapping) or not sites:
        raise ValueError(
            f"sites must be some names of sites, or map these to what their cells are over, given {sites!r}"
        )
    over_by_site = dict(sites) if isinstance(sites, Mapping) else dict.fromkeys(sites)
    return {site: _nodes(model, tokens, site, over) for site, over in over_by_site.items()}


def _nodes(model: LayeredModel, tokens: Tokens, site: str, over: Over) -> Nodes:
    entry = site_of(site, model.sites)
    full = entry.shape(*tokens.ids.shape)
    if not isinstance(over, Grid):
        all_axes = tuple(axis for axis in entry.axes if axis != "batch" and field_of(axis) != "unit")
        axes = axes_of(model, tokens, site, all_axes if over is None else over)
        is_over = lambda axis: axis in axes or field_of(axis) in axes
        return Nodes(
            entry, axes, tuple(n if is_over(axis) else 1 for axis, n in zip(entry.axes, full) if axis != "batch")
        )
    check_cells(model, tokens, cells_of({site: Replace(0.0, over)}))
    is_over = lambda axis: axis == "batch" or over.where.narrows(field_of(axis))
    collapsed = tuple(n if is_over(axis) else 1 for axis, n in zip(entry.axes, full))
    members = _members(model, tokens, entry, over, collapsed)
    return Nodes(entry, {}, tuple(n for axis, n in zip(entry.axes, collapsed) if axis != "batch"), over, members)


def _members(model: LayeredModel, tokens: Tokens, site: Site, grid: Grid, shape: tuple[int, ...]) -> np.ndarray:
    """The entries of each cell, by example: `Nodes.members`."""
    batch = site.axes.index("batch")
    step = max(1, MASK_BYTES // int(np.prod(shape)))
    chunk = lambda begin: jax.tree.map(lambda index: index[begin : begin + step], grid.where)
    parts = []
    for begin in range(0, grid.size, step):
        mask = np.asarray(_masks(model, site, tokens, chunk(begin)))
        entries = np.argwhere(np.broadcast_to(mask, (len(mask), *shape)))
        parts.append(entries + np.eye(1, entries.shape[1], dtype=int) * begin)  # counts from the grid's first cell
    rows = np.concatenate(parts)
    example, rest = rows[:, 1 + batch], np.delete(rows, 1 + batch, axis=1)
    most = np.bincount(example, minlength=shape[batch]).max()
    members = np.zeros((shape[batch], most, rest.shape[1]), np.int32)
    members[:, :, 0] = grid.size
    for i in range(shape[batch]):
        entries = rest[example == i]
        members[i, : len(entries)] = entries
    return members


@eqx.filter_jit
def _masks(model: LayeredModel, site: Site, tokens: Tokens, where: Where) -> Bool[Array, "cell ..."]:
    """Which entries of a site each cell holds; axes that the grid does not narrow have size 1."""
    frame, inner = model.frame(tokens), site.shape(*tokens.ids.shape)[site.has_layer :]

    def cell(where: Where) -> Bool[Array, "..."]:
        def layer(index: Int[Array, ""] | None) -> Bool[Array, "..."]:
            return selection(where, site.inner_axes, known_axes(Point(site, index, frame), inner))

        if not site.has_layer:
            return layer(None)
        layers = site.sizes["layer"] if where.narrows("layer") else 1
        return jax.lax.map(layer, jnp.arange(layers, dtype=jnp.int32))

    return jax.lax.map(cell, where)


def gates_at_entries(
    sites: Mapping[str, Site],
    gates: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
    members: Mapping[str, Array],
) -> dict[str, Array]:
    """Spread the gates of cells over the entries of their sites.

    Args:
        sites: the model's table of sites.
        gates: the gates by site, examples in front.
        shapes: `Nodes.shape` by site.
        members: `Nodes.members`, of the sites whose cells are a grid's.

    Returns:
        By site, an array with the site's axes that broadcasts to its shape: at each entry the sum of the gates of
        the cells that hold it.
    """
    return {
        site: jnp.moveaxis(
            _spread(gate, shapes[site], members[site]) if site in members else gate, 0, sites[site].axes.index("batch")
        )
        for site, gate in gates.items()
    }


def _spread(gate: Float[Array, "batch cell"], shape: tuple[int, ...], members: Int[Array, "batch k n"]) -> Array:
    cell, *index = jnp.moveaxis(members, -1, 0)
    example = jnp.broadcast_to(jnp.arange(len(gate), dtype=jnp.int32)[:, None], cell.shape)
    values = gate.at[example, cell].get(mode="fill", fill_value=0)  # 0 for the cell that does not exist
    return jnp.zeros((len(gate), *shape), gate.dtype).at[(example, *index)].add(values)


def _without_batch(site: Site) -> tuple[str, ...]:
    return tuple(axis for axis in site.axes if axis != "batch")


def overlap(nodes: Nodes) -> bool:
    """Whether several cells hold one entry of the site.

    Args:
        nodes: the cells of a site.

    Returns:
        Whether some do, for any example.
    """
    if nodes.members is None or nodes.grid is None:
        return False
    real = nodes.members[:, :, 0] < nodes.grid.size
    return any(len(np.unique(rows[exist, 1:], axis=0)) < exist.sum() for rows, exist in zip(nodes.members, real))
