"""The second-order error of a first-order estimate: the diagonal of the gates' Hessian, by random probes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mijax._types import Array, Int
from mijax.attribution.method import Examples, Measured, Terms, gate_gradients
from mijax.attribution.taps import Path


class Curvature(NamedTuple):
    """The second-order terms, by metric and site.

    Attributes:
        half: half the second derivative of each metric along each gate.
        standard_error: the standard error of `half`, a mean over probes.
    """

    half: Terms
    standard_error: Terms


def curvature(measured: Measured, gates: dict[str, Array], examples: Examples, probes: int) -> Curvature:
    """Estimate the second-order term of every cell's effect with `probes` products of the Hessian and random signs.

    E[v * Hv] is the diagonal of H if the signs v are independent (Hutchinson 1990). The variance of one probe is
    the sum of the squares of the row's other entries, so that it is smaller the fewer sites are requested together.
    The signs of an example depend only on the key and the example's number, not on the other examples of the batch.

    Args:
        measured: the metrics as a function of the gates.
        gates: the gates by site, at which the derivatives are taken.
        examples: the prompts that run together.
        probes: the number of probes, at least two for a standard error.

    Returns:
        Half the diagonal, in the metrics' units, and its standard error.
    """
    slope = lambda gates, along: jax.jvp(lambda g: measured(g, Path())[0], (gates,), (along,))[1]

    def probe(sums, key):
        signs = {
            site: _signs(jax.random.fold_in(key, i), g, examples.numbers) for i, (site, g) in enumerate(gates.items())
        }
        _, product = gate_gradients(lambda gates: (slope(gates, signs), {}), gates)
        terms = {name: {site: signs[site] * p for site, p in by_site.items()} for name, (by_site,) in product.items()}
        return jax.tree.map(lambda s, new: (s[0] + new, s[1] + new**2), sums, terms, is_leaf=_is_pair), None

    zeros = jax.tree.map(lambda g: (jnp.zeros_like(g), jnp.zeros_like(g)), gates)
    init = dict.fromkeys(jax.eval_shape(lambda g: measured(g, Path())[0], gates), zeros)
    sums, _ = jax.lax.scan(probe, init, jax.random.split(examples.key, probes))
    half = jax.tree.map(lambda s: s[0] / (2 * probes), sums, is_leaf=_is_pair)
    error = lambda s: jnp.sqrt(jnp.maximum(s[1] - s[0] ** 2 / probes, 0.0) / (probes * (probes - 1))) / 2
    return Curvature(half, jax.tree.map(error, sums, is_leaf=_is_pair))


def _is_pair(x: object) -> bool:
    return isinstance(x, tuple)


def _signs(key: Array, gate: Array, examples: Int[Array, " batch"]) -> Array:
    draw = lambda example: jax.random.rademacher(jax.random.fold_in(key, example), gate.shape[1:], gate.dtype)
    return jax.vmap(draw)(examples)
