"""A concept as three directions: a gradient, a difference between counterfactuals, and a probe."""

from typing import TYPE_CHECKING

import numpy as np

from mijax._types import ArrayLike
from mijax.arguments import check_known
from mijax.attribution.checks import check_apart, check_differ, check_gradient
from mijax.attribution.gradients import Gradients, gradients, program_of
from mijax.attribution.probe import probes
from mijax.engine.measure import checked, described, is_users
from mijax.engine.pairs import check_pair
from mijax.interventions.checks import check
from mijax.interventions.where import Where
from mijax.meshes import automatic
from mijax.metrics import AnyMetric, position
from mijax.model.model import LayeredModel
from mijax.model.sites import Site, field_of, site_of
from mijax.model.tokens import Tokens
from mijax.programs.now import JitNow

if TYPE_CHECKING:
    import xarray as xr

KINDS = ("gradient", "difference", "probe")


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

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> metric = mj.metrics.logit(7)
    >>> result = mj.concept(model, positive=[[1, 2, 3]], negative=[[1, 4, 3]], site="resid_post", metric=metric)
    >>> dict(result.cosine.sizes)
    {'kind': 3, 'other': 3, 'layer': 2}
    """
    check_known("concept", (model, positive, negative, metric))
    model, positive, negative, metric = automatic((model, positive, negative, metric))
    prompts = {"positive": model.inputs(positive), "negative": model.inputs(negative)}
    check_pair(*prompts.values())
    check_differ(*prompts.values())
    entry = site_of(site, model.sites)
    if not entry.has_vectors or "pos" not in entry.axes:
        raise ValueError(
            f"a concept has a direction at a site of vectors; {site!r} has the axes {', '.join(entry.axes)}"
        )
    name, program = program_of(model, prompts["positive"], metric)
    check_gradient(model, prompts["positive"], name, program)
    if is_users(metric):
        check_apart(model, prompts["positive"], name, program)
    for tokens in prompts.values():
        check(model, tokens, {}, {site: Where(pos=position(pos))})
    results = {kind: _gradients(model, tokens, program, site, pos) for kind, tokens in prompts.items()}
    for kind, result in results.items():
        checked({name: result.values}, kind)
    directions = _directions(entry, site, results["positive"], results["negative"], probe)
    for kind, direction in zip(KINDS, directions):
        if not np.isfinite(direction).all():
            raise ValueError(f"the direction of the {kind} at {site!r} is not finite")
    attrs = {"site": site, "metric": name, "prompts": sum(len(t.ids) for t in prompts.values()), **described(model)}
    return _labelled(directions, entry).assign_attrs(attrs)


@JitNow
def _gradients(model: LayeredModel, tokens: Tokens, metric: AnyMetric, site: str, pos: ArrayLike) -> Gradients:
    return gradients(model, tokens, metric, (site,), pos)


def _directions(
    entry: Site, site: str, positive: Gradients, negative: Gradients, probe: ArrayLike | None
) -> np.ndarray:
    """The directions `[kind, *layer, *head, unit]`; `ValueError` for a probe of another shape."""
    axis = entry.axes.index("batch")
    layers = slice(None) if entry.layers is None else list(entry.layers)  # those that have the site
    existing = lambda x: x[layers] if entry.has_layer else x
    by_example = lambda x: np.moveaxis(existing(np.asarray(x[site])), axis, 0).squeeze(axis + 1)  # the one position
    gradient = np.concatenate([by_example(positive.grads), by_example(negative.grads)]).mean(axis=0)
    acts, baseline = by_example(positive.acts), by_example(negative.acts)
    probed = probes(acts, baseline) if probe is None else np.asarray(probe, gradient.dtype)
    if probed.shape != gradient.shape:
        raise ValueError(f"the probe's direction has shape {probed.shape}, expected {gradient.shape}")
    return np.stack([gradient, (acts - baseline).mean(axis=0), probed])


def _labelled(directions: np.ndarray, entry: Site) -> "xr.Dataset":
    """The directions `[kind, *layer, *head, unit]` and the cosines between them; that with a zero vector is 0."""
    import xarray as xr

    wide = directions.astype(np.float64)  # squares of large entries of float32 overflow
    size = np.linalg.norm(wide, axis=-1, keepdims=True)
    unit = wide / np.where(size > 0, size, 1.0)
    cosine = np.einsum("i...u,j...u->ij...", unit, unit).astype(directions.dtype)
    dims = ["unit" if field_of(a) == "unit" else a for a in entry.axes if a not in ("batch", "pos")]
    coords = {"kind": list(KINDS), "other": list(KINDS)}
    coords |= {dim: np.arange(n) for dim, n in zip(dims, directions.shape[1:])}
    coords |= {"layer": np.asarray(entry.layers)} if entry.has_layer and entry.layers is not None else {}
    variables = {"direction": (("kind", *dims), directions), "cosine": (("kind", "other", *dims[:-1]), cosine)}
    return xr.Dataset(variables, coords)
