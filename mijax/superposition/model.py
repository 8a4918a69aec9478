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
"""The numbers of features and of hidden dimensions that a padded model uses; they may be traced."""


class Model(NamedTuple):
    """A toy model. A custom model is `Model(init, apply)`; the other fields are optional.

    Args:
        init: `init(key)` gives parameters, any pytree.
        apply: `apply(params, x)` gives an output `[feature, batch]` for examples `x [feature, batch]`.
        dims: names of the axes of each parameter, for results.
        affine: `affine(params)` gives the `(A, b)` of a model that is `ReLU(A x + b)`, whose exact expectations
            are cheap.
        possible: whether the used sizes of a padded model are within its shape; drivers raise an error where they
            are not.
    """

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[[Params, Float[Array, "feature batch"]], Float[Array, "feature batch"]]
    dims: Mapping[str, tuple[str, ...]] | None = None
    affine: Callable[[Params], tuple[Array, Array]] | None = None
    possible: ArrayLike = True


def times(matrix: Float[Array, "row column"], x: Float[Array, "column batch"]) -> Float[Array, "row batch"]:
    """The product of two matrices.

    A first matrix of at most 16 entries is multiplied by explicit sums, so that XLA fuses the product with the
    operations around it.

    Args:
        matrix: `[row, column]`.
        x: `[column, batch]`.

    Returns:
        `[row, batch]`.

    >>> import jax.numpy as jnp
    >>> times(jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])).tolist()
    [[11.0]]
    """
    return matrix @ x if matrix.size > 16 else _written_out(matrix, x)


@jax.custom_vjp
def _written_out(matrix: Array, x: Array) -> Array:
    """The product as explicit sums of rows of `x`."""
    rows, columns = matrix.shape
    return jnp.stack([sum((matrix[i, j] * x[j] for j in range(1, columns)), matrix[i, 0] * x[0]) for i in range(rows)])


