"""Estimates of every cell of patching grids from gradients, with their own error, and measured where in doubt."""

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax._types import ArrayLike
from mijax.attribution.checks import check_apart, check_count, check_differ, check_gradient, check_layered, check_nodes
from mijax.attribution.estimates import AttributionJob, estimated, schedule
from mijax.attribution.gradient import AtP
from mijax.attribution.method import Method
from mijax.attribution.nodes import Sites, nodes_of
from mijax.attribution.verify import Verify, check_exact, coincide, verified
from mijax.engine.labels import positions_told
from mijax.engine.measure import Metrics, as_floats, described, is_split, named
from mijax.engine.pairs import Direction, check_pair
from mijax.memory import PeakMemory, default_memory
from mijax.meshes import automatic
from mijax.model.model import LayeredModel
from mijax.model.tokens import Tokens
from mijax.run import check

if TYPE_CHECKING:
    import xarray as xr

PLAIN = AtP()
VARIABLES = {"term": "{}", "unsigned": "{}.unsigned", "error": "{}.error", "error_se": "{}.error_se"}
"""The variable of a site for each kind of term."""


def attribute(
    model: LayeredModel,
    *,
    clean: Tokens | ArrayLike,
    corrupted: Tokens | ArrayLike | None,
    sites: Sites,
    metric: Metrics,
    direction: Direction = "denoise",
    method: Method = PLAIN,
    probes: int = 0,
    verify: int = 0,
    sample: int | None = None,
    threshold: float = 0.05,
    seed: int = 0,
    memory: int | None = None,
    progress: bool = True,
    save: str | os.PathLike | None = None,
) -> "xr.Dataset":
    """Estimate what `patch` would measure at every cell of every site, from gradients.

    `sites` names sites, whose cells are then over all of their axes but vectors' units; or maps each to what its cells are
    over, as `patch` takes it: names of axes (summed over the others), or a `mijax.grid`. `method` is one of
    `mijax.AtP()` (two forward passes and one backward for everything), `mijax.IntegratedGradients(...)`, `mijax.AtPStar()`.
    With `corrupted=None` the source's activations are zeros (gradient x input; the estimate is that of a zero ablation of
    the clean run, whatever `direction`).

    Gives a variable for each site, on the scale of `patch`: the base's metric plus the estimated change, [*cells, batch]; with
    `base` and `source` beside. Several metrics have the dimension `metric` in front. Key/value heads have the dimension `kv_head`.

    How wrong is it? `probes` random probes (of `AtP`; each about two backward passes; at least 2) add `<site>.error`, the second-order
    term of every cell, which is what the exact effect exceeds the estimate by where cells are nearly quadratic, and its
    `<site>.error_se`. (A metric that is least at the base, such as a divergence from the base's own logits, is all second order.)
    Neither sees what has no curvature at the base, such as saturated attention. So `verify=k` measures with the sweep engine
    the `k` cells of each site whose mean effect and error are largest together, and a random `sample` of the rest (by
    default as many): `<site>.exact`, NaN where not measured, and `<site>.measured` (0 not, 1 among the largest, 2 in the
    sample). Its attribute `missed_at_most` then bounds, with 95 % confidence, how many of the rest change the metric by at least
    `threshold` of source - base (of the base, without a source), as `missed_in_sample` of the sample do.

    Prompts are run in chunks within `memory` bytes, layers being computed again in the backward pass (`jax.checkpoint`) where that
    takes it; attributes tell. `progress` and `save` are as in `sweep` (only estimates are saved).

    Raises what `patch` raises; `TypeError` for a metric without gradient (ranks and accuracies count); `ValueError` for
    prompts that are the same in both batches, a metric, gradient or error that is not finite, a metric of an example that depends on others,
    different places along one axis, more cells to verify than there are. Warns where a metric's means on base and source
    coincide (which `verify` refuses: there is no whole to miss a share of).

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> both = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "metric": mj.metrics.logit_diff(7, 8)}
    >>> r = mj.attribute(model, sites={"z": ("layer", "head"), "mlp_out": ("layer", "pos")}, **both)
    >>> r.z.dims, r.mlp_out.dims
    (('layer', 'head', 'batch'), ('layer', 'pos', 'batch'))
    >>> exact = mj.patch(model, site="z", over=("layer", "head"), **both)
    >>> bool(abs(exact - r.z).max() < 0.1 * abs(exact - exact.base).max())
    True
    """
    for what, value in {"probes": probes, "verify": verify, "sample": sample, "seed": seed, "memory": memory}.items():
        if value is not None:
            check_count(value, what)
    if not 0 < threshold < np.inf:
        raise ValueError(f"threshold must be a part of source - base, over 0, given {threshold!r}")
    if not isinstance(method, Method):
        raise TypeError(f"method must be one such as mijax.AtP(), given {method!r}")
    check_layered(model)
    model.check()
    model, clean, corrupted = automatic((model, clean, corrupted))
    metrics = {name: automatic(own) for name, own in named(metric).items()}  # not the dictionary: JAX would sort it
    base, source = _sides(model, clean, corrupted, direction)
    job = AttributionJob(model, base, source, metrics, nodes_of(model, base, sites), method, probes, seed)
    sample = verify if sample is None else sample
    _check(job, verify, sample)
    order = schedule(job, default_memory() if memory is None else memory)
    if verify:
        check_exact(job, verify + sample, memory)
    with PeakMemory() as peak:
        found, order = estimated(job, order, progress=progress, save=save)
    told: dict[str, Any] = {"prompts_together": order.prompts, "checkpoint": order.checkpoint}
    told |= {"memory_estimate": float(order.bytes)} | ({} if peak.taken is None else {"memory_peak": float(peak.taken)})
    result = _labelled(job, found, single=not isinstance(metric, Mapping))
    result = result.assign_attrs(direction="noise" if source is None else direction, **told)
    if not verify and source is not None and coincide(result):
        warnings.warn(
            "source and base coincide: the metric has one mean on both, of which no effect is a share", stacklevel=2
        )
    if verify:
        result = verified(job, result, Verify(verify, sample, threshold, seed), memory, progress)
    return result


