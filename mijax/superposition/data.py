"""Sparse features: pure samplers with explicit keys, and the activity patterns that exact expectations run over.

A batch is `[feature, batch]`: examples are columns, so that a model reads as in the papers, `W x`.
"""

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from mijax._types import Array, ArrayLike, Bool, Float

Sampler = Callable[[PRNGKeyArray, int], Array]


class Patterns(NamedTuple):
    """Which features are active together, and how often; each active one is uniform in [`low`, 1], on its own."""

    active: Bool[np.ndarray, "pattern feature"]
    probability: Float[Array, " pattern"]
    low: float


class Data(NamedTuple):
    """Features with a sampler: `Data(n, sampler)` is all that data of your own takes.

    `sample(key, batch)` gives `[feature, batch]`. Draws that depend on the key alone are shared by all cells of a grid that
    have the same seed; what then depends on a cell's settings (its density) is computed from them. `patterns()` lists what
    exact expectations run over; without it only samples can be taken. `density` is each feature's probability of being active,
    where it is known. `chances` are the probabilities that the data was made from, where these are others (of sets):
    drivers tell of one that is not in (0, 1].
    """

    n: int
    sample: Sampler
    patterns: Callable[[], Patterns] | None = None
    density: Float[Array, " feature"] | None = None
    chances: Float[Array, " event"] | None = None


def sparse(n: int, density: ArrayLike, *, signed: bool = False) -> Data:
    """Independent features: each 0 with probability 1 - p, else uniform in [0, 1], or in [-1, 1] if `signed`.

    `density` is p = 1 - S, one number or one for each of the `n` features. One uniform draw u per feature serves both: the feature is
    active where u < p, and then u / p is uniform in [0, 1]. Elhage et al. 2022. `ValueError` where p is not in (0, 1].

    >>> import jax
    >>> x = sparse(3, 0.5).sample(jax.random.key(0), 1000)
    >>> x.shape, bool(abs((x > 0).mean() - 0.5) < 0.05)
    ((3, 1000), True)
    """
    p = per_feature(density, n, "density")
    check_density(p)

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        u = jax.random.uniform(key, (n, batch))
        return _spread(jnp.where(u < p[:, None], u / p[:, None], 0.0), signed)

    def patterns() -> Patterns:
        return Patterns(_subsets(n), _subset_probability(_subsets(n), p), -1.0 if signed else 0.0)

    return Data(n, sample, patterns, p)


def correlated(n: int, density: ArrayLike, size: int = 2, *, signed: bool = False) -> Data:
    """Sets of `size` neighbouring features that are present together, with probability p; amplitudes are independent.

    >>> import jax
    >>> x = correlated(4, 0.5).sample(jax.random.key(0), 100)
    >>> bool(((x[0] > 0) == (x[1] > 0)).all()), bool(((x[0] > 0) == (x[2] > 0)).all())
    (True, False)
    """
    sets = _sets(n, size)
    p = per_feature(density, sets, "density")
    check_density(p)

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        which, amount = jax.random.split(key)
        active = jnp.repeat(jax.random.uniform(which, (sets, batch)) < p[:, None], size, axis=0)
        return _spread(jnp.where(active, jax.random.uniform(amount, (n, batch)), 0.0), signed)

    def patterns() -> Patterns:
        of_sets = _subsets(sets)
        return Patterns(of_sets.repeat(size, axis=1), _subset_probability(of_sets, p), -1.0 if signed else 0.0)

    return Data(n, sample, patterns, jnp.repeat(p, size))


