"""The walk over a transformer's layers: the one loop over them, whose argument is what is done with a layer."""

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
from mijax.model.tap import Tap, Visit


class Layer(eqx.Module):
    """One layer, as the body of a walk is given it: its number, its parameters, and the block that they are of."""

    config: Config = eqx.field(static=True)
    index: Int[Array, ""]
    params: Block

    def __call__(
        self,
        x: Stream,
        frame: Frame,
        tap: Tap,
        state: Any,
        held: KVCache | None = None,
        attended: Bool[Array, ""] | None = None,
    ) -> tuple[Asked, Any]:
        """The stream after the layer, and the tap's state: see `mijax.model.block.block`."""
        visit = Visit(tap, transformer_sites(self.config), frame, self.index)
        return block(self.config, self.params, x, visit, state, held, attended)


Body: TypeAlias = Callable[[Layer, Any, Any], tuple[Any, Any]]
"""What is done with a layer: `body(layer, carry, x) -> carry, y`."""


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
    """Run `body` on the layers `first` .. `last - 1` (all by default) in turn, as `jax.lax.scan` does.

    `xs` has the layers in front; a body is given its layer's part, and what it gives is stacked. `first` and `last` may be traced:
    what lies outside is not computed (zeros stand there in what is stacked), unless they differ within a `vmap`.
    Walking a range and then the next is walking both.

    `remat` wraps what the backward pass is to compute again (`jax.checkpoint` with a policy): each layer, and groups of
    `group` layers around them.
    """
    n = config.n_layers
    whole = isinstance(first, int) and first == 0 and (last is None or (isinstance(last, int) and last == n))
    last = n if last is None else last

    def sliced(carry: Any, index: Int[Array, ""]) -> tuple[Any, Any]:
        take = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
        return body(Layer(config, index, jax.tree.map(take, blocks)), carry, jax.tree.map(take, xs))

    def ranged(carry: Any, index: Int[Array, ""]) -> tuple[Any, Any]:
        program, (_, empty) = jax.make_jaxpr(sliced, return_shape=True)(carry, index)  # traced once for both branches
        structure = jax.tree.structure((carry, empty))

        def take(carry: Any) -> Any:
            return jax.tree.unflatten(structure, jaxpr_as_fun(program)(*jax.tree.leaves((carry, index))))

        skip = lambda carry: (carry, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty))
        return jax.lax.cond((index >= first) & (index < last), take, skip, carry)

    numbers = jnp.arange(n, dtype=jnp.int32)
    if not whole:  # parameters are sliced in the branch that is taken, so that a skipped layer costs nothing
        return jax.lax.scan(ranged, carry, numbers)
    if remat is None:  # parameters are scanned, so that their gradient is written once, and not added up layer by layer
        scanned = lambda carry, own: body(Layer(config, *own[:2]), carry, own[2])
        return jax.lax.scan(scanned, carry, (numbers, blocks, xs))
    # Parameters are sliced inside what is computed again: scanned, each layer's would be kept for it a second time.
    layers = lambda carry, numbers: jax.lax.scan(remat(sliced), carry, numbers)
    if group == 1:
        return layers(carry, numbers)
    full = n // group * group
    carry, ys = jax.lax.scan(remat(layers), carry, numbers[:full].reshape(-1, group))
    carry, rest = remat(layers)(carry, numbers[full:])
    merged = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), ys)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), merged, rest)
