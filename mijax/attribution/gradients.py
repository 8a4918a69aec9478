"""The gradient of a metric with respect to activations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mijax._types import Array, ArrayLike, Float
from mijax.attribution.checks import check_apart, check_gradient, check_layered
from mijax.engine.measure import as_programs, captures_of, is_users, named, values_of
from mijax.forward import run, zero_varying_like
from mijax.interventions.edits import Add
from mijax.interventions.selecting import narrowed_shape
from mijax.interventions.where import Where
from mijax.meshes import batch_spec, with_automatic_axes
from mijax.metrics import AnyMetric, position
from mijax.model.model import LayeredModel
from mijax.model.sites import site_of
from mijax.model.tokens import Tokens
from mijax.programs.convert import mesh_axes_of


class Gradients(NamedTuple):
    """A metric, activations, and the metric's gradient with respect to them.

    Attributes:
        values: the metric of each example, `[batch]`.
        acts: the activations by site, shaped as `run` captures them.
        grads: the gradient by site, of the same shapes.
    """

    values: Float[Array, " batch"]
    acts: dict[str, Array]
    grads: dict[str, Array]


def gradients(
    model: LayeredModel,
    tokens: Tokens | ArrayLike,
    metric: AnyMetric,
    sites: tuple[str, ...],
    pos: ArrayLike | None = None,
) -> Gradients:
    """The activations of some sites, and the gradient of each example's metric with respect to them.

    A pure function, as `mijax.run` is.

    Args:
        model: the model.
        tokens: the prompts, `mijax.Tokens` or plain ids `[batch, pos]`.
        metric: one metric; its value for an example must depend on that example alone.
        sites: names of sites.
        pos: one position, or one per example as `[batch, 1]`: only activations there, with a position axis of size
            1. By default all positions.

    Returns:
        The metric `[batch]`; activations and gradients by site, shaped as `run` captures them.

    Raises:
        TypeError: for several metrics, or one without a gradient.
        ValueError: for an unknown site, and with `pos` for a site without an axis of positions.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> result = mj.gradients(model, [[1, 2, 3]], mj.metrics.logit(7), ("resid_post", "post"), pos=-1)
    >>> result.grads["resid_post"].shape, result.grads["post"].shape
    ((2, 1, 1, 8), (2, 1, 1, 32))
    """
    check_layered(model)
    model.check()
    tokens = model.inputs(tokens)
    name, program = program_of(model, tokens, metric)
    check_gradient(model, tokens, name, program)
    in_shard_map = any(map(mesh_axes_of, jax.tree.leaves((model, tokens, program))))
    if is_users(metric) and not in_shard_map:  # there, nothing can be computed beside the trace
        check_apart(model, tokens, name, program)
    where = None if pos is None else Where(pos=position(pos))
    for site in sites:
        if where is not None and "pos" not in site_of(site, model.sites).axes:
            axes = ", ".join(model.sites[site].axes)
            raise ValueError(f"site {site!r} has no positions of its own, only {axes}")
    spec = lambda batch: {site: batch_spec(site_of(site, model.sites).axes, batch) for site in sites}
    return with_automatic_axes(
        lambda model, tokens, program: _gradients(model, tokens, program, dict.fromkeys(sites, where)),
        model,
        tokens,
        program,
        like=tokens.ids,
        out_axes=lambda batch: Gradients(batch_spec(("batch",), batch), spec(batch), spec(batch)),  # pyright: ignore[reportArgumentType]
    )


def _gradients(model: LayeredModel, tokens: Tokens, program: AnyMetric, capture: dict[str, Where | None]) -> Gradients:
    """The metric's gradients with respect to what is added at the sites, which is zero."""
    # Inside `shard_map`, the gradient of an array that does not vary over the mesh would be a sum over all devices.
    zero, zeros = zero_varying_like((model, tokens, program), model.dtype).reshape(()), {}
    for site, where in capture.items():
        axes = model.sites[site].axes
        shape = narrowed_shape(where, axes, model.sites[site].shape(*tokens.ids.shape))
        zeros[site] = jnp.broadcast_to(zero, shape)

    def measured(added: dict[str, Array]) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        edits = {site: Add(value, capture[site] or Where()) for site, value in added.items()}
        out = run(model, tokens, edits, capture=capture, taps=captures_of(model, {"": program}))
        values = values_of({"": program}, out.readout, out.taps)[""]
        return jnp.sum(values), (values, out.acts)

    grads, (values, acts) = jax.grad(measured, has_aux=True)(zeros)
    return Gradients(values, acts, grads)


def program_of(model: LayeredModel, tokens: Tokens, metric: Any) -> tuple[str, AnyMetric]:
    """The name of the one metric, and the program that it computes at this call.

    Args:
        model: the model.
        tokens: the prompts.
        metric: the metric, as a user gives it.

    Returns:
        The name, and the metric with the user's functions converted (`mijax.programs.convert`).

    Raises:
        TypeError: for several metrics.
    """
    if isinstance(metric, Mapping):
        raise TypeError(f"one metric is taken here, given several: {', '.join(map(repr, metric))}")
    return next(iter(as_programs(model, tokens, named(metric)).items()))
