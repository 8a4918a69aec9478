"""LayerNorm, RMSNorm, or no norm."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Float
from mijax.model.config import Config
from mijax.model.tap import State, Visit


class Norm(eqx.Module):
    """Weight and bias of a norm, stacked over layers inside the blocks."""

    weight: Float[Array, "*layer d_model"]
    bias: Float[Array, "*layer d_model"] | None

    @classmethod
    def init(cls, config: Config, *stack: int, dtype: Any) -> "Norm":
        """A norm whose weights are one and whose biases are zero.

        Args:
            config: says whether a norm has a bias.
            *stack: the sizes of the leading axes: the number of layers, or none.
            dtype: the dtype of the parameters.

        Returns:
            The norm, with arrays `[*stack, d_model]`.
        """
        shape = (*stack, config.d_model)
        return cls(
            weight=jnp.ones(shape, dtype),
            bias=jnp.zeros(shape, dtype) if config.norm_bias else None,
        )


def normalised(
    config: Config, norm: Norm | None, x: Float[Array, "*axes d_model"], name: str, visit: Visit, state: State
) -> tuple[Float[Array, "*axes d_model"], State]:
    """Centre (LayerNorm only), divide by the scale, and apply weight and bias.

    The sites `{name}.scale` and `{name}.normalized` are visited on the way.

    Args:
        config: says which norm it is, and its epsilon.
        norm: weight and bias, without a layer axis; `None` where the model has no norm at this place.
        x: `[*axes, d_model]`, the residual stream.
        name: the norm's name, `"ln1"` say.
        visit: the tap in this layer.
        state: the tap's state.

    Returns:
        `[*axes, d_model]`, the normalised stream (`x` itself where there is no norm); and the tap's state.
    """
    if norm is None:
        return x, state
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    scale, state = visit(f"{name}.scale", jnp.sqrt(jnp.mean(x * x, axis=-1) + config.norm_eps), state)
    x, state = visit(f"{name}.normalized", x / scale[..., None], state)
    return _affine(norm, x), state


def _affine(norm: Norm, x: Float[Array, "*axes d_model"]) -> Float[Array, "*axes d_model"]:
    """Multiply by the weight, and add the bias where the norm has one."""
    expand = lambda p: jnp.expand_dims(p.astype(x.dtype), tuple(range(x.ndim - 1)))
    x = x * expand(norm.weight)
    return x if norm.bias is None else x + expand(norm.bias)


def rms_normalised(x: Float[Array, "..."], eps: float, axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Divide by the root of the mean square over some axes.

    Args:
        x: the vectors.
        eps: added to the mean square.
        axes: the axes of a vector's entries.

    Returns:
        The normalised vectors, without weights.
    """
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)
