"""A concept three ways: as a gradient, as a difference between counterfactuals, and as a probe's direction."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Float
from mijax.attribution.checks import check_apart, check_differ, check_gradient, check_layered
from mijax.engine.measure import as_programs, captures_of, checked, described, named, values_of
from mijax.engine.pairs import check_pair
from mijax.interventions.edits import Add
from mijax.interventions.where import Where
from mijax.meshes import automatic
from mijax.metrics import AnyMetric, position
from mijax.model.model import LayeredModel
from mijax.model.sites import field_of, site_of
from mijax.model.tokens import Tokens
from mijax.programs.now import JitNow
from mijax.run import check, run, zero_varying_like

if TYPE_CHECKING:
    import xarray as xr

KINDS = ("gradient", "difference", "probe")


class Gradients(NamedTuple):
    """A metric of each example, activations by site, and the metric's gradient with respect to them."""

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
    """The gradient of each example's metric with respect to every activation of some sites, beside the activations.

    A pure function, as `mijax.run` is. With `pos` (one position, or one per example as `[batch, 1]`), only there: the position axis then has
    size 1. Both arrays have the shapes that `run` captures. Raises `TypeError` for a metric without gradient; what it says of an
    example must depend on that example alone.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> found = mj.gradients(model, [[1, 2, 3]], mj.metrics.logit(7), ("resid_post", "post"), pos=-1)
    >>> found.grads["resid_post"].shape, found.grads["post"].shape
    ((2, 1, 1, 8), (2, 1, 1, 32))
    """
    check_layered(model)
    model.check()
    tokens = model.inputs(tokens)
    name, program = _program(model, tokens, metric)
    check_gradient(model, tokens, name, program)
    where = Where() if pos is None else Where(pos=position(pos))
    capture = {site: None if pos is None else where for site in sites}
    # Inside `shard_map`, what does not vary over the mesh has a gradient that is summed over it: another device's examples.
    zero, zeros = zero_varying_like((model, tokens, program), model.dtype).reshape(()), {}
    for site in sites:
        found = site_of(site, model.sites)
        if pos is not None and "pos" not in found.axes:
            raise ValueError(f"site {site!r} has no positions of its own, only {', '.join(found.axes)}")
        shape = zip(found.axes, found.shape(*tokens.ids.shape))
        sizes = [1 if axis == "pos" and pos is not None else n for axis, n in shape]
        zeros[site] = jnp.broadcast_to(zero, sizes)

    def measured(added: dict[str, Array]) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        edits, taps = {site: Add(v, where) for site, v in added.items()}, captures_of(model, {name: program})
        out = run(model, tokens, edits, capture=capture, taps=taps)
        values = values_of({name: program}, out.readout, out.taps)[name]
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
    """Compare a concept's three directions at a site of vectors, layer by layer: do they agree?

    `positive` and `negative` are pairs of prompts with and without the concept, `metric` says how much of it the model
    expresses (the logit of its word, say). At `pos` of every prompt: the mean `gradient` of the metric over all prompts;
    the mean `difference` of activations between the pairs; and the direction of a `probe` that tells
    positive from negative (logistic regression with a small L2 penalty; or yours, of shape [*layer, *head, unit]).

    Gives `direction` [kind, *layer, *head, unit] and `cosine` [kind, other, *layer, *head] between the kinds. A gradient says
    what the model would do, a difference and a probe what is there to be seen: a probe can find what nothing uses.

    Raises `ValueError` where the batches differ in shape or padding, or the site has no vectors; `TypeError` for a
    metric without gradient.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> found = mj.concept(model, positive=[[1, 2, 3]], negative=[[1, 4, 3]], site="resid_post", metric=mj.metrics.logit(7))
    >>> dict(found.cosine.sizes)
    {'kind': 3, 'other': 3, 'layer': 2}
    """
    import xarray as xr

    model, positive, negative, metric = automatic((model, positive, negative, metric))
    positive, negative = model.inputs(positive), model.inputs(negative)
    check_pair(positive, negative)
    check_differ(positive, negative)
    found = site_of(site, model.sites)
    if not found.has_vectors or "pos" not in found.axes:
        raise ValueError(
            f"a concept has a direction at a site of vectors; {site!r} has the axes {', '.join(found.axes)}"
        )
    name, program = _program(model, positive, metric)
    check_gradient(model, positive, name, program)
    if not getattr(metric, "per_example", False):
        check_apart(model, positive, name, program)
    for tokens in (positive, negative):
        check(model, tokens, {}, {site: Where(pos=position(pos))})
    yes, no = (_found(model, tokens, program, site, pos) for tokens in (positive, negative))
    for own, what in ((yes, "positive"), (no, "negative")):
        checked({name: own.values}, what)
    axis = found.axes.index("batch")
    acts, grads = ([np.moveaxis(np.asarray(getattr(own, of)[site]), axis, 0).squeeze(axis + 1) for own in (yes, no)]
                   for of in ("acts", "grads"))  # fmt: skip
    gradient, difference = np.concatenate(grads).mean(axis=0), (acts[0] - acts[1]).mean(axis=0)
    direction = _probes(acts) if probe is None else np.asarray(probe, gradient.dtype)
    if direction.shape != gradient.shape:
        raise ValueError(f"the probe's direction has shape {direction.shape}, expected {gradient.shape}")
    together = np.stack([gradient, difference, direction]).astype(np.float64)
    for kind, own in zip(KINDS, together):
        if not np.isfinite(own).all():
            raise ValueError(f"the direction of the {kind} at {site!r} is not finite")
    size = np.linalg.norm(together, axis=-1, keepdims=True)
    unit = together / np.where(size > 0, size, 1.0)
    dims = [("unit" if field_of(a) == "unit" else a) for a in found.axes if a not in ("batch", "pos")]
    coords = {"kind": list(KINDS), **{dim: np.arange(n) for dim, n in zip(dims, gradient.shape)}}
    cosine = np.einsum("i...u,j...u->ij...", unit, unit)
    told = {"site": site, "metric": name, "prompts": 2 * len(positive.ids), **described(model)}
    between = xr.DataArray(
        cosine.astype(np.float32),
        {**{d: c for d, c in coords.items() if d != "unit"}, "other": list(KINDS)},
        ("kind", "other", *dims[:-1]),
    )
    return xr.Dataset(
        {"direction": xr.DataArray(together.astype(np.float32), coords, ("kind", *dims)), "cosine": between}, attrs=told
    )


