"""A batch of tokenised prompts, and what padding does to positions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Ids, Int, Mask

PADDING = np.iinfo(np.int32).min // 2
"""The position of a padding token: smaller than any index, whether counted from the front or the end."""


class Inputs:
    """A batch of whatever a model takes, in `values`, with the examples in front: each is one token for those that ask.

    >>> Inputs([[0.5, 1.0], [2.0, 3.0]]).lengths.tolist()
    [1, 1]
    """

    values: Any
    ids: Ids | np.ndarray
    mask: Mask | np.ndarray
    strings: Sequence[Sequence[str]] | None = None
    end_tokens: tuple[int, ...] = ()

    def __init__(self, values: Any):
        """Raises `ValueError` for an array without examples."""
        self.values = values if isinstance(values, jax.Array) else jnp.asarray(np.asarray(values))
        if self.values.ndim < 1 or len(self.values) == 0:
            raise ValueError(f"a batch has the examples in front, given shape {self.values.shape}")
        self.ids = np.zeros((len(self.values), 1), np.int32)
        self.mask = np.ones(self.ids.shape, bool)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """The values, and a place for each example."""
        return (self.values, self.ids, self.mask), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, ...]) -> "Inputs":
        """Rebuild without checks: inside a transformation leaves may be anything."""
        del aux
        inputs = object.__new__(cls)
        inputs.values, inputs.ids, inputs.mask = children
        return inputs

    @property
    def positions(self) -> Int[Array, "batch pos"]:
        """Each real token's place among its prompt's real tokens, from 0; `PADDING` elsewhere."""
        return jnp.where(self.mask, jnp.cumsum(self.mask, axis=1, dtype=jnp.int32) - 1, PADDING)

    @property
    def lengths(self) -> Any:
        """The number of real tokens of each prompt, `[batch]`; on the host where the mask is there."""
        return self.mask.sum(axis=1, dtype=np.int32)


jax.tree_util.register_pytree_node_class(Inputs)


@jax.tree_util.register_pytree_node_class
class Tokens(Inputs):
    """Token ids `[batch pos]` with the mask of those that are real (not padding).

    `strings` are the tokens as text, for labels: they are no part of the pytree, so that prompts of
    equal shape share compiled code, and they are `None` on the other side of a JAX transformation. So are `end_tokens`,
    the ids at which the model that the tokens are for ends a text, where a tokenizer told them.

    >>> Tokens([[5, 6, 7]]).positions
    Array([[0, 1, 2]], dtype=int32)
    """

    def __init__(
        self,
        ids: ArrayLike,
        mask: ArrayLike | None = None,
        strings: Sequence[Sequence[str]] | None = None,
        end_tokens: Sequence[int] = (),
    ):
        """`ids` and `mask` are `[batch pos]`; without a mask every token is real.

        Raises `TypeError` for ids or a mask of another dtype, `ValueError` for a mask of other numbers, for another rank, an empty batch, or a mask of another shape.
        """
        # What is given on the host stays there until it is used: looking at it then costs nothing.
        self.ids = integers(ids, "token ids")
        if self.ids.ndim != 2 or 0 in self.ids.shape or self.ids.dtype == bool:
            raise ValueError(
                f"token ids must be a non-empty [batch, pos] of integers, given shape {tuple(self.ids.shape)}"
            )
        real = np.ones(self.ids.shape, bool) if mask is None else integers(mask, "a mask")
        if is_concrete(real) and not np.isin(np.asarray(real), (0, 1)).all():
            raise ValueError("a mask must be boolean, or 0 and 1")
        self.mask = real.astype(bool)
        self.values = self.ids
        if self.mask.shape != self.ids.shape:
            raise ValueError(f"the mask has shape {tuple(self.mask.shape)}, the token ids {tuple(self.ids.shape)}")
        self.strings, self.end_tokens = strings, tuple(end_tokens)

    def tree_flatten(self):
        """`ids` and `mask` are the leaves."""
        return (self.ids, self.mask), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, Any]) -> "Tokens":
        """Rebuild without checks: inside a transformation leaves may be anything."""
        del aux
        tokens = object.__new__(cls)
        tokens.ids, tokens.mask = children
        tokens.values = tokens.ids
        tokens.strings, tokens.end_tokens = None, ()
        return tokens

    def __repr__(self):
        return f"Tokens(batch={self.ids.shape[0]}, pos={self.ids.shape[1]})"


def as_tokens(tokens: "Tokens | ArrayLike") -> Tokens:
    """Accept a batch as it is, or plain ids of which every one is real."""
    return tokens if isinstance(tokens, Tokens) else Tokens(tokens)


def is_concrete(x: Any) -> bool:
    """Whether the values of `x` can be looked at now (it is not being traced)."""
    return not isinstance(x, jax.core.Tracer)


def resized(x: Any, axis: int, size: int, value: Any) -> Any:
    """The array with `size` entries along an axis: cut, or filled with `value`; a host array stays one."""
    xp = np if is_concrete(x) else jnp
    x = xp.moveaxis(xp.asarray(x), axis, -1)[..., :size]
    more = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return xp.moveaxis(xp.pad(x, more, constant_values=value), -1, axis)


def integers(x: Any, what: str) -> Any:
    """int32, on the host where `x` is there; numbers too large for it stay out of every range.

    Raises `TypeError` for anything but integers (or, for a mask, booleans, which stay as they are).
    """
    try:
        x = x if isinstance(x, jax.Array) else np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{what} must be one number or a rectangular list") from error
    if x.dtype == bool:
        return x
    if x.size == 0:  # an empty list has no dtype of its own
        return x.astype(np.int32)
    if x.dtype.kind in "US":
        raise TypeError(
            f"{what} must be integers, given text: a tokenizer makes them, tokenizer({np.asarray(x).ravel()[0]!r})"
        )
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{what} must be integers, given dtype {x.dtype}")
    if x.dtype.itemsize >= 4 and x.dtype != np.int32:
        x = x.clip(max=2**31 - 1) if x.dtype.kind == "u" else x.clip(-(2**31), 2**31 - 1)
    return x.astype(np.int32) if isinstance(x, jax.Array) else np.asarray(x, np.int32)


def columns(
    tokens: Tokens, pos: Int[Array, " k"] | Int[Array, "batch k"]
) -> tuple[Int[Array, "batch k"], Bool[Array, "batch k"]]:
    """The columns of `tokens` at which positions stand, and whether they exist.

    `pos` counts real tokens, from the end where it is negative: one list for all prompts, or one
    list each.

    >>> padded = Tokens([[0, 0, 5, 6], [1, 2, 3, 4]], mask=[[0, 0, 1, 1], [1, 1, 1, 1]])
    >>> columns(padded, jnp.array([0, -1, 2]))[0]
    Array([[2, 3, 0],
           [0, 3, 2]], dtype=int32)
    >>> columns(padded, jnp.array([0, -1, 2]))[1]
    Array([[ True,  True, False],
           [ True,  True,  True]], dtype=bool)
    """
    wanted = (pos if pos.ndim == 2 else pos[None, :])[:, :, None]
    places, lengths = tokens.positions[:, None, :], jnp.asarray(tokens.lengths)[:, None, None]
    hits = (places == wanted) | (places - lengths == wanted)
    return jnp.argmax(hits, axis=-1).astype(jnp.int32), jnp.any(hits, axis=-1)


def check_tokens(d_vocab: int, n_ctx: int, tokens: Tokens) -> None:
    """Raise `ValueError` for prompts longer than the context, tokens outside the vocabulary, and prompts of padding alone."""
    if tokens.ids.ndim != 2:
        raise ValueError(f"tokens must be [batch, pos], given shape {tokens.ids.shape}")
    if tokens.ids.shape[1] > n_ctx:
        raise ValueError(f"the prompts have {tokens.ids.shape[1]} tokens, the model's context {n_ctx}")
    if is_concrete(tokens.ids) and is_concrete(tokens.mask):
        ids, mask = np.asarray(tokens.ids), np.asarray(tokens.mask)
        bad = np.argwhere(mask & ((ids < 0) | (ids >= d_vocab)))  # padding may be anything
        if len(bad):
            example, column = map(int, bad[0])
            raise ValueError(
                f"token {ids[example, column]} (example {example}, column {column}) is outside the vocabulary of {d_vocab}"
            )
        if not mask.any(axis=1).all():
            raise ValueError(f"example {int(np.argmin(mask.any(axis=1)))} is all padding")
