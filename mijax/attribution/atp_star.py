"""AtP* (Kramar et al. 2024): attribution patching without its two known kinds of false negatives."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mijax._types import Array
from mijax.attribution.method import Estimates, Measured, Method, gate_gradients
from mijax.attribution.nodes import Nodes
from mijax.attribution.taps import RECOMPUTED, Path
from mijax.model.sites import Site


class AtPStar(Method):
    """Attention recomputed for queries and keys, and magnitudes with each layer's gradient dropped in turn.

    Where attention is saturated, the gradient of a query is nearly zero whatever patching it would do; here the
    pattern with the source's query (or key) is computed exactly, and only what follows it is linear. Keys at several positions in
    one cell of a grid are exchanged one by one and added up; those of cells over all positions together.

    Where the direct effect of a node cancels what a later layer makes of it, its gradient says little. `unsigned` in the
    result is the mean over layers of the estimate's magnitude with no gradient through what that layer writes (GradDrop):
    over all but a node's own layer, without which it has none; over all for nodes of the stream.
    It ranks cells; it is no change of the metric, and is not to be compared with one.

    Takes one backward pass for each layer. Raises `ValueError` for a model of a single layer.
    """

    def check(self, n_layers: int, nodes: Mapping[str, Nodes], alone: bool) -> None:
        """Two layers, and whole queries and keys."""
        if n_layers < 2:
            raise ValueError("AtPStar drops one layer's gradient at a time: it takes a model of at least two layers")
        for site, own in nodes.items():
            if site in RECOMPUTED and own.shape[-1] > 1:
                raise ValueError(
                    f"AtPStar recomputes attention with whole queries and keys: it has no cells over units at {site!r}; AtP() has"
                )

    def path(self, batch: int) -> Path:
        """Attention is recomputed."""
        del batch
        return Path(recompute=True)

    def __call__(self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site]) -> Estimates:
        """One backward pass with everything, and one for each layer without what it writes."""
        n_layers = next(iter(sites.values())).sizes["layer"]
        at = lambda dropped: gate_gradients(lambda gates: measured(gates, Path(dropped=dropped, recompute=True)), gates)
        runs, found = at(None)

        def drop(total, layer):
            _, own = at(layer)
            return jax.tree.map(lambda t, new: t + jnp.abs(new), total, own), None

        total, _ = jax.lax.scan(drop, jax.tree.map(jnp.zeros_like, found), jnp.arange(n_layers, dtype=jnp.int32))
        # What is inside a layer has no gradient at all where its own layer is dropped; the stream always has.
        others = {name: n_layers - (sites[name].has_layer and not sites[name].is_stream) for name in gates}
        unsigned = {name: {site: t / others[site] for site, t in own.items()} for name, (own,) in total.items()}
        return Estimates(runs, {name: own for name, (own,) in found.items()}, unsigned)
