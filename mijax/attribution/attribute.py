"""Estimates of every cell of patching grids from gradients, with their own error, and measured where in doubt."""

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax._types import ArrayLike
from mijax.arguments import bytes_of, check_known
from mijax.attribution.atp import AtP
from mijax.attribution.checks import check_apart, check_differ, check_gradient, check_layered, check_nodes
from mijax.attribution.estimates import AttributionJob, estimated, schedule
from mijax.attribution.method import Estimates, Method
from mijax.attribution.nodes import Sites, nodes_of
from mijax.attribution.verify import Verify, check_exact, coincide, verified
from mijax.engine.labels import with_positions
from mijax.engine.measure import Metrics, as_floats, described, is_users, named
from mijax.engine.names import EFFECT, METRIC, QUANTITY, RUN
from mijax.engine.pairs import Direction, check_pair
from mijax.interventions.checks import check
from mijax.memory import PeakMemory, default_memory
from mijax.meshes import automatic
from mijax.model.model import LayeredModel
from mijax.model.tokens import Tokens

if TYPE_CHECKING:
    import xarray as xr

PLAIN = AtP()
VARIABLES = {"terms": "{}", "unsigned": "{}.unsigned", "error": "{}.error", "error_se": "{}.error_se"}
"""The variable of a site for each field of `Estimates`."""


