"""A linear probe: logistic regression on activations."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Float


def logistic_probe(
    x: Float[Array, "example unit"], y: Float[Array, " example"], penalty: float = 1e-2, steps: int = 100
) -> Float[Array, " unit"]:
    """The direction of a logistic regression, by L-BFGS.

    It minimises the mean loss in nats, plus `penalty` / 2 times the squared weights of inputs scaled to a mean
    square of 1. Without a penalty, the weights of a direction that separates the classes are infinite.

    Args:
        x: `[example, unit]`, the inputs.
        y: `[example]`, the classes, 0 or 1.
        penalty: the strength of the L2 penalty.
        steps: the number of steps of L-BFGS.

    Returns:
        `[unit]` weights, zero where `x` does not vary.

    >>> x = jnp.array([[1.0, 0.5], [2.0, -0.5], [-1.0, 0.5], [-2.0, -0.5]])
    >>> w = logistic_probe(x, jnp.array([1.0, 1.0, 0.0, 0.0]))
    >>> bool(w[0] > 10 * abs(w[1]))
    True
    """
    import optax

    centred = x - jnp.mean(x, axis=0, keepdims=True)
    scale, size = jnp.sqrt(jnp.mean(centred**2)), jnp.sqrt(jnp.mean(x**2))
    varies = scale > 10 * jnp.finfo(x.dtype).eps * size  # smaller differences are rounding errors
    scaled = centred / jnp.where(varies, scale, 1.0)

    def loss(w: Array) -> Array:
        logits = scaled @ w[:-1] + w[-1]
        return jnp.mean(jax.nn.softplus(logits) - y * logits) + 0.5 * penalty * jnp.sum(w[:-1] ** 2)

    solver = optax.lbfgs()
    w: Any = jnp.zeros(x.shape[1] + 1, x.dtype)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(w, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # optax's line search counts in mixed integers
        (w, _), _ = cast(Any, jax.lax.scan)(step, (w, solver.init(w)), None, length=steps)
    return jnp.where(varies, w[:-1] / jnp.where(varies, scale, 1.0), 0.0)


def probes(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """The direction of a probe at each place.

    Args:
        positive: `[example, ..., unit]`, activations of the class 1.
        negative: those of the class 0.

    Returns:
        `[..., unit]`: the weights of `logistic_probe` at each place.

    >>> positive = np.array([[[1.0], [2.0]], [[2.0], [1.0]]], np.float32)  # two examples at two places, of one unit
    >>> negative = np.array([[[0.0], [3.0]], [[-1.0], [4.0]]], np.float32)
    >>> np.sign(probes(positive, negative)).tolist()
    [[1.0], [-1.0]]
    """
    x, y = np.concatenate([positive, negative]), np.repeat([1.0, 0.0], [len(positive), len(negative)])
    inner = x.shape[1:]
    by_place = np.moveaxis(x.reshape(len(x), -1, inner[-1]), 1, 0)
    return np.asarray(_by_place(jnp.asarray(by_place), jnp.asarray(y, by_place.dtype))).reshape(inner)


@jax.jit
def _by_place(x: Float[Array, "place example unit"], y: Float[Array, " example"]) -> Float[Array, "place unit"]:
    return jax.lax.map(lambda at_place: logistic_probe(at_place, y), x)
