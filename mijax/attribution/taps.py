"""The tap of the base run in attribution: gates move its activations towards those of the source run."""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mijax._types import Array, Float, Int, Scores
from mijax.attribution.recompute import keys_changed, queries_changed
from mijax.model.position import Frame
from mijax.model.scores import ScoreRule
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
        inputs: by which part each example's embeddings are moved towards the source's. A gate then adds the
            difference of the source run and the base run with its embeddings unmoved.
        dropped: the layer through whose contributions to the residual stream no gradient passes.
        recompute: whether a gate at `q` or `k` acts through the pattern that attention has with the source's query
            or key.
    """

    inputs: Float[Array, " batch"] | None = None
    dropped: Int[Array, ""] | None = None
    recompute: bool = False


class Toward(Tap):
    """Moves each activation `x` of the base run to `x + gate * (source's - x)`.

    Its state holds the activations that attention is computed from, where it is recomputed.

    Attributes:
        gates: the gates of one layer (or around the layers).
        path: how else the base run is changed.
        others: the activations of the other runs at the same place, by run and site: those of the `source` (zeros
            without one), and of the `base` with its embeddings unmoved, where they are moved.
        touched: the sites at which the tap is called.
        rule: how scores are computed.
    """

    gates: Gates
    path: Path
    others: Mapping[str, Mapping[str, Array]]
    touched: frozenset[str] = eqx.field(static=True)
    rule: ScoreRule | None = eqx.field(static=True)

    @property
    def sites(self) -> frozenset[str]:
        """The second sites of `called_sites`."""
        return self.touched

    def init(self, sites: Mapping[str, Site], frame: Frame, zero: Array) -> dict[str, Array]:
        """Empty."""
        return {}

    def at(self, point: Point, x: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Move the activation, and mark what the backward pass is not to compute again."""
        site, name, path = point.site, point.site.name, self.path
        if site.product:
            x = checkpoint_name(x, KEPT)
        if name == "embed" and path.inputs is not None:
            x = x + path.inputs.astype(x.dtype)[:, None, None] * (self.others["source"][name] - x)
        if name in self.gates and not (path.recompute and name in RECOMPUTED):
            x = x + self.gates[name] * checkpoint_name(self._change(name, x), KEPT)
        if path.recompute and name == "pattern":
            x = x + self._through_pattern(point, x, state)
        if path.dropped is not None and site.added and site.has_layer:
            x = jnp.where(point.layer == path.dropped, jax.lax.stop_gradient(x), x)
        return x, {**state, name: x} if path.recompute and not point.copy else state

    def _change(self, site: str, x: Array) -> Array:
        """What a gate of 1 adds to `x`."""
        base = self.others["base"][site] if "base" in self.others else x
        return self._of_source(site, x) - base

    def _of_source(self, site: str, x: Array) -> Array:
        """The source's activation, of the shape of `x`."""
        return self.others["source"][site] if "source" in self.others else jnp.zeros_like(x)

    def _through_pattern(self, point: Point, pattern: Scores, state: dict[str, Array]) -> Scores | float:
        """The change of the pattern by the gates at q and k, through recomputed attention."""
        assert self.rule is not None
        if self.rule.sinks:
            raise ValueError("gates at q and k do not act through recomputed attention in a model with attention sinks")
        acts = jax.lax.stop_gradient({**state, "pattern": pattern})
        q, k = (f"rot_{name}" if f"rot_{name}" in acts else name for name in RECOMPUTED)
        change = 0.0
        if "q" in self.gates:
            source = self._of_source(q, acts[q])
            change = queries_changed(point.frame, self.rule, acts[k], acts["pattern"], source, self.gates["q"])
        if "k" in self.gates:
            source, scores = self._of_source(k, acts[k]), acts["attn_scores"]
            change += keys_changed(point.frame, self.rule, acts[q], scores, acts["pattern"], source, self.gates["k"])
        return change


def called_sites(sites: Mapping[str, Site], gates: Gates, path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The sites at which the other runs' activations are needed, and those at which `Toward` must be called.

    Args:
        sites: the model's table of sites.
        gates: the gates by site.
        path: how the base run is changed.

    Returns:
        The names of both; the second hold the first.
    """
    inputs = () if path.inputs is None else ("embed",)
    read = [sites[name].read_as or name for name in RECOMPUTED if path.recompute]
    needed = frozenset((*gates, *inputs, *read))
    marked = {name for name, site in sites.items() if site.product or (path.dropped is not None and site.added)}
    recomputed = ("attn_scores", "pattern", *RECOMPUTED) if path.recompute else ()
    return needed, needed | marked | frozenset(recomputed)
