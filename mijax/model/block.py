"""One layer. There is no other statement of it: every kind of run calls this one."""

import equinox as eqx
import jax

from mijax._types import Array, Asked, Bool, Stream
from mijax.model.attention import Attention, Memory, attention
from mijax.model.config import Config
from mijax.model.mlp import MLP, mlp
from mijax.model.norm import Norm
from mijax.model.position import Frame
from mijax.model.sites import Tap


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
    frame: Frame,
    tap: Tap,
    memory: Memory | None = None,
    attended: Bool[Array, ""] | None = None,
) -> Asked:
    """Run one layer (`params` without the layer axis) on the residual stream, or what `frame.asked` asks of it.

    Where `attended` is true, `x` holds already what attention adds to it, and the second half alone is run.
    """
    first = lambda x: _attend(config, params, x, frame, tap, memory)
    x, after = first(x) if attended is None else jax.lax.cond(attended, lambda x: (asked(frame, x),) * 2, first, x)
    if frame.asked is not None:
        tap = tap.at(frame.asked[0])
    if params.mlp is not None and params.ln2 is not None:
        after = after if config.parallel else tap("resid_mid", after)
        after = after + mlp(config, params.mlp, params.ln2, x if config.parallel else after, tap)
    return tap("resid_post", after)


def _attend(
    config: Config, params: Block, x: Stream, frame: Frame, tap: Tap, memory: Memory | None
) -> tuple[Asked, Asked]:
    """The stream before and after attention."""
    x = tap("resid_pre", x)
    written = attention(config, params.attn, params.ln1, x, frame, tap, memory)
    x = asked(frame, x)
    return x, x + written


def asked(frame: Frame, x: Stream) -> Asked:
    """The rows of which more than keys and values is needed."""
    return x if frame.asked is None else x[:, frame.asked[1]]
