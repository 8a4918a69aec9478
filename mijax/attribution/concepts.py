"""A concept as three directions: a gradient, a difference between counterfactuals, and a probe."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Float
from mijax.arguments import check_known
from mijax.attribution.checks import check_apart, check_differ, check_gradient, check_layered
from mijax.engine.measure import as_programs, captures_of, checked, described, is_users, named, values_of
from mijax.engine.pairs import check_pair
from mijax.forward import run, zero_varying_like
from mijax.interventions.checks import check
from mijax.interventions.edits import Add
from mijax.interventions.selecting import narrowed_shape
from mijax.interventions.where import Where
from mijax.meshes import automatic, batch_spec, with_automatic_axes
from mijax.metrics import AnyMetric, position
from mijax.model.model import LayeredModel
from mijax.model.sites import field_of, site_of
from mijax.model.tokens import Tokens
from mijax.programs.convert import mesh_axes_of
from mijax.programs.now import JitNow

if TYPE_CHECKING:
    import xarray as xr

KINDS = ("gradient", "difference", "probe")


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
    name, program = _program(model, tokens, metric)
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


def concept(
    model: LayeredModel,
    *,
    positive: Tokens | ArrayLike,
    negative: Tokens | ArrayLike,
    site: str,
    metric: AnyMetric,
    pos: ArrayLike = -1,
    probe: ArrayLike | None = None,
) -> "xr.Dataset":
    """Compare three directions of a concept at a site of vectors, layer by layer: do they agree?

    At `pos` of every prompt: the mean `gradient` of the metric over all prompts; the mean `difference` of
    activations between the pairs; and the direction of a `probe` that separates positive from negative. A gradient
    says what the model would do with the concept; a difference and a probe say what can be read off: a probe can
    find information that the model does not use.

    Args:
        model: the model.
        positive: prompts with the concept.
        negative: the same number of prompts without it, paired with `positive`.
        site: a site of vectors.
        metric: how much of the concept the model expresses (the logit of its word, say).
        pos: one position, or one per example as `[batch, 1]`.
        probe: the probe's direction, `[*layer, *head, unit]`; by default logistic regression with a small L2
            penalty.

    Returns:
        `direction` [kind, *layer, *head, unit], and `cosine` [kind, other, *layer, *head] between the kinds.

    Raises:
        ValueError: where the batches differ in shape or padding, or the prompts of a pair do not differ; for a site
            without vectors, a metric of an example that depends on others, a probe of another shape, a direction
            that is not finite.
        TypeError: for several metrics, or one without a gradient.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> metric = mj.metrics.logit(7)
    >>> result = mj.concept(model, positive=[[1, 2, 3]], negative=[[1, 4, 3]], site="resid_post", metric=metric)
    >>> dict(result.cosine.sizes)
    {'kind': 3, 'other': 3, 'layer': 2}
    """
    import xarray as xr

    check_known("concept", (model, positive, negative, metric))
    model, positive, negative, metric = automatic((model, positive, negative, metric))
    positive, negative = model.inputs(positive), model.inputs(negative)
    check_pair(positive, negative)
    check_differ(positive, negative)
    entry = site_of(site, model.sites)
    if not entry.has_vectors or "pos" not in entry.axes:
        raise ValueError(
            f"a concept has a direction at a site of vectors; {site!r} has the axes {', '.join(entry.axes)}"
        )
    name, program = _program(model, positive, metric)
    check_gradient(model, positive, name, program)
    if is_users(metric):
        check_apart(model, positive, name, program)
    for tokens in (positive, negative):
        check(model, tokens, {}, {site: Where(pos=position(pos))})
    on_positive, on_negative = (_found(model, tokens, program, site, pos) for tokens in (positive, negative))
    for result, what in ((on_positive, "positive"), (on_negative, "negative")):
        checked({name: result.values}, what)
    axis = entry.axes.index("batch")
    acts, grads = ([np.moveaxis(np.asarray(getattr(result, field)[site]), axis, 0).squeeze(axis + 1)
                    for result in (on_positive, on_negative)] for field in ("acts", "grads"))  # fmt: skip
    gradient, difference = np.concatenate(grads).mean(axis=0), (acts[0] - acts[1]).mean(axis=0)
    probe_direction = _probes(acts) if probe is None else np.asarray(probe, gradient.dtype)
    if probe_direction.shape != gradient.shape:
        raise ValueError(f"the probe's direction has shape {probe_direction.shape}, expected {gradient.shape}")
    directions = np.stack([gradient, difference, probe_direction]).astype(np.float64)
    for kind, direction in zip(KINDS, directions):
        if not np.isfinite(direction).all():
            raise ValueError(f"the direction of the {kind} at {site!r} is not finite")
    size = np.linalg.norm(directions, axis=-1, keepdims=True)
    unit = directions / np.where(size > 0, size, 1.0)
    dims = [("unit" if field_of(a) == "unit" else a) for a in entry.axes if a not in ("batch", "pos")]
    coords = {"kind": list(KINDS), **{dim: np.arange(n) for dim, n in zip(dims, gradient.shape)}}
    cosine = np.einsum("i...u,j...u->ij...", unit, unit)
    attrs = {"site": site, "metric": name, "prompts": 2 * len(positive.ids), **described(model)}
    cosines = xr.DataArray(
        cosine.astype(gradient.dtype),
        {**{d: c for d, c in coords.items() if d != "unit"}, "other": list(KINDS)},
        ("kind", "other", *dims[:-1]),
    )
    return xr.Dataset(
        {"direction": xr.DataArray(directions.astype(gradient.dtype), coords, ("kind", *dims)), "cosine": cosines},
        attrs=attrs,
    )


@JitNow
def _found(model: LayeredModel, tokens: Tokens, metric: AnyMetric, site: str, pos: ArrayLike) -> Gradients:
    return gradients(model, tokens, metric, (site,), pos)


def _program(model: LayeredModel, tokens: Tokens, metric: Any) -> tuple[str, AnyMetric]:
    """The name of the one metric, and the program that it computes at this call."""
    if isinstance(metric, Mapping):
        raise TypeError(f"one metric is taken here, given several: {', '.join(map(repr, metric))}")
    return next(iter(as_programs(model, tokens, named(metric)).items()))


def _probes(acts: list[np.ndarray]) -> np.ndarray:
    """The direction of a probe for each layer (and head), from the activations of positive and negative prompts."""
    x, y = np.concatenate(acts), np.repeat([1.0, 0.0], [len(a) for a in acts])
    inner = x.shape[1:]
    by_place = np.moveaxis(x.reshape(len(x), -1, inner[-1]), 1, 0)
    return np.asarray(_fitted(jnp.asarray(by_place), jnp.asarray(y, by_place.dtype))).reshape(inner)


@jax.jit
def _fitted(x: Float[Array, "place example unit"], y: Float[Array, " example"]) -> Float[Array, "place unit"]:
    return jax.lax.map(lambda at_place: logistic_probe(at_place, y), x)


def logistic_probe(
    x: Float[Array, "example unit"], y: Float[Array, " example"], penalty: float = 1e-2, steps: int = 100
) -> Float[Array, " unit"]:
    """The direction of a logistic regression, by L-BFGS.

    It minimises the mean loss in nats, plus `penalty` / 2 times the squared weights of inputs scaled to a mean
    square of 1. Without a penalty, the weights of a direction that separates the classes are infinite.

    Args:
        x: `[example, unit]`, the inputs.
        y: `[example]`, the classes, 0 or 1.
        penalty: the strength of the L2 penalty.
        steps: the number of steps of L-BFGS.

    Returns:
        `[unit]` weights, zero where `x` does not vary.

    >>> x = jnp.array([[1.0, 0.5], [2.0, -0.5], [-1.0, 0.5], [-2.0, -0.5]])
    >>> w = logistic_probe(x, jnp.array([1.0, 1.0, 0.0, 0.0]))
    >>> bool(w[0] > 10 * abs(w[1]))
    True
    """
    import optax

    centred = x - jnp.mean(x, axis=0, keepdims=True)
    scale, size = jnp.sqrt(jnp.mean(centred**2)), jnp.sqrt(jnp.mean(x**2))
    varies = scale > 10 * jnp.finfo(x.dtype).eps * size  # smaller differences are rounding errors
    scaled = centred / jnp.where(varies, scale, 1.0)

    def loss(w: Array) -> Array:
        logits = scaled @ w[:-1] + w[-1]
        return jnp.mean(jax.nn.softplus(logits) - y * logits) + 0.5 * penalty * jnp.sum(w[:-1] ** 2)

    solver = optax.lbfgs()
    w: Any = jnp.zeros(x.shape[1] + 1, x.dtype)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(w, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # optax's line search counts in mixed integers
        (w, _), _ = cast(Any, jax.lax.scan)(step, (w, solver.init(w)), None, length=steps)
    return jnp.where(varies, w[:-1] / jnp.where(varies, scale, 1.0), 0.0)
