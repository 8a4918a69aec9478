"""The parameters of a transformer, their initialisation, and what is computed before and after the layers."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Bool, Float, Ids, Int, Stream
from mijax.arguments import check_key
from mijax.model.attention import Attention
from mijax.model.block import Block
from mijax.model.config import Config
from mijax.model.experts import ExpertMLP
from mijax.model.mlp import MLP
from mijax.model.model import LayeredModel
from mijax.model.norm import Norm, normalised
from mijax.model.numerics import accumulator
from mijax.model.parameters import check_fit, parameter_dtype
from mijax.model.position import Columns, Frame, Whole, frame, frame_of
from mijax.model.readout import Readout
from mijax.model.sites import Site, transformer_sites
from mijax.model.tap import State, Tap, Visit
from mijax.model.tokens import Tokens, check_tokens
from mijax.model.walk import Body, Layer, walk


class Transformer(LayeredModel):
    """The parameters of a transformer: a pytree whose leaves are arrays only. `mijax.run` runs it.

    Attributes:
        W_E: token embedding.
        W_pos: learned position embedding; `None` for other kinds of positions.
        ln_embed: the norm of the token embedding, or `None`.
        blocks: the layers, each array stacked along a leading axis.
        ln_final: the norm before the unembedding, or `None`.
        W_U: unembedding; `None` where it is tied to `W_E`.
        b_U: its bias, or `None`.
        config: the architecture, a static field.
    """

    W_E: Float[Array, "vocab d_model"]
    W_pos: Float[Array, "ctx d_model"] | None
    ln_embed: Norm | None
    blocks: Block
    ln_final: Norm | None
    W_U: Float[Array, "vocab_out d_model"] | None
    b_U: Float[Array, " vocab_out"] | None
    config: Config = eqx.field(static=True)
    users_code = False

    @property
    def unembedding(self) -> Float[Array, "vocab_out d_model"]:
        """`W_U`, or `W_E` where the two are tied."""
        return self.W_E if self.W_U is None else self.W_U

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of every activation."""
        return accumulator(self.W_E.dtype)

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites of its forward pass, by name."""
        return transformer_sites(self.config)

    @property
    def name(self) -> str:
        """The label in the config."""
        return self.config.name or "unnamed"

    @property
    def layer_bytes(self) -> int:
        """The size of the parameters of one layer, in bytes: of the largest, where they differ."""
        of_all, of_some = self.blocks.split(self.config)
        size = lambda tree, layers: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // max(1, layers)
        kinds = (of_some.mlp, self.config.mlp_layers), (of_some.experts, self.config.expert_layers)
        return size(of_all, self.n_layers) + max(size(tree, len(layers)) for tree, layers in kinds)

    @property
    def d_vocab(self) -> int:
        """The size of the vocabulary."""
        return self.config.d_vocab

    @property
    def n_ctx(self) -> int:
        """The greatest number of tokens of a prompt."""
        return self.config.n_ctx

    def check(self) -> None:
        """Raise `ValueError` for parameters that are not those of the config: see `check_parameters`."""
        check_parameters(self)

    def check_inputs(self, inputs: Any) -> None:
        """Raise `ValueError` for tokens outside the vocabulary, and prompts that are empty or exceed the context."""
        check_tokens(self.d_vocab, self.n_ctx, inputs)

    def bad_inputs(self, inputs: Any) -> Bool[Array, ""]:
        """Whether a token is outside the vocabulary, or a prompt is empty."""
        outside = jnp.any(inputs.mask & ((inputs.ids < 0) | (inputs.ids >= self.d_vocab)))
        return outside | ~jnp.all(jnp.any(jnp.asarray(inputs.mask), axis=1))

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.config.n_layers

    @property
    def causal(self) -> bool:
        """Whether tokens attend to no later tokens."""
        return self.config.causal

    @property
    def has_halves(self) -> bool:
        """Whether a layer's MLP reads the output of its attention, so that a run can begin between them."""
        return self.config.has_halves

    def frame(self, inputs: Any) -> Whole:
        """The positions of a batch."""
        return frame(self.config, inputs, self.dtype)

    def frame_of(self, tokens: Tokens, columns: Int[Array, " pos"], alone: bool = False) -> Columns:
        """The positions of some columns of a batch."""
        return frame_of(self.config, tokens, self.dtype, columns, alone)

    def embed(self, ids: Ids, frame: Frame, tap: Tap, state: State) -> tuple[Stream, State]:
        """The residual stream before the first layer (sites `embed` and `pos_embed`), and the tap's state."""
        visit = Visit(tap, self.sites, frame)
        x = self.W_E[ids].astype(self.dtype)
        x = x if self.config.embed_scale == 1 else x * self.config.embed_scale
        x, state = normalised(self.config, self.ln_embed, x, "ln_embed", visit, state)
        x, state = visit("embed", x, state)
        if self.W_pos is not None:
            pos_embed = self.W_pos[jnp.maximum(frame.positions, 0)].astype(self.dtype)
            pos_embed, state = visit("pos_embed", pos_embed, state)
            x = x + pos_embed
        return x, state

    def layer(self, index: int) -> Layer:
        """One layer, as `walk` passes it to its body."""
        return Layer(self.config, jnp.int32(index), self.blocks.at(self.config, index))

    def walk(self, body: Body, carry: Any, xs: Any = None, **how: Any) -> tuple[Any, Any]:
        """Run `body(layer, carry, x) -> carry, y` on the layers in turn."""
        return walk(self.config, self.blocks, body, carry, xs, **how)

    def final(self, x: Stream, frame: Frame, tap: Tap, state: State) -> tuple[Stream, State]:
        """The stream as the unembedding reads it, and the tap's state."""
        visit = Visit(tap, self.sites, frame)
        x, state = visit("final_in", x, state)
        return normalised(self.config, self.ln_final, x, "ln_final", visit, state)

    def readout(self, final: Stream, tokens: Tokens) -> Readout:
        """The final stream of a batch with the unembedding."""
        return Readout(final, tokens, self.unembedding, self.b_U, self.config.logits_cap)

    def numbers_per_token(self, sites: Iterable[str]) -> int:
        """How many numbers of each computed token a layer has in memory at once, with a tap at `sites`."""
        c, sites = self.config, set(sites)
        copies = any(self.sites[name].per_head for name in sites)
        heads = (c.n_heads + c.n_kv_heads) * c.d_head
        maps = 3 if c.mlp == "gated" else 2
        neurons, out = maps * c.d_mlp * bool(c.mlp_layers), 0
        if c.experts is not None:  # a token is copied for each expert that it uses
            every = "expert_out" in sites or "expert_weights" in sites
            neurons = max(neurons, maps * c.d_expert * c.experts.top_k + 3 * c.experts.shared)
            out = 3 * c.d_model * (c.experts.n if every else c.experts.top_k)
        numbers = 8 * c.d_model + 4 * heads + neurons + out
        return numbers + 3 * c.n_heads * c.d_model * copies

    def numbers_per_batch(self, batch: int, pos: int) -> int:
        """How many numbers of each batch attention has in memory at once, however many tokens are computed."""
        c = self.config
        return batch * pos * (2 * (c.n_heads + 2 * c.n_kv_heads) * c.d_head + c.d_model + 3 * c.n_heads * pos)

    @property
    def products_per_token(self) -> int:
        """How many multiplications a layer takes per token, on average: the size of the matrices that it uses."""
        products = sum(a.size for a in jax.tree.leaves(self.blocks) if a.ndim > 2)
        rule, experts = self.config.experts, self.blocks.experts
        if rule is not None and experts is not None:
            of_experts = sum(a.size for a in (experts.W_in, experts.W_out, experts.W_gate) if a is not None)
            products -= of_experts * (rule.n - rule.top_k) // rule.n
        return products // max(1, self.n_layers)

    def __repr__(self) -> str:
        arrays = [a for a in jax.tree.leaves(self) if eqx.is_array(a)]
        return (
            f"Transformer({self.config.name or 'unnamed'}: {sum(a.size for a in arrays):,} parameters of"
            f" {self.W_E.dtype}, {self.config.differences()}{self.config.origin and f'; {self.config.origin}'})"
        )


