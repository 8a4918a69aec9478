"""Toy models as pure functions of their parameters and a batch `x [feature, batch]`, whose columns are examples."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mijax._types import Array, ArrayLike, Float

Params = Any
Activation = Callable[[Array], Array]
Used = tuple[Any, Any]
"""How many features and how many hidden dimensions a padded model uses: numbers, which may be traced."""


class Model(NamedTuple):
    """A toy model: `init(key)` gives parameters (any pytree), `apply(params, x)` an output for each column of `x`.

    `Model(init, apply)` is all that a model of your own takes. `dims` names the axes of its parameters in results.
    `affine(params)` gives the `(A, b)` of a model that is `ReLU(A x + b)`, for which exact expectations are cheap. `possible` is whether
    the sizes that a padded model uses can be: drivers tell where they cannot.
    """

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[[Params, Float[Array, "feature batch"]], Float[Array, "feature batch"]]
    dims: Mapping[str, tuple[str, ...]] | None = None
    affine: Callable[[Params], tuple[Array, Array]] | None = None
    possible: ArrayLike = True


def times(matrix: Float[Array, "row column"], x: Float[Array, "column batch"]) -> Float[Array, "row batch"]:
    """The product of two matrices; where the first is tiny it is written out, so that XLA fuses it with all around it.

    >>> import jax.numpy as jnp
    >>> times(jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])).tolist()
    [[11.0]]
    """
    return matrix @ x if matrix.size > 16 else _written_out(matrix, x)


@jax.custom_vjp
def _written_out(matrix: Array, x: Array) -> Array:
    rows, columns = matrix.shape
    return jnp.stack([sum((matrix[i, j] * x[j] for j in range(1, columns)), matrix[i, 0] * x[0]) for i in range(rows)])


def _forward(matrix: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _written_out(matrix, x), (matrix, x)


def _backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    matrix, x = kept  # JAX's own rule pads where an entry was taken, which XLA's CPU programs do ten times slower
    return g @ x.T, _written_out(matrix.T, g)


_written_out.defvjp(_forward, _backward)


def relu_output(n: int, m: int, *, used: Used | None = None) -> Model:
    """`ReLU(W^T W x + b)`, `W [m, n]`: the model of Elhage et al. 2022.

    `used` pads, so that models of different sizes run in one call: parameters beyond so many features and hidden dimensions
    are zero, and stay so. Give the features beyond an importance of 0, and the model is the small one. `ValueError` where m >
    n: a bottleneck cannot be wider than what passes.

    >>> import jax
    >>> model = relu_output(5, 2)
    >>> params = model.init(jax.random.key(0))
    >>> params["W"].shape, model.apply(params, jax.numpy.ones((5, 7))).shape
    ((2, 5), (5, 7))
    """
    affine = lambda params: (params["W"].T @ params["W"], params["b"])
    return _tied(n, m, jax.nn.relu, used, affine)


def linear(n: int, m: int, *, used: Used | None = None) -> Model:
    """`W^T W x + b`: what principal component analysis solves. Elhage et al. 2022."""
    return _tied(n, m, lambda x: x, used)


def gelu_output(n: int, m: int, *, used: Used | None = None) -> Model:
    """`GELU(W^T W x + b)`, with the exact GELU."""
    return _tied(n, m, lambda x: jax.nn.gelu(x, approximate=False), used)


def top_k_output(n: int, m: int, k: int, *, used: Used | None = None) -> Model:
    """`W^T W x + b` of which the `k` largest outputs are kept, and none that is negative; the others are 0."""
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: of {n} outputs between 1 and {n} can be kept")

    def largest(z: Array) -> Array:
        return jnp.where(z >= jax.lax.top_k(z.T, k)[0][None, :, -1], jax.nn.relu(z), 0.0)

    return _tied(n, m, largest, used)


def relu_hidden(n: int, m: int, *, used: Used | None = None) -> Model:
    """`ReLU(W^T ReLU(W x) + b)`: hidden dimensions are neurons, so that the basis is privileged. Elhage et al. 2022."""
    _check(n, m)

    def apply(params: Params, x: Array) -> Array:
        return jax.nn.relu(times(params["W"].T, jax.nn.relu(times(params["W"], x))) + params["b"][:, None])

    return _padded(Model(_init_tied(n, m, used), apply, _TIED), n, m, used)


def untied(n: int, m: int, *, used: Used | None = None) -> Model:
    """`ReLU(W2 W1 x + b)`, `W1 [m, n]`, `W2 [n, m]`."""
    _check(n, m)

    def apply(params: Params, x: Array) -> Array:
        return jax.nn.relu(times(params["W2"], times(params["W1"], x)) + params["b"][:, None])

    affine = lambda params: (params["W2"] @ params["W1"], params["b"])
    return _padded(Model(_init_untied(n, m, used), apply, _UNTIED, affine), n, m, used)


def hidden_layer(n: int, m: int, activation: Activation = jax.nn.relu, *, used: Used | None = None) -> Model:
    """`ReLU(W2 act(W1 x) + b)`: computes in its neurons, of which there may be more than features.

    With signed inputs and the target |x| it is the absolute-value model of Elhage et al. 2022.
    """

    def apply(params: Params, x: Array) -> Array:
        return jax.nn.relu(times(params["W2"], activation(times(params["W1"], x))) + params["b"][:, None])

    return _padded(Model(_init_untied(n, m, used), apply, _UNTIED), n, m, used, bottleneck=False)


_TIED = {"W": ("hidden", "feature"), "b": ("feature",)}
_UNTIED = {"W1": ("hidden", "feature"), "W2": ("feature", "hidden"), "b": ("feature",)}


def _tied(n: int, m: int, activation: Activation, used: Used | None, affine: Callable | None = None) -> Model:
    _check(n, m)

    def apply(params: Params, x: Array) -> Array:
        return activation(times(params["W"].T, times(params["W"], x)) + params["b"][:, None])

    return _padded(Model(_init_tied(n, m, used), apply, _TIED, affine), n, m, used)


def _padded(model: Model, n: int, m: int, used: Used | None, *, bottleneck: bool = True) -> Model:
    """A model of which what is beyond the used sizes is zero, and has no gradient."""
    if used is None:
        return model
    features, hidden = (jnp.asarray(size, jnp.result_type(int)) for size in used)
    there = {"feature": jnp.arange(n) < features, "hidden": jnp.arange(m) < hidden}
    possible = (
        (features >= 1) & (features <= n) & (hidden >= 1) & (hidden <= (jnp.minimum(features, m) if bottleneck else m))
    )
    if not isinstance(possible, jax.core.Tracer) and not possible:
        raise ValueError(f"used={features}, {hidden}: not among {n} features and {m} hidden dimensions")

    def cut(params: Params) -> Params:
        axes = {name: [there[dim] for dim in own] for name, own in (model.dims or {}).items()}
        mask = lambda own: own[0] if len(own) == 1 else own[0][:, None] & own[1][None]
        return {name: jnp.where(mask(axes[name]), value, 0.0) for name, value in params.items()}

    affine = None if model.affine is None else lambda params: model.affine(cut(params))  # pyright: ignore[reportOptionalCall]
    return Model(
        lambda key: cut(model.init(key)), lambda params, x: model.apply(cut(params), x), model.dims, affine, possible
    )


def _init_tied(n: int, m: int, used: Used | None) -> Callable[[PRNGKeyArray], Params]:
    return lambda key: {"W": _xavier(key, (m, n), used), "b": jnp.zeros(n)}


def _init_untied(n: int, m: int, used: Used | None) -> Callable[[PRNGKeyArray], Params]:
    def init(key: PRNGKeyArray) -> Params:
        first, second = jax.random.split(key)
        return {"W1": _xavier(first, (m, n), used), "W2": _xavier(second, (m, n), used).T, "b": jnp.zeros(n)}

    return init


def _xavier(key: PRNGKeyArray, shape: tuple[int, int], used: Used | None) -> Float[Array, "hidden feature"]:
    """Normal with variance 2 / (features + hidden dimensions), as in the paper's notebook."""
    features, hidden = (jnp.asarray(size, jnp.result_type(float)) for size in used or shape)
    return jax.random.normal(key, shape) * jnp.sqrt(2 / (features + hidden))


def _check(n: int, m: int) -> None:
    if not 1 <= m <= n:
        raise ValueError(f"{m} hidden dimensions for {n} features: a bottleneck has between 1 and {n}")
