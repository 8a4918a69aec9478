"""The loop over a transformer's layers. Its argument is the function that is called with each layer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from mijax._types import Array, Asked, Bool, Int, Stream
from mijax.model.attention import KVCache
from mijax.model.block import Block, block
from mijax.model.config import Config
from mijax.model.position import Frame
from mijax.model.sites import transformer_sites
from mijax.model.tap import State, Tap, Visit


class Layer(eqx.Module):
    """One layer, as `walk` passes it to its body.

    Attributes:
        config: the architecture.
        index: the number of the layer.
        params: its parameters, as `block` takes them.
    """

    config: Config = eqx.field(static=True)
    index: Int[Array, ""]
    params: Block

    def __call__(
        self,
        x: Stream,
        frame: Frame,
        tap: Tap,
        state: State,
        held: KVCache | None = None,
        attended: Bool[Array, ""] | None = None,
    ) -> tuple[Asked, State]:
        """Run the layer.

        Args:
            x: `[batch, pos, d_model]`, the residual stream before it.
            frame: the positions of its tokens.
            tap: what to call at the sites.
            state: the tap's state.
            held: keys and values of tokens that are not computed here.
            attended: where true, only the second half of the layer is run: see `mijax.model.block.block`.

        Returns:
            `[batch, query, d_model]`, the residual stream after the layer; and the tap's state.
        """
        visit = Visit(tap, transformer_sites(self.config), frame.in_layer(self.index), self.index)
        return block(self.config, self.params, x, visit, state, held, attended)


Body: TypeAlias = Callable[[Layer, Any, Any], tuple[Any, Any]]
"""The function that `walk` calls with each layer: `body(layer, carry, x) -> carry, y`."""


def walk(
    config: Config,
    blocks: Block,
    body: Body,
    carry: Any,
    xs: Any = None,
    *,
    first: Int[Array, ""] | int = 0,
    last: Int[Array, ""] | int | None = None,
    remat: Callable[[Callable], Callable] | None = None,
    group: int = 1,
) -> tuple[Any, Any]:
    """Run a function on the layers `first` .. `last - 1` in turn, as `jax.lax.scan` does.

    Layers outside this range are not computed, unless `first` or `last` differ within a `vmap`. Walking a range and
    then the range that follows equals walking both at once.

    Args:
        config: the architecture.
        blocks: the parameters of all layers.
        body: `body(layer, carry, x) -> carry, y`.
        carry: what the first layer's call receives.
        xs: arrays with a leading axis of all layers, of which each call receives one entry.
        first: the first layer; may be traced.
        last: the layer after the last, by default the number of layers; may be traced.
        remat: wraps the functions that the backward pass is to compute again (`jax.checkpoint` with a policy): each
            layer, and around them each group of `group` layers.
        group: the number of layers of a group.

    Returns:
        The last carry, and the `y` stacked over all layers, zeros for those outside the range.

    Raises:
        ValueError: for groups of a part of the layers.
    """
    n = config.n_layers
    whole = isinstance(first, int) and first == 0 and (last is None or (isinstance(last, int) and last == n))
    last = n if last is None else last

    def at(index: Int[Array, ""], tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)

    def sliced(carry: Any, inputs: tuple[Int[Array, ""], Any]) -> tuple[Any, Any]:
        index, x = inputs
        return body(Layer(config, index, blocks.at(config, index)), carry, x)

    def ranged(carry: Any, index: Int[Array, ""]) -> tuple[Any, Any]:
        all_sliced = lambda carry, index: sliced(carry, (index, at(index, xs)))
        call = all_sliced if remat is None else remat(all_sliced)
        program, (_, empty) = jax.make_jaxpr(call, return_shape=True)(carry, index)  # traced once for both branches
        structure = jax.tree.structure((carry, empty))

        def take(carry: Any) -> Any:
            return jax.tree.unflatten(structure, jaxpr_as_fun(program)(*jax.tree.leaves((carry, index))))

        skip = lambda carry: (carry, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty))
        return jax.lax.cond((index >= first) & (index < last), take, skip, carry)

    numbers = jnp.arange(n, dtype=jnp.int32)
    if not whole and group > 1:
        raise ValueError(f"groups of {group} layers are computed again where all layers are walked, not a part of them")
    if not whole:  # parameters are sliced in the branch of layers that run, so that a skipped layer costs nothing
        return jax.lax.scan(ranged, carry, numbers)
    if remat is None:  # parameters are scanned over: their gradient is written once, not summed over the layers
        of_all, of_some = blocks.split(config)
        scanned = lambda carry, inputs: body(
            Layer(config, inputs[0], eqx.combine(inputs[1], of_some)), carry, inputs[2]
        )
        return jax.lax.scan(scanned, carry, (numbers, of_all, xs))
    # Parameters are sliced inside the function that is computed again: scanned over, each layer's parameters would be
    # stored for the backward pass a second time. Other inputs are scanned over, since their gradient is written once.
    layers = lambda carry, inputs: jax.lax.scan(remat(sliced), carry, inputs)
    if group == 1:
        return layers(carry, (numbers, xs))
    n_grouped = n // group * group
    grouped = jax.tree.map(lambda a: a[:n_grouped].reshape(-1, group, *a.shape[1:]), (numbers, xs))
    carry, ys = jax.lax.scan(remat(layers), carry, grouped)
    carry, rest = remat(layers)(carry, jax.tree.map(lambda a: a[n_grouped:], (numbers, xs)))
    merged = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), ys)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), merged, rest)
