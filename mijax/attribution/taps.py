"""The taps of attribution: of all runs at once for their values, and of the base run for its derivative."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mijax._types import Array, Float, Int, Scores
from mijax.attribution.recompute import keys_changed, queries_changed
from mijax.interventions.tap import head_count
from mijax.model.config import Config
from mijax.model.position import Frame
from mijax.model.sites import PER_HEAD_COPIES, SITES

Gates = Mapping[str, Array]
"""By site, an array that broadcasts to all of the site, layer axis included."""

RECOMPUTED = ("q", "k")
PRODUCTS = ("q", "k", "v", "attn_out", "pre", "pre_linear", "mlp_out")
"""The sites that are products with the parameters, too dear to be computed twice."""
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


def nothing(runs: Collection[str]) -> Held:
    """What is known of `runs` beside the base run before they are run."""
    return Held({run: {} for run in runs}, {}, {})


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


class _Tap:
    """What both have in common."""

    def __init__(
        self,
        config: Config,
        frame: Frame,
        gates: Gates,
        path: Path,
        held: Held,
        layer: Int[Array, ""] | None = None,
    ):
        self.config, self.frame, self.gates = config, frame, gates
        self.path, self.held, self.layer = path, held, layer
        self.own: dict[str, Array] = {}

    def heads(self, site: str) -> Int[Array, " k"] | None:
        assert site in PER_HEAD_COPIES
        return jnp.arange(head_count(SITES[site], self.config), dtype=jnp.int32) if site in self.gates else None

    def at(self, frame: Frame) -> Any:
        raise AssertionError("every layer is run at all positions here")

    def gate(self, site: str) -> Array | None:
        """The site's gate, where it moves the site itself."""
        return None if self.path.recompute and site in RECOMPUTED else self.gates.get(site)

    def change(self, site: str, x: Array) -> Array:
        """What stands there in the source run (zeros without one) less what stands in the base run, which is `x`."""
        others = self.held.others
        there = others["source"][site] if "source" in others else jnp.zeros_like(x)
        return there - (others["base"][site] if "base" in others else x)


class Together(_Tap):
    """The tap of all runs at once, the base run's examples first: fills `held`, and moves the base run where gates are open."""

    def __call__(self, site: str, x: Array, heads: Int[Array, " k"] | None = None) -> Array:
        """Put into `held` what stands here, and move the base run."""
        gate, products, changes = self.gate(site), self.held.products, self.held.changes
        first, *rest = self.split(x)
        for acts, other in zip(self.held.others.values(), rest):
            acts[site] = other
        if site in PRODUCTS:
            products[site] = first
        if gate is not None:
            changes[site] = self.change(site, first)
        return self.edited(site, x)

    def edited(self, site: str, x: Array) -> Array:
        """Move the base run."""
        gate = self.gate(site)
        if gate is None or not self.path.opened:
            return x
        first, *rest = self.split(x)
        return jnp.concatenate([first + gate * self.change(site, first), *rest])

    def split(self, x: Array) -> list[Array]:
        """Each run's part."""
        return jnp.split(x, 1 + len(self.held.others))


class Toward(_Tap):
    """The tap of the base run, moved by gates towards the source run; what is `held` of it is not computed again."""

    def __call__(self, site: str, x: Array, heads: Int[Array, " k"] | None = None) -> Array:
        """Move it, from what is known of it."""
        if site in self.held.products:
            x = known(x, checkpoint_name(self.held.products[site], KEPT))
        x = self._moved(site, x, self.held.changes.get(site))
        if self.path.recompute and site in ("q", "k", "rot_q", "rot_k", "attn_scores"):
            self.own[site] = x
        return x

    def edited(self, site: str, x: Array) -> Array:
        """Move it."""
        return self._moved(site, x, None)

    def _moved(self, site: str, x: Array, change: Array | None) -> Array:
        if site == "embed" and self.path.inputs is not None:
            x = x + self.path.inputs.astype(x.dtype)[:, None, None] * (self.held.others["source"][site] - x)
        gate = self.gate(site)
        if gate is not None:
            computed = self.change(site, x)
            x = x + gate * (computed if change is None else known(computed, checkpoint_name(change, KEPT)))
        if self.path.recompute and site == "pattern":
            x = x + self._through_pattern(x)
        if self.path.dropped is not None and site in ("attn_out", "mlp_out"):
            x = jnp.where(self.layer == self.path.dropped, jax.lax.stop_gradient(x), x)
        return x

    def _through_pattern(self, pattern: Scores) -> Scores | float:
        """What gates at q and k add to the pattern, attention recomputed."""
        given = {name: rotated(self.config, name) for name in RECOMPUTED if name in self.gates}
        own = {name: jax.lax.stop_gradient(x) for name, x in self.own.items()}
        own["pattern"] = jax.lax.stop_gradient(pattern)
        others = self.held.others
        source = others["source"] if "source" in others else {s: jnp.zeros_like(own[s]) for s in given.values()}
        change = 0.0
        if "q" in given:
            change = queries_changed(self.config, self.frame, own, source[given["q"]], self.gates["q"])
        if "k" in given:
            change = change + keys_changed(self.config, self.frame, own, source[given["k"]], self.gates["k"])
        return change


def rotated(config: Config, site: str) -> str:
    """The site whose values attention takes the products of."""
    return f"rot_{site}" if config.positions == "rotary" else site
