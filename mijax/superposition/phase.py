"""Phase diagrams: whether a feature is ignored, shares a dimension, or has one, over importance and density.

The last of n features has importance I, the others 1. There are four kinds of diagram: closed forms with unit
norms and no bias, closed forms with the optimal bias, minima over norms, angles and biases, and trained models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from mijax._types import ArrayLike, Float
from mijax.superposition import theory
from mijax.superposition.data import sparse
from mijax.superposition.geometry import DEDICATED, IGNORED, SHARING, UNKNOWN, role
from mijax.superposition.loss import Toy
from mijax.superposition.model import relu_output
from mijax.superposition.train import train


class Phase(NamedTuple):
    """Losses of the candidate configurations over importance and density.

    Attributes:
        losses: `[candidate, importance, density]`.
        roles: the role of the last feature in each candidate: 0 ignored, 1 sharing, 2 dedicated.
    """

    losses: Float[np.ndarray, "candidate importance density"]
    roles: tuple[int, ...]

    @property
    def winner(self) -> np.ndarray:
        """`[importance, density]`: the last feature's role in the candidate of the lowest loss, as in `roles`.

        It is -1, unknown, where the loss of a candidate is NaN, or that of all is infinite.
        """
        winner = np.asarray(self.roles)[self.losses.argmin(0)]
        return np.where(np.isfinite(self.losses.min(0)), winner, UNKNOWN)


def toy(n: int, m: int) -> Callable[..., Toy]:
    """The toy model of a phase diagram, as a function of density and importance.

    Args:
        n: number of features.
        m: number of hidden dimensions.

    Returns:
        A function `(density, importance) -> Toy`, which `train` takes: a `relu_output` model of independent sparse
        features, the last of which has this importance, the others 1.

    >>> toy(3, 2)(0.1, 0.5).weights.tolist()
    [1.0, 1.0, 0.5]
    """

    def make_toy(density: Any, importance: Any) -> Toy:
        weights = jnp.ones(n, jnp.result_type(float)).at[-1].set(importance)
        return Toy(relu_output(n, m), sparse(n, density), weights)

    return make_toy


def _candidates(n: int, m: int) -> dict[str, tuple[int, np.ndarray]]:
    """Configurations by name: the last feature's role, and W with columns of norm 1 or 0."""
    if (n, m) == (2, 1):
        return {
            "last ignored": (IGNORED, np.array([[1.0, 0.0]])),
            "antipodal": (SHARING, np.array([[1.0, -1.0]])),
            "last dedicated": (DEDICATED, np.array([[0.0, 1.0]])),
        }
    if (n, m) == (3, 2):
        angle = 2 * np.pi * np.arange(3) / 3
        return {
            "last ignored": (IGNORED, np.array([[1.0, 0, 0], [0, 1, 0]])),
            "antipodal with the last": (SHARING, np.array([[1.0, 0, 0], [0, 1, -1]])),
            "last dedicated, others antipodal": (DEDICATED, np.array([[1.0, -1, 0], [0, 0, 1]])),
            "last dedicated, another ignored": (DEDICATED, np.array([[1.0, 0, 0], [0, 0, 1]])),
            "triangle": (SHARING, np.stack([np.cos(angle), np.sin(angle)])),
        }
    raise ValueError(f"n={n}, m={m}: configurations are known for n=2, m=1 and n=3, m=2")


def closed_form(n: int, m: int, importance: ArrayLike, density: ArrayLike, *, biased: bool = False) -> Phase:
    """The phase diagram of the closed forms of `mijax.superposition.theory`.

    Args:
        n: number of features; with m, 2 and 1, or 3 and 2.
        m: number of hidden dimensions.
        importance: `[importance]`, importances of the last feature.
        density: `[density]`, densities of all features.
        biased: whether antipodal pairs have their optimal bias instead of none.

    Returns:
        The losses of the candidates.

    Raises:
        ValueError: for other sizes, densities outside [0, 1], or negative importances.

    >>> closed_form(2, 1, [0.5], [0.01, 1.0]).winner.tolist()
    [[1, 0]]
    """
    i, p = np.asarray(importance, float)[:, None], np.asarray(density, float)[None]
    pair = theory.antipodal_biased if biased else theory.antipodal
    if (n, m) == (2, 1):
        losses = [theory.ignored(p, i), pair(p, 1.0, i), theory.ignored(p) + 0 * i]
    elif (n, m) == (3, 2):
        losses = [
            theory.ignored(p, i),
            pair(p, 1.0, i),
            pair(p) + 0 * i,
            theory.ignored(p) + 0 * i,
            theory.triangle(p) * (2 + i) / 3,
        ]
    else:
        raise ValueError(f"n={n}, m={m}: closed forms are known for n=2, m=1 and n=3, m=2")
    return Phase(np.stack(np.broadcast_arrays(*losses)), tuple(r for r, _ in _candidates(n, m).values()))


