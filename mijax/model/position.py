"""What a run knows of its positions before the first layer: rotary angles, and who may attend to whom."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Asked, Bool, Float, Heads, Int, Stream
from mijax.model.config import Config
from mijax.model.tokens import Tokens


class Rows(NamedTuple):
    """Tokens of many variants (cells) of one batch, packed into one list of rows: what a sweep's chunk computes.

    Each row is the token of one cell, one example, one column of the batch. `place` says which row computes a token;
    -1 where none does, because it is what it is in the base run. Attention takes the queries of each cell and example
    together, in as many slots as the longest has rows: `slot` says which row is in one, `within` in which of these a
    row is.
    """

    cell: Int[Array, " row"]
    example: Int[Array, " row"]
    column: Int[Array, " row"]
    place: Int[Array, "cell batch pos"]
    slot: Int[Array, "cell batch slot"]
    within: Int[Array, " row"]

    def spread(self, x: Float[Array, "1 row *rest"]) -> Float[Array, "cell_batch slot *rest"]:
        """The rows in their slots; anything in an empty one."""
        return jnp.take(x[0], _merged(self.slot), axis=0, mode="clip")

    def fill(
        self, x: Float[Array, "1 row *rest"], base: Float[Array, "batch pos *rest"]
    ) -> Float[Array, "cell_batch pos *rest"]:
        """Each cell's batch of tokens; the base run's where no row computes one."""
        held = jnp.tile(base, (self.place.shape[0], *(1,) * (base.ndim - 1)))
        own = _merged(self.place)
        there = own.reshape(own.shape + (1,) * (x.ndim - 2)) >= 0
        return jnp.where(there, jnp.take(x[0], own, axis=0, mode="clip"), held)

    def unpack(
        self, x: Float[Array, "1 row *rest"], base: Float[Array, "batch pos *rest"]
    ) -> Float[Array, "cell batch pos *rest"]:
        """As `fill`, cell by cell."""
        return self.fill(x, base).reshape(self.place.shape[0], *base.shape)

    def unpack_queries(
        self, x: Float[Array, "cell_batch head slot key"], base: Float[Array, "batch head query key"]
    ) -> Float[Array, "cell batch head query key"]:
        """What is by slot as it is by query; the base run's where no row computes one."""
        cells, batch, slots = self.slot.shape
        by_slot = x.reshape(cells, batch, x.shape[1], slots, x.shape[3])
        index = jnp.take(self.within, self.place, mode="clip")[:, :, None, :, None]
        there = (self.place >= 0)[:, :, None, :, None]
        return jnp.where(there, jnp.take_along_axis(by_slot, index, axis=3), base[None])

    def gather(self, x: Float[Array, "cell_batch slot *rest"]) -> Float[Array, "1 row *rest"]:
        """The rows, out of their slots."""
        batch, slots = self.slot.shape[1:]
        index = (self.cell * batch + self.example) * slots + self.within
        return jnp.take(x.reshape(-1, *x.shape[2:]), index, axis=0, mode="clip")[None]


def _merged(x: Int[Array, "cell batch n"]) -> Int[Array, "cell_batch n"]:
    return x.reshape(-1, x.shape[-1])


class Sight(NamedTuple):
    """What a layer's attention needs to know of positions: which keys a query may see, and cosine and sine of each
    position's angles, where the model rotates."""

    allowed: Bool[Array, "spread query key"]
    rotary: tuple[Float[Array, "batch pos angle"], Float[Array, "batch pos angle"]] | None


class Frame(eqx.Module):
    """The tokens that a run computes, and how their queries find the keys of all tokens that are there.

    `positions` counts real tokens (`PADDING` elsewhere), `keys` does so for the tokens that may be attended to. Attention
    computes keys and values of the frame's tokens, `join`s them to those that are `held` of others, lets queries that are
    `spread` over batches attend, and `gather`s what they bring. What follows it is computed at the tokens that are `read`.
    """

    positions: Int[Array, "batch pos"]
    keys: Int[Array, "spread key"]
    lengths: Int[Array, " spread"]
    sight: Sight

    @property
    def entries(self) -> Int[Array, " pos"] | None:
        """Which of the batch's columns the computed tokens are, where they are not all."""
        return None

    def join(self, computed: Array, held: Array | None) -> Array:
        """Keys or values of all tokens that may be attended to."""
        del held
        return computed

    def spread(self, q: Array) -> Array:
        """The queries by batch, as keys stand."""
        return q

    def gather(self, z: Array) -> Array:
        """The inverse of `spread`."""
        return z

    @property
    def reading(self) -> "tuple[Frame, Int[Array, ' query']] | None":
        """The frame of those tokens of which more than keys and values is needed, with their places among all; `None` for all."""
        return None

    def read(self, x: Stream) -> Asked:
        """The tokens of which more than keys and values is needed."""
        return x if self.reading is None else x[:, self.reading[1]]


