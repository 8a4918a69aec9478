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
    """The sets of features that are active together, with their probabilities.

    The amplitudes of active features are independent, each uniform in [`low`, 1].

    Args:
        active: `[pattern, feature]`, which features each pattern activates.
        probability: `[pattern]`, the probability of each pattern.
        low: the lower end of an amplitude's interval.
    """

    active: Bool[np.ndarray, "pattern feature"]
    probability: Float[Array, " pattern"]
    low: float


class Data(NamedTuple):
    """Features with a sampler. Custom data is `Data(n, sampler)`; the other fields are optional.

    Draws that depend on the key alone are shared by all cells of a grid that have the same seed. Quantities that
    depend on a cell's settings (such as its density) are computed from these draws.

    Args:
        n: number of features.
        sample: `sample(key, batch)` gives examples `[feature, batch]`.
        patterns: lists the activity patterns that exact expectations run over; without it the data can only be
            sampled.
        density: `[feature]`, the probability that each feature is active, where it is known.
        chances: the probabilities that the data was made from, where these differ from `density` (those of sets).
            Drivers report one outside (0, 1].
    """

    n: int
    sample: Sampler
    patterns: Callable[[], Patterns] | None = None
    density: Float[Array, " feature"] | None = None
    chances: Float[Array, " event"] | None = None


def sparse(n: int, density: ArrayLike, *, signed: bool = False) -> Data:
    """Independent features: each is 0 with probability 1 - p, else uniform in [0, 1], or in [-1, 1] if `signed`.

    One uniform draw u per feature decides activity and amplitude: the feature is active where u < p, and u / p is
    then uniform in [0, 1]. Elhage et al. 2022.

    Args:
        n: number of features.
        density: p = 1 - S, one number, or one for each feature.
        signed: whether amplitudes are uniform in [-1, 1] instead of [0, 1].

    Returns:
        The data, with 2^n activity patterns.

    Raises:
        ValueError: for a p outside (0, 1], or a density of another shape. The patterns raise it for more than 12
            features.

    >>> import jax
    >>> x = sparse(3, 0.5).sample(jax.random.key(0), 1000)
    >>> x.shape, bool(abs((x > 0).mean() - 0.5) < 0.05)
    ((3, 1000), True)
    """
    p = per_feature(density, n, "density")
    _check_density(p)

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        u = jax.random.uniform(key, (n, batch))
        return _spread(jnp.where(u < p[:, None], u / p[:, None], 0.0), signed)

    def patterns() -> Patterns:
        return Patterns(_subsets(n), _subset_probability(_subsets(n), p), -1.0 if signed else 0.0)

    return Data(n, sample, patterns, p)


def correlated(n: int, density: ArrayLike, size: int = 2, *, signed: bool = False) -> Data:
    """Sets of `size` neighbouring features that are present together, with probability p; amplitudes are independent.

    Args:
        n: number of features, a multiple of `size`.
        density: p, one number, or one for each set.
        size: number of features in a set.
        signed: whether amplitudes are uniform in [-1, 1] instead of [0, 1].

    Returns:
        The data, with 2^(n / size) activity patterns.

    Raises:
        ValueError: for an n that is no multiple of `size`, a p outside (0, 1], or a density of another shape. The
            patterns raise it for more than 12 sets.

    >>> import jax
    >>> x = correlated(4, 0.5).sample(jax.random.key(0), 100)
    >>> bool(((x[0] > 0) == (x[1] > 0)).all()), bool(((x[0] > 0) == (x[2] > 0)).all())
    (True, False)
    """
    sets = _sets(n, size)
    p = per_feature(density, sets, "density")
    _check_density(p)

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        activity_key, amplitude_key = jax.random.split(key)
        active = jnp.repeat(jax.random.uniform(activity_key, (sets, batch)) < p[:, None], size, axis=0)
        return _spread(jnp.where(active, jax.random.uniform(amplitude_key, (n, batch)), 0.0), signed)

    def patterns() -> Patterns:
        active_sets = _subsets(sets)
        return Patterns(active_sets.repeat(size, axis=1), _subset_probability(active_sets, p), -1.0 if signed else 0.0)

    return Data(n, sample, patterns, jnp.repeat(p, size))


def anticorrelated(
    n: int, density: ArrayLike, size: int = 2, *, per: Literal["set", "feature"] = "set", signed: bool = False
) -> Data:
    """Sets of `size` neighbouring features of which at most one is present at a time, each as often as the others.

    Args:
        n: number of features, a multiple of `size`.
        density: one probability, or one for each set, of the event that `per` names.
        size: number of features in a set.
        per: "set": `density` is the probability that a set is active, as in Elhage et al. 2022; a feature is then
            active with probability p / size. "feature": it is the probability p that a feature is active; a set is
            then active with probability p * size, which must not exceed 1.
        signed: whether amplitudes are uniform in [-1, 1] instead of [0, 1].

    Returns:
        The data, with (size + 1)^(n / size) activity patterns.

    Raises:
        ValueError: for an n that is no multiple of `size`, another `per`, a set's probability outside (0, 1], or a
            density of another shape.

    >>> import jax
    >>> x = anticorrelated(4, 0.9).sample(jax.random.key(0), 100)
    >>> bool((x[0] * x[1] == 0).all()), bool((x[0] * x[2] == 0).all())
    (True, False)
    """
    sets = _sets(n, size)
    if per not in ("set", "feature"):
        raise ValueError(f"per={per!r}: given is the density of a 'set' or of a 'feature'")
    p = per_feature(density, sets, "density") * (size if per == "feature" else 1)
    _check_density(p, "density of a set" + (f" (features' density x {size})" if per == "feature" else ""))

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        activity_key, amplitude_key = jax.random.split(key)
        u = jax.random.uniform(activity_key, (sets, batch)) * size / p[:, None]  # below `size` where the set is active
        active = jnp.repeat(jnp.floor(u), size, axis=0) == jnp.tile(jnp.arange(size, dtype=u.dtype), sets)[:, None]
        return _spread(jnp.where(active, jax.random.uniform(amplitude_key, (n, batch)), 0.0), signed)

    def patterns() -> Patterns:
        choices = np.array(list(itertools.product(range(size + 1), repeat=sets)))  # `size`: no feature of the set
        active = (choices[..., None] == np.arange(size)).reshape(len(choices), n)
        probabilities = jnp.where(choices == size, 1 - p[None], p[None] / size)
        return Patterns(active, probabilities.prod(axis=1), -1.0 if signed else 0.0)

    return Data(n, sample, patterns, jnp.repeat(p / size, size), p)


