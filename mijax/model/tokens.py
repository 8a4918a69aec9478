"""Batches of tokenised prompts, and positions that do not count padding."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Ids, Int, Mask

PADDING = np.iinfo(np.int32).min // 2
"""The position of a padding token: smaller than any index, counted from the beginning or from the end."""


class Inputs:
    """A batch of inputs of any model, in `values`. Code that asks for tokens sees one token per example.

    Args:
        values: an array with a leading axis of examples.

    Raises:
        ValueError: for an array without examples.

    >>> Inputs([[0.5, 1.0], [2.0, 3.0]]).lengths.tolist()
    [1, 1]
    """

    values: Any
    ids: Ids | np.ndarray
    mask: Mask | np.ndarray
    strings: Sequence[Sequence[str]] | None = None
    end_tokens: tuple[int, ...] = ()

    def __init__(self, values: Any):
        self.values = values if isinstance(values, jax.Array) else jnp.asarray(np.array(values))
        if self.values.ndim < 1 or len(self.values) == 0:
            raise ValueError(f"a batch has the examples in front, given shape {self.values.shape}")
        self.ids = np.zeros((len(self.values), 1), np.int32)
        self.mask = np.ones(self.ids.shape, bool)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """`values`, `ids` and `mask` are the leaves."""
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
        """The index of each real token among the real tokens of its prompt, from 0; `PADDING` at padding."""
        return jnp.where(self.mask, jnp.cumsum(self.mask, axis=1, dtype=jnp.int32) - 1, PADDING)

    @property
    def lengths(self) -> Int[Array | np.ndarray, " batch"]:
        """`[batch]`, the number of real tokens of each prompt; a host array where the mask is one."""
        return self.mask.sum(axis=1, dtype=np.int32)


jax.tree_util.register_pytree_node_class(Inputs)


@jax.tree_util.register_pytree_node_class
class Tokens(Inputs):
    """Token ids with the mask of those that are real (not padding).

    `strings` and `end_tokens` are no part of the pytree, so that prompts of equal shape share compiled code; inside and
    after a JAX transformation they are `None` and `()`.

    Args:
        ids: `[batch, pos]`, integers.
        mask: `[batch, pos]`, booleans or 0 and 1; without it every token is real.
        strings: the tokens as text, for labels.
        end_tokens: ids at which the model ends a text, where a tokenizer knows them.

    Raises:
        TypeError: for ids or a mask of another dtype.
        ValueError: for a mask of other numbers or of another shape, for ids of another rank, or an empty batch.

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
        # Host arrays stay on the host until they are used, so that checks of their values need no device transfer.
        self.ids: Ids | np.ndarray = integers(ids, "token ids")
        if self.ids.ndim != 2 or 0 in self.ids.shape or self.ids.dtype == bool:
            raise ValueError(
                f"token ids must be a non-empty [batch, pos] of integers, given shape {tuple(self.ids.shape)}"
            )
        real = np.ones(self.ids.shape, bool) if mask is None else integers(mask, "a mask")
        if is_concrete(real) and not np.isin(np.asarray(real), (0, 1)).all():
            raise ValueError("a mask must be boolean, or 0 and 1")
        self.mask: Mask | np.ndarray = real.astype(bool)
        self.values: Any = self.ids
        if self.mask.shape != self.ids.shape:
            raise ValueError(f"the mask has shape {tuple(self.mask.shape)}, the token ids {tuple(self.ids.shape)}")
        self.strings: Sequence[Sequence[str]] | None = strings
        self.end_tokens: tuple[int, ...] = tuple(end_tokens)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
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

    def __repr__(self) -> str:
        return f"Tokens(batch={self.ids.shape[0]}, pos={self.ids.shape[1]})"


