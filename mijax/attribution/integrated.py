"""Integrated gradients (Sundararajan et al. 2017) between two runs."""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array
from mijax.attribution.method import Estimates, Examples, Measured, Method, gate_gradients
from mijax.attribution.nodes import Nodes, overlap
from mijax.attribution.taps import Path
from mijax.model.sites import Site


class IntegratedGradients(Method):
    """The mean gradient along a path from the base to the source, times their difference.

    Along the gates, the terms of all requested sites sum to the effect of replacing all of them. (For `embed`,
    `attn_out` and `mlp_out` together, that is the source's metric minus the base's; sites of which one depends on
    another share an effect between them.) Along the inputs (Hanna et al. 2024, EAP-IG), the terms of `embed`, or
    those of any one layer's `resid_pre`, sum to nearly the same.

    `gap` in the result is by how much that sum misses, for each prompt (along the inputs: the sum of the terms of
    `embed`, whether requested or not); the attribute `gap` is its mean size. For a smooth model it falls
    exponentially with `steps`.

    Args:
        steps: the number of points of a Gauss-Legendre rule, exact for polynomials of degree 2 * steps - 1.
        along: "gate" opens the gates of all cells together, from 0 to 1; "inputs" moves the embeddings from base to
            source.

    Raises:
        ValueError: for fewer than one step, or a path of another name.
    """

    users_code = False
    steps: int = eqx.field(static=True, default=5)
    along: Literal["gate", "inputs"] = eqx.field(static=True, default="gate")

    def __check_init__(self) -> None:
        is_whole = isinstance(self.steps, int) and not isinstance(self.steps, bool)
        if self.along not in ("gate", "inputs") or not is_whole or self.steps < 1:
            raise ValueError(
                "integrated gradients go in at least one step, along 'gate' or 'inputs', given"
                f" steps={self.steps!r}, along={self.along!r}"
            )

    def check(self, n_layers: int, nodes: Mapping[str, Nodes], alone: bool) -> None:
        """Raise `ValueError` along the inputs without a source, and along the gates for cells that overlap."""
        if self.along == "inputs" and alone:
            raise ValueError(
                "integrated gradients along the inputs need corrupted prompts; along the gate, zeros can stand for them"
            )
        shared = [site for site, cells in nodes.items() if self.along == "gate" and overlap(cells)]
        if shared:
            raise ValueError(
                f"integrated gradients along the gate take cells that share no place; those at {shared[0]!r} do"
            )

    def path(self, batch: int) -> Path:
        """Along the inputs, embeddings are moved; along the gate, nothing but the gates."""
        return Path() if self.along == "gate" else Path(inputs=jnp.zeros((batch,)))

    def __call__(
        self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site], examples: Examples
    ) -> Estimates:
        """Take `steps` backward passes, in the memory of one."""
        del sites, examples
        base, source = measured(gates, Path())
        batch, dtype = next((len(v), v.dtype) for v in base.values())
        points, weights = np.polynomial.legendre.leggauss(self.steps)
        opened = lambda gates, part: {s: g + part.reshape(-1, *(1,) * (g.ndim - 1)) for s, g in gates.items()}
        if self.along == "gate":
            values_at = lambda gates, part: measured(opened(gates, part), Path())
        else:
            values_at = lambda gates, part: measured(gates, Path(inputs=part))

        def step(total, point):
            part, weight = point
            _, grads = gate_gradients(values_at, gates, jnp.full((batch,), part, dtype))
            return jax.tree.map(lambda t, new: t + weight.astype(t.dtype) * new, total, grads), None

        zeros = {name: (jax.tree.map(jnp.zeros_like, gates), jnp.zeros((batch,), dtype)) for name in base}
        rule = jnp.asarray((points + 1) / 2, dtype), jnp.asarray(weights / 2, dtype)
        grads, _ = jax.lax.scan(step, zeros, rule)
        end, _ = values_at(gates, jnp.ones((batch,), dtype))
        gap = {name: grads[name][1] - (end[name] - base[name]) for name in base}
        return Estimates(base, source, {name: terms for name, (terms, _) in grads.items()}, gap=gap)
