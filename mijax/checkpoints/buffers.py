"""Tensors that checkpoints hold beside parameters: masks and rotary frequencies, which must repeat the config."""

import jax.numpy as jnp
import numpy as np

from mijax.checkpoints.table import Buffer
from mijax.model.config import Config
from mijax.model.rotary import Rotary, frequencies


def _is_causal_mask(config: Config, x: np.ndarray) -> bool:
    """Whether it is a lower triangle of ones over the whole context, as in every layer of GPT-2's checkpoints."""
    return x.shape == (1, 1, config.n_ctx, config.n_ctx) and np.array_equal(x[0, 0], np.tri(config.n_ctx, dtype=bool))


def _is_masking_score(_: Config, x: np.ndarray) -> bool:
    """Whether it is the score of masked keys, far below any other: -10000, which bfloat16 rounds to -9984."""
    return x.shape == () and float(x) <= -9_000


def masks(attention: str) -> tuple[Buffer, Buffer]:
    """The buffers of masks in checkpoints of GPT-2's relatives.

    Args:
        attention: the start of the names of attention's tensors.
    """
    return (
        Buffer(attention + "bias", _is_causal_mask, "the causal mask of the whole context"),
        Buffer(attention + "masked_bias", _is_masking_score, "one number of at most -9000"),
    )


def _is_of_config(config: Config, x: np.ndarray) -> bool:
    """Whether it holds the rotary frequencies of the config, rounded to float32 and then to the buffer's dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or not isinstance(config.positions, Rotary):
        return False
    expected = frequencies(config.positions)
    precision = jnp.finfo(x.dtype)
    tolerance = 2e-6 * expected + float(precision.eps) * expected + float(precision.smallest_subnormal)
    return x.shape == expected.shape and bool((np.abs(x.astype(np.float64) - expected) <= tolerance).all())


def rotary_buffers(*names: str) -> tuple[Buffer, ...]:
    """Buffers that hold rotary frequencies.

    Args:
        *names: their names.
    """
    return tuple(Buffer(name, _is_of_config, "the rotary frequencies that the config gives") for name in names)
