"""AtP* (Kramar et al. 2024): attribution patching, corrected for its two known kinds of false negatives."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mijax._types import Array
from mijax.attribution.method import Estimates, Examples, Measured, Method, gate_gradients
from mijax.attribution.nodes import Nodes
from mijax.attribution.taps import RECOMPUTED, Path
from mijax.model.sites import Site


class AtPStar(Method):
    """Attention recomputed for queries and keys, and magnitudes with each layer's gradient dropped in turn.

    Where attention is saturated, the gradient of a query is nearly zero whatever the effect of patching it. Here
    the pattern with the source's query (or key) is computed exactly, and only the computation after it is
    linearised. Keys at several positions in one cell of a grid are exchanged one by one, and their effects added
    up; for a cell over all positions, all keys are exchanged together.

    Where the direct effect of a node and its effect through a later layer cancel, its gradient is uninformative.
    `unsigned` in the result is the magnitude of the estimate with no gradient through the outputs of one layer
    (GradDrop), averaged over layers: over all but the node's layer, without which there is no gradient, and over
    all layers for nodes of the residual stream. It ranks cells; it is no change of the metric, and is not to be
    compared with one.

    It takes one backward pass for each layer, and a model of at least two layers.
    """

    users_code = False

    def check(self, n_layers: int, nodes: Mapping[str, Nodes], alone: bool) -> None:
        """Raise `ValueError` for a model of a single layer, and for cells over units of queries or keys."""
        if n_layers < 2:
            raise ValueError("AtPStar drops one layer's gradient at a time: it takes a model of at least two layers")
        for site, cells in nodes.items():
            if site in RECOMPUTED and cells.shape[-1] > 1:
                raise ValueError(
                    f"AtPStar recomputes attention with whole queries and keys: it has no cells over units at {site!r}; AtP() has"
                )

    def path(self, batch: int) -> Path:
        """A path with attention recomputed."""
        del batch
        return Path(recompute=True)

    def __call__(
        self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site], examples: Examples
    ) -> Estimates:
        """Take one backward pass through all layers, and one for each layer with no gradient through its outputs."""
        del examples
        n_layers = next(iter(sites.values())).sizes["layer"]
        without = lambda layer: gate_gradients(
            lambda gates: measured(gates, Path(dropped=layer, recompute=True)), gates
        )
        (base, source), grads = without(None)

        def drop(total, layer):
            _, dropped_grads = without(layer)
            return jax.tree.map(lambda t, new: t + jnp.abs(new), total, dropped_grads), None

        total, _ = jax.lax.scan(drop, jax.tree.map(jnp.zeros_like, grads), jnp.arange(n_layers, dtype=jnp.int32))
        # Nodes inside a layer have no gradient where that layer is dropped; those of the stream always have one.
        n_terms = {name: n_layers - (sites[name].has_layer and not sites[name].is_stream) for name in gates}
        unsigned = {name: {site: t / n_terms[site] for site, t in sums.items()} for name, (sums,) in total.items()}
        return Estimates(base, source, {name: terms for name, (terms,) in grads.items()}, unsigned)
