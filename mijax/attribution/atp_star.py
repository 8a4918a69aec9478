"""AtP* (Kramar et al. 2024): attribution patching without its two known kinds of false negatives."""

import jax
import jax.numpy as jnp

from mijax._types import Array
from mijax.attribution.method import Measured, Method, Scores, gradients
from mijax.attribution.taps import Path
from mijax.model.sites import SITES


class AtPStar(Method):
    """Attention recomputed for queries and keys, and magnitudes with each layer's gradient dropped in turn.

    Where attention is saturated, the gradient of a query is nearly zero whatever patching it would do; here the
    pattern with the source's query (or key) is computed exactly, and only what follows it is linear. Keys at several positions in
    one cell of a grid are exchanged one by one and added up; those of cells over all positions together.

    Where the direct effect of a node cancels what a later layer makes of it, its gradient says little. `unsigned` in the
    result is the mean over layers of the estimate's magnitude with no gradient through what that layer writes (GradDrop).
    It ranks cells; it is no change of the metric, and is not to be compared with one.

    Takes one backward pass for each layer. Raises `ValueError` for a model of a single layer.
    """

    def path(self, batch: int) -> Path:
        """Attention is recomputed."""
        del batch
        return Path(recompute=True)

    def __call__(self, measured: Measured, gates: dict[str, Array], n_layers: int) -> Scores:
        """One backward pass with everything, and one for each layer without what it writes."""
        if n_layers < 2:
            raise ValueError("AtPStar drops one layer's gradient at a time: it takes a model of at least two layers")
        at = lambda dropped: gradients(lambda gates: measured(gates, Path(dropped=dropped, recompute=True)), gates)
        runs, found = at(None)

        def drop(total, layer):
            _, own = at(layer)
            return jax.tree.map(lambda t, new: t + jnp.abs(new), total, own), None

        total, _ = jax.lax.scan(drop, jax.tree.map(jnp.zeros_like, found), jnp.arange(n_layers, dtype=jnp.int32))
        # What is inside a layer has no gradient at all where its own layer is dropped; the stream always has.
        others = {site: n_layers - (SITES[site].has_layer and not site.startswith("resid")) for site in gates}
        unsigned = {name: {site: t / others[site] for site, t in own.items()} for name, (own,) in total.items()}
        return Scores(runs, {name: own for name, (own,) in found.items()}, unsigned)