class Whole(Frame):
    """All tokens of a batch."""


class Columns(Frame):
    """Some columns of a batch, beside which others are held."""

    columns: Int[Array, " pos"]

    @property
    def entries(self):
        """The columns."""
        return self.columns

    def join(self, computed, held):
        """Those that are computed, put among those that are held; alone, where nothing is."""
        return computed if held is None else held.at[:, self.columns].set(computed)


class Packed(Frame):
    """Rows of many variants of one batch as one example of many positions; attention is over `cell_batch` examples.

    `whole` is the frame of the batch that they are tokens of, and `rows` says which they are.
    """

    rows: Rows
    whole: Whole
    last: "tuple[Packed, Int[Array, ' query']] | None" = None

    def join(self, computed, held):
        """Each variant's batch, the base run's tokens where no row computes one."""
        assert held is not None
        return self.rows.fill(computed, held)

    def spread(self, q):
        """Rows in the slots of their variant's examples."""
        return self.rows.spread(q)

    def gather(self, z):
        """Out of the slots."""
        return self.rows.gather(z)

    @property
    def reading(self):
        """The rows that the last layer is computed at."""
        return self.last


def frame(config: Config, tokens: Tokens, dtype) -> Whole:
    """Compute once per run what every layer needs to know of positions."""
    positions = tokens.positions
    return Whole(positions, positions, jnp.asarray(tokens.lengths), _sight(config, positions, positions, dtype))


def frame_of(config: Config, tokens: Tokens, dtype, columns: Int[Array, " pos"], alone: bool = False) -> Columns:
    """The frame of some columns of a batch, which attend to all columns, or to one another `alone`."""
    positions = tokens.positions[:, columns]
    keys = positions if alone else tokens.positions
    return Columns(positions, keys, jnp.asarray(tokens.lengths), _sight(config, positions, keys, dtype), columns)


def _sight(config: Config, positions: Int[Array, "batch pos"], keys: Int[Array, "batch key"], dtype) -> Sight:
    allowed = jnp.broadcast_to(keys[:, None, :] >= 0, (*positions.shape, keys.shape[1]))
    if config.causal:
        allowed = allowed & (positions[:, :, None] >= keys[:, None, :])
    if config.positions != "rotary":
        return Sight(allowed, None)
    angles = jnp.maximum(positions, 0).astype(dtype)[:, :, None] * jnp.asarray(frequencies(config), dtype)[None, None]
    return Sight(allowed, (jnp.cos(angles), jnp.sin(angles)))


def pack(whole: Whole, rows: Rows) -> Packed:
    """The frame of packed rows of a batch whose own frame is `whole`."""
    cells = rows.place.shape[0]
    tile = lambda x: jnp.tile(x, (cells, *(1,) * (x.ndim - 1)))
    own = lambda x: x[rows.example, rows.column][None]
    rotary = None if whole.sight.rotary is None else (own(whole.sight.rotary[0]), own(whole.sight.rotary[1]))
    example = jnp.arange(whole.keys.shape[0], dtype=jnp.int32)[None, :, None]
    allowed = whole.sight.allowed[example, jnp.take(rows.column, rows.slot, mode="clip")]
    sight = Sight(allowed.reshape(-1, *allowed.shape[2:]), rotary)
    return Packed(own(whole.positions), tile(whole.keys), tile(whole.lengths), sight, rows, whole)


def frequencies(config: Config) -> np.ndarray:
    """The angle per position of each rotated pair (Su et al. 2021), stretched for long contexts if asked.

    >>> frequencies(Config(n_layers=1, d_model=8, n_heads=2, d_vocab=5, n_ctx=4, positions="rotary")).tolist()
    [1.0, 0.01]
    """
    freq = 1.0 / config.rotary_base ** (np.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    scaling = config.rotary_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    turns = scaling.original_n_ctx * freq / (2 * np.pi)  # over the original context
    keep = np.clip((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0, 1)
    return keep * freq + (1 - keep) * freq / scaling.factor


def rotate(config: Config, x: Heads, frame: Frame) -> Heads:
    """Turn the first `rotary_dim` dimensions, pairing dimension i with i + rotary_dim / 2."""
    assert frame.sight.rotary is not None
    cos, sin = (t[:, :, None, :] for t in frame.sight.rotary)
    half = config.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
