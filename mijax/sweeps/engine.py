"""What runs on the device: the base run, kept; and chunks of cells, each resumed from it where it begins to differ.

State around the one block of the model: a chunk is a packed list of the tokens that differ from the base run.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Int, Stream
from mijax.interventions.tap import Tap
from mijax.model.attention import Memory
from mijax.model.block import block
from mijax.model.config import Config
from mijax.model.numerics import accumulator
from mijax.model.position import Frame, Rows, frame, pack
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer, embed, final_norm
from mijax.run import Edits, run

BEFORE_LAYERS = ("embed", "pos_embed")
AFTER_ATTENTION = (
    "resid_mid",
    "mlp_in",
    "ln2.scale",
    "ln2.normalized",
    "pre",
    "pre_linear",
    "post",
    "mlp_out",
    "resid_post",
)


class Base(NamedTuple):
    """What of the base run the cells need: the stream at each half-layer, before the edits there; keys and values."""

    states: Float[Array, "half batch pos d_model"]
    memory: Memory
    final: Stream


class Chunk(NamedTuple):
    """Cells that run together: from which half-layer on, and which of their tokens."""

    start: Int[Array, ""]
    rows: Rows


def half_layer(config: Config, site: str) -> int:
    """0 where an edit in a layer acts before or in attention, 1 where after; parallel layers have no halves."""
    return int(site in AFTER_ATTENTION and not config.parallel)


def base_capture(config: Config) -> tuple[str, ...]:
    """The sites that `base_of` reads."""
    embedded = ("embed", "pos_embed") if config.positions == "learned" else ("embed",)
    return (*embedded, "resid_pre", "attn_out", "resid_post", "rot_k" if config.positions == "rotary" else "k", "v")


def base_of(
    model: Transformer, tokens: Tokens, edits: Any, capture: Iterable[str]
) -> tuple[Readout, dict[str, Array], Base]:
    """Run the base, under the edits that every cell shares, and keep what cells resume from, and what else is asked."""
    config = model.config
    out = run(model, tokens, edits, capture=tuple(dict.fromkeys((*base_capture(config), *capture))))
    acts = out.acts
    first = sum(acts[site] for site in BEFORE_LAYERS if site in acts)
    before = jnp.concatenate([jnp.asarray(first)[None], acts["resid_post"][:-1]])[: config.n_layers]
    between = acts["resid_pre"] + acts["attn_out"]
    states = jnp.stack([before, between], axis=1).reshape(-1, *before.shape[1:])
    memory = Memory(acts["rot_k" if config.positions == "rotary" else "k"], acts["v"])
    return out.readout, acts, Base(states, memory, out.readout.final)


def run_chunk(
    model: Transformer,
    tokens: Tokens,
    base: Base,
    chunk: Chunk,
    edits: Edits,
    stacked: Any,
    read: Int[Array, "batch read"] | None,
) -> Float[Array, "cell batch pos d_model"]:
    """The final stream of every cell, from its first edit on; NaN at columns that are not in `read`."""
    config, n = model.config, model.config.n_layers
    whole = frame(config, tokens, accumulator(model.W_E.dtype))
    packed = pack(whole, chunk.rows)
    x = _begin(model, tokens, base, chunk, packed, edits, stacked)

    def layer(index, x, packed):
        take = lambda tree: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)
        tap = Tap(config, packed, edits, {}, index, stacked)
        attended = None if config.parallel else 2 * index < chunk.start
        return block(config, take(model.blocks), x, packed, tap, take(base.memory), attended)

    begin = jnp.minimum(chunk.start // 2, jnp.int32(max(0, n - 1)))
    rows = chunk.rows
    if read is None or n == 0:
        x = jax.lax.fori_loop(begin, n, lambda i, x: layer(i, x, packed), x)
    else:
        x = jax.lax.fori_loop(begin, n - 1, lambda i, x: layer(i, x, packed), x)
        rows, index = _asked(rows, read)
        last = pack(whole, rows)
        x, packed = layer(jnp.int32(n - 1), x, packed._replace(asked=(last, index))), last
    x = final_norm(model, x, Tap(config, packed, edits, {}, None, stacked))
    final = rows.fill(x, base.final).reshape(*rows.place.shape, -1)
    if read is None:
        return final
    is_read = jnp.any(read[:, :, None] == jnp.arange(final.shape[2], dtype=jnp.int32)[None, None], axis=1)
    return jnp.where(is_read[None, :, :, None], final, jnp.nan)


def _begin(model, tokens: Tokens, base: Base, chunk: Chunk, packed: Frame, edits, stacked) -> Stream:
    """The rows' stream where the chunk begins."""
    rows = chunk.rows
    x = base.states[chunk.start, rows.example, rows.column][None]
    if any(site in edits for site in BEFORE_LAYERS):
        ids = jnp.asarray(tokens.ids)[rows.example, rows.column][None]
        embedded = embed(model, ids, packed, Tap(model.config, packed, edits, {}, None, stacked))
        x = jnp.where(chunk.start == 0, embedded, x)
    return x


def _asked(rows: Rows, read: Int[Array, "batch read"]) -> tuple[Rows, Int[Array, " query"]]:
    """The rows at the columns that are read, and their places among all rows."""
    cells, batch = rows.place.shape[:2]
    read = jnp.broadcast_to(read[None], (cells, *read.shape))
    index = jnp.take_along_axis(rows.place, read, axis=2).reshape(-1)
    number = jnp.arange(index.size, dtype=jnp.int32).reshape(read.shape)
    grid = jnp.indices((cells, batch), dtype=jnp.int32)
    place = jnp.full(rows.place.shape, -1, jnp.int32)
    place = place.at[grid[0][:, :, None], grid[1][:, :, None], read].set(
        jnp.where(index.reshape(read.shape) >= 0, number, -1)
    )
    cell, example = (jnp.broadcast_to(g[:, :, None], read.shape).reshape(-1) for g in grid)
    if rows.slot.shape[2] == rows.place.shape[2]:  # an edit of scores must find every query
        slot, own = place, read.reshape(-1)
    else:
        slot = number
        own = jnp.broadcast_to(jnp.arange(read.shape[2], dtype=jnp.int32), read.shape).reshape(-1)
    return Rows(cell, example, read.reshape(-1), place, slot, own), jnp.maximum(index, 0)
