"""Rotary positions (Su et al. 2021): which dimensions of queries and keys are rotated, and how fast."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Float, Heads, Int
from mijax.model.fields import check_fields


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    A frequency that turns at most `low_freq` times over the original context is divided by `factor`, one that turns
    at least `high_freq` times is kept.

    Args:
        kind: what is done with the frequencies between: `"linear"` divides all frequencies; `"llama3"` interpolates
            linearly in the number of turns; `"yarn"` (Peng et al. 2023) linearly in the number of the dimension.
        factor: by what frequencies are divided.
        low_freq: turns over the original context up to which a frequency is low (`"llama3"`, `"yarn"`).
        high_freq: turns over the original context from which on a frequency is kept (`"llama3"`, `"yarn"`).
        original_n_ctx: the context length, in tokens, before stretching (`"llama3"`, `"yarn"`).
        attention_factor: by what rotated queries and keys are multiplied (`"yarn"`).
        truncate: whether the first and the last dimension between are rounded outwards to whole numbers (`"yarn"`).

    Raises:
        ValueError: naming every invalid field; all numbers must be positive and finite, and `high_freq` above
            `low_freq`.

    >>> RotaryScaling("linear", factor=4.0).factor
    4.0
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_n_ctx: int = 8192
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        """Check all fields."""
        faults = list(check_fields(self).values())
        if not faults and self.high_freq <= self.low_freq:
            faults.append(f"high_freq={self.high_freq} must be above low_freq={self.low_freq}")
        if faults:
            raise ValueError("invalid RotaryScaling: " + "; ".join(faults))


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions: pairs of dimensions of queries and keys are rotated by an angle that grows with the position.

    Args:
        base: base of the frequencies.
        dim: how many of the `d_head` dimensions are rotated; 0 for all.
        scaling: how the frequencies are stretched for long contexts.

    Raises:
        ValueError: naming every invalid field.

    >>> Rotary(base=500_000.0).dim
    0
    """

    base: float = 10_000.0
    dim: int = 0  # 0: d_head
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        """Check all fields."""
        faults = list(check_fields(self).values())
        if not faults and self.scaling is not None and self.scaling.kind == "yarn" and self.base <= 1:
            faults.append(f"base={self.base} must be above 1 for yarn")
        if faults:
            raise ValueError("invalid Rotary: " + "; ".join(faults))


def frequencies(rotary: Rotary) -> np.ndarray:
    """The rotary frequencies, stretched for long contexts where `rotary.scaling` says so.

    Args:
        rotary: the rotary positions, with `dim` above 0.

    Returns:
        `[dim / 2]`, the angle per position of each rotated pair of dimensions, in radians.

    >>> frequencies(Rotary(dim=4)).tolist()
    [1.0, 0.01]
    """
    freq = 1.0 / rotary.base ** (np.arange(0, rotary.dim, 2) / rotary.dim)
    scaling = rotary.scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_n_ctx * freq / (2 * np.pi)  # number of turns over the original context
        keep = np.clip((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0, 1)
    else:
        keep = 1 - _ramp(rotary, scaling)
    return keep * freq + (1 - keep) * freq / scaling.factor


def _ramp(rotary: Rotary, scaling: RotaryScaling) -> np.ndarray:
    """`[dim / 2]`: 0 up to the last pair that turns `high_freq` times, 1 from the first that turns `low_freq` times on."""
    length = scaling.original_n_ctx / (2 * math.pi)
    pair = lambda turns: rotary.dim * math.log(length / turns) / (2 * math.log(rotary.base))  # that turns so often
    first, last = pair(scaling.high_freq), pair(scaling.low_freq)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary.dim - 1)
    return np.clip((np.arange(rotary.dim // 2) - first) / (last - first if last != first else 0.001), 0, 1)


def angles(positions: Int[Array, "batch pos"], rotary: Rotary | None, dim: int, dtype: Any) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles of `dim` dimensions: those of a layer without rotary positions are zero.

    Args:
        positions: `[batch, pos]`, of each token; those of padding are negative.
        rotary: the rotary positions of the layer, or `None`.
        dim: the number of dimensions that other layers rotate.
        dtype: of both.

    Returns:
        Both `[batch, pos, dim / 2]`.
    """
    turns, factor = np.zeros(dim // 2) if rotary is None else frequencies(rotary), 1.0
    if rotary is not None and rotary.scaling is not None:
        factor = rotary.scaling.attention_factor
    turned = jnp.maximum(positions, 0).astype(dtype)[:, :, None] * jnp.asarray(turns, dtype)[None, None]
    return jnp.cos(turned) * factor, jnp.sin(turned) * factor


def rotate(x: Heads, rotary: tuple[Float[Array, "batch pos angle"], Float[Array, "batch pos angle"]]) -> Heads:
    """Rotate the first dimensions, of which dimension i is paired with i + the number of angles.

    Args:
        x: `[batch, pos, head, d_head]`, queries or keys.
        rotary: cosine and sine of the angles of their tokens.

    Returns:
        `[batch, pos, head, d_head]`; dimensions from twice the number of angles on are unchanged.
    """
    cos, sin = (t[:, :, None, :] for t in rotary)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
