"""One layer. There is no other statement of it: every kind of run calls this one, by way of the walk."""

from typing import Any

import equinox as eqx
import jax

from mijax._types import Array, Asked, Bool, Stream
from mijax.model.attention import Attention, KVCache, attention
from mijax.model.config import Config
from mijax.model.mlp import MLP, mlp
from mijax.model.norm import Norm
from mijax.model.tap import Visit


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
    state: Any,
    held: KVCache | None = None,
    attended: Bool[Array, ""] | None = None,
) -> tuple[Asked, Any]:
    """Run one layer (`params` without the layer axis) on the residual stream, or what the frame reads of it.

    `held` are the keys and values of tokens that are not computed. Where `attended` is true, `x` holds already what attention
    adds to it, and the second half alone is run. Gives the stream and the tap's state.
    """
    frame = visit.frame
    first = lambda x, state: _attend(config, params, x, visit, state, held)
    if attended is None:
        x, after, state = first(x, state)
    else:
        x, after, state = jax.lax.cond(
            attended, lambda x, state: (frame.read(x), frame.read(x), state), first, x, state
        )
    if frame.reading is not None:
        visit = visit._replace(frame=frame.reading[0])
    if params.mlp is not None and params.ln2 is not None:
        if not config.parallel:
            after, state = visit("resid_mid", after, state)
        added, state = mlp(config, params.mlp, params.ln2, x if config.parallel else after, visit, state)
        after = after + added
    return visit("resid_post", after, state)


def _attend(
    config: Config, params: Block, x: Stream, visit: Visit, state: Any, held: KVCache | None
) -> tuple[Asked, Asked, Any]:
    """The stream before and after attention, and the tap's state."""
    x, state = visit("resid_pre", x, state)
    added, state = attention(config, params.attn, params.ln1, x, visit, state, held)
    x = visit.frame.read(x)
    return x, x + added, state
