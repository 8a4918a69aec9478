"""One layer. No other module computes it: every kind of run calls `block`, through the walk over layers."""

import dataclasses

import equinox as eqx
import jax

from mijax._types import Array, Asked, Bool, Int, Stream
from mijax.model.attention import Attention, KVCache, attention
from mijax.model.config import Config
from mijax.model.experts import ExpertMLP
from mijax.model.mixed import mlp_or_experts
from mijax.model.mlp import MLP
from mijax.model.norm import Norm, normalised
from mijax.model.tap import State, Visit


class Block(eqx.Module):
    """The parameters of all layers, each array with a leading layer axis.

    `ln1` and `ln2` are the norms before attention and before the MLP, `ln1_post` and `ln2_post` those of their outputs, or
    of the stream after these were added. Where some layers have an MLP and the others experts
    (`Config.dense_layers`), `mlp` and `experts` are stacked over those layers that have them.
    """

    ln1: Norm | None
    attn: Attention
    ln1_post: Norm | None
    ln2: Norm | None
    mlp: MLP | None
    experts: ExpertMLP | None
    ln2_post: Norm | None

    def at(self, config: Config, index: Int[Array, ""] | int) -> "Block":
        """The parameters of one layer, as `block` takes them.

        Args:
            config: the architecture.
            index: the number of the layer.
        """
        of_all, of_some = self.split(config)
        fixed = lambda a: jax.lax.index_in_dim(a, int(index), keepdims=False)
        traced = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
        return eqx.combine(jax.tree.map(fixed if isinstance(index, int) else traced, of_all), of_some)

    def split(self, config: Config) -> tuple["Block", "Block"]:
        """The parameters that all layers have, and those that some layers have, for `equinox.combine`.

        Args:
            config: the architecture.
        """
        nothing = jax.tree.map(lambda _: None, self)
        if not config.dense_layers:
            return self, nothing
        of_some = dataclasses.replace(nothing, mlp=self.mlp, experts=self.experts)
        return dataclasses.replace(self, mlp=nothing.mlp, experts=nothing.experts), of_some


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
        params: the parameters of the layer (no layer axis; MLP and experts as `mlp_or_experts` takes them).
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
    if config.mlp != "none":
        if not config.parallel:
            after, state = visit("resid_mid", after, state)
        x, state = visit("mlp_in", x if config.parallel else after, state)
        ln2 = params.ln1 if config.shared_norm else params.ln2
        x, state = normalised(config, ln2, x, "ln2", visit, state)
        mlp_out, state = mlp_or_experts(config, params.mlp, params.experts, x, visit, state)
        after, state = _add(config, after, mlp_out, params.ln2_post, "mlp_out", visit, state)
    return visit("resid_post", after, state)


def _attend(
    config: Config, params: Block, x: Stream, visit: Visit, state: State, held: KVCache | None
) -> tuple[Asked, Asked, State]:
    """The stream before and after attention, at the positions that the frame reads, and the tap's state."""
    x, state = visit("resid_pre", x, state)
    attn_out, state = attention(config, params.attn, params.ln1, x, visit, state, held)
    x = visit.frame.read(x)
    if visit.frame.reading is not None:
        visit = visit._replace(frame=visit.frame.reading[0])
    after, state = _add(config, x, attn_out, params.ln1_post, "attn_out", visit, state)
    return x, after, state


def _add(
    config: Config, x: Stream, out: Stream, norm: Norm | None, site: str, visit: Visit, state: State
) -> tuple[Stream, State]:
    """The stream after the output of attention or MLP is added, and the tap's state.

    `norm` is that of the output, or of the stream after the addition.
    """
    name = {"attn_out": "ln1_post", "mlp_out": "ln2_post"}[site]
    in_stream = config.norm_at == "stream"
    out, state = normalised(config, None if in_stream else norm, out, name, visit, state)
    out, state = visit(site, out, state)
    return normalised(config, norm if in_stream else None, x + out, name, visit, state)
