"""The taps of attribution: one of all runs at once, for their values, and one of the base run, for its derivative."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mijax._types import Array, Float, Int, Scores
from mijax.attribution.recompute import keys_changed, queries_changed
from mijax.model.position import Frame
from mijax.model.sites import Site
from mijax.model.tap import Point, Tap

Gates = Mapping[str, Array]
"""By site, an array that broadcasts to the site's shape, layer axis included."""

RECOMPUTED = ("q", "k")
"""The sites whose gates may act through recomputed attention."""
KEPT = "kept"
"""The checkpoint name of values that are saved for the backward pass."""


class Path(NamedTuple):
    """How the base run is changed, apart from the gates' values.

    Attributes:
        opened: whether gates may be other than zero; if not, they serve for the derivative with respect to them
            alone.
        inputs: by which part each example's embeddings are moved towards the source's. A gate then adds the
            difference of the source run and the base run with its embeddings unmoved.
        dropped: the layer through whose contributions to the residual stream no gradient passes.
        recompute: whether a gate at `q` or `k` acts through the pattern that attention has with the source's query
            or key.
    """

    opened: bool = False
    inputs: Float[Array, " batch"] | None = None
    dropped: Int[Array, ""] | None = None
    recompute: bool = False


class Held(NamedTuple):
    """The values of a layer (or around the layers) that the pass of all runs computes.

    Attributes:
        others: the activations of the other runs, by run and site.
        products: the base run's values at sites that are products with parameters.
        changes: by site, the difference that a gate of 1 adds.
    """

    others: Mapping[str, dict[str, Array]]
    products: dict[str, Array]
    changes: dict[str, Array]


@jax.custom_jvp
def known(computed: Array, value: Array) -> Array:
    """Replace a computed array by its known value, keeping its derivative.

    The computation of `computed` then becomes dead code, which the compiler removes; that of its derivative
    remains. Take second derivatives in forward mode first, and then in reverse. (Partial evaluation, with which
    reverse mode begins, drops custom rules inside a scan, so that differentiating its result again sees a
    constant.)

    Args:
        computed: an array, as computed.
        value: its value, computed elsewhere.

    Returns:
        `value`, with the derivative of `computed`.
    """
    del computed
    return value


@known.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return known(*primals), tangents[0]


class Gated(Tap):
    """The base class of both taps.

    Attributes:
        gates: the gates of one layer (or around the layers).
        path: how the base run is changed.
        touched: the sites at which the tap is called.
    """

    gates: Gates
    path: Path
    touched: frozenset[str] = eqx.field(static=True)

    @property
    def sites(self) -> frozenset[str]:
        """The sites of `gated_sites`."""
        return self.touched

    def gate(self, site: str) -> Array | None:
        """The gate that acts at a site directly.

        Args:
            site: the name of the site.

        Returns:
            The gate; `None` where there is none, or where it acts through recomputed attention.
        """
        return None if self.path.recompute and site in RECOMPUTED else self.gates.get(site)


def _change(held: Held, site: str, x: Array) -> Array:
    """The source's activation (zeros without one) minus the base's: that of the unmoved base run, or else `x`."""
    others = held.others
    source = others["source"][site] if "source" in others else jnp.zeros_like(x)
    return source - (others["base"][site] if "base" in others else x)