def init(config: Config, key: Array, dtype: Any = jnp.float32) -> Transformer:
    """A model with random weights, initialised as GPT-2 is.

    Weights are normal with standard deviation 0.02, divided by `sqrt(2 * n_layers)` for the matrices that write to the
    residual stream; biases are zero, the weights of norms one.

    Args:
        config: the architecture.
        key: a PRNG key of `jax.random`.
        dtype: the dtype of the parameters: float64, float32, float16 or bfloat16.

    Returns:
        The model.

    Raises:
        TypeError: for another dtype, and for what is no random key, a seed say.
        ValueError: for float64 without `jax_enable_x64`.

    >>> import mijax as mj
    >>> config = Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16)
    >>> mj.run(mj.init(config, jax.random.key(0)), [[1, 2, 3]]).logits.shape
    (1, 3, 11)
    """
    check_key(key)
    drawn = _drawn(config, key, parameter_dtype(dtype))
    return dataclasses.replace(drawn, config=config)  # one program serves configs of several names


@eqx.filter_jit
def _drawn(config: Config, key: Array, dtype: Any) -> Transformer:
    """As `init`: one program with one draw, since each draw takes half a second to compile."""
    leaves = jax.tree.leaves(parameter_shapes(config, dtype))
    numbers, start = jax.random.normal(key, (sum(leaf.size for leaf in leaves),), dtype), 0

    def normal(shape: tuple[int, ...], scale: float) -> Array:
        nonlocal start
        begin, start = start, start + math.prod(shape)
        return numbers[begin:start].reshape(shape) * jnp.asarray(scale, dtype)

    return _with_weights(config, dtype, normal)