def _sides(model: LayeredModel, clean: Any, corrupted: Any, direction: Direction) -> tuple[Tokens, Tokens | None]:
    """The base and the source."""
    clean = model.inputs(clean)
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', given {direction!r}")
    if corrupted is None:
        return clean, None
    corrupted = model.inputs(corrupted)
    check_pair(clean, corrupted)
    check_differ(clean, corrupted)
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)


def _check(job: AttributionJob, verify: int, sample: int) -> None:
    """Raise what `attribute` raises of what is known before the runs."""
    if job.model.n_layers == 0:
        raise ValueError("a model without layers has nothing to attribute to")
    if job.probes == 1:
        raise ValueError("a standard error takes at least two probes, given probes=1")
    if job.probes and not isinstance(job.method, AtP):
        raise ValueError(f"probes tell the second-order error of AtP(); that of {job.method!r} is another")
    job.method.check(job.model.n_layers, job.nodes, job.source is None)
    check_nodes(job.nodes, verify, sample)
    for tokens in (job.base,) if job.source is None else (job.base, job.source):
        check(job.model, tokens, {}, {})
    if not job.metrics:
        raise ValueError("there is no metric")
    for name, metric in job.programs.items():
        check_gradient(job.model, job.base, name, metric)
        if not is_split(job.metrics[name]):
            check_apart(job.model, job.base, name, metric)


def _labelled(job: AttributionJob, found: Mapping[str, np.ndarray], single: bool) -> "xr.Dataset":
    """The base plus each cell's term, by site; what else was found beside it."""
    import xarray as xr

    names = list(job.metrics)
    together = lambda own: own[0] if single else np.stack(own)
    runs = ("batch",) if single else ("metric", "batch")
    shared: dict[str, Any] = {"batch": np.arange(len(job.base.ids))} | ({} if single else {"metric": names})
    for run in ("base", "source", "gap"):
        if f"{run}:{names[0]}" in found:
            shared[run] = (runs, as_floats(together([found[f"{run}:{name}"] for name in names])))
    arrays = {}
    for site, nodes in job.nodes.items():
        coords = shared | {dim: np.asarray(labels) for dim, labels in nodes.labels.items()}
        dims = (*runs[:-1], *nodes.labels, "batch")
        for kind, name in VARIABLES.items():
            if f"{kind}:{names[0]}:{site}" in found:
                cells = [nodes.by_cell(found[f"{kind}:{metric}:{site}"], job.base) for metric in names]
                if kind == "term":
                    cells = [c + found[f"base:{metric}"] for c, metric in zip(cells, names)]
                array = xr.DataArray(as_floats(together(cells)), coords, dims)
                arrays[name.format(site)] = array if nodes.grid else positions_told(array, job.base)
    result = xr.merge([array.rename(name) for name, array in arrays.items()], join="exact", compat="equals")
    attrs: dict[str, Any] = {"method": repr(job.method), "metric": " ".join(names), "sites": " ".join(job.nodes)}
    for name in names:
        if f"gap:{name}" in found:
            attrs["gap" if single else f"gap.{name}"] = float(np.abs(found[f"gap:{name}"]).mean())
    return result.assign_attrs(attrs | described(job.model))
