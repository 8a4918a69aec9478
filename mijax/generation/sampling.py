"""Drawing the next token from its logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Int, Logits
from mijax.model.tokens import is_concrete


class Sampling(NamedTuple):
    """The settings of sampling as arrays, so that new values compile nothing; meanings as in `generate`."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


def as_sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any, d_vocab: int) -> tuple[Sampling | None, bool]:
    """Convert the settings of `generate` to arrays.

    Args:
        temperature, top_k, top_p, min_p: as in `generate`.
        d_vocab: the size of the vocabulary.

    Returns:
        The settings, `None` where the likeliest token is taken; and whether the distribution is cut.
    """
    if is_concrete(temperature) and bool(np.all(np.asarray(temperature) == 0)):
        return None, False
    cuts = {"top_k": (top_k, d_vocab), "top_p": (top_p, 1.0), "min_p": (min_p, 0.0)}
    numbers = {name: jnp.asarray(default if value is None else value) for name, (value, default) in cuts.items()}
    return Sampling(jnp.asarray(temperature, jnp.float32), **numbers), any(v is not None for v, _ in cuts.values())


def sample(logits: Logits, sampling: Sampling, filtered: bool, key: Array) -> Int[Array, " batch"]:
    """Draw tokens from softmax(logits / temperature).

    The distribution is cut by `top_k`, then `top_p`, then `min_p`, as the library transformers does.

    Args:
        logits: `[batch, vocab]`.
        sampling: the settings.
        filtered: whether the distribution is cut.
        key: the random key.

    Returns:
        `[batch]` token ids.
    """
    temperature, top_k, top_p, min_p = sampling
    logits = logits / temperature.astype(logits.dtype)
    if filtered:
        ordered = -jnp.sort(-logits, axis=-1)
        keep = (jnp.arange(logits.shape[-1]) < top_k)[None]
        probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
        preceding = jnp.cumsum(probs, axis=-1) - probs  # the probability of all likelier tokens
        keep = keep & ((preceding < top_p.astype(logits.dtype)) | (top_p >= 1))
        keep = keep & (probs >= min_p.astype(logits.dtype) * probs[:, :1])
        logits = jnp.where(
            logits >= jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True), logits, -jnp.inf
        )
    return jax.random.categorical(key, logits, axis=-1)
