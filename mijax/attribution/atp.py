"""Attribution patching: every cell of a patching grid from one gradient (Nanda 2023; Syed et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import numpy as np

from mijax._types import Array
from mijax.arguments import whole_number
from mijax.attribution.curvature import curvature
from mijax.attribution.method import Estimates, Examples, Measured, Method, gate_gradients
from mijax.attribution.taps import Path
from mijax.model.sites import Site


def _seed(value: Any) -> Any:
    value = value.item() if isinstance(value, np.ndarray) and not value.ndim else value
    whole_number("seed", value)
    return np.asarray(value)  # an array, so that another seed compiles nothing


class AtP(Method):
    """The gradient with respect to a gate between the base's and the source's activations, at the base.

    It is the effect of patching to first order in the difference of the activations: exact on a linear model. It
    misses effects where attention is saturated, and where those of several paths cancel. Without a source it is
    gradient x input, with the sign of an ablation.

    With `probes` it also estimates its own second-order error, `<site>.error` in the result, with the standard error
    `<site>.error_se`: what the exact effect exceeds the estimate by where cells are nearly quadratic. A metric that is
    least at the base, such as a divergence from the base's own logits, is all second order. What has no curvature at
    the base either, such as saturated attention, only `mijax.Verify` sees.

    Args:
        probes: the number of random probes, each about two backward passes; 0, or at least 2 for a standard error.
        seed: the seed of the probes.

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: for negative numbers, and a single probe.

    >>> AtP(probes=16)
    AtP(probes=16)
    """

    users_code = False
    probes: int = eqx.field(static=True, default=0)
    seed: Any = eqx.field(converter=_seed, default=0)

    def __check_init__(self) -> None:
        whole_number("probes", self.probes)
        if self.probes == 1:
            raise ValueError("a standard error takes at least two probes, given probes=1")

    def __repr__(self) -> str:
        shown = {"probes": self.probes, "seed": self.seed}
        return f"AtP({', '.join(f'{name}={value}' for name, value in shown.items() if not _is_zero(value))})"

    @property
    def second_order(self) -> bool:
        """With probes."""
        return self.probes > 0

    def __call__(
        self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site], examples: Examples
    ) -> Estimates:
        """Take two forward passes and one backward; two more backward passes for each probe."""
        del sites
        (base, source), grads = gate_gradients(lambda gates: measured(gates, Path()), gates)
        estimates = Estimates(base, source, {name: terms for name, (terms,) in grads.items()})
        if not self.probes:
            return estimates
        error, error_se = curvature(measured, gates, examples, self.probes)
        return estimates._replace(error=error, error_se=error_se)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | np.ndarray) and int(value) == 0