def attribute(
    model: LayeredModel,
    *,
    clean: Tokens | ArrayLike,
    corrupted: Tokens | ArrayLike | None,
    sites: Sites,
    metric: Metrics,
    direction: Direction = "denoise",
    method: Method = PLAIN,
    verify: Verify | None = None,
    memory: int | None = None,
    progress: bool = True,
    save: str | os.PathLike[str] | None = None,
) -> "xr.Dataset":
    """Estimate what `patch` would measure at every cell of every site, from gradients.

    Attribution patching (Nanda 2023) and its refinements. The estimate's own error is told by `mijax.AtP(probes=...)`, which
    adds each cell's second-order term, and by `verify`, which measures some cells exactly.

    Args:
        model: the model.
        clean: the clean prompts.
        corrupted: the corrupted prompts, of one shape and padding with `clean`. With `None` the source's activations are
            zeros: gradient x input, the estimate of a zero ablation of the clean run, whatever `direction`.
        sites: names of sites, whose cells are then over all of their axes but vectors' units; or sites mapped to what
            their cells are over, as `patch` takes it: names of axes (summed over the others), or a `mijax.grid`.
        metric: one metric, or several by name.
        direction: `"denoise"` patches clean activations into the corrupted run, `"noise"` the other way round.
        method: `mijax.AtP()` (two forward passes and one backward for everything), `mijax.IntegratedGradients(...)` or
            `mijax.AtPStar()`.
        verify: how many cells to measure exactly, `mijax.Verify(20)`.
        memory: the bytes that prompts running together may take, by default what the device has to spare. Layers are computed
            again in the backward pass (`jax.checkpoint`), and prompts split, where that takes it; attributes tell.
        progress: whether to show a bar.
        save: a folder for the estimates of finished prompts, from which the same call goes on after a crash.

    Returns:
        A variable for each site, on the scale of `patch`: the base's metric plus the estimated change, `[*cells, batch]`,
        with `base` and `source` beside. Several metrics have the dimension `metric` in front; key/value heads have the
        dimension `kv_head`. What a method and `verify` add is told there.

    Raises:
        TypeError: for a metric without gradient (ranks and accuracies count).
        ValueError: for what `patch` refuses, prompts that are the same in both batches, a metric, gradient or error that is not
            finite, a metric of an example that depends on others, different places along one axis, more cells to verify than
            there are. A metric whose means on base and source coincide is warned of, and cannot be verified: there is no
            whole of which to miss a share.

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
    memory = bytes_of(memory)
    if not isinstance(method, Method):
        raise TypeError(f"method must be one such as mijax.AtP(), given {method!r}")
    if not (verify is None or isinstance(verify, Verify)):
        raise TypeError(f"verify must be a mijax.Verify, such as mijax.Verify(20), given {verify!r}")
    check_layered(model)
    check_known("attribute", (model, clean, corrupted))
    model.check()
    model, clean, corrupted = automatic((model, clean, corrupted))
    metrics = {name: automatic(m) for name, m in named(metric).items()}  # not the dictionary: JAX would sort it
    base, source = _sides(model, clean, corrupted, direction)
    job = AttributionJob(model, base, source, metrics, nodes_of(model, base, sites), method)
    _check(job)
    order = schedule(job, default_memory() if memory is None else memory)
    if verify is not None:
        check_exact(job, verify, memory)
    with PeakMemory() as peak:
        estimates, order = estimated(job, order, progress=progress, save=save)
    run: dict[str, Any] = {"prompts_together": order.prompts, "checkpoint": order.checkpoint}
    run |= {"memory_estimate": float(order.bytes)} | ({} if peak.taken is None else {"memory_peak": float(peak.taken)})
    result = _labelled(job, estimates, single=not isinstance(metric, Mapping))
    result = result.assign_attrs(direction="noise" if source is None else direction, **run)
    if verify is not None:
        return verified(job, result, verify, memory, progress)
    if source is not None and coincide(result):
        warnings.warn(
            "source and base coincide: the metric has one mean on both, of which no effect is a share", stacklevel=2
        )
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


def _check(job: AttributionJob) -> None:
    """Raise what `attribute` raises of what is known before the runs."""
    if job.model.n_layers == 0:
        raise ValueError("a model without layers has nothing to attribute to")
    job.method.check(job.model.n_layers, job.nodes, job.source is None)
    check_nodes(job.nodes)
    for tokens in (job.base,) if job.source is None else (job.base, job.source):
        check(job.model, tokens, {}, {})
    if not job.metrics:
        raise ValueError("there is no metric")
    check_known("attribute", job.programs)
    for name, metric in job.programs.items():
        check_gradient(job.model, job.base, name, metric)
        if is_users(job.metrics[name]):
            check_apart(job.model, job.base, name, metric)


def _labelled(job: AttributionJob, estimates: Estimates, single: bool) -> "xr.Dataset":
    """The base plus each cell's term, by site; with the other estimates beside it."""
    import xarray as xr

    names = list(job.metrics)
    together = lambda by_metric: as_floats(by_metric[names[0]] if single else np.stack([by_metric[n] for n in names]))
    runs = ("batch",) if single else ("metric", "batch")
    shared: dict[str, Any] = {"batch": np.arange(len(job.base.ids))} | ({} if single else {"metric": names})
    for run in ("base", "source", "gap"):
        if getattr(estimates, run):
            shared[run] = (runs, together(getattr(estimates, run)), {QUANTITY: RUN})
    arrays = {}
    for site, nodes in job.nodes.items():
        coords = shared | {dim: np.asarray(labels) for dim, labels in nodes.labels.items()}
        dims = (*runs[:-1], *nodes.labels, "batch")
        for field, variable in VARIABLES.items():
            terms = getattr(estimates, field)
            if terms is None:
                continue
            cells = {metric: nodes.by_cell(terms[metric][site], job.base) for metric in names}
            if field == "terms":
                cells = {metric: estimates.base[metric] + c for metric, c in cells.items()}
            attrs = {QUANTITY: METRIC if field == "terms" else EFFECT}
            array = xr.DataArray(together(cells), coords, dims, attrs=attrs)
            arrays[variable.format(site)] = array if nodes.grid else with_positions(array, job.base)
    result = xr.merge([array.rename(name) for name, array in arrays.items()], join="exact", compat="equals")
    described_by: dict[str, Any] = {"method": repr(job.method), "metric": " ".join(names), "sites": " ".join(job.nodes)}
    for name, gap in (estimates.gap or {}).items():
        described_by["gap" if single else f"gap.{name}"] = float(np.abs(gap).mean())
    return result.assign_attrs(described_by | described(job.model))