def _forward(matrix: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _written_out(matrix, x), (matrix, x)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # JAX's derivative of indexing pads each entry's gradient to the whole matrix: ten times slower on CPUs.
    matrix, x = residuals
    return g @ x.T, _written_out(matrix.T, g)


_written_out.defvjp(_forward, _backward)


def relu_output(n: int, m: int, *, used: Used | None = None) -> Model:
    """`ReLU(W^T W x + b)`, `W [m, n]`: the model of Elhage et al. 2022.

    `used` pads, so that models of different sizes run in one call: parameters beyond the used features and hidden
    dimensions are zero, and stay zero in training. With an importance of 0 for the unused features the padded
    model is equivalent to the smaller one.

    Args:
        n: number of features.
        m: number of hidden dimensions, at most n: a bottleneck is not wider than its input.
        used: the numbers of features and of hidden dimensions in use; `None` uses all.

    Returns:
        The model, with parameters `W [m, n]` and `b [n]`.

    Raises:
        ValueError: for an m outside 1 to n, or concrete `used` sizes that are not within n and m, or whose hidden
            dimensions exceed their features.

    >>> import jax
    >>> model = relu_output(5, 2)
    >>> params = model.init(jax.random.key(0))
    >>> params["W"].shape, model.apply(params, jax.numpy.ones((5, 7))).shape
    ((2, 5), (5, 7))
    """
    affine = lambda params: (params["W"].T @ params["W"], params["b"])
    return _tied(n, m, jax.nn.relu, used, affine)


def linear(n: int, m: int, *, used: Used | None = None) -> Model:
    """`W^T W x + b`, which principal component analysis solves. Elhage et al. 2022.

    Args:
        n: number of features.
        m: number of hidden dimensions, at most n.
        used: sizes in use, as in `relu_output`.

    Returns:
        The model, with parameters `W [m, n]` and `b [n]`.

    Raises:
        ValueError: for sizes that `relu_output` refuses.

    >>> import jax.numpy as jnp
    >>> params = {"W": jnp.array([[1.0, -1.0]]), "b": jnp.zeros(2)}
    >>> linear(2, 1).apply(params, jnp.array([[1.0], [0.5]])).tolist()
    [[0.5], [-0.5]]
    """
    return _tied(n, m, lambda x: x, used)


def gelu_output(n: int, m: int, *, used: Used | None = None) -> Model:
    """`GELU(W^T W x + b)`, with the exact GELU.

    Args:
        n: number of features.
        m: number of hidden dimensions, at most n.
        used: sizes in use, as in `relu_output`.

    Returns:
        The model, with parameters `W [m, n]` and `b [n]`.

    Raises:
        ValueError: for sizes that `relu_output` refuses.

    >>> import jax.numpy as jnp
    >>> params = {"W": jnp.array([[1.0, -1.0]]), "b": jnp.zeros(2)}
    >>> bool(gelu_output(2, 1).apply(params, jnp.array([[1.0], [0.5]]))[1, 0] < 0)  # where ReLU gives 0
    True
    """
    return _tied(n, m, lambda x: jax.nn.gelu(x, approximate=False), used)


def top_k_output(n: int, m: int, k: int, *, used: Used | None = None) -> Model:
    """`W^T W x + b`, of which the `k` largest outputs are kept where they are positive; the others are 0.

    Outputs that tie with the k-th largest are kept too.

    Args:
        n: number of features.
        m: number of hidden dimensions, at most n.
        k: number of outputs to keep, at most n.
        used: sizes in use, as in `relu_output`.

    Returns:
        The model, with parameters `W [m, n]` and `b [n]`.

    Raises:
        ValueError: for a k outside 1 to n, or sizes that `relu_output` refuses.

    >>> import jax.numpy as jnp
    >>> params = {"W": jnp.array([[1.0, 0.5]]), "b": jnp.zeros(2)}
    >>> top_k_output(2, 1, 1).apply(params, jnp.array([[1.0], [0.5]])).tolist()
    [[1.25], [0.0]]
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: of {n} outputs between 1 and {n} can be kept")

    def largest(z: Array) -> Array:
        return jnp.where(z >= jax.lax.top_k(z.T, k)[0][None, :, -1], jax.nn.relu(z), 0.0)

    return _tied(n, m, largest, used)


def relu_hidden(n: int, m: int, *, used: Used | None = None) -> Model:
    """`ReLU(W^T ReLU(W x) + b)`: hidden dimensions are neurons, so that the basis is privileged. Elhage et al. 2022.

    Args:
        n: number of features.
        m: number of neurons, at most n.
        used: sizes in use, as in `relu_output`.

    Returns:
        The model, with parameters `W [m, n]` and `b [n]`.

    Raises:
        ValueError: for sizes that `relu_output` refuses.

    >>> import jax.numpy as jnp
    >>> params = {"W": jnp.array([[1.0, -1.0]]), "b": jnp.zeros(2)}
    >>> relu_hidden(2, 1).apply(params, jnp.array([[0.5], [1.0]])).tolist()  # the neuron is off
    [[0.0], [0.0]]
    """
    _check(n, m)

    def apply(params: Params, x: Array) -> Array:
        return jax.nn.relu(times(params["W"].T, jax.nn.relu(times(params["W"], x))) + params["b"][:, None])

    return _padded(Model(_init_tied(n, m, used), apply, _TIED), n, m, used)


def untied(n: int, m: int, *, used: Used | None = None) -> Model:
    """`ReLU(W2 W1 x + b)`: encoder and decoder are independent.

    Args:
        n: number of features.
        m: number of hidden dimensions, at most n.
        used: sizes in use, as in `relu_output`.

    Returns:
        The model, with parameters `W1 [m, n]`, `W2 [n, m]` and `b [n]`.

    Raises:
        ValueError: for sizes that `relu_output` refuses.

    >>> import jax.numpy as jnp
    >>> params = {"W1": jnp.array([[1.0, -1.0]]), "W2": jnp.array([[2.0], [-2.0]]), "b": jnp.zeros(2)}
    >>> untied(2, 1).apply(params, jnp.array([[1.0], [0.5]])).tolist()
    [[1.0], [0.0]]
    """
    _check(n, m)

    def apply(params: Params, x: Array) -> Array:
        return jax.nn.relu(times(params["W2"], times(params["W1"], x)) + params["b"][:, None])

    affine = lambda params: (params["W2"] @ params["W1"], params["b"])
    return _padded(Model(_init_untied(n, m, used), apply, _UNTIED, affine), n, m, used)


def hidden_layer(n: int, m: int, activation: Activation = jax.nn.relu, *, used: Used | None = None) -> Model:
    """`ReLU(W2 act(W1 x) + b)`: a model that computes in its neurons.

    With signed inputs and the target |x| it is the absolute-value model of Elhage et al. 2022.

    Args:
        n: number of features.
        m: number of neurons, which may exceed n.
        activation: act, an elementwise function.
        used: sizes in use, as in `relu_output`; the used neurons may exceed the used features.

    Returns:
        The model, with parameters `W1 [m, n]`, `W2 [n, m]` and `b [n]`.

    Raises:
        ValueError: for concrete `used` sizes that are not within n and m.

    >>> import jax.numpy as jnp
    >>> params = {"W1": jnp.array([[1.0], [-1.0]]), "W2": jnp.array([[1.0, 1.0]]), "b": jnp.zeros(1)}
    >>> hidden_layer(1, 2).apply(params, jnp.array([[-3.0, 2.0]])).tolist()  # |x| from two neurons
    [[3.0, 2.0]]
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
    """The model with all parameters beyond the used sizes set to zero, and without gradient."""
    if used is None:
        return model
    features, hidden = (jnp.asarray(size, jnp.result_type(int)) for size in used)
    in_use = {"feature": jnp.arange(n) < features, "hidden": jnp.arange(m) < hidden}
    possible = (
        (features >= 1) & (features <= n) & (hidden >= 1) & (hidden <= (jnp.minimum(features, m) if bottleneck else m))
    )
    if not isinstance(possible, jax.core.Tracer) and not possible:
        raise ValueError(f"used={features}, {hidden}: not among {n} features and {m} hidden dimensions")

    def cut(params: Params) -> Params:
        axes = {name: [in_use[dim] for dim in dims] for name, dims in (model.dims or {}).items()}
        mask = lambda parts: parts[0] if len(parts) == 1 else parts[0][:, None] & parts[1][None]
        return {name: jnp.where(mask(axes[name]), value, 0.0) for name, value in params.items()}

    affine = None if model.affine is None else lambda params: model.affine(cut(params))  # pyright: ignore[reportOptionalCall]
    return Model(
        lambda key: cut(model.init(key)), lambda params, x: model.apply(cut(params), x), model.dims, affine, possible
    )


def _init_tied(n: int, m: int, used: Used | None) -> Callable[[PRNGKeyArray], Params]:
    return lambda key: {"W": _xavier(key, (m, n), used), "b": jnp.zeros(n)}


def _init_untied(n: int, m: int, used: Used | None) -> Callable[[PRNGKeyArray], Params]:
    def init(key: PRNGKeyArray) -> Params:
        key_1, key_2 = jax.random.split(key)
        return {"W1": _xavier(key_1, (m, n), used), "W2": _xavier(key_2, (m, n), used).T, "b": jnp.zeros(n)}

    return init


def _xavier(key: PRNGKeyArray, shape: tuple[int, int], used: Used | None) -> Float[Array, "hidden feature"]:
    """Normal numbers of variance 2 / (features + hidden dimensions), as in the notebook of Elhage et al. 2022."""
    features, hidden = (jnp.asarray(size, jnp.result_type(float)) for size in used or shape)
    return jax.random.normal(key, shape) * jnp.sqrt(2 / (features + hidden))


def _check(n: int, m: int) -> None:
    if not 1 <= m <= n:
        raise ValueError(f"{m} hidden dimensions for {n} features: a bottleneck has between 1 and {n}")