def free(n: int, m: int, importance: ArrayLike, density: ArrayLike, *, steps: int = 400) -> Phase:
    """The phase diagram of true minima: norms, angles and biases optimised on the exact loss, from each configuration.

    The role of an optimised model is that of its final parameters: a start that moves into another configuration's
    basin counts as that configuration.

    Args:
        n: number of features; with m, 2 and 1, or 3 and 2.
        m: number of hidden dimensions.
        importance: `[importance]`, importances of the last feature.
        density: `[density]`, densities of all features.
        steps: number of optimizer steps (Adam, with a cosine decay from 0.03).

    Returns:
        The lowest loss of each role, infinite where no model ends with it; candidates are roles here.

    Raises:
        ValueError: for other sizes, or densities outside (0, 1].

    >>> free(2, 1, [0.5], [0.01, 1.0], steps=50).winner.tolist()
    [[1, 0]]
    """
    over = {"importance": importance, "density": density}
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.03, steps))
    configurations = _candidates(n, m)
    roles = list(dict.fromkeys(r for r, _ in configurations.values()))
    best = np.full((len(roles), len(np.asarray(importance)), len(np.asarray(density))), np.inf)
    for _, w in configurations.values():
        results = train(_started(n, m, w), over, optimizer=optimizer, steps=steps, batch=None, progress=False)
        final_roles = role(results.W.values)
        for k, r in enumerate(roles):
            best[k] = np.minimum(best[k], np.where(final_roles == r, results.loss.values, np.inf))
    return Phase(best, tuple(roles))


def _started(n: int, m: int, w: np.ndarray) -> Callable[..., Toy]:
    """The toy model with a configuration W as initial parameters, perturbed, since exact zeros are a saddle point."""
    initial = w + 0.02 * np.cos(1.7 * np.arange(w.size)).reshape(w.shape)
    represented = (w**2).sum(0) > 0

    def make_toy(density: Any, importance: Any) -> Toy:
        base = toy(n, m)(density, importance)
        params = {"W": jnp.asarray(initial, jnp.result_type(float)), "b": jnp.where(represented, 0.0, density / 2)}
        return base._replace(model=base.model._replace(init=lambda key: params))

    return make_toy


def agreement(roles: np.ndarray, closed: Phase, true: Phase) -> tuple[float, np.ndarray]:
    """The fraction of cells whose role is the theory's, among the cells where closed form and true minimum agree.

    Where the two differ, in the band between their boundaries, neither role is wrong. Cells where one of them is
    unknown do not count.

    Args:
        roles: `[importance, density]` roles, of trained models for example.
        closed: the diagram of the closed form.
        true: the diagram of true minima.

    Returns:
        The fraction, NaN where they agree nowhere, and `[importance, density]` whether closed form and true minimum
        agree.

    Raises:
        ValueError: for roles and diagrams of different shapes.

    >>> closed = closed_form(2, 1, [0.5], [0.01, 1.0])
    >>> agreement(np.array([[1, 2]]), closed, closed)
    (0.5, array([[ True,  True]]))
    """
    if not np.shape(roles) == closed.winner.shape == true.winner.shape:
        raise ValueError(
            f"roles {np.shape(roles)}, closed form {closed.winner.shape} and true minima {true.winner.shape}: one shape is expected"
        )
    clear = (closed.winner == true.winner) & (closed.winner != UNKNOWN)
    return float((roles == closed.winner)[clear].mean()) if clear.any() else np.nan, clear