def _with_weights(config: Config, dtype: Any, weights: Callable[[tuple[int, ...], float], Array]) -> Transformer:
    """A model whose weights are `weights(shape, standard deviation)`, its biases zero and its norms one."""
    c, n = config, config.n_layers
    normal = lambda *shape, scale=0.02: weights(shape, scale)
    bias = lambda exists, *shape: jnp.zeros(shape, dtype) if exists else None
    norm = lambda exists, *stack: Norm.init(c, *stack, dtype=dtype) if exists else None
    ones = lambda exists, *shape: jnp.ones(shape, dtype) if exists else None
    to_stream = 0.02 / max(1, 2 * n) ** 0.5
    attn = Attention(
        W_Q=normal(n, c.d_model, c.n_heads, c.d_head),
        W_K=normal(n, c.d_model, c.n_kv_heads, c.d_head),
        W_V=normal(n, c.d_model, c.n_kv_heads, c.d_head),
        W_O=normal(n, c.n_heads, c.d_head, c.d_model, scale=to_stream),
        b_Q=bias("q" in c.attn_bias, n, c.n_heads, c.d_head),
        b_K=bias("k" in c.attn_bias, n, c.n_kv_heads, c.d_head),
        b_V=bias("v" in c.attn_bias, n, c.n_kv_heads, c.d_head),
        b_O=bias("o" in c.attn_bias, n, c.d_model),
        q_norm=ones(c.qk_norm != "none", n, c.n_heads if c.qk_norm == "all" else 1, c.d_head),
        k_norm=ones(c.qk_norm != "none", n, c.n_kv_heads if c.qk_norm == "all" else 1, c.d_head),
        sinks=bias(c.sinks, n, c.n_heads),
    )
    gated, e = c.mlp == "gated", c.experts

    def maps(*stack: int, width: int) -> dict[str, Any]:
        return {
            "W_in": normal(*stack, c.d_model, width),
            "W_out": normal(*stack, width, c.d_model, scale=to_stream),
            "W_gate": normal(*stack, c.d_model, width) if gated else None,
            "b_in": bias(c.mlp_bias, *stack, width),
            "b_out": bias(c.mlp_bias, *stack, c.d_model),
            "b_gate": bias(c.mlp_bias and gated, *stack, width),
        }

    experts, n_sparse = None, len(c.expert_layers)
    mlp = MLP(**maps(len(c.mlp_layers), width=c.d_mlp)) if c.has_mlp else None
    if e is not None:
        experts = ExpertMLP(
            W_router=normal(n_sparse, c.d_model, e.n),
            b_router=bias(e.router_bias, n_sparse, e.n),
            shared=MLP(**maps(n_sparse, width=e.shared)) if e.shared else None,
            W_shared_gate=normal(n_sparse, c.d_model) if e.shared_gate else None,
            **maps(n_sparse, e.n, width=c.d_expert),
        )
    return Transformer(
        W_E=normal(c.d_vocab, c.d_model),
        W_pos=normal(c.n_ctx, c.d_model) if c.positions == "learned" else None,
        ln_embed=norm(c.embed_norm),
        blocks=Block(
            ln1=norm(c.has_norm("input"), n),
            attn=attn,
            ln1_post=norm(c.has_norm("output"), n),
            ln2=norm(c.has_norm("input") and c.mlp != "none" and not c.shared_norm, n),
            mlp=mlp,
            experts=experts,
            ln2_post=norm(c.has_norm("output") and c.mlp != "none", n),
        ),
        ln_final=norm(c.final_norm),
        W_U=None if c.tied_unembed else normal(c.d_vocab_out, c.d_model),
        b_U=bias(c.unembed_bias, c.d_vocab_out),
        config=config,
    )


def check_parameters(model: Transformer) -> None:
    """Check that a model has exactly the parameters of its config, with their shapes, in one floating point dtype.

    Values are not read: traced arrays, arrays that are not in memory yet (`jax.ShapeDtypeStruct`) and sharded arrays
    are checked alike. The check takes some microseconds for a model with the same shapes and config as one before.

    Args:
        model: the model.

    Raises:
        ValueError: that lists every mismatch; or that says so, where all parameters have one more leading axis, as
            those of models made by `vmap` over `init` have.

    >>> import dataclasses, jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> check_parameters(model)
    >>> check_parameters(dataclasses.replace(model, W_pos=model.W_pos[:2]))
    Traceback (most recent call last):
    ValueError: the model's parameters do not fit its config: W_pos has shape (2, 8), expected (16, 8)
    """
    check_fit(model, parameter_shapes)


def parameter_shapes(config: Config, dtype: Any = jnp.float32) -> Transformer:
    """The model of a config with a `jax.ShapeDtypeStruct` for each parameter.

    Args:
        config: the architecture.
        dtype: the dtype of the parameters.

    >>> parameter_shapes(Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16)).W_E.shape
    (11, 8)
    """
    return jax.eval_shape(lambda: _with_weights(config, dtype, lambda shape, scale: jnp.zeros(shape, dtype)))