def anticorrelated(
    n: int, density: ArrayLike, size: int = 2, *, per: Literal["set", "feature"] = "set", signed: bool = False
) -> Data:
    """Sets of `size` neighbouring features of which at most one is present at a time, each as often as the others.

    `density` is that of a set, as in Elhage et al. 2022 (`per="set"`: each feature then has p / size), or that of a feature
    (`per="feature"`: a set is active with probability p * size, which must not exceed 1).

    >>> import jax
    >>> x = anticorrelated(4, 0.9).sample(jax.random.key(0), 100)
    >>> bool((x[0] * x[1] == 0).all()), bool((x[0] * x[2] == 0).all())
    (True, False)
    """
    sets = _sets(n, size)
    if per not in ("set", "feature"):
        raise ValueError(f"per={per!r}: given is the density of a 'set' or of a 'feature'")
    p = per_feature(density, sets, "density") * (size if per == "feature" else 1)
    check_density(p, "density of a set" + (f" (features' density x {size})" if per == "feature" else ""))

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        which, amount = jax.random.split(key)
        u = jax.random.uniform(which, (sets, batch)) * size / p[:, None]  # below `size` where the set is active
        chosen = jnp.repeat(jnp.floor(u), size, axis=0) == jnp.tile(jnp.arange(size, dtype=u.dtype), sets)[:, None]
        return _spread(jnp.where(chosen, jax.random.uniform(amount, (n, batch)), 0.0), signed)

    def patterns() -> Patterns:
        chosen = np.array(list(itertools.product(range(size + 1), repeat=sets)))  # `size` is none of them
        active = (chosen[..., None] == np.arange(size)).reshape(len(chosen), n)
        each = jnp.where(chosen == size, 1 - p[None], p[None] / size)
        return Patterns(active, each.prod(axis=1), -1.0 if signed else 0.0)

    return Data(n, sample, patterns, jnp.repeat(p / size, size), p)


def one_hot(n: int) -> Data:
    """Exactly one feature at a time, each as often as the others, uniform in [0, 1]. Chen et al. 2023.

    >>> import jax
    >>> (one_hot(5).sample(jax.random.key(0), 7) > 0).sum(axis=0).tolist()
    [1, 1, 1, 1, 1, 1, 1]
    """

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        which, amount = jax.random.split(key)
        chosen = jax.random.randint(which, (batch,), 0, n)
        return jax.nn.one_hot(chosen, n, axis=0) * (1 - jax.random.uniform(amount, (1, batch)))  # in (0, 1]

    def patterns() -> Patterns:
        return Patterns(np.eye(n, dtype=bool), jnp.full(n, 1 / n), 0.0)

    return Data(n, sample, patterns, jnp.full(n, 1 / n))


def fixed(examples: ArrayLike) -> Data:
    """The same finite set of examples `[feature, example]` in every step, whatever the batch; `ValueError` for another rank.

    >>> fixed([[1, 0, 0.5], [0, 1, 0.5]]).sample(None, 1000).shape
    (2, 3)
    """
    array = jnp.asarray(examples, jnp.result_type(float))
    if array.ndim != 2:
        raise ValueError(f"examples are [feature, example], given is shape {array.shape}")
    return Data(array.shape[0], lambda key, batch: array)


def unit_norm(x: Float[Array, "feature batch"]) -> Float[Array, "feature batch"]:
    """Each example divided by its Euclidean norm; one without active features stays zero. Henighan et al. 2023.

    >>> import jax.numpy as jnp
    >>> unit_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]])).round(1).tolist()
    [[0.6000000238418579, 0.0], [0.800000011920929, 0.0]]
    """
    norm = jnp.sqrt((x**2).sum(axis=0, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def per_feature(value: ArrayLike, n: int, name: str) -> Float[Array, " feature"]:
    """One number for all, or one for each: as one for each; `ValueError` for anything else."""
    array = jnp.asarray(value, jnp.result_type(float))
    if array.shape not in ((), (n,)):
        raise ValueError(f"{name} of shape {array.shape}: give one number, or one for each of {n}")
    return jnp.broadcast_to(array, (n,))


def check_density(density: ArrayLike, name: str = "density") -> None:
    """Raise `ValueError` where a density is known and not in (0, 1]; what is traced, drivers check beforehand."""
    if not isinstance(density, jax.core.Tracer):
        bad = np.asarray(density)[~((np.asarray(density) > 0) & (np.asarray(density) <= 1))]
        if bad.size:
            raise ValueError(f"{name} {bad.ravel()[0]:g}: a probability p = 1 - S, in (0, 1], is expected")


def _sets(n: int, size: int) -> int:
    if size < 1 or n % size:
        raise ValueError(f"{n} features do not fall into sets of {size}")
    return n // size


def _spread(x: Array, signed: bool) -> Array:
    """[0, 1] to [-1, 1], where active."""
    return jnp.where(x > 0, 2 * x - 1, 0.0) if signed else x


def _subsets(n: int) -> Bool[np.ndarray, "pattern feature"]:
    if n > 12:
        raise ValueError(f"{n} independent features have 2^{n} activity patterns: sample them instead")
    return np.array(list(itertools.product([False, True], repeat=n)))


def _subset_probability(active: np.ndarray, p: Array) -> Float[Array, " pattern"]:
    return jnp.where(active, p[None], 1 - p[None]).prod(axis=1)
