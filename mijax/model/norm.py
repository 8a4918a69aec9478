"""LayerNorm, RMSNorm, or no norm."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from mijax._types import Array, Float
from mijax.model.config import Config
from mijax.model.tap import State, Visit


class Norm(eqx.Module):
    """Weight and bias of a norm, stacked over layers inside the blocks."""

    weight: Float[Array, "*layer d_model"] | None
    bias: Float[Array, "*layer d_model"] | None

    @classmethod
    def init(cls, config: Config, *stack: int, dtype: Any) -> "Norm":
        """A norm whose weights are one and whose biases are zero.

        Args:
            config: says whether a norm has a weight and a bias.
            *stack: the sizes of the leading axes: the number of layers, or none.
            dtype: the dtype of the parameters.

        Returns:
            The norm, with arrays `[*stack, d_model]`.
        """
        shape = (*stack, config.d_model)
        return cls(
            weight=None if config.norm == "none" else jnp.ones(shape, dtype),
            bias=jnp.zeros(shape, dtype) if config.norm_bias else None,
        )


def normalised(
    config: Config, norm: Norm, x: Float[Array, "*axes d_model"], name: str, visit: Visit, state: State
) -> tuple[Float[Array, "*axes d_model"], State]:
    """Centre (LayerNorm only), divide by the scale, and apply weight and bias.

    The sites `{name}.scale` and `{name}.normalized` are visited on the way.

    Args:
        config: says which norm it is, and its epsilon.
        norm: weight and bias, without a layer axis.
        x: `[*axes, d_model]`, the residual stream.
        name: `"ln1"`, `"ln2"` or `"ln_final"`.
        visit: the tap in this layer.
        state: the tap's state.

    Returns:
        `[*axes, d_model]`, the normalised stream (`x` itself where the model has no norms); and the tap's state.
    """
    if config.norm == "none":
        return x, state
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    scale, state = visit(f"{name}.scale", jnp.sqrt(jnp.mean(x * x, axis=-1) + config.norm_eps), state)
    x, state = visit(f"{name}.normalized", x / scale[..., None], state)
    return _affine(norm, x), state


def _affine(norm: Norm, x: Float[Array, "*axes d_model"]) -> Float[Array, "*axes d_model"]:
    """Multiply by the weight and add the bias, where the norm has them."""
    expand = lambda p: jnp.expand_dims(p.astype(x.dtype), tuple(range(x.ndim - 1)))
    x = x if norm.weight is None else x * expand(norm.weight)
    return x if norm.bias is None else x + expand(norm.bias)