@JitNow
def _found(model: LayeredModel, tokens: Tokens, metric: AnyMetric, site: str, pos: ArrayLike) -> Gradients:
    return gradients(model, tokens, metric, (site,), pos)


def _program(model: LayeredModel, tokens: Tokens, metric: Any) -> tuple[str, AnyMetric]:
    """The one metric by its name, as it is now."""
    if isinstance(metric, Mapping):
        raise TypeError(f"one metric is taken here, given several: {', '.join(map(repr, metric))}")
    return next(iter(as_programs(model, tokens, named(metric)).items()))


def _probes(acts: list[np.ndarray]) -> np.ndarray:
    """A probe of each layer (and head)."""
    x, y = np.concatenate(acts), np.repeat([1.0, 0.0], [len(a) for a in acts])
    inner = x.shape[1:]
    each = np.moveaxis(x.reshape(len(x), -1, inner[-1]), 1, 0)
    return np.asarray(_fitted(jnp.asarray(each), jnp.asarray(y, each.dtype))).reshape(inner)


@jax.jit
def _fitted(x: Float[Array, "place example unit"], y: Float[Array, " example"]) -> Float[Array, "place unit"]:
    return jax.lax.map(lambda own: logistic_probe(own, y), x)


def logistic_probe(
    x: Float[Array, "example unit"], y: Float[Array, " example"], penalty: float = 1e-2, steps: int = 100
) -> Float[Array, " unit"]:
    """The direction of logistic regression of `y` in {0, 1} on `x`, by L-BFGS; zero where `x` does not vary.

    Minimises the mean loss in nats plus `penalty` / 2 times the squared weights of inputs scaled to a mean square of 1; what separates
    the classes is otherwise infinite.

    >>> x = jnp.array([[1.0, 0.5], [2.0, -0.5], [-1.0, 0.5], [-2.0, -0.5]])
    >>> w = logistic_probe(x, jnp.array([1.0, 1.0, 0.0, 0.0]))
    >>> bool(w[0] > 10 * abs(w[1]))
    True
    """
    import optax

    centred = x - jnp.mean(x, axis=0, keepdims=True)
    scale, size = jnp.sqrt(jnp.mean(centred**2)), jnp.sqrt(jnp.mean(x**2))
    varies = scale > 10 * jnp.finfo(x.dtype).eps * size  # else what there is to see is rounding
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
