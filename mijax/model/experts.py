"""The MLP of a mixture of experts, some of which all tokens may share. No other module computes it."""

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Int, Stream
from mijax.model.config import Config
from mijax.model.mlp import MLP, activated, mlp
from mijax.model.numerics import einsum
from mijax.model.tap import State, Visit

LARGEST_BLOCK = 128
"""The most tokens that are multiplied with an expert's matrices at once: more leave more places in blocks empty."""


class ExpertMLP(eqx.Module):
    """Weights stacked over layers and experts; the gate's are `None` in dense experts.

    `shared` is the MLP that all tokens use, `W_shared_gate` projects the stream to the factor of its output.
    """

    W_router: Float[Array, "layer d_model expert"]
    b_router: Float[Array, "layer expert"] | None
    W_in: Float[Array, "layer expert d_model d_mlp"]
    W_out: Float[Array, "layer expert d_mlp d_model"]
    W_gate: Float[Array, "layer expert d_model d_mlp"] | None
    b_in: Float[Array, "layer expert d_mlp"] | None
    b_out: Float[Array, "layer expert d_model"] | None
    b_gate: Float[Array, "layer expert d_mlp"] | None
    shared: MLP | None
    W_shared_gate: Float[Array, "layer d_model"] | None


def experts(config: Config, params: ExpertMLP, x: Stream, visit: Visit, state: State) -> tuple[Stream, State]:
    """The output of a mixture of experts.

    Only the experts that a token uses are computed for it, unless a tap is called at `expert_out` or edits
    `expert_weights`: a token may then use others, and the derivative in a weight of zero is the output of its expert.

    Args:
        config: the architecture.
        params: the weights of one layer (no layer axis).
        x: `[batch, pos, d_model]`, the stream that router and experts read, after their norm.
        visit: the tap in this layer.
        state: the tap's state.

    Returns:
        `[batch, pos, d_model]`, the weighted sum of the experts' outputs, with that of the shared MLP; and the tap's
        state.
    """
    out, state = _routed(config, params, x, visit, state)
    if params.shared is None:
        return out, state
    shared, state = mlp(config, params.shared, x, visit, state, "shared_")
    if params.W_shared_gate is not None:
        shared = shared * jax.nn.sigmoid(einsum("bpd,d->bp", x, params.W_shared_gate))[..., None]
    shared, state = visit("shared_out", shared, state)
    return out + shared, state


def _routed(config: Config, params: ExpertMLP, x: Stream, visit: Visit, state: State) -> tuple[Stream, State]:
    """The weighted sum of the experts' outputs, and the tap's state."""
    rule = config.experts
    assert rule is not None
    logits = einsum("bpd,de->bpe", x, params.W_router)
    if params.b_router is not None:
        logits = logits + params.b_router.astype(logits.dtype)[None, None]
    logits, state = visit("router_logits", logits, state)
    weights = rule.weights(logits)
    edited, state = visit("expert_weights", weights, state)
    asked = "expert_out" in visit.tap.sites
    if edited is weights and not asked:  # what only keeps the weights returns them as they are
        return _used(config, params, x, weights, rule.top_k), state
    out = _all(config, params, x)
    out, state = visit("expert_out", out, state) if asked else (out, state)
    return _weighted(edited, out), state


def _expert(config: Config, params: ExpertMLP, x: Float[Array, "row d_model"]) -> Float[Array, "row d_model"]:
    """The output of one expert, whose weights have no axis of experts."""
    affine = lambda x, W, b: einsum("ri,io->ro", x, W) + (0.0 if b is None else b.astype(x.dtype)[None])
    linear = affine(x, params.W_in, params.b_in)
    gate = None if params.W_gate is None else affine(x, params.W_gate, params.b_gate)
    return affine(activated(config, linear, gate), params.W_out, params.b_out)


