"""What a run knows of its positions before the first layer: rotary angles, and who may attend to whom."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Float, Heads, Int
from mijax.model.config import Config
from mijax.model.tokens import Tokens


class Frame(NamedTuple):
    """The positions of a run, or of those of its tokens that are computed now.

    `positions` counts real tokens (`PADDING` elsewhere), `keys` does so for the tokens that may be attended to,
    `allowed` says which keys a query may see, `rotary` holds cosine and sine of each position's angles, where
    the model rotates. `columns` are the computed tokens' places in the batch, where they are not all.
    """

    positions: Int[Array, "batch pos"]
    keys: Int[Array, "batch key"]
    lengths: Int[Array, " batch"]
    allowed: Bool[Array, "batch pos key"]
    rotary: tuple[Float[Array, "batch pos angle"], Float[Array, "batch pos angle"]] | None
    columns: Int[Array, " pos"] | None = None


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
