"""What a run computes from positions before the first layer: rotary angles, and which keys a query may see."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Asked, Bool, Float, Int, Real, Stream
from mijax.model.config import Config
from mijax.model.rotary import angles
from mijax.model.tokens import Tokens


class Rows(NamedTuple):
    """Tokens of many variants (cells) of one batch, packed into one list of rows: what a sweep's chunk computes.

    A row is the token of one cell, one example and one column of the batch. Attention groups the queries by cell and
    example; each group has as many slots as the largest group has rows.

    Attributes:
        cell: the cell of each row.
        example: the example of each row.
        column: the column of each row.
        place: which row computes a token; -1 where no row does, because the token does not differ from the base run.
        slot: which row is in a slot of a group.
        within: which slot of its group a row is in.
    """

    cell: Int[Array, " row"]
    example: Int[Array, " row"]
    column: Int[Array, " row"]
    place: Int[Array, "cell batch pos"]
    slot: Int[Array, "cell batch slot"]
    within: Int[Array, " row"]

    def spread(self, x: Real[Array, "1 row *rest"]) -> Real[Array, "cell_batch slot *rest"]:
        """Put rows into their slots.

        Args:
            x: one entry per row.

        Returns:
            One entry per slot; that of an empty slot means nothing.
        """
        return jnp.take(x[0], _merged(self.slot), axis=0, mode="clip")

    def unpack(
        self, x: Float[Array, "1 row *rest"], base: Float[Array, "batch pos *rest"] | None = None
    ) -> Float[Array, "cell batch pos *rest"]:
        """The whole batch of each cell.

        Args:
            x: one entry per row.
            base: the base run's values, for tokens that no row computes; by default these are arbitrary.

        Returns:
            One entry per token.
        """
        cells = jnp.take(x[0], self.place, axis=0, mode="clip")
        if base is None:
            return cells
        computed = self.place >= 0
        return jnp.where(computed.reshape(computed.shape + (1,) * (x.ndim - 2)), cells, base)

    def pack(self, x: Float[Array, "cell batch pos *rest"]) -> Float[Array, "1 row *rest"]:
        """Take the rows out of the whole batches of the cells: the inverse of `unpack`.

        Args:
            x: one entry per token.

        Returns:
            One entry per row.
        """
        return x[self.cell, self.example, self.column][None]

    def unpack_queries(
        self, x: Float[Array, "cell_batch head slot key"], base: Float[Array, "batch head query key"]
    ) -> Float[Array, "cell batch head query key"]:
        """Scores or patterns of each cell, by query in place of by slot.

        Args:
            x: scores or patterns by slot.
            base: the base run's, for queries that no row computes.

        Returns:
            Scores or patterns by query.
        """
        cells, batch, slots = self.slot.shape
        by_slot = x.reshape(cells, batch, x.shape[1], slots, x.shape[3])
        index = jnp.take(self.within, self.place, mode="clip")[:, :, None, :, None]
        computed = (self.place >= 0)[:, :, None, :, None]
        return jnp.where(computed, jnp.take_along_axis(by_slot, index, axis=3), base[None])

    def gather(self, x: Float[Array, "cell_batch slot *rest"]) -> Float[Array, "1 row *rest"]:
        """Take rows out of their slots: the inverse of `spread`.

        Args:
            x: one entry per slot.

        Returns:
            One entry per row.
        """
        batch, slots = self.slot.shape[1:]
        index = (self.cell * batch + self.example) * slots + self.within
        return jnp.take(x.reshape(-1, *x.shape[2:]), index, axis=0, mode="clip")[None]


def _merged(x: Int[Array, "cell batch n"]) -> Int[Array, "cell_batch n"]:
    return x.reshape(-1, x.shape[-1])


class Sight(eqx.Module):
    """What attention needs of positions, in one layer; or, before `in_layer`, in all.

    Attributes:
        causal: whether a query sees no later keys.
        window: how many tokens back a query sees, itself included; `None` where no layer has a limit. One number for
            each layer before `in_layer`.
        rotary: cosine and sine of the rotary angles of each position; `None` where the model does not rotate.
        kinds: for each layer, the number of its kind in `rotary`, which then has a leading axis of kinds; `None` where
            the angles are those of all layers.
    """

    causal: bool = eqx.field(static=True)
    window: Int[Array, "*layer"] | None = None
    rotary: tuple[Float[Array, "*kind batch pos angle"], Float[Array, "*kind batch pos angle"]] | None = None
    kinds: Int[Array, " layer"] | None = None

    def in_layer(self, layer: Int[Array, ""]) -> "Sight":
        """That of one layer.

        Args:
            layer: the number of the layer.
        """
        of = lambda x, index: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        kinds, window = self.kinds, self.window
        rotary = self.rotary if kinds is None else jax.tree.map(lambda x: of(x, kinds[layer]), self.rotary)
        return Sight(self.causal, None if window is None else of(window, layer), rotary)

    def allows(
        self, queries: Int[Array, "spread query"], keys: Int[Array, "spread key"]
    ) -> Bool[Array, "spread query key"]:
        """Which keys each query may see: no padding, and none that is later or too far back.

        Args:
            queries: the position of each query.
            keys: that of each key.
        """
        queries, keys = queries[:, :, None], keys[:, None, :]
        allowed = jnp.broadcast_to(keys >= 0, jnp.broadcast_shapes(queries.shape, keys.shape))
        if self.causal:
            allowed = allowed & (queries >= keys)
        return allowed if self.window is None else allowed & (queries - keys < self.window)


class Frame(eqx.Module):
    """The tokens that a run computes, and how their queries find the keys of all tokens.

    Attention computes keys and values of the frame's tokens, combines them with cached ones of other tokens (`join`),
    groups the queries by example as the keys are (`spread`), lets them attend, and puts the results back in the order
    of the frame's tokens (`gather`). The rest of the layer is computed at the tokens that `read` selects.

    Attributes:
        positions: of each computed token, its index among the real tokens of its prompt; `PADDING` at padding.
        keys: the same for the tokens that may be attended to.
        lengths: the number of real tokens of each prompt.
        sight: which keys each query may see, and the rotary angles.
    """

    positions: Int[Array, "batch pos"]
    keys: Int[Array, "spread key"]
    lengths: Int[Array, " spread"]
    sight: Sight

    @property
    def queries(self) -> Int[Array, "spread query"]:
        """The position of each query, grouped as `spread` does."""
        return self.spread(self.positions[..., None])[..., 0]

    @property
    def in_order(self) -> bool:
        """Whether the first query is the first key, the second the second, and so on, and later keys are later tokens."""
        return False

    @property
    def entries(self) -> Int[Array, " pos"] | None:
        """The columns of the batch that are computed; `None` for all."""
        return None

    def join(self, computed: Array, held: Array | None) -> Array:
        """Keys or values of all tokens that may be attended to.

        Args:
            computed: those of the frame's tokens.
            held: those of other tokens; `None` where there are none.

        Returns:
            Both, by example and position: here `computed`, which are all.
        """
        del held
        return computed

    def spread(self, q: Array) -> Array:
        """Group queries by example, as the keys are.

        Args:
            q: queries of the frame's tokens.

        Returns:
            The grouped queries: here the same.
        """
        return q

    def gather(self, z: Array) -> Array:
        """The inverse of `spread`.

        Args:
            z: one entry per grouped query.

        Returns:
            One entry for each of the frame's tokens: here the same.
        """
        return z

    def in_layer(self, layer: Int[Array, ""]) -> "Frame":
        """The frame in one layer, whose window and rotary positions may differ from other layers'.

        Args:
            layer: the number of the layer.
        """
        return dataclasses.replace(self, sight=self.sight.in_layer(layer))

    @property
    def reading(self) -> "tuple[Frame, Int[Array, ' query']] | None":
        """The frame of the tokens that need more than keys and values, and their indices here; `None` for all."""
        return None

    def read(self, x: Stream) -> Asked:
        """Select the tokens that need more than keys and values.

        Args:
            x: `[batch, pos, d_model]`, one entry for each of the frame's tokens.

        Returns:
            `[batch, query, d_model]`, the entries of those tokens.
        """
        return x if self.reading is None else x[:, self.reading[1]]


class Whole(Frame):
    """All tokens of a batch."""

    @property
    def in_order(self) -> bool:
        """True."""
        return True


class Columns(Frame):
    """Some columns of a batch; keys and values of the others are cached.

    Attributes:
        columns: the columns.
        alone: whether they attend to one another only.
    """

    columns: Int[Array, " pos"]
    alone: bool = eqx.field(static=True, default=False)

    @property
    def entries(self) -> Int[Array, " pos"]:
        """The columns."""
        return self.columns

    @property
    def in_order(self) -> bool:
        """Whether the columns attend to one another only."""
        return self.alone

    def join(self, computed: Array, held: Array | None) -> Array:
        """The computed keys or values put into the cached ones, or alone where there is no cache."""
        return computed if held is None else held.at[:, self.columns].set(computed)


class Packed(Frame):
    """Rows of many variants of one batch, as one example of many positions; attention is over `cell_batch` examples.

    Attributes:
        rows: which tokens the rows are.
        whole: the frame of the batch.
        last: in the last layer, the frame of the rows that are needed after it, and their indices; `None` for all.
    """

    rows: Rows
    whole: Whole
    last: "tuple[Packed, Int[Array, ' query']] | None" = None

    def join(self, computed: Array, held: Array | None) -> Array:
        """Keys or values of each variant's batch: the base run's (`held`) where no row computes a token."""
        assert held is not None
        return self.rows.unpack(computed, held).reshape(-1, *held.shape[1:])

    def spread(self, q: Array) -> Array:
        """Put rows into slots, grouped by variant and example."""
        return self.rows.spread(q)

    def gather(self, z: Array) -> Array:
        """Take rows out of the slots."""
        return self.rows.gather(z)

    def in_layer(self, layer: Int[Array, ""]) -> "Packed":
        """This frame, and that of the rows that are read, in one layer."""
        last = None if self.last is None else (self.last[0].in_layer(layer), self.last[1])
        return dataclasses.replace(self, sight=self.sight.in_layer(layer), last=last)

    @property
    def reading(self) -> "tuple[Packed, Int[Array, ' query']] | None":
        """The field `last`."""
        return self.last


def frame(config: Config, tokens: Tokens, dtype: Any) -> Whole:
    """The frame of a whole batch, computed once per run for all layers.

    Args:
        config: the architecture.
        tokens: the batch.
        dtype: the dtype of the activations, and of the rotary angles.

    Returns:
        The frame.
    """
    positions = tokens.positions
    return Whole(positions, positions, jnp.asarray(tokens.lengths), _sight(config, positions, dtype))


def frame_of(config: Config, tokens: Tokens, dtype: Any, columns: Int[Array, " pos"], alone: bool = False) -> Columns:
    """The frame of some columns of a batch.

    Args:
        config: the architecture.
        tokens: the whole batch.
        dtype: the dtype of the activations, and of the rotary angles.
        columns: indices of the columns, in ascending order.
        alone: whether the columns attend to one another only, not to the whole batch.

    Returns:
        The frame.
    """
    positions = tokens.positions[:, columns]
    keys = positions if alone else tokens.positions
    return Columns(positions, keys, jnp.asarray(tokens.lengths), _sight(config, positions, dtype), columns, alone)


def _sight(config: Config, positions: Int[Array, "batch pos"], dtype: Any) -> Sight:
    no_limit = np.iinfo(np.int32).max
    windows = jnp.asarray([window or no_limit for window in config.windows], jnp.int32) if config.windows else None
    rotaries = config.rotaries or (None,) * config.n_layers
    dim = next((rotary.dim for rotary in rotaries if rotary is not None), 0)
    kinds = list(dict.fromkeys(rotaries))
    by_kind = [angles(positions, rotary, dim, dtype) for rotary in kinds] if dim else []
    if len(by_kind) < 2:
        return Sight(config.causal, windows, by_kind[0] if by_kind else None)
    number = jnp.asarray([kinds.index(rotary) for rotary in rotaries], jnp.int32)
    return Sight(config.causal, windows, jax.tree.map(lambda *x: jnp.stack(x), *by_kind), number)


def pack(whole: Whole, rows: Rows) -> Packed:
    """The frame of packed rows.

    Args:
        whole: the frame of the batch that the rows are tokens of.
        rows: which tokens are computed.

    Returns:
        The frame.
    """
    cells = rows.place.shape[0]
    tile = lambda x: jnp.tile(x, (cells, *(1,) * (x.ndim - 1)))
    by_row = lambda x: x[rows.example, rows.column][None]
    rotary = jax.tree.map(lambda x: x[..., rows.example, rows.column, :][..., None, :, :], whole.sight.rotary)
    sight = eqx.tree_at(lambda sight: sight.rotary, whole.sight, rotary, is_leaf=lambda x: x is None)
    return Packed(by_row(whole.positions), tile(whole.keys), tile(whole.lengths), sight, rows, whole)
