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

    The distribution is cut by `top_k`, then `top_p`, then `min_p`, as the library transformers does. Of equal logits at
    the edge, `top_k` keeps all, and `top_p` the first.

    Args:
        logits: `[batch, vocab]`.
        sampling: the settings.
        filtered: whether the distribution is cut.
        key: the random key.

    Returns:
        `[batch]` token ids; -1 at a temperature that is negative or not finite (which a trace may hold).
    """
    temperature, top_p, min_p = (x.astype(logits.dtype) for x in (sampling.temperature, sampling.top_p, sampling.min_p))
    is_greedy = temperature < jnp.finfo(logits.dtype).tiny  # a smaller divisor is zero on some devices
    largest = jnp.max(logits, axis=-1, keepdims=True)
    logits = (logits - largest) / jnp.where(is_greedy, 1, temperature)  # at most 0: nothing overflows
    if filtered:
        order = jnp.argsort(-logits, axis=-1)
        ordered = jnp.take_along_axis(logits, order, axis=-1)
        rank = jnp.arange(logits.shape[-1])[None]
        keep = ordered >= jnp.min(jnp.where(rank < sampling.top_k, ordered, 0), axis=-1, keepdims=True)
        probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
        preceding = jnp.cumsum(probs, axis=-1) - probs  # the probability of all likelier tokens
        keep = keep & ((preceding < top_p) | (rank == 0) | (top_p >= 1))
        keep = keep & (probs >= min_p * probs[:, :1])
        logits = jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), logits, -jnp.inf)
    token = jnp.where(is_greedy, jnp.argmax(logits, axis=-1), jax.random.categorical(key, logits, axis=-1))
    return jnp.where((temperature >= 0) & jnp.isfinite(temperature), token, -1)