def as_tokens(tokens: "Tokens | ArrayLike") -> Tokens:
    """Convert plain ids to `Tokens`.

    Args:
        tokens: a batch, or ids `[batch, pos]`, all of which are real tokens.

    Returns:
        The batch, unchanged where it is one already.

    Raises:
        TypeError: for ids that are not integers.
        ValueError: for ids that are not a non-empty `[batch, pos]`.

    >>> as_tokens([[1, 2, 3]])
    Tokens(batch=1, pos=3)
    """
    return tokens if isinstance(tokens, Tokens) else Tokens(tokens)


def is_concrete(x: Any) -> bool:
    """Whether the values of an array are known: it is not being traced.

    Args:
        x: an array or a tracer.

    Returns:
        The answer.
    """
    return not isinstance(x, jax.core.Tracer)


def resized(x: Any, axis: int, size: int, value: Any) -> Array | np.ndarray:
    """Cut an array, or fill it up, to a given size along an axis.

    Args:
        x: the array.
        axis: the axis.
        size: the number of entries wanted.
        value: what new entries at the end are.

    Returns:
        The array; a host array where `x` is one.

    >>> resized(np.array([1, 2]), 0, 4, 0), resized(np.array([1, 2]), 0, 1, 0)
    (array([1, 2, 0, 0]), array([1]))
    """
    xp: Any = np if is_concrete(x) else jnp
    x = xp.moveaxis(xp.asarray(x), axis, -1)[..., :size]
    widths = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return xp.moveaxis(xp.pad(x, widths, constant_values=value), -1, axis)


def integers(x: Any, what: str) -> Array | np.ndarray:
    """Convert integers to int32.

    Numbers too large for int32 are clipped to its limits, and so stay out of every range.

    Args:
        x: an array or a list of integers or booleans.
        what: what messages call it.

    Returns:
        int32, or booleans unchanged (for masks); a host array unless `x` is a JAX array.

    Raises:
        TypeError: for other dtypes.
        ValueError: for a ragged list.

    >>> integers([1, 2**40], "token ids").tolist()
    [1, 2147483647]
    """
    try:
        x = x if isinstance(x, jax.Array) else np.array(x)  # a copy: the caller may fill the array anew
    except ValueError as error:
        raise ValueError(f"{what} must be one number or a rectangular list") from error
    if x.dtype == bool:
        return x
    if x.size == 0:  # NumPy makes an empty list float64
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
    """The columns of a batch that hold given positions.

    Args:
        tokens: the batch.
        pos: positions, counted in real tokens, negative from the end: `[k]` for all prompts, or `[batch, k]`.

    Returns:
        `[batch, k]` columns (0 for a position that does not exist), and `[batch, k]` whether each position exists.

    >>> padded = Tokens([[0, 0, 5, 6], [1, 2, 3, 4]], mask=[[0, 0, 1, 1], [1, 1, 1, 1]])
    >>> columns(padded, jnp.array([0, -1, 2]))[0]
    Array([[2, 3, 0],
           [0, 3, 2]], dtype=int32)
    >>> columns(padded, jnp.array([0, -1, 2]))[1]
    Array([[ True,  True, False],
           [ True,  True,  True]], dtype=bool)
    """
    targets = (pos if pos.ndim == 2 else pos[None, :])[:, :, None]
    positions, lengths = tokens.positions[:, None, :], jnp.asarray(tokens.lengths)[:, None, None]
    matches = (positions == targets) | (positions - lengths == targets)
    return jnp.argmax(matches, axis=-1).astype(jnp.int32), jnp.any(matches, axis=-1)


def check_tokens(d_vocab: int, n_ctx: int, tokens: Tokens) -> None:
    """Check a batch; its values only where they are known (outside a trace).

    Args:
        d_vocab: the size of the vocabulary.
        n_ctx: the context length, in tokens.
        tokens: the batch.

    Raises:
        ValueError: for ids that are not `[batch, pos]`, prompts longer than the context, tokens outside the vocabulary
            (padding may be any number), and prompts that are all padding.

    >>> check_tokens(5, 4, Tokens([[1, 7]]))
    Traceback (most recent call last):
    ValueError: token 7 (example 0, column 1) is outside the vocabulary of 5
    """
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
