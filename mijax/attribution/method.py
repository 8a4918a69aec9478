"""What every gradient method is: from a metric as a function of gates to one term for each gate."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Int
from mijax.attribution.nodes import Nodes
from mijax.attribution.taps import Path
from mijax.display import ShownAsTree
from mijax.model.sites import Site
from mijax.programs.now import UsersCode

Values: TypeAlias = dict[str, Float[Array, " batch"]]
"""By metric."""

Terms: TypeAlias = dict[str, dict[str, Array]]
"""By metric and site, of the shape of the site's gates."""

Measured: TypeAlias = Callable[[dict[str, Array], Path], tuple[Values, Values]]
"""The metrics of each example, as a function of the gates and of what else is done to the run; and those of the source."""


class Estimates(NamedTuple):
    """What a method estimates, arrays with the examples in front.

    Attributes:
        base: the metrics of the base run.
        source: the metrics of the source run; empty without one.
        terms: by how much patching each cell changes them.
        unsigned: magnitudes that rank cells and are no changes.
        gap: what the terms along a path sum to, less what they should sum to.
        error: the second-order term of each cell, which `terms` leave out.
        error_se: the standard error of `error`.
    """

    base: Values
    source: Values
    terms: Terms
    unsigned: Terms | None = None
    gap: Values | None = None
    error: Terms | None = None
    error_se: Terms | None = None


class Examples(NamedTuple):
    """The prompts that run together.

    Attributes:
        numbers: their numbers among all prompts.
        key: the random key of all prompts.
    """

    numbers: Int[Array, " batch"]
    key: Array


class Method(UsersCode, ShownAsTree):
    """A way of turning gradients with respect to gates into estimates of what patching does; abstract.

    `second_order` says whether it takes second derivatives, for which the backward pass keeps more. `seed` is of its
    random draws.
    """

    second_order = False
    seed = 0

    @abc.abstractmethod
    def __call__(
        self, measured: Measured, gates: dict[str, Array], sites: Mapping[str, Site], examples: Examples
    ) -> Estimates:
        """Estimate.

        Args:
            measured: the metrics as a function of the gates.
            gates: `[batch, ...]` zeros by site, at which to estimate.
            sites: the model's table of sites.
            examples: the prompts that run together.

        Returns:
            The estimates.
        """

    def check(self, n_layers: int, nodes: Mapping[str, Nodes], alone: bool) -> None:
        """Raise `ValueError` for cells, or a model, that it has no estimate for; `alone`, where there is no source."""
        del n_layers, nodes, alone

    def path(self, batch: int) -> Path:
        """What is done to the runs that are differentiated, as far as it decides what these keep."""
        del batch
        return Path()


def gate_gradients(
    measured: Callable[..., tuple[Values, Values]], *at: Any
) -> tuple[tuple[Values, Values], dict[str, tuple[Any, ...]]]:
    """Compute the metrics, and the gradient of each with respect to every argument.

    No example's metric depends on another example, so that the gradient of the sum over examples is each one's own.

    Args:
        measured: a function that returns the metrics, `[batch]` by name, and a result that is not differentiated (the
            metrics of the source run).
        at: its arguments, pytrees of arrays at which the derivatives are taken.

    Returns:
        What `measured` returns; and by metric the gradients, one for each of `at` and of its structure.
    """
    values, pull, source = jax.vjp(measured, *at, has_aux=True)
    alone = lambda name: {n: jnp.ones_like(v) if n == name else jnp.zeros_like(v) for n, v in values.items()}
    return (values, source), {name: pull(alone(name)) for name in values}
