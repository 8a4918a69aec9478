"""The base run with every site moved by a gate towards another run, which goes through the layers beside it.

State around the one block of the model. What stands in the source run is there when the layer needs it and forgotten after,
so that nothing of the size of all layers' activations is ever kept; with `checkpoint`, the backward pass computes it anew.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mijax._types import Array, Float, Ids, Int, Scores, Stream
from mijax.attribution.recompute import keys_changed, queries_changed
from mijax.interventions.tap import Tap, head_count
from mijax.model.block import block
from mijax.model.config import Config
from mijax.model.numerics import accumulator
from mijax.model.position import Frame, frame
from mijax.model.readout import Readout
from mijax.model.sites import PER_HEAD_COPIES, SITES
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer, embed, final_norm

Gates = Mapping[str, Array]
"""By site, an array that broadcasts to all of the site, layer axis included."""

RECOMPUTED = ("q", "k")
MATRIX_PRODUCTS = ("q", "k", "v", "attn_out", "pre", "pre_linear")
"""The sites of which the backward pass needs the value, and which are too dear to be computed again."""

KEPT = "kept"


class Path(NamedTuple):
    """What else is done to the base run.

    `inputs` moves each example's embeddings by that part towards the source's; a gate then adds the difference of the
    source run and the base run as it is. `dropped` is a layer of whose writes no gradient passes. `recompute`: a gate at `q` or `k` acts through the
    pattern that attention has with the source's query or key.
    """

    inputs: Float[Array, " batch"] | None = None
    dropped: Int[Array, ""] | None = None
    recompute: bool = False


def gated(
    model: Transformer,
    tokens: Tokens,
    source: Ids | None,
    gates: Gates,
    path: Path,
    checkpoint: int,
) -> tuple[Readout, Readout | None]:
    """The base run on `tokens`, each site `x` in it now `x + gate * (source's - x)`; and the source run.

    `source` are ids padded as `tokens` are; `None` puts zeros in place of the source's activations. The backward pass
    computes again what is between the matrix products (`checkpoint` 0), each layer (1), or groups of layers and
    then each layer (2), which keeps the streams of about twice the root of the number of layers.
    """
    config = model.config
    here = frame(config, tokens, accumulator(model.W_E.dtype))
    n = config.n_layers
    in_full = {s: jnp.broadcast_to(g, (n, *g.shape[1:])) for s, g in gates.items() if SITES[s].has_layer}
    outer = {site: gate for site, gate in gates.items() if not SITES[site].has_layer}
    wanted = dict.fromkeys(_wanted(config, gates, path))
    # What goes through the layers: the run that is differentiated, and those that it is compared with.
    others = {} if source is None else {"source": source}
    if path.inputs is not None:
        others["base"] = jnp.asarray(tokens.ids)
    taps = {name: Tap(config, here, {}, dict.fromkeys((*outer, "embed"))) for name in others}
    beside = {name: embed(model, ids, here, taps[name]) for name, ids in others.items()}
    x = embed(model, jnp.asarray(tokens.ids), here, _Toward(config, here, outer, _acts(taps), path))

    def layer(carry: tuple[Stream, dict[str, Stream]], scanned: tuple[Int[Array, ""], dict[str, Array]]):
        (x, beside), (index, own) = carry, scanned
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), model.blocks)
        taps = {name: Tap(config, here, {}, wanted, index) for name in beside}
        beside = {name: block(config, params, stream, here, taps[name]) for name, stream in beside.items()}
        return (block(config, params, x, here, _Toward(config, here, own, _acts(taps), path, index)), beside), None

    x, beside = _scan(layer, (x, beside), (jnp.arange(n, dtype=jnp.int32), in_full), checkpoint)
    taps = {name: Tap(config, here, {}, dict.fromkeys(outer)) for name in beside}
    ends = {name: final_norm(model, stream, taps[name]) for name, stream in beside.items()}
    x = final_norm(model, x, _Toward(config, here, outer, _acts(taps), path))
    readout = lambda final: Readout(final, tokens, model.unembedding, model.b_U)
    return readout(x), readout(ends["source"]) if "source" in ends else None


def _acts(taps: Mapping[str, Tap]) -> dict[str, dict[str, Array]]:
    return {name: tap.acts for name, tap in taps.items()}


def _scan(layer: Callable, carry: Any, scanned: Any, checkpoint: int) -> Any:
    """Scan over the layers; or over groups of them, over each group's layers inside, and over those that are left."""
    n, again = len(scanned[0]), _again(layer, checkpoint)
    each = lambda carry, own: jax.lax.scan(again, carry, own)
    if checkpoint < 2:
        return each(carry, scanned)[0]
    size = group_size(n)
    grouped = jax.tree.map(lambda a: a[: n // size * size].reshape(n // size, size, *a.shape[1:]), scanned)
    carry, _ = jax.lax.scan(_again(each, checkpoint), carry, grouped)
    return _again(each, checkpoint)(carry, jax.tree.map(lambda a: a[n // size * size :], scanned))[0]


def _again(function: Callable, checkpoint: int) -> Callable:
    """What of it the backward pass computes again: all, or all but matrix products. (Not even that: each layer's
    parameters would be kept a second time.)"""
    policy = None if checkpoint else jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(function, prevent_cse=False, policy=policy)


def group_size(n_layers: int) -> int:
    """The root of the number of layers, rounded up.

    >>> group_size(12), group_size(29), group_size(1)
    (4, 6, 1)
    """
    return max(1, math.isqrt(max(0, n_layers - 1)) + 1)


def _wanted(config: Config, gates: Gates, path: Path) -> tuple[str, ...]:
    """The layers' sites of the other runs that the gates need."""
    recomputed = [s for s in RECOMPUTED if s in gates and path.recompute]
    sites = [s for s in gates if SITES[s].has_layer and s not in recomputed]
    return (*sites, *(_rotated(config, s) for s in recomputed))


def _rotated(config: Config, site: str) -> str:
    return f"rot_{site}" if config.positions == "rotary" else site


class _Toward:
    """The tap of the run that is differentiated: `acts` holds what stands at its sites in the other runs."""

    def __init__(
        self, config: Config, frame: Frame, gates: Gates, acts: Mapping[str, Mapping[str, Array]], path: Path,
        layer: Int[Array, ""] | None = None,
    ):  # fmt: skip
        self.config, self.frame, self.gates, self.acts = config, frame, gates, acts
        self.path, self.layer, self.own = path, layer, {}

    def __call__(self, site: str, x: Array, heads: Int[Array, " k"] | None = None) -> Array:
        x = self.edited(site, x)
        x = checkpoint_name(x, KEPT) if site in MATRIX_PRODUCTS else x
        if self.path.recompute and site in ("q", "k", "rot_q", "rot_k", "attn_scores"):
            self.own[site] = x
        return x

    def edited(self, site: str, x: Array) -> Array:
        if site == "embed" and self.path.inputs is not None:
            x = x + self.path.inputs[:, None, None] * (self.acts["source"][site] - x)
        recomputed = self.path.recompute and site in RECOMPUTED
        if site in self.gates and not recomputed:
            there = self.acts["source"][site] if "source" in self.acts else jnp.zeros_like(x)
            change = there - (self.acts["base"][site] if "base" in self.acts else x)
            x = x + self.gates[site] * checkpoint_name(change, KEPT)
        if self.path.recompute and site == "pattern":
            x = x + self._through_pattern(x)
        if self.path.dropped is not None and site in ("attn_out", "mlp_out"):
            x = jnp.where(self.layer == self.path.dropped, jax.lax.stop_gradient(x), x)
        return x

    def heads(self, site: str) -> Int[Array, " k"] | None:
        assert site in PER_HEAD_COPIES
        return jnp.arange(head_count(SITES[site], self.config), dtype=jnp.int32) if site in self.gates else None

    def at(self, frame: Frame) -> "_Toward":
        raise AssertionError("every layer is run at all positions here")

    def _through_pattern(self, pattern: Scores) -> Scores | float:
        """What gates at q and k add to the pattern, attention recomputed."""
        given = {name: _rotated(self.config, name) for name in RECOMPUTED if name in self.gates}
        own = {name: jax.lax.stop_gradient(x) for name, x in self.own.items()}
        own["pattern"] = jax.lax.stop_gradient(pattern)
        source = self.acts["source"] if "source" in self.acts else {s: jnp.zeros_like(own[s]) for s in given.values()}
        change = 0.0
        if "q" in given:
            change = queries_changed(self.config, self.frame, own, source[given["q"]], self.gates["q"])
        if "k" in given:
            change = change + keys_changed(self.config, self.frame, own, source[given["k"]], self.gates["k"])
        return change
