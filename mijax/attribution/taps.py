"""The taps of attribution: of all runs at once for their values, and of the base run for its derivative."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mijax._types import Array, Float, Int, Scores
from mijax.attribution.recompute import keys_changed, queries_changed
from mijax.model.sites import Site
from mijax.model.tap import Point, Tap

Gates = Mapping[str, Array]
"""By site, an array that broadcasts to all of the site, layer axis included."""

RECOMPUTED = ("q", "k")
"""The sites whose gates may act through attention recomputed."""
KEPT = "kept"
"""The name of what is kept for the backward pass."""


class Path(NamedTuple):
    """What else is done to the base run.

    `opened`: gates may be other than zero (if not, they are there for their derivative alone). `inputs` moves each
    example's embeddings by that part towards the source's; a gate then adds the difference of the source run and the base run as
    it is. `dropped` is a layer of whose writes no gradient passes. `recompute`: a gate at `q` or `k` acts through the
    pattern that attention has with the source's query or key.
    """

    opened: bool = False
    inputs: Float[Array, " batch"] | None = None
    dropped: Int[Array, ""] | None = None
    recompute: bool = False


class Held(NamedTuple):
    """What stands in a layer: in the other runs by run and site, in the base run at its products, and by how much a gate
    moves each site."""

    others: Mapping[str, dict[str, Array]]
    products: dict[str, Array]
    changes: dict[str, Array]


@jax.custom_jvp
def known(computed: Array, value: Array) -> Array:
    """`value`, with the derivative of what gave it when it was `computed`: that is dead code, its derivative is not.

    A second derivative is one forwards of which one backwards is taken. (Partial evaluation, which a backward pass begins with,
    drops custom rules inside a scan: what differentiates its result sees a constant.)
    """
    del computed
    return value


@known.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return known(*primals), tangents[0]


class Gated(Tap):
    """What both taps have in common: the gates of one layer (or around the layers), and what else is done."""

    gates: Gates
    path: Path
    touched: frozenset[str] = eqx.field(static=True)

    @property
    def sites(self):
        """Those that `gated_sites` gives."""
        return self.touched

    def gate(self, site: str) -> Array | None:
        """The site's gate, where it moves the site itself."""
        return None if self.path.recompute and site in RECOMPUTED else self.gates.get(site)


def change(held: Held, site: str, x: Array) -> Array:
    """What stands there in the source run (zeros without one) less what stands in the base run, which is `x`."""
    others = held.others
    there = others["source"][site] if "source" in others else jnp.zeros_like(x)
    return there - (others["base"][site] if "base" in others else x)


class Together(Gated):
    """The tap of all runs at once, the base run's examples first: fills `Held`, and moves the base run where gates are open."""

    runs: tuple[str, ...] = eqx.field(static=True)

    def init(self, sites, frame, zero):
        """What is known of the other runs before they are run: zeros where a site stands in some layer only."""
        batch, pos = frame.positions.shape[0] // (1 + len(self.runs)), frame.positions.shape[1]
        some = [sites[name] for name in self.touched if sites[name].is_inside and not sites[name].has_layer]
        zeros = {site.name: jax.lax.full_like(zero, 0, shape=site.shape(batch, pos)) for site in some}
        of = lambda kept: {name: x for name, x in zeros.items() if kept(name)}
        products, changes = of(lambda name: sites[name].product), of(lambda name: self.gate(name) is not None)
        return Held({run: dict(zeros) for run in self.runs}, products, changes)

    def at(self, point, x, state):
        """Put into `Held` what stands here, and move the base run."""
        site, name = point.site, point.site.name
        first, *rest = self.split(x)
        gate, held = self.gate(name), state
        others = {run: {**acts, name: other} for (run, acts), other in zip(state.others.items(), rest)}
        here = Held(others, {}, {})
        if not point.copy:
            products = {**state.products, name: first} if site.product else state.products
            changes = state.changes if gate is None else {**state.changes, name: change(here, name, first)}
            held = Held(others, products, changes)
        if gate is None or not self.path.opened:
            return x, held
        return jnp.concatenate([first + gate * change(here, name, first), *rest]), held

    def split(self, x: Array) -> list[Array]:
        """Each run's part."""
        return jnp.split(x, 1 + len(self.runs))


class Toward(Gated):
    """The tap of the base run, moved by gates towards the source run; what is `held` of it is not computed again.

    The state is what attention was made of, where it is recomputed, with products of queries and keys times `scale`.
    """

    held: Held
    scale: float = eqx.field(static=True, default=1.0)

    def init(self, sites, frame, zero):
        """Nothing yet."""
        return {}

    def at(self, point, x, state):
        """Move it, from what is known of it."""
        site, name = point.site, point.site.name
        held = Held(self.held.others, {}, {}) if point.copy else self.held
        if name in held.products:
            x = known(x, checkpoint_name(held.products[name], KEPT))
        if name == "embed" and self.path.inputs is not None:
            x = x + self.path.inputs.astype(x.dtype)[:, None, None] * (held.others["source"][name] - x)
        gate = self.gate(name)
        if gate is not None:
            computed = change(held, name, x)
            x = x + gate * (
                known(computed, checkpoint_name(held.changes[name], KEPT)) if name in held.changes else computed
            )
        if self.path.recompute and name == "pattern":
            x = x + self._through_pattern(point, x, state)
        if self.path.dropped is not None and site.added and site.has_layer:
            x = jnp.where(point.layer == self.path.dropped, jax.lax.stop_gradient(x), x)
        return x, {**state, name: x} if self.path.recompute and not point.copy else state

    def _through_pattern(self, point: Point, pattern: Scores, state: dict[str, Array]) -> Scores | float:
        """What gates at q and k add to the pattern, attention recomputed."""
        own = {name: jax.lax.stop_gradient(x) for name, x in state.items()} | {
            "pattern": jax.lax.stop_gradient(pattern)
        }
        others, added = self.held.others, 0.0
        source = lambda site: others["source"][site] if "source" in others else jnp.zeros_like(own[site])
        q, k = (f"rot_{name}" if f"rot_{name}" in own else name for name in RECOMPUTED)
        if "q" in self.gates:
            added = queries_changed(point.frame, self.scale, own[k], own["pattern"], source(q), self.gates["q"])
        if "k" in self.gates:
            made = own[q], own["attn_scores"], own["pattern"]
            added = added + keys_changed(point.frame, self.scale, *made, source(k), self.gates["k"])
        return added


def gated_sites(sites: Mapping[str, Site], gates: Gates, path: Path) -> frozenset[str]:
    """The sites at which both taps must be called."""
    names = {*gates, *(name for name, site in sites.items() if site.product)}
    if path.inputs is not None:
        names.add("embed")
    if path.recompute:
        names |= {"attn_scores", "pattern", *RECOMPUTED, *(sites[name].read_as or name for name in RECOMPUTED)}
    if path.dropped is not None:
        names |= {name for name, site in sites.items() if site.added}
    return frozenset(names)