def one_hot(n: int) -> Data:
    """Exactly one active feature at a time, each as often as the others, uniform in [0, 1]. Chen et al. 2023.

    Sampled amplitudes are in (0, 1], so that the active feature is never 0.

    Args:
        n: number of features.

    Returns:
        The data, with n activity patterns.

    >>> import jax
    >>> (one_hot(5).sample(jax.random.key(0), 7) > 0).sum(axis=0).tolist()
    [1, 1, 1, 1, 1, 1, 1]
    """

    def sample(key: PRNGKeyArray, batch: int) -> Array:
        feature_key, amplitude_key = jax.random.split(key)
        feature = jax.random.randint(feature_key, (batch,), 0, n)
        return jax.nn.one_hot(feature, n, axis=0) * (1 - jax.random.uniform(amplitude_key, (1, batch)))  # in (0, 1]

    def patterns() -> Patterns:
        return Patterns(np.eye(n, dtype=bool), jnp.full(n, 1 / n), 0.0)

    return Data(n, sample, patterns, jnp.full(n, 1 / n))


def fixed(examples: ArrayLike) -> Data:
    """The same finite set of examples in every step, whatever the batch size.

    Args:
        examples: `[feature, example]`.

    Returns:
        The data, without activity patterns.

    Raises:
        ValueError: for examples that are not of rank 2.

    >>> fixed([[1, 0, 0.5], [0, 1, 0.5]]).sample(None, 1000).shape
    (2, 3)
    """
    array = jnp.asarray(examples, jnp.result_type(float))
    if array.ndim != 2:
        raise ValueError(f"examples are [feature, example], given is shape {array.shape}")
    return Data(array.shape[0], lambda key, batch: array)


def unit_norm(x: Float[Array, "feature batch"]) -> Float[Array, "feature batch"]:
    """Each example divided by its Euclidean norm. Henighan et al. 2023.

    Args:
        x: `[feature, batch]`.

    Returns:
        `[feature, batch]`; an example without active features stays zero.

    >>> import jax.numpy as jnp
    >>> unit_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]])).round(1).tolist()
    [[0.6000000238418579, 0.0], [0.800000011920929, 0.0]]
    """
    norm = jnp.sqrt((x**2).sum(axis=0, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def per_feature(value: ArrayLike, n: int, name: str) -> Float[Array, " feature"]:
    """One number, or one for each feature, as `[n]`.

    Args:
        value: a scalar or `[n]`.
        n: number of features, or of sets.
        name: what the value is called in the error.

    Returns:
        `[n]`, in JAX's default float dtype.

    Raises:
        ValueError: for any other shape.
    """
    array = jnp.asarray(value, jnp.result_type(float))
    if array.shape not in ((), (n,)):
        raise ValueError(f"{name} of shape {array.shape}: give one number, or one for each of {n}")
    return jnp.broadcast_to(array, (n,))


def _check_density(density: ArrayLike, name: str = "density") -> None:
    """Raise `ValueError` for a concrete density outside (0, 1]; drivers check traced ones before they run."""
    if not isinstance(density, jax.core.Tracer):
        bad = np.asarray(density)[~((np.asarray(density) > 0) & (np.asarray(density) <= 1))]
        if bad.size:
            raise ValueError(f"{name} {bad.ravel()[0]:g}: a probability p = 1 - S, in (0, 1], is expected")


def _sets(n: int, size: int) -> int:
    """The number of sets of `size` features."""
    if size < 1 or n % size:
        raise ValueError(f"{n} features do not fall into sets of {size}")
    return n // size


def _spread(x: Array, signed: bool) -> Array:
    """Amplitudes of active features mapped from [0, 1] to [-1, 1] if `signed`."""
    return jnp.where(x > 0, 2 * x - 1, 0.0) if signed else x


def _subsets(n: int) -> Bool[np.ndarray, "pattern feature"]:
    """All 2^n subsets of n features."""
    if n > 12:
        raise ValueError(f"{n} independent features have 2^{n} activity patterns: sample them instead")
    return np.array(list(itertools.product([False, True], repeat=n)))


def _subset_probability(active: np.ndarray, p: Array) -> Float[Array, " pattern"]:
    """The probability of each subset `active [pattern, feature]`, for independent features with `p [feature]`."""
    return jnp.where(active, p[None], 1 - p[None]).prod(axis=1)
