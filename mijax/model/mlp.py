"""The MLP: dense or gated."""

from collections.abc import Callable

import equinox as eqx
import jax

from mijax._types import Array, Float, Stream
from mijax.model.config import Config
from mijax.model.norm import Norm, normalised
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


def mlp(config: Config, params: MLP, ln2: Norm | None, x: Stream, visit: Visit, state: State) -> tuple[Stream, State]:
    """The output of the MLP.

    Args:
        config: the architecture.
        params: the weights of one layer (no layer axis).
        ln2: the norm before them, where there is one.
        x: `[batch, pos, d_model]`, the residual stream that the MLP reads.
        visit: the tap in this layer.
        state: the tap's state.

    Returns:
        `[batch, pos, d_model]`, the output of the MLP with bias; and the tap's state.
    """
    x, state = visit("mlp_in", x, state)
    x, state = normalised(config, ln2, x, "ln2", visit, state)
    activation, linear = ACTIVATIONS[config.activation], _affine(x, params.W_in, params.b_in)
    if config.mlp == "gated":
        assert params.W_gate is not None
        pre, state = visit("pre", _affine(x, params.W_gate, params.b_gate), state)
        linear, state = visit("pre_linear", linear, state)
        post = activation(pre) * linear
    else:
        pre, state = visit("pre", linear, state)
        post = activation(pre)
    post, state = visit("post", post, state)
    return _affine(post, params.W_out, params.b_out), state


def _affine(x: Array, W: Array, b: Array | None) -> Array:
    out = einsum("bpi,io->bpo", x, W)
    return out if b is None else out + b.astype(out.dtype)[None, None]
