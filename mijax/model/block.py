"""One layer. No other module computes it: every kind of run calls `block`, through the walk over layers."""

import equinox as eqx
import jax

from mijax._types import Array, Asked, Bool, Stream
from mijax.model.attention import Attention, KVCache, attention
from mijax.model.config import Config
from mijax.model.mlp import MLP, mlp
from mijax.model.norm import Norm
from mijax.model.tap import State, Visit


class Block(eqx.Module):
    """The parameters of all layers, each array with a leading layer axis."""

    ln1: Norm
    attn: Attention
    ln2: Norm | None
    mlp: MLP | None


def block(
    config: Config,
    params: Block,
    x: Stream,
    visit: Visit,
    state: State,
    held: KVCache | None = None,
    attended: Bool[Array, ""] | None = None,
) -> tuple[Asked, State]:
    """Run one layer.

    Args:
        config: the architecture.
        params: the parameters of the layer (no layer axis).
        x: `[batch, pos, d_model]`, the residual stream before the layer.
        visit: the tap in this layer, with the frame of the tokens of `x`.
        state: the tap's state.
        held: keys and values of tokens that are not computed here.
        attended: where true, `x` already contains the output of the layer's attention, and only the second half of
            the layer is run.

    Returns:
        `[batch, query, d_model]`, the residual stream after the layer at the positions that the frame reads (usually
        all); and the tap's state.
    """
    frame = visit.frame
    first_half = lambda x, state: _attend(config, params, x, visit, state, held)
    if attended is None:
        x, after, state = first_half(x, state)
    else:
        x, after, state = jax.lax.cond(
            attended, lambda x, state: (frame.read(x), frame.read(x), state), first_half, x, state
        )
    if frame.reading is not None:
        visit = visit._replace(frame=frame.reading[0])
    if params.mlp is not None and params.ln2 is not None:
        if not config.parallel:
            after, state = visit("resid_mid", after, state)
        mlp_out, state = mlp(config, params.mlp, params.ln2, x if config.parallel else after, visit, state)
        after = after + mlp_out
    return visit("resid_post", after, state)


def _attend(
    config: Config, params: Block, x: Stream, visit: Visit, state: State, held: KVCache | None
) -> tuple[Asked, Asked, State]:
    """The stream before and after attention, at the positions that the frame reads, and the tap's state."""
    x, state = visit("resid_pre", x, state)
    attn_out, state = attention(config, params.attn, params.ln1, x, visit, state, held)
    x = visit.frame.read(x)
    return x, x + attn_out, state
