"""One layer. There is no other statement of it: every kind of run calls this one."""

import equinox as eqx

from mijax._types import Stream
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


def block(config: Config, params: Block, x: Stream, frame: Frame, tap: Tap, memory: Memory | None = None) -> Stream:
    """Run one layer (`params` without the layer axis) on the residual stream."""
    x = tap("resid_pre", x)
    after = x + attention(config, params.attn, params.ln1, x, frame, tap, memory)
    if params.mlp is not None and params.ln2 is not None:
        after = after if config.parallel else tap("resid_mid", after)
        after = after + mlp(config, params.mlp, params.ln2, x if config.parallel else after, tap)
    return tap("resid_post", after)
