"""The tap that keeps activations."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.interventions.selecting import known_axes, narrow, narrowed_shape
from mijax.interventions.where import Where
from mijax.model.tap import Tap


class Kept(NamedTuple):
    """What is kept: of this layer; of the layers that are asked for, in slots; at sites without layers."""

    layer: dict[str, Array]
    slots: dict[str, Array]
    outer: dict[str, Array]


class Capturing(Tap):
    """Keeps what stands at some sites, narrowed as asked: of all layers, or of those that a `Where` names.

    The result holds the activations by site, with the layers in front where the site has them.
    """

    users_code = False
    captures: dict[str, Where | None]
    n_layers: int = eqx.field(static=True)

    @property
    def sites(self):
        """Those that are captured."""
        return frozenset(self.captures)

    def init(self, sites, frame, zero):
        """Empty slots, and zeros where a site stands in some layer only."""
        batch, pos, keys = *frame.positions.shape, frame.keys.shape[1]
        slots = {}
        for name, wanted in self._layers().items():
            site = sites[name]
            shape = narrowed_shape(self.captures[name], site.inner_axes, site.shape(batch, pos, keys)[1:])
            slots[name] = jax.lax.full_like(zero, 0, shape=(wanted.size, *shape))
        inside = [sites[name] for name in self.captures if sites[name].is_inside and not sites[name].has_layer]
        shape = lambda site: narrowed_shape(self.captures[site.name], site.axes, site.shape(batch, pos, keys))
        return Kept({}, slots, {site.name: jax.lax.full_like(zero, 0, shape=shape(site)) for site in inside})

    def at(self, point, x, state):
        """Keep it; nothing is changed."""
        if point.copy:
            return x, state
        site, name = point.site, point.site.name
        where = self.captures[name]
        kept = x if where is None else narrow(x, where, site.inner_axes, known_axes(point, x.shape))
        if not site.has_layer:
            return x, state._replace(outer={**state.outer, name: kept})
        if name not in state.slots:
            return x, state._replace(layer={**state.layer, name: kept})
        assert point.layer is not None
        slot = first_slot(self._layers()[name], point.layer)
        filled = state.slots[name].at[slot].set(kept, mode="drop")
        return x, state._replace(slots={**state.slots, name: filled})

    def close(self, state):
        """Stack what is kept of every layer."""
        return state._replace(layer={}), state.layer

    def result(self, state, stacked):
        """All activations by site."""
        of_first = lambda wanted: jnp.argmax(wanted[:, None] == wanted[None, :], axis=1)  # a layer may be listed twice
        slots = {name: x[of_first(self._layers()[name])] for name, x in state.slots.items()}
        return {**stacked, **state.outer, **slots}

    def tiled(self, count: int) -> "Capturing":
        """The same in a batch that holds the examples `count` times, one batch after the other."""
        captures = {name: where and where.tiled(count) for name, where in self.captures.items()}
        return Capturing(captures, self.n_layers)

    def _layers(self) -> dict[str, Int[Array, " k"]]:
        """The layers of the sites of which not all are kept."""
        named = {name: Where() if where is None else where for name, where in self.captures.items()}
        layers = {name: where.layers(self.n_layers) for name, where in named.items()}
        return {name: wanted for name, wanted in layers.items() if wanted is not None}


def first_slot(wanted: Int[Array, " k"], layer: Int[Array, ""]) -> Int[Array, ""]:
    """Where a layer's activation goes: to its first place among the wanted ones, or out of range, where it is dropped."""
    hits = wanted == layer
    return jnp.where(jnp.any(hits), jnp.argmax(hits).astype(jnp.int32), wanted.size)
