"""What every gradient method is: from a metric as a function of gates to one term for each gate."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Float
from mijax.attribution.nodes import Nodes
from mijax.attribution.taps import Path
from mijax.model.sites import Site

Values: TypeAlias = dict[str, Float[Array, " batch"]]
"""By metric."""

Terms: TypeAlias = dict[str, dict[str, Array]]
"""By metric and site, of the shape of the site's gates."""

Measured: TypeAlias = Callable[[dict[str, Array], Path], tuple[Values, Values]]
"""The metrics of each example, as a function of the gates and of what else is done to the run; and those of the source.
Gates other than zero take `Path(opened=True)`."""


class Estimates(NamedTuple):
    """What a method finds: the metrics of the base and the source, and by how much it says that each cell changes them.

    `unsigned` are magnitudes, which are no changes. `gap` is what the terms
    on the path sum to, less what they should sum to.
    """

    runs: tuple[Values, Values]
    terms: Terms
    unsigned: Terms | None = None
    gap: Values | None = None


class Method(eqx.Module):
    """A way of turning gradients with respect to gates into estimates of what patching does."""

    @abc.abstractmethod
    def __call__(self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site]) -> Estimates:
        """The terms at `gates`, which are zeros; `sites` are the model's."""

    def check(self, n_layers: int, nodes: Mapping[str, Nodes], alone: bool) -> None:
        """Raise `ValueError` for cells, or a model, that it has no estimate for; `alone`, where there is no source."""
        del n_layers, nodes, alone

    def path(self, batch: int) -> Path:
        """What is done to the runs that are differentiated, as far as it decides what these keep."""
        del batch
        return Path()


def gate_gradients(
    measured: Callable[..., tuple[Values, Values]], *at: Any
) -> tuple[tuple[Values, Values], dict[str, tuple]]:
    """The metrics, and each one's gradient with respect to every argument. (Examples know nothing of each other, so the
    gradient of their sum is each one's own.)"""
    values, pull, source = jax.vjp(measured, *at, has_aux=True)
    alone = lambda name: {n: jnp.ones_like(v) if n == name else jnp.zeros_like(v) for n, v in values.items()}
    return (values, source), {name: pull(alone(name)) for name in values}
