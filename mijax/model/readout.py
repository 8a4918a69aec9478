"""The unembedding, computed only for the positions and tokens that are asked for."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Float, Int, Logits, Stream
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.model.numerics import einsum
from mijax.model.tokens import Tokens, columns, integers, is_concrete


class Readout(eqx.Module):
    """The final residual stream, after the last norm, with the unembedding.

    Attributes:
        final: the stream.
        tokens: the batch.
        W_U: the unembedding.
        b_U: its bias; `None` where the model has none.
        cap: where above 0, a logit `l` becomes `cap * tanh(l / cap)`.
    """

    final: Stream
    tokens: Tokens
    W_U: Float[Array, "vocab d_model"]
    b_U: Float[Array, " vocab"] | None
    cap: float = eqx.field(static=True, default=0.0)

    @property
    def n_logits(self) -> int:
        """The number of logits of a token."""
        return self.W_U.shape[0]

    def logits(self, pos: ArrayLike | None = None, tokens: ArrayLike | None = None) -> Logits:
        """Logits at some positions (all by default) for some tokens (all by default).

        Indices are read by their rank, as in `Where`: a 0-d index selects one entry and drops the axis, `[k]` selects
        several, `[batch, k]` several for each example.

        Args:
            pos: positions, counted in real tokens, negative from the last; by default all columns of the batch.
            tokens: token ids; by default the whole vocabulary.

        Returns:
            `[batch, pos, vocab]`, with `pos` and `vocab` narrowed or dropped accordingly. Without `pos`, logits at
            padding are NaN (of gradient zero).

        Raises:
            IndexError: for a position that a prompt does not have, or a token outside the vocabulary. Inside a trace,
                where values are not known, these logits are NaN instead.
            TypeError: for indices that are not integers, or of rank above 2.
            ValueError: for `[batch, k]` indices of another batch size, or ragged lists.

        >>> import jax, mijax as mj
        >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
        >>> readout = mj.run(model, [[1, 2, 3]]).readout
        >>> readout.logits().shape, readout.logits(pos=-1).shape, readout.logits(pos=[0, 2], tokens=[4]).shape
        ((1, 3, 11), (1, 11), (1, 2, 1))
        """
        logits = lambda readout, pos, tokens: readout._logits(pos, tokens)
        out_axes = lambda batch: batch_spec(("batch",), batch)
        return with_automatic_axes(logits, self, pos, tokens, like=self.final, out_axes=out_axes)

    def _logits(self, pos: ArrayLike | None, tokens: ArrayLike | None) -> Logits:
        x, dropped = self._at(pos)
        if tokens is None:
            logits = einsum("bpd,vd->bpv", x, self.W_U)
            logits = self._capped(logits if self.b_U is None else logits + self.b_U.astype(logits.dtype)[None, None])
        else:
            tokens = _index(tokens, "tokens")
            self._check_batch(tokens, "tokens")
            logits = self._some(x, tokens)
        if pos is None:  # logits at padding predict nothing
            real = jnp.asarray(self.tokens.mask)
            logits = jnp.where(real.reshape(*real.shape, *(1,) * (logits.ndim - 2)), logits, jnp.nan)
        return logits[:, 0] if dropped else logits

    def _capped(self, logits: Logits) -> Logits:
        return self.cap * jnp.tanh(logits / self.cap) if self.cap else logits

    def _at(self, pos: ArrayLike | None) -> tuple[Stream, bool]:
        """The final stream at some positions, and whether their axis is to be dropped."""
        if pos is None:
            return self.final, False
        pos = _index(pos, "pos")
        self._check_batch(pos, "pos")
        column, exists = columns(self.tokens, pos if pos.ndim else pos[None])
        if is_concrete(exists) and not np.all(exists):
            example = int(np.argmin(np.all(exists, axis=1)))
            length = int(self.tokens.lengths[example])
            raise IndexError(
                f"position {np.asarray(pos).tolist()} asked of example {example}, which has {length} tokens"
            )
        x = jnp.take_along_axis(self.final, column[:, :, None], axis=1)
        return jnp.where(exists[:, :, None], x, jnp.nan), np.ndim(pos) == 0

    def _check_batch(self, index: Int[Array, "..."], what: str) -> None:
        if index.ndim == 2 and index.shape[0] != self.final.shape[0]:
            raise ValueError(f"{what} has indices for {index.shape[0]} examples, the batch has {self.final.shape[0]}")

    def _some(self, x: Stream, tokens: Int[Array, "..."]) -> Logits:
        """Logits of `x` for some tokens."""
        valid = (tokens >= 0) & (tokens < self.W_U.shape[0])
        if is_concrete(valid) and not np.all(valid):
            bad = np.asarray(tokens)[~np.asarray(valid)][0]
            raise IndexError(f"token {bad} is outside the vocabulary of {self.W_U.shape[0]}")
        batch_k = tokens if tokens.ndim == 2 else tokens.reshape(1, -1)
        safe = jnp.where(valid, tokens, 0).reshape(batch_k.shape)
        directions = self.W_U[safe[0]] if tokens.ndim < 2 else self.W_U[safe]
        logits = einsum("bpd,vd->bpv" if tokens.ndim < 2 else "bpd,bvd->bpv", x, directions)
        if self.b_U is not None:
            logits = logits + self.b_U[safe].astype(logits.dtype)[:, None]
        logits = jnp.where(valid.reshape(batch_k.shape)[:, None], self._capped(logits), jnp.nan)
        return logits[..., 0] if tokens.ndim == 0 else logits


def _index(index: ArrayLike, what: str) -> Int[Array, "..."]:
    index = jnp.asarray(integers(index, what))
    if index.ndim > 2 or index.dtype == bool:
        raise TypeError(f"{what} must be integers of rank 0, 1 or 2, given {index.dtype} of rank {index.ndim}")
    return index