def _weighted(weights: Float[Array, "*token expert"], out: Float[Array, "*token expert d_model"]) -> Array:
    """The sum of the outputs by their weights, where zero times infinity is zero."""
    unused = (weights == 0)[..., None] & ~jnp.isfinite(out)  # a finite output stays, for the derivative in its weight
    return einsum("...e,...ed->...d", weights, jnp.where(unused, 0.0, out), out.dtype)


def _all(config: Config, params: ExpertMLP, x: Stream) -> Float[Array, "batch pos expert d_model"]:
    """The outputs of all experts for all tokens."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.map(lambda weights: _expert(config, weights, rows), _of_experts(params))
    return jnp.moveaxis(out, 0, 1).reshape(*x.shape[:2], -1, x.shape[-1])


def _of_experts(params: ExpertMLP) -> ExpertMLP:
    """The weights with an axis of experts."""
    others = lambda p: (p.W_router, p.b_router, p.shared, p.W_shared_gate)
    return eqx.tree_at(others, params, (None,) * 4, is_leaf=lambda x: x is None)


def _used(config: Config, params: ExpertMLP, x: Stream, weights: Array, top_k: int) -> Stream:
    """The weighted sum over the `top_k` experts of largest weight, computed for these tokens only.

    Pairs of a token and an expert are sorted by expert, and divided into blocks of one expert each, which are
    multiplied one after the other. Of each expert the last block is filled up.
    """
    n, rows = weights.shape[-1], x.reshape(-1, x.shape[-1])
    chosen, expert = jax.lax.top_k(weights.reshape(-1, n), top_k)  # NaN comes first
    pairs = expert.size
    size = _block_size(pairs, n)
    number, slot, expert_of_block = _blocks(expert.reshape(-1), n, size, min(pairs, pairs // size + n))
    token = jnp.full(expert_of_block.size * size, len(rows), jnp.int32)
    token = token.at[slot].set(jnp.arange(pairs, dtype=jnp.int32) // top_k)
    padded = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])  # a token of zeros fills the blocks
    of_expert = _of_experts(params)

    def multiply(_: None, block: tuple[Array, Array, Array]) -> tuple[None, Array]:
        index, rows, expert = block
        at = lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False)
        run = lambda rows: _expert(config, jax.tree.map(at, of_expert), rows)
        return None, jax.lax.cond(index < number, run, jnp.zeros_like, rows)

    blocks = padded[token].reshape(-1, size, x.shape[-1])
    _, out = jax.lax.scan(multiply, None, (jnp.arange(len(blocks), dtype=jnp.int32), blocks, expert_of_block))
    by_pair = out.reshape(-1, x.shape[-1])[slot].reshape(-1, top_k, x.shape[-1])
    return _weighted(chosen, by_pair).reshape(x.shape)


def _block_size(pairs: int, n: int) -> int:
    """The number of tokens in a block: a power of two, about half of the tokens that an expert has on average."""
    return min(LARGEST_BLOCK, 2 ** max(0, (pairs // (2 * n)).bit_length() - 1))


def _blocks(
    expert: Int[Array, " pair"], n: int, size: int, most: int
) -> tuple[Int[Array, ""], Int[Array, " pair"], Int[Array, " block"]]:
    """The number of blocks in use; the place of each pair in the blocks, one after the other; each block's expert."""
    order = jnp.argsort(expert, stable=True)
    counts = jnp.zeros(n, jnp.int32).at[expert].add(1)
    needed = -(-counts // size)
    first_block, first_pair = jnp.cumsum(needed) - needed, jnp.cumsum(counts) - counts
    rank = jnp.arange(expert.size, dtype=jnp.int32) - first_pair[expert[order]]
    slot = jnp.zeros_like(expert).at[order].set(first_block[expert[order]] * size + rank)
    ends = jnp.cumsum(needed)
    of_block = jnp.searchsorted(ends, jnp.arange(most, dtype=jnp.int32), side="right").astype(jnp.int32)
    return ends[-1], slot, jnp.minimum(of_block, n - 1)
