"""Integrated gradients (Sundararajan et al. 2017) between two runs."""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array
from mijax.attribution.method import Estimates, Measured, Method, gate_gradients
from mijax.attribution.nodes import Nodes, overlap
from mijax.attribution.taps import Path
from mijax.model.sites import Site


class IntegratedGradients(Method):
    """The mean gradient along a path from the base to the source, times their difference.

    `along="gate"` opens the gates of all cells together, from 0 to 1: the terms of all sites asked for sum to what
    replacing them all does. (Ask for `embed`, `attn_out`, `mlp_out` together, and this is the source's metric less the base's;
    sites that hold one another share an effect between them.) `along="inputs"` moves the embeddings from base to source
    (Hanna et al. 2024, EAP-IG): the terms of `embed`, or of any one layer's `resid_pre`, sum to nearly the same.

    `steps` are the points of a Gauss-Legendre rule, exact for polynomials of degree 2 * steps - 1. `gap` in
    the result is by how much that sum misses for each prompt (along the inputs: the sum of the terms of `embed`, asked for or not), and
    the attribute `gap` its mean size; a smooth model's falls exponentially with `steps`.
    """

    steps: int = eqx.field(static=True, default=5)
    along: Literal["gate", "inputs"] = eqx.field(static=True, default="gate")

    def __check_init__(self):
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if self.along not in ("gate", "inputs") or not whole or self.steps < 1:
            raise ValueError(
                "integrated gradients go in at least one step, along 'gate' or 'inputs', given"
                f" steps={self.steps!r}, along={self.along!r}"
            )

    def check(self, n_layers: int, nodes: Mapping[str, Nodes], alone: bool) -> None:
        """Along the inputs takes a source; along the gate, cells that share no place."""
        if self.along == "inputs" and alone:
            raise ValueError(
                "integrated gradients along the inputs need corrupted prompts; along the gate, zeros can stand for them"
            )
        shared = [site for site, own in nodes.items() if self.along == "gate" and overlap(own)]
        if shared:
            raise ValueError(
                f"integrated gradients along the gate take cells that share no place; those at {shared[0]!r} do"
            )

    def path(self, batch: int) -> Path:
        """Along the gates, they open; along the inputs, the base run goes beside."""
        return Path(opened=True) if self.along == "gate" else Path(inputs=jnp.zeros((batch,)))

    def __call__(self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site]) -> Estimates:
        """`steps` times one backward pass, in the memory of one."""
        runs = measured(gates, Path())
        base = runs[0]
        batch, dtype = next((len(v), v.dtype) for v in base.values())
        points, weights = np.polynomial.legendre.leggauss(self.steps)
        opened = lambda gates, part: {s: g + part.reshape(-1, *(1,) * (g.ndim - 1)) for s, g in gates.items()}
        if self.along == "gate":
            at = lambda gates, part: measured(opened(gates, part), Path(opened=True))
        else:
            at = lambda gates, part: measured(gates, Path(inputs=part))

        def step(total, point):
            place, weight = point
            _, found = gate_gradients(at, gates, jnp.full((batch,), place, dtype))
            return jax.tree.map(lambda t, new: t + weight.astype(t.dtype) * new, total, found), None

        zeros = {name: (jax.tree.map(jnp.zeros_like, gates), jnp.zeros((batch,), dtype)) for name in base}
        along = jnp.asarray((points + 1) / 2, dtype), jnp.asarray(weights / 2, dtype)
        found, _ = jax.lax.scan(step, zeros, along)
        end, _ = at(gates, jnp.ones((batch,), dtype))
        gap = {name: found[name][1] - (end[name] - base[name]) for name in base}
        return Estimates(runs, {name: own for name, (own, _) in found.items()}, gap=gap)