class Together(Gated):
    """The tap of all runs in one batch, the base run's examples first.

    It fills `Held`, and applies open gates to the base run.

    Attributes:
        runs: the names of the other runs, in the order of the batch.
    """

    runs: tuple[str, ...] = eqx.field(static=True)

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> Held:
        """Empty, but for zeros at sites that only some layers have."""
        batch, pos = frame.positions.shape[0] // (1 + len(self.runs)), frame.positions.shape[1]
        partial = [sites[name] for name in self.touched if sites[name].is_inside and not sites[name].has_layer]
        zeros = {site.name: jax.lax.full_like(zero, 0, shape=site.shape(batch, pos)) for site in partial}
        of = lambda selected: {name: x for name, x in zeros.items() if selected(name)}
        products, changes = of(lambda name: sites[name].product), of(lambda name: self.gate(name) is not None)
        return Held({run: dict(zeros) for run in self.runs}, products, changes)

    def at(self, point: Point, x: Array, state: Held) -> tuple[Array, Held]:
        """Record the activations in `Held`, and apply an open gate to the base run."""
        site, name = point.site, point.site.name
        first, *rest = self.split(x)
        gate, held = self.gate(name), state
        others = {run: {**acts, name: other} for (run, acts), other in zip(state.others.items(), rest)}
        local = Held(others, {}, {})
        if not point.copy:
            products = {**state.products, name: first} if site.product else state.products
            changes = state.changes if gate is None else {**state.changes, name: _change(local, name, first)}
            held = Held(others, products, changes)
        if gate is None or not self.path.opened:
            return x, held
        return jnp.concatenate([first + gate * _change(local, name, first), *rest]), held

    def split(self, x: Array) -> list[Array]:
        """Split a batch of all runs.

        Args:
            x: an activation of all runs, examples in front.

        Returns:
            The activation of each run, the base run's first.
        """
        return jnp.split(x, 1 + len(self.runs))


class Toward(Gated):
    """The tap of the base run, which gates move towards the source run.

    Its state holds the activations that attention is computed from, where it is recomputed.

    Attributes:
        held: known values, which take the place of the same values computed again.
        scale: the factor of the query-key products.
    """

    held: Held
    scale: float = eqx.field(static=True, default=1.0)

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> dict[str, Array]:
        """Empty."""
        return {}

    def at(self, point: Point, x: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Put known values in place of computed ones, and apply the gate."""
        site, name = point.site, point.site.name
        held = Held(self.held.others, {}, {}) if point.copy else self.held
        if name in held.products:
            x = known(x, checkpoint_name(held.products[name], KEPT))
        if name == "embed" and self.path.inputs is not None:
            x = x + self.path.inputs.astype(x.dtype)[:, None, None] * (held.others["source"][name] - x)
        gate = self.gate(name)
        if gate is not None:
            computed = _change(held, name, x)
            x = x + gate * (
                known(computed, checkpoint_name(held.changes[name], KEPT)) if name in held.changes else computed
            )
        if self.path.recompute and name == "pattern":
            x = x + self._through_pattern(point, x, state)
        if self.path.dropped is not None and site.added and site.has_layer:
            x = jnp.where(point.layer == self.path.dropped, jax.lax.stop_gradient(x), x)
        return x, {**state, name: x} if self.path.recompute and not point.copy else state

    def _through_pattern(self, point: Point, pattern: Scores, state: dict[str, Array]) -> Scores | float:
        """The change of the pattern by the gates at q and k, through recomputed attention."""
        acts = {name: jax.lax.stop_gradient(x) for name, x in state.items()} | {
            "pattern": jax.lax.stop_gradient(pattern)
        }
        others, added = self.held.others, 0.0
        source = lambda site: others["source"][site] if "source" in others else jnp.zeros_like(acts[site])
        q, k = (f"rot_{name}" if f"rot_{name}" in acts else name for name in RECOMPUTED)
        if "q" in self.gates:
            added = queries_changed(point.frame, self.scale, acts[k], acts["pattern"], source(q), self.gates["q"])
        if "k" in self.gates:
            base = acts[q], acts["attn_scores"], acts["pattern"]
            added = added + keys_changed(point.frame, self.scale, *base, source(k), self.gates["k"])
        return added


def gated_sites(sites: Mapping[str, Site], gates: Gates, path: Path) -> frozenset[str]:
    """The sites at which both taps must be called.

    Args:
        sites: the model's table of sites.
        gates: the gates by site.
        path: how the base run is changed.

    Returns:
        The names of the sites.
    """
    names = {*gates, *(name for name, site in sites.items() if site.product)}
    if path.inputs is not None:
        names.add("embed")
    if path.recompute:
        names |= {"attn_scores", "pattern", *RECOMPUTED, *(sites[name].read_as or name for name in RECOMPUTED)}
    if path.dropped is not None:
        names |= {name for name, site in sites.items() if site.added}
    return frozenset(names)
