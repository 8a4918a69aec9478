"""The MLP: dense or gated."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Stream
from mijax.model.config import Config
from mijax.model.numerics import einsum
from mijax.model.tap import State, Visit

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),  # the tanh form of GPT-2
}


class MLP(eqx.Module):
    """Weights stacked over layers; the gate's are `None` in a dense MLP."""

    W_in: Float[Array, "layer d_model d_mlp"]
    W_out: Float[Array, "layer d_mlp d_model"]
    W_gate: Float[Array, "layer d_model d_mlp"] | None
    b_in: Float[Array, "layer d_mlp"] | None
    b_out: Float[Array, "layer d_model"] | None
    b_gate: Float[Array, "layer d_mlp"] | None


def mlp(config: Config, params: MLP, x: Stream, visit: Visit, state: State, start: str = "") -> tuple[Stream, State]:
    """The output of the MLP.

    Args:
        config: the architecture.
        params: the weights of one layer (no layer axis).
        x: `[batch, pos, d_model]`, the residual stream that the MLP reads, after its norm.
        visit: the tap in this layer.
        state: the tap's state.
        start: how the names of its sites begin.

    Returns:
        `[batch, pos, d_model]`, the output of the MLP with bias; and the tap's state.
    """
    linear, gate = _affine(x, params.W_in, params.b_in), None
    if config.mlp == "gated":
        assert params.W_gate is not None
        gate, state = visit(start + "pre", _affine(x, params.W_gate, params.b_gate), state)
        linear, state = visit(start + "pre_linear", linear, state)
    else:
        linear, state = visit(start + "pre", linear, state)
    post, state = visit(start + "post", activated(config, linear, gate), state)
    return _affine(post, params.W_out, params.b_out), state


def activated(config: Config, linear: Float[Array, "..."], gate: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """The neurons' activations.

    Args:
        config: says which activation function it is.
        linear: the neurons before it, or the linear branch where there is a gate.
        gate: the gate before it, or `None`.

    Returns:
        The activation of `linear`, or of `gate` times `linear`.
    """
    if config.activation == "clamped_swiglu":  # GPT-OSS
        assert gate is not None
        gate = jnp.minimum(gate, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (jnp.clip(linear, -7.0, 7.0) + 1.0)
    function = ACTIVATIONS[config.activation]
    return function(linear) if gate is None else function(gate) * linear


def _affine(x: Array, W: Array, b: Array | None) -> Array:
    out = einsum("bpi,io->bpo", x, W)
    return out if b is None else out + b.astype(out.dtype)[None, None]
