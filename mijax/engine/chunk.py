"""The computation on the device: the base run, and chunks of cells, each resumed where it begins to differ from it.

A chunk is a packed list of the tokens that differ from the base run, on which the model's layers are walked.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, Float, Int, Stream
from mijax.forward import Out, run
from mijax.interventions.capturing import Capturing
from mijax.interventions.edits import Edits
from mijax.interventions.rows import CapturingRows, EditingRows
from mijax.model.attention import KVCache
from mijax.model.model import LayeredModel
from mijax.model.position import Packed, Rows, pack
from mijax.model.sites import cached_sites
from mijax.model.tap import Chain, State, Tap
from mijax.model.tokens import Tokens


class Base(NamedTuple):
    """What is kept of the base run for the cells.

    Attributes:
        states: the residual stream at the start of each half-layer, before the edits there.
        cache: keys and values of all layers.
        final: the final stream.
        acts: the activations, in full, at the sites of which the metrics read something.
    """

    states: Float[Array, "half batch pos d_model"]
    cache: KVCache
    final: Stream
    acts: dict[str, Array]


class Chunk(NamedTuple):
    """Cells that run together.

    Attributes:
        start: the first half-layer that is computed.
        rows: the tokens that are computed.
    """

    start: Int[Array, ""]
    rows: Rows


def base_of(
    model: LayeredModel, tokens: Tokens, edits: Any, capture: Iterable[str], read: Sequence[Capturing]
) -> tuple[Out, Base]:
    """Run the base, and keep what cells resume from.

    Args:
        model: the model.
        tokens: the prompts.
        edits: the edits that all cells share.
        capture: sites of which the activations are returned too.
        read: the taps that keep what the metrics read.

    Returns:
        The output of the run, and the states that cells resume from.
    """
    added = [name for name, site in model.sites.items() if site.part == "embedding" and site.added]
    cached, read_sites = cached_sites(model.sites), sorted({site for tap in read for site in tap.sites})
    captured = dict.fromkeys((*added, "resid_pre", "attn_out", "resid_post", *cached, *read_sites, *capture))
    out = run(model, tokens, edits, capture=tuple(captured), taps=read)
    acts = out.acts
    first = sum(acts[site] for site in added)
    before = jnp.concatenate([jnp.asarray(first)[None], acts["resid_post"][:-1]])[: model.n_layers]
    between = acts["resid_pre"] + acts["attn_out"]
    states = jnp.stack([before, between], axis=1).reshape(-1, *before.shape[1:])
    cache = KVCache(*(acts[site] for site in cached))
    return out, Base(states, cache, out.readout.final, {site: acts[site] for site in read_sites})


def run_chunk(
    model: LayeredModel,
    tokens: Tokens,
    base: Base,
    chunk: Chunk,
    edits: Edits,
    stacked: Any,
    columns: Int[Array, "batch read"] | None,
    read: Sequence[Capturing],
) -> tuple[Float[Array, "cell batch pos d_model"], tuple[dict[str, Array], ...]]:
    """Run the cells of a chunk, each from its first edit on.

    Args:
        model: the model.
        tokens: the prompts.
        base: the base run.
        chunk: the half-layer to start at, and the tokens to compute.
        edits: the edits of the cells.
        stacked: for each array of `edits`, whether it has a leading axis of cells.
        columns: the columns at which the metrics read the final stream, the only ones that the last layer computes;
            `None` for all.
        read: the taps that keep what the metrics read of the activations.

    Returns:
        The final stream of every cell, NaN except at `columns`; and what each tap of `read` keeps, with the cells
        in front.
    """
    n, rows = model.n_layers, chunk.rows
    whole = model.frame(tokens)
    packed = pack(whole, rows)
    tap = Chain((EditingRows(edits, stacked), *(_of_rows(model, base, capturing) for capturing in read)))
    layered, rest = tap.per_layer(model.sites)
    x, state = _begin(model, tokens, base, chunk, packed, rest, tap.init(model.sites, packed, base.final))

    def at(frame: Packed) -> Callable[[Any, Any, Any], tuple[Any, None]]:
        def body(layer: Any, carry: Any, inputs: Any) -> tuple[Any, None]:
            attended = 2 * layer.index < chunk.start if model.has_halves else None
            return layer(carry[0], frame, eqx.combine(inputs[0], rest), carry[1], inputs[1], attended), None

        return body

    first = jnp.minimum(chunk.start // 2, jnp.int32(max(0, n - 1)))
    xs = (layered, base.cache)
    if columns is None or n == 0:
        (x, state), _ = model.walk(at(packed), (x, state), xs, first=first)
    else:
        carry, _ = model.walk(at(packed), (x, state), xs, first=first, last=n - 1)
        rows, index = _read_rows(rows, columns)
        last = pack(whole, rows)
        ending = at(dataclasses.replace(packed, last=(last, index)))
        (x, state), _ = ending(model.layer(n - 1), carry, jax.tree.map(lambda a: a[n - 1], xs))
        packed = last
    x, state = model.final(x, packed, rest, state)
    final = rows.unpack(x, base.final)
    _, *acts = rest.result(state, (None,) * len(rest.taps))
    if columns is None:
        return final, tuple(acts)
    is_read = jnp.any(columns[:, :, None] == jnp.arange(final.shape[2], dtype=jnp.int32)[None, None], axis=1)
    return jnp.where(is_read[None, :, :, None], final, jnp.nan), tuple(acts)


def _of_rows(model: LayeredModel, base: Base, tap: Capturing) -> CapturingRows:
    """The tap that keeps, for every cell, what `tap` keeps of a run."""
    layered = frozenset(name for name in tap.sites if model.sites[name].has_layer)
    return CapturingRows(tap.captures, {name: base.acts[name] for name in tap.sites}, layered, model.n_layers)


def _begin(
    model: LayeredModel, tokens: Tokens, base: Base, chunk: Chunk, packed: Packed, tap: Tap, state: State
) -> tuple[Stream, State]:
    """The residual stream of the rows at the chunk's first half-layer, and the tap's state."""
    rows = chunk.rows
    x = base.states[chunk.start, rows.example, rows.column][None]
    if any(model.sites[name].part == "embedding" for name in tap.sites):
        ids = jnp.asarray(tokens.ids)[rows.example, rows.column][None]
        embedded, state = model.embed(ids, packed, tap, state)
        x = jnp.where(chunk.start == 0, embedded, x)
    return x, state


def _read_rows(rows: Rows, read: Int[Array, "batch read"]) -> tuple[Rows, Int[Array, " query"]]:
    """The rows of every cell at the columns that are read, and the index of each among all rows.

    The index is arbitrary where no row computes the token.
    """
    cells, batch, _ = rows.place.shape
    cell, example, nth = jnp.indices((cells, batch, read.shape[1]), dtype=jnp.int32)
    column = jnp.broadcast_to(read, cell.shape)
    among_all = rows.place[cell, example, column]
    number = jnp.arange(cell.size, dtype=jnp.int32).reshape(cell.shape)
    number = jnp.where(among_all >= 0, number, -1)
    place = jnp.full_like(rows.place, -1).at[cell, example, column].set(number)
    if rows.slot.shape[2] == rows.place.shape[2]:  # an edit of attention scores needs all queries
        slot, within = place, column
    else:
        slot, within = jnp.arange(cell.size, dtype=jnp.int32).reshape(cell.shape), nth
    cell, example, column, within, among_all = (x.reshape(-1) for x in (cell, example, column, within, among_all))
    return Rows(cell, example, column, place, slot, within), jnp.maximum(among_all, 0)
