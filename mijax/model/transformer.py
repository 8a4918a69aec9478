"""The parameters of a transformer, fresh ones, and what stands before and after the layers."""

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Ids, Stream
from mijax.model.attention import Attention
from mijax.model.block import Block
from mijax.model.config import Config
from mijax.model.mlp import MLP
from mijax.model.norm import Norm, normalise
from mijax.model.numerics import accumulator
from mijax.model.position import Frame
from mijax.model.sites import Tap


class Transformer(eqx.Module):
    """A transformer's parameters: a pytree of arrays and nothing else. `mijax.run` runs it.

    The layers' arrays are stacked along a leading axis. `W_U` is `None` where the unembedding is tied
    to `W_E`.
    """

    W_E: Float[Array, "vocab d_model"]
    W_pos: Float[Array, "ctx d_model"] | None
    blocks: Block
    ln_final: Norm
    W_U: Float[Array, "vocab d_model"] | None
    b_U: Float[Array, " vocab"] | None
    config: Config = eqx.field(static=True)

    @property
    def unembedding(self) -> Float[Array, "vocab d_model"]:
        """`W_U`, or what it is tied to."""
        return self.W_E if self.W_U is None else self.W_U

    def __repr__(self):
        arrays = [a for a in jax.tree.leaves(self) if eqx.is_array(a)]
        return (
            f"Transformer({self.config.name or 'unnamed'}: {sum(a.size for a in arrays):,} parameters, {self.config})"
        )


def init(config: Config, key: Array, dtype=jnp.float32) -> Transformer:
    """A fresh model: normal weights of scale 0.02, what writes to the stream scaled down by depth (GPT-2).

    >>> import mijax as mj
    >>> config = Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16)
    >>> mj.run(mj.init(config, jax.random.key(0)), [[1, 2, 3]]).logits.shape
    (1, 3, 11)
    """
    c, n = config, config.n_layers
    keys = iter(jax.random.split(key, 10))
    normal = lambda *shape, scale=0.02: jax.random.normal(next(keys), shape, dtype) * jnp.asarray(scale, dtype)
    bias = lambda wanted, *shape: jnp.zeros(shape, dtype) if wanted else None
    norm = lambda *stack: Norm.init(c, *stack, dtype=dtype)
    to_stream = 0.02 / max(1, 2 * n) ** 0.5
    attn = Attention(
        W_Q=normal(n, c.d_model, c.n_heads, c.d_head),
        W_K=normal(n, c.d_model, c.n_kv_heads, c.d_head),
        W_V=normal(n, c.d_model, c.n_kv_heads, c.d_head),
        W_O=normal(n, c.n_heads, c.d_head, c.d_model, scale=to_stream),
        b_Q=bias(c.qkv_bias, n, c.n_heads, c.d_head),
        b_K=bias(c.qkv_bias, n, c.n_kv_heads, c.d_head),
        b_V=bias(c.qkv_bias, n, c.n_kv_heads, c.d_head),
        b_O=bias(c.attn_out_bias, n, c.d_model),
    )
    gated = c.mlp == "gated"
    mlp = None if c.mlp == "none" else MLP(
        W_in=normal(n, c.d_model, c.d_mlp),
        W_out=normal(n, c.d_mlp, c.d_model, scale=to_stream),
        W_gate=normal(n, c.d_model, c.d_mlp) if gated else None,
        b_in=bias(c.mlp_bias, n, c.d_mlp),
        b_out=bias(c.mlp_bias, n, c.d_model),
        b_gate=bias(c.mlp_bias and gated, n, c.d_mlp),
    )  # fmt: skip
    return Transformer(
        W_E=normal(c.d_vocab, c.d_model),
        W_pos=normal(c.n_ctx, c.d_model) if c.positions == "learned" else None,
        blocks=Block(ln1=norm(n), attn=attn, ln2=norm(n) if mlp else None, mlp=mlp),
        ln_final=norm(),
        W_U=None if c.tied_unembed else normal(c.d_vocab, c.d_model),
        b_U=bias(c.unembed_bias, c.d_vocab),
        config=config,
    )


def embed(model: Transformer, ids: Ids, frame: Frame, tap: Tap) -> Stream:
    """The residual stream before the first layer."""
    dtype = accumulator(model.W_E.dtype)
    x = tap("embed", model.W_E[ids].astype(dtype))
    if model.W_pos is not None:
        x = x + tap("pos_embed", model.W_pos[jnp.maximum(frame.positions, 0)].astype(dtype))
    return x


def final_norm(model: Transformer, x: Stream, tap: Tap) -> Stream:
    """The stream as the unembedding reads it."""
    return normalise(model.config, model.ln_final, x, "ln_final", tap)
