"""Estimates of every cell of patching grids from gradients, with their own error, and measured where in doubt."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike
from mijax.attribution.gradient import AtP
from mijax.attribution.integrated import IntegratedGradients
from mijax.attribution.method import Method
from mijax.attribution.nodes import Nodes, Sites, nodes_of, overlap
from mijax.attribution.scores import Job, plan, scored
from mijax.attribution.verify import Verify, verified
from mijax.memory import PeakMemory, default_memory
from mijax.metrics import AnyMetric
from mijax.model.numerics import accumulator
from mijax.model.readout import Readout
from mijax.model.tokens import Tokens, as_tokens
from mijax.model.transformer import Transformer
from mijax.run import check
from mijax.sweeps.measure import Metrics, checked, described, named, values_of
from mijax.sweeps.patch import Direction, check_pair
from mijax.sweeps.places import positions_told

if TYPE_CHECKING:
    import xarray as xr

PLAIN = AtP()
KINDS = {"term": "{}", "unsigned": "{}.unsigned", "error": "{}.error", "error_se": "{}.error_se"}
"""The variable of a site for each kind of term."""


def attribute(
    model: Transformer,
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
    With `corrupted=None` the source's activations are zeros (gradient x input; the estimate is that of a zero ablation).

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
    prompts that are the same in both batches, a gradient that is not finite, different grids along one axis, more cells to
    verify than there are.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> both = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "metric": mj.metrics.logit_diff(7, 8)}
    >>> r = mj.attribute(model, sites={"z": ("layer", "head"), "mlp_out": ("layer", "pos")}, **both)
    >>> r.z.dims, r.mlp_out.dims
    (('layer', 'head', 'batch'), ('layer', 'pos', 'batch'))
    >>> exact = mj.patch(model, site="z", over=("layer", "head"), **both)
    >>> bool(abs(exact - r.z).max() < 0.1 * abs(exact - exact.base).max())
    True
    """
    base, source = _sides(clean, corrupted, direction)
    metrics = named(metric)
    nodes = nodes_of(model, base, sites)
    sample = verify if sample is None else sample
    _check_method(model, source, nodes, method, probes)
    _check_cells(nodes, verify, sample)
    _check_runs(model, base, source, metrics)
    job = Job(model, base, source, metrics, nodes, method, probes, seed)
    order = plan(job, default_memory() if memory is None else memory)
    with PeakMemory(order.bytes) as peak:
        found, order = scored(job, order, progress=progress, save=save)
    _check_found(job, found)
    told: dict[str, Any] = {"prompts_together": order.prompts, "checkpoint": order.checkpoint}
    told |= {"memory_estimate": float(order.bytes)} | ({} if peak.taken is None else {"memory_peak": float(peak.taken)})
    result = _labelled(job, found, single=not isinstance(metric, Mapping))
    result = result.assign_attrs(direction="noise" if source is None else direction, **told)
    if verify:
        result = verified(job, result, Verify(verify, sample, threshold, seed), memory, progress)
    return result


def _sides(clean: Any, corrupted: Any, direction: Direction) -> tuple[Tokens, Tokens | None]:
    """The base and the source."""
    clean = as_tokens(clean)
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', given {direction!r}")
    if corrupted is None:
        return clean, None
    corrupted = as_tokens(corrupted)
    check_pair(clean, corrupted)
    check_differ(clean, corrupted)
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)


def check_differ(clean: Tokens, corrupted: Tokens) -> None:
    """Raise `ValueError` where an example is the same prompt in both batches."""
    same = (np.asarray(clean.ids) == np.asarray(corrupted.ids)) | ~np.asarray(clean.mask)
    if same.all(axis=1).any():
        raise ValueError(
            f"both batches have the same prompt in example {int(np.argmax(same.all(axis=1)))}: nothing to attribute"
        )


def _check_method(
    model: Transformer, source: Tokens | None, nodes: Mapping[str, Nodes], method: Method, probes: int
) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"method must be one such as mijax.AtP(), given {method!r}")
    if model.config.n_layers == 0:
        raise ValueError("a model without layers has nothing to attribute to")
    if probes < 0 or probes == 1:
        raise ValueError(f"a standard error takes at least two probes, given probes={probes}")
    if probes and not isinstance(method, AtP):
        raise ValueError(f"probes tell the second-order error of AtP(); that of {method!r} is another")
    along = method.along if isinstance(method, IntegratedGradients) else None
    if along == "inputs" and source is None:
        raise ValueError(
            "integrated gradients along the inputs need corrupted prompts; along the gate, zeros can stand for them"
        )
    shared = [site for site, own in nodes.items() if along == "gate" and overlap(own)]
    if shared:
        raise ValueError(
            f"integrated gradients along the gate take cells that share no place; those at {shared[0]!r} do"
        )


