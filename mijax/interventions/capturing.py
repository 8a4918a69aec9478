"""The tap that keeps activations."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.selecting import known_axes, narrow, narrowed_shape
from mijax.interventions.where import Where
from mijax.model.position import Frame
from mijax.model.sites import Site
from mijax.model.tap import Point, Tap

Capture: TypeAlias = Iterable[str] | Mapping[str, Where | None]
Captures: TypeAlias = dict[str, Where | None]


def as_captures(capture: Capture) -> Captures:
    """Read a `capture` argument.

    Args:
        capture: names of sites, or sites mapped to a `Where` or to `None`.

    Returns:
        The place to keep by site; `None` is all of the site.

    Raises:
        TypeError: for a bare string, or a site that is mapped to anything but a `Where` or `None`.
    """
    if isinstance(capture, str):
        raise TypeError(f"capture must be a sequence of sites, given the string {capture!r}; write ({capture!r},)")
    if not isinstance(capture, Mapping):
        return dict.fromkeys(capture)
    for site, where in capture.items():
        if not (where is None or isinstance(where, Where)):
            raise TypeError(
                f"capture must map sites to a mijax.Where or None, given {type(where).__name__} at site {site!r}"
            )
    return dict(capture)


class Kept(NamedTuple):
    """The state of `Capturing` during a run: activations by site.

    Attributes:
        layer: those of the current layer, at sites captured in all layers.
        slots: those of sites captured in the layers that a `Where` lists, one slot for each listed layer.
        outer: those of sites without a layer axis.
    """

    layer: dict[str, Array]
    slots: dict[str, Array]
    outer: dict[str, Array]


class Capturing(Tap):
    """Keeps the activations of some sites, narrowed by a `Where`: of all layers, or of those that the `Where` names.

    The result holds the activations by site, with the layers in front where the site has a layer axis.

    Args:
        captures: for each captured site, which entries are kept; `None` for the whole site.
        n_layers: the number of layers of the model.
    """

    users_code = False
    captures: dict[str, Where | None]
    n_layers: int = eqx.field(static=True)

    @property
    def sites(self) -> frozenset[str]:
        """The captured sites."""
        return frozenset(self.captures)

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> Kept:
        """Zeros in all slots, and at the sites that stand inside the layers without a layer axis."""
        batch, pos, keys = *frame.positions.shape, frame.keys.shape[1]
        slots = {}
        for name, layers in self._layers().items():
            site = sites[name]
            shape = narrowed_shape(self.captures[name], site.inner_axes, site.shape(batch, pos, keys)[1:])
            slots[name] = jax.lax.full_like(zero, 0, shape=(layers.size, *shape))
        inside = [sites[name] for name in self.captures if sites[name].is_inside and not sites[name].has_layer]
        shape = lambda site: narrowed_shape(self.captures[site.name], site.axes, site.shape(batch, pos, keys))
        return Kept({}, slots, {site.name: jax.lax.full_like(zero, 0, shape=shape(site)) for site in inside})

    def at(self, point: Point, x: Array, state: Kept) -> tuple[Array, Kept]:
        """Keep the activation, and return it unchanged."""
        if point.copy:
            return x, state
        site, name = point.site, point.site.name
        where = self.captures[name]
        activation = x if where is None else narrow(x, where, site.inner_axes, known_axes(point, x.shape))
        if not site.has_layer:
            return x, state._replace(outer={**state.outer, name: activation})
        if name not in state.slots:
            return x, state._replace(layer={**state.layer, name: activation})
        assert point.layer is not None
        slot = first_slot(self._layers()[name], point.layer)
        filled = state.slots[name].at[slot].set(activation, mode="drop")
        return x, state._replace(slots={**state.slots, name: filled})

    def close(self, state: Kept) -> tuple[Kept, dict[str, Array]]:
        """Hand over this layer's activations, to be stacked over layers."""
        return state._replace(layer={}), state.layer

    def result(self, state: Kept, stacked: dict[str, Array]) -> dict[str, Array]:
        """All activations by site."""
        of_first = lambda layers: jnp.argmax(layers[:, None] == layers[None, :], axis=1)  # a layer may be listed twice
        slots = {name: x[of_first(self._layers()[name])] for name, x in state.slots.items()}
        return {**stacked, **state.outer, **slots}

    def _layers(self) -> dict[str, Int[Array, " k"]]:
        """The listed layers of each site of which not all layers are kept."""
        wheres = {name: Where() if where is None else where for name, where in self.captures.items()}
        layers = {name: where.layers(self.n_layers) for name, where in wheres.items()}
        return {name: index for name, index in layers.items() if index is not None}


def first_slot(wanted: Int[Array, " k"], layer: Int[Array, ""]) -> Int[Array, ""]:
    """The slot in which a layer's activation is stored.

    Args:
        wanted: the layers that are captured, one for each slot.
        layer: the number of the current layer.

    Returns:
        The first index of `layer` in `wanted`; `k`, which is out of range so that the activation is dropped, where
        it is not in the list.
    """
    hits = wanted == layer
    return jnp.where(jnp.any(hits), jnp.argmax(hits).astype(jnp.int32), wanted.size)
