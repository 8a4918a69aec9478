"""What runs on the device: the base run, kept; and chunks of cells, each resumed from it where it begins to differ.

State around the one block of the model: a chunk is a packed list of the tokens that differ from the base run.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mijax._types import Array, Asked, Float, Int, Stream
from mijax.interventions.rows import EditingRows
from mijax.model.attention import KVCache
from mijax.model.position import Packed, Rows, pack
from mijax.model.readout import Readout
from mijax.model.sites import cached_sites
from mijax.model.tap import Tap
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer
from mijax.model.walk import Body, Layer
from mijax.run import Edits, run


class Base(NamedTuple):
    """What of the base run the cells need: the stream at each half-layer, before the edits there; keys and values."""

    states: Float[Array, "half batch pos d_model"]
    cache: KVCache
    final: Stream


class Chunk(NamedTuple):
    """Cells that run together: from which half-layer on, and which of their tokens."""

    start: Int[Array, ""]
    rows: Rows


def base_of(
    model: Transformer, tokens: Tokens, edits: Any, capture: Iterable[str]
) -> tuple[Readout, dict[str, Array], Base]:
    """Run the base, under the edits that every cell shares, and keep what cells resume from, and what else is asked."""
    added = [name for name, site in model.sites.items() if site.part == "embedding" and site.added]
    cached = cached_sites(model.sites)
    kept = dict.fromkeys((*added, "resid_pre", "attn_out", "resid_post", *cached, *capture))
    out = run(model, tokens, edits, capture=tuple(kept))
    acts = out.acts
    first = sum(acts[site] for site in added)
    before = jnp.concatenate([jnp.asarray(first)[None], acts["resid_post"][:-1]])[: model.n_layers]
    between = acts["resid_pre"] + acts["attn_out"]
    states = jnp.stack([before, between], axis=1).reshape(-1, *before.shape[1:])
    return out.readout, acts, Base(states, KVCache(*(acts[site] for site in cached)), out.readout.final)


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
    n, rows, tap = model.n_layers, chunk.rows, EditingRows(edits, stacked)
    whole = model.frame(tokens)
    packed = pack(whole, rows)

    def at(frame: Packed) -> Body:
        def body(layer: Layer, x: Stream, held: KVCache) -> tuple[Asked, None]:
            attended = 2 * layer.index < chunk.start if model.has_halves else None
            x, _ = layer(x, frame, tap, None, held, attended)
            return x, None

        return body

    x = _begin(model, tokens, base, chunk, packed, tap)
    first = jnp.minimum(chunk.start // 2, jnp.int32(max(0, n - 1)))
    if read is None or n == 0:
        x, _ = model.walk(at(packed), x, base.cache, first=first)
    else:
        x, _ = model.walk(at(packed), x, base.cache, first=first, last=n - 1)
        rows, index = _read_rows(rows, read)
        last = pack(whole, rows)
        ending = dataclasses.replace(packed, last=(last, index))
        x, _ = at(ending)(model.layer(n - 1), x, jax.tree.map(lambda a: a[n - 1], base.cache))
        packed = last
    x, _ = model.final(x, packed, tap, None)
    final = rows.fill(x, base.final).reshape(*rows.place.shape, -1)
    if read is None:
        return final
    is_read = jnp.any(read[:, :, None] == jnp.arange(final.shape[2], dtype=jnp.int32)[None, None], axis=1)
    return jnp.where(is_read[None, :, :, None], final, jnp.nan)


def _begin(model: Transformer, tokens: Tokens, base: Base, chunk: Chunk, packed: Packed, tap: Tap) -> Stream:
    """The rows' stream where the chunk begins."""
    rows = chunk.rows
    x = base.states[chunk.start, rows.example, rows.column][None]
    if any(model.sites[name].part == "embedding" for name in tap.sites):
        ids = jnp.asarray(tokens.ids)[rows.example, rows.column][None]
        embedded, _ = model.embed(ids, packed, tap, None)
        x = jnp.where(chunk.start == 0, embedded, x)
    return x


def _read_rows(rows: Rows, read: Int[Array, "batch read"]) -> tuple[Rows, Int[Array, " query"]]:
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
