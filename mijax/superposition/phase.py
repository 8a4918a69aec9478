"""Phase diagrams: which of a model's features are ignored, share a dimension, or have one, over importance and density.

The last of n features has importance I, the others 1. Four diagrams side by side: the closed form (unit norms, no bias), with the
bias at its best, with norms and biases free, and trained models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from mijax._types import ArrayLike, Float
from mijax.superposition import theory
from mijax.superposition.data import sparse
from mijax.superposition.geometry import DEDICATED, IGNORED, SHARING, role
from mijax.superposition.loss import Toy
from mijax.superposition.model import relu_output
from mijax.superposition.train import train


class Phase(NamedTuple):
    """Losses of the candidate configurations `[candidate, importance, density]`, and each one's role of the last feature."""

    losses: Float[np.ndarray, "candidate importance density"]
    roles: tuple[int, ...]

    @property
    def winner(self) -> np.ndarray:
        """The role of the last feature in the cheapest configuration: 0 ignored, 1 sharing, 2 dedicated."""
        return np.asarray(self.roles)[self.losses.argmin(0)]


def toy(n: int, m: int) -> Callable[..., Toy]:
    """The toy model of a phase diagram, as a function of density and importance, as `train` takes it."""

    def of(density: Any, importance: Any) -> Toy:
        weights = jnp.ones(n, jnp.result_type(float)).at[-1].set(importance)
        return Toy(relu_output(n, m), sparse(n, density), weights)

    return of


def candidates(n: int, m: int) -> dict[str, tuple[int, np.ndarray]]:
    """Configurations by name: the last feature's role, and W with unit norms. For n=2, m=1 and n=3, m=2."""
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
    """The diagram of the closed forms of `mijax.superposition.theory`; `biased` lets antipodal pairs choose their bias.

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
    return Phase(np.stack(np.broadcast_arrays(*losses)), tuple(r for r, _ in candidates(n, m).values()))


def free(n: int, m: int, importance: ArrayLike, density: ArrayLike, *, steps: int = 400) -> Phase:
    """The diagram of true minima: each configuration is a start from which norms, angles and biases are optimised on the exact loss.

    Where a start flows into another basin, its role is that of what it ends as: then it counts as that one.

    >>> free(2, 1, [0.5], [0.01, 1.0], steps=50).winner.tolist()
    [[1, 0]]
    """
    over = {"importance": importance, "density": density}
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.03, steps))
    own = candidates(n, m)
    roles = list(dict.fromkeys(r for r, _ in own.values()))
    best = np.full((len(roles), len(np.asarray(importance)), len(np.asarray(density))), np.inf)
    for _, w in own.values():
        found = train(_started(n, m, w), over, optimizer=optimizer, steps=steps, batch=None, progress=False)
        ends_as = role(found.W.values)
        for k, r in enumerate(roles):
            best[k] = np.minimum(best[k], np.where(ends_as == r, found.loss.values, np.inf))
    return Phase(best, tuple(roles))


def _started(n: int, m: int, w: np.ndarray) -> Callable[..., Toy]:
    """The toy model that begins at a configuration, off its saddle of exact zeros."""
    begun = w + 0.02 * np.cos(1.7 * np.arange(w.size)).reshape(w.shape)
    represented = (w**2).sum(0) > 0

    def of(density: Any, importance: Any) -> Toy:
        made = toy(n, m)(density, importance)
        params = {"W": jnp.asarray(begun, jnp.result_type(float)), "b": jnp.where(represented, 0.0, density / 2)}
        return made._replace(model=made.model._replace(init=lambda key: params))

    return of


def agreement(found: np.ndarray, closed: Phase, true: Phase) -> tuple[float, np.ndarray]:
    """The fraction of cells whose role is the theory's, of those where closed form and true minimum agree; and which these are.

    Where the two differ, in the band between their boundaries, neither role is wrong.
    """
    clear = closed.winner == true.winner
    return float((found == closed.winner)[clear].mean()), clear