def _check_cells(nodes: Mapping[str, Nodes], verify: int, sample: int) -> None:
    labels: dict[str, list[Any]] = {}
    for site, own in nodes.items():
        if not 0 <= verify <= own.size:
            raise ValueError(f"verify must be from 0 to the {own.size} cells of site {site!r}, given {verify}")
        for dim, these in own.labels.items():
            if labels.setdefault(dim, list(these)) != list(these):
                raise ValueError(
                    f"sites with different grids along {dim!r} must be asked for apart; at {site!r} these are {list(these)[:9]}, at"
                    f" another {labels[dim][:9]} (key/value heads may be named 'kv_head')"
                )
    if sample < 0 or (sample and not verify):
        raise ValueError(f"sample counts cells beside those of verify={verify}, given {sample}")


def _check_runs(model: Transformer, base: Tokens, source: Tokens | None, metrics: Mapping[str, AnyMetric]) -> None:
    if not metrics:
        raise ValueError("there is no metric")
    for tokens in (base,) if source is None else (base, source):
        check(model.config, tokens, {}, {})
    for name, metric in metrics.items():
        check_gradient(model, base, name, metric)


def _check_found(job: Job, found: Mapping[str, np.ndarray]) -> None:
    """Raise `ValueError` where a run's metric or its gradient is not finite."""
    for run in ("base", "source"):
        checked({name: found[f"{run}:{name}"] for name in job.metrics if f"{run}:{name}" in found}, run)
    for name in job.metrics:
        for site in job.nodes:
            bad = ~np.isfinite(found[f"term:{name}:{site}"])
            if bad.any():
                raise ValueError(
                    f"the gradient of metric {name!r} at site {site!r} is not finite in example {int(np.argwhere(bad)[0][0])}: the"
                    " metric has no slope where the base run is (a root at zero, say), or the model overflows"
                )


def check_gradient(model: Transformer, tokens: Tokens, name: str, metric: AnyMetric) -> None:
    """Raise `TypeError` where none of eight random final streams gives any example's metric a gradient."""
    if getattr(metric, "per_example", False):  # one tells as much as all
        tokens, metric = jax.tree.map(lambda a: np.asarray(a)[:1], tokens), metric.take(np.zeros(1, np.int32))  # pyright: ignore[reportFunctionMemberAccess]
    shape, dtype = (*tokens.ids.shape, model.config.d_model), accumulator(model.W_E.dtype)
    streams = (jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype) for seed in range(8))
    slope = lambda final: _slope(final, tokens, model.unembedding, model.b_U, metric)
    if not any(bool(np.asarray(slope(final)).any()) for final in streams):
        raise TypeError(
            f"metric {name!r} has no gradient: it does not change with small changes of the final stream (ranks and"
            " accuracies count); take a logit, a probability or a divergence"
        )


@eqx.filter_jit
def _slope(final: Array, tokens: Tokens, W_U: Array, b_U: Array | None, metric: AnyMetric) -> Array:
    total = lambda final: jnp.sum(values_of({"": metric}, Readout(final, tokens, W_U, b_U))[""])
    return jax.grad(total)(final)


def _labelled(job: Job, found: Mapping[str, np.ndarray], single: bool) -> "xr.Dataset":
    """The base plus each cell's term, by site; what else was found beside it."""
    import xarray as xr

    names = list(job.metrics)
    together = lambda own: own[0] if single else np.stack(own)
    runs = ("batch",) if single else ("metric", "batch")
    shared: dict[str, Any] = {"batch": np.arange(len(job.base.ids))} | ({} if single else {"metric": names})
    for run in ("base", "source", "gap"):
        if f"{run}:{names[0]}" in found:
            shared[run] = (runs, together([found[f"{run}:{name}"] for name in names]).astype(np.float32))
    arrays = {}
    for site, nodes in job.nodes.items():
        coords = shared | {dim: np.asarray(labels) for dim, labels in nodes.labels.items()}
        dims = (*runs[:-1], *nodes.labels, "batch")
        for kind, name in KINDS.items():
            if f"{kind}:{names[0]}:{site}" in found:
                cells = [nodes.by_cell(found[f"{kind}:{metric}:{site}"], job.base) for metric in names]
                if kind == "term":
                    cells = [c + found[f"base:{metric}"] for c, metric in zip(cells, names)]
                array = xr.DataArray(together(cells).astype(np.float32), coords, dims)
                arrays[name.format(site)] = array if nodes.grid else positions_told(array, job.base)
    result = xr.merge([array.rename(name) for name, array in arrays.items()], join="exact", compat="equals")
    attrs: dict[str, Any] = {"method": repr(job.method), "metric": " ".join(names), "sites": " ".join(job.nodes)}
    for name in names:
        if f"gap:{name}" in found:
            attrs["gap" if single else f"gap.{name}"] = float(np.abs(found[f"gap:{name}"]).mean())
    return result.assign_attrs(attrs | described(job.model))
