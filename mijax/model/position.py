"""What a run knows of its positions before the first layer: rotary angles, and who may attend to whom."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Float, Heads, Int
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

    def gather(self, x: Float[Array, "cell_batch slot *rest"]) -> Float[Array, "1 row *rest"]:
        """The rows, out of their slots."""
        batch, slots = self.slot.shape[1:]
        index = (self.cell * batch + self.example) * slots + self.within
        return jnp.take(x.reshape(-1, *x.shape[2:]), index, axis=0, mode="clip")[None]


def _merged(x: Int[Array, "cell batch n"]) -> Int[Array, "cell_batch n"]:
    return x.reshape(-1, x.shape[-1])


class Frame(NamedTuple):
    """The positions of a run, or of those of its tokens that are computed now.

    `positions` counts real tokens (`PADDING` elsewhere), `keys` does so for the tokens that may be attended to,
    `allowed` says which keys a query may see, `rotary` holds cosine and sine of each position's angles, where
    the model rotates. `columns` are the computed tokens' places in the batch, where they are not all.

    Packed rows stand as one example of many positions; attention is then over `cell_batch` examples. `whole` is the
    frame of the batch that they are tokens of, and `asked` the frame of those rows of which more than
    keys and values is needed, with their places among all, where these are fewer.
    """

    positions: Int[Array, "batch pos"]
    keys: Int[Array, "batch key"]
    lengths: Int[Array, " batch"]
    allowed: Bool[Array, "batch pos key"]
    rotary: tuple[Float[Array, "batch pos angle"], Float[Array, "batch pos angle"]] | None
    columns: Int[Array, " pos"] | None = None
    rows: Rows | None = None
    whole: "Frame | None" = None
    asked: "tuple[Frame, Int[Array, ' query']] | None" = None


def frame(config: Config, tokens: Tokens, dtype, columns: Int[Array, " pos"] | None = None) -> Frame:
    """Compute once per run (or for some `columns` of it) what every layer's attention needs to know of positions."""
    keys = tokens.positions
    positions = keys if columns is None else keys[:, columns]
    allowed = jnp.broadcast_to(keys[:, None, :] >= 0, (*positions.shape, keys.shape[1]))
    if config.causal:
        allowed = allowed & (positions[:, :, None] >= keys[:, None, :])
    rotary = None
    if config.positions == "rotary":
        angles = (
            jnp.maximum(positions, 0).astype(dtype)[:, :, None] * jnp.asarray(frequencies(config), dtype)[None, None]
        )
        rotary = jnp.cos(angles), jnp.sin(angles)
    return Frame(positions, keys, jnp.asarray(tokens.lengths), allowed, rotary, columns)


def pack(whole: Frame, rows: Rows) -> Frame:
    """The frame of packed rows of a batch whose own frame is `whole`."""
    cells = rows.place.shape[0]
    tile = lambda x: jnp.tile(x, (cells, *(1,) * (x.ndim - 1)))
    own = lambda x: x[rows.example, rows.column][None]
    rotary = None if whole.rotary is None else (own(whole.rotary[0]), own(whole.rotary[1]))
    example = jnp.arange(whole.keys.shape[0], dtype=jnp.int32)[None, :, None]
    allowed = whole.allowed[example, jnp.take(rows.column, rows.slot, mode="clip")]
    return Frame(
        own(whole.positions), tile(whole.keys), tile(whole.lengths), allowed.reshape(-1, *allowed.shape[2:]), rotary,
        rows=rows, whole=whole,
    )  # fmt: skip


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
    assert frame.rotary is not None
    cos, sin = (t[:, :, None, :] for t in frame.rotary)
    half = config.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
