"""The second half of a layer that has an MLP or experts: in a model, all layers may have one of these, or each its own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Stream
from mijax.model.config import Config
from mijax.model.experts import ExpertMLP, experts
from mijax.model.mlp import MLP, mlp
from mijax.model.tap import State, Visit


def mlp_or_experts(
    config: Config, dense: MLP | None, sparse: ExpertMLP | None, x: Stream, visit: Visit, state: State
) -> tuple[Stream, State]:
    """The output of a layer's MLP, or of its experts.

    Where the layers of a model differ in this, they still run in one scan, and only what a layer has is computed. A tap
    is called at the sites of both in every layer, so that its state has one structure: at those that the layer lacks
    with NaN, and what it returns there is not used.

    Args:
        config: the architecture.
        dense: the weights of the MLP, of one layer (no layer axis); with `config.dense_layers`, of those layers.
        sparse: the weights of the experts, of one layer; with `config.dense_layers`, of the other layers.
        x: `[batch, pos, d_model]`, the stream that is read, after its norm.
        visit: the tap in this layer.
        state: the tap's state.

    Returns:
        `[batch, pos, d_model]`, the output; and the tap's state.
    """
    if sparse is None:
        assert dense is not None
        return mlp(config, dense, x, visit, state)
    if dense is None:
        return experts(config, sparse, x, visit, state)
    is_dense = np.isin(np.arange(config.n_layers), config.dense_layers)
    place = jnp.asarray(np.where(is_dense, np.cumsum(is_dense), np.cumsum(~is_dense)) - 1, jnp.int32)[visit.layer]
    at = lambda params: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, keepdims=False), params)

    def of_mlp(x: Stream, state: State) -> tuple[Stream, State]:
        return mlp(config, at(dense), x, visit, _absent(config.expert_layers, x, visit, state))

    def of_experts(x: Stream, state: State) -> tuple[Stream, State]:
        return experts(config, at(sparse), x, visit, _absent(config.mlp_layers, x, visit, state))

    return jax.lax.cond(jnp.asarray(is_dense)[visit.layer], of_mlp, of_experts, x, state)


def _absent(layers: tuple[int, ...], x: Stream, visit: Visit, state: State) -> State:
    """The tap's state after it is called, with NaN, at the sites that only `layers` have."""
    nan = jnp.full_like(x[..., 0], jnp.nan)
    # What is computed of NaN has no effect; a derivative, zero, times NaN would be NaN all the same.
    fixed = lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a
    visit = visit._replace(tap=jax.tree.map(fixed, visit.tap))
    for name in sorted(visit.tap.sites & visit.sites.keys()):
        site = visit.sites[name]
        if site.has_layer and site.layers == layers:
            shape = site.shape(*x.shape[:2])[1:]
            _, state = visit(name, jnp.broadcast_to(nan.reshape(*nan.shape, *(1,) * (len(shape) - 2)), shape), state)
    return state
