"""Attribution patching: every cell of a patching grid from one gradient (Nanda 2023; Syed et al. 2023)."""

from collections.abc import Mapping

from mijax._types import Array
from mijax.attribution.method import Estimates, Measured, Method, gate_gradients
from mijax.attribution.taps import Path
from mijax.model.sites import Site


class AtP(Method):
    """The gradient with respect to a gate between the base's and the source's activations, at the base.

    It is the effect of patching to first order in the difference of the activations: exact on a linear model. It
    misses effects where attention is saturated, and where those of several paths cancel. Without a source it is
    gradient x input, with the sign of an ablation.
    """

    def __call__(self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site]) -> Estimates:
        """Take two forward passes and one backward."""
        runs, grads = gate_gradients(lambda gates: measured(gates, Path()), gates)
        return Estimates(runs, {name: terms for name, (terms,) in grads.items()})
