"""Masks over prompt and new tokens, for `Where(pos=...)` in `generate`."""

import numpy as np

from mijax._types import ArrayLike, Bool
from mijax.model.tokens import Tokens, as_tokens


def new_tokens(tokens: Tokens | ArrayLike, max_new_tokens: int) -> Bool[np.ndarray, "batch pos"]:
    """The mask of the new tokens, for `Where(pos=new_tokens(prompts, n))` in `generate`.

    Args:
        tokens: the prompts.
        max_new_tokens: the number of new tokens.

    Returns:
        `[batch, pos + max_new_tokens]`, True at new tokens.

    >>> new_tokens([[1, 2]], 3).tolist()
    [[False, False, True, True, True]]
    """
    return np.pad(np.zeros(as_tokens(tokens).ids.shape, bool), ((0, 0), (0, max_new_tokens)), constant_values=True)


def prompt_tokens(tokens: Tokens | ArrayLike, max_new_tokens: int) -> Bool[np.ndarray, "batch pos"]:
    """The mask of the prompts' tokens, for `Where(pos=prompt_tokens(prompts, n))` in `generate`.

    Args:
        tokens: the prompts.
        max_new_tokens: the number of new tokens.

    Returns:
        `[batch, pos + max_new_tokens]`, True at the prompts' real tokens.

    >>> prompt_tokens([[1, 2]], 3).tolist()
    [[True, True, False, False, False]]
    """
    return np.pad(np.asarray(as_tokens(tokens).mask), ((0, 0), (0, max_new_tokens)))


def current_tokens(tokens: Tokens | ArrayLike, max_new_tokens: int) -> Bool[np.ndarray, "batch pos"]:
    """The mask of the tokens that a next token is read from, for `Where(pos=current_tokens(prompts, n))` in `generate`.

    Args:
        tokens: the prompts.
        max_new_tokens: the number of new tokens.

    Returns:
        `[batch, pos + max_new_tokens]`, True at each prompt's last token and at new tokens.

    >>> current_tokens([[1, 2]], 3).tolist()
    [[False, True, True, True, True]]
    """
    mask = np.asarray(as_tokens(tokens).mask)
    last = np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True)
    return np.pad(mask & last, ((0, 0), (0, max_new_tokens)), constant_values=True)
