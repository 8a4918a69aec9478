"""Measuring exactly the cells in doubt, and a sample of the others, which bounds what was missed."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mijax._types import Float, Int
from mijax.attribution.estimates import AttributionJob
from mijax.attribution.nodes import Nodes
from mijax.engine.cells import cells_of
from mijax.engine.driver import check_sweep, swept
from mijax.engine.grid import Grid
from mijax.engine.measure import Values
from mijax.engine.options import Options
from mijax.engine.pairs import patched
from mijax.interventions.edits import Replace

if TYPE_CHECKING:
    import xarray as xr

CONFIDENCE = 0.95


class Verify(NamedTuple):
    """How many cells of each site to measure because of their score, and how many at random; from which part of source -
    base on a cell of the rest counts as missed; the seed of the sample."""

    k: int
    sample: int
    threshold: float
    seed: int


class Chosen(NamedTuple):
    """Cells by their numbers: those of the highest score, and a random sample of the rest."""

    top: Int[np.ndarray, " k"]
    sample: Int[np.ndarray, " s"]


def choose(score: Float[np.ndarray, " cell"], k: int, sample: int, rng: np.random.Generator) -> Chosen:
    """The `k` cells of the highest score, and up to `sample` of the others, each as likely as any other.

    >>> choose(np.array([0.1, 3.0, 0.2, 2.0]), 2, 9, np.random.default_rng(0))
    Chosen(top=array([1, 3]), sample=array([0, 2]))
    """
    order = np.argsort(-score, kind="stable")
    rest = order[k:]
    return Chosen(order[:k], np.sort(rng.choice(rest, min(sample, len(rest)), replace=False)))


def most_missed(rest: int, sample: int, missed: int, confidence: float = CONFIDENCE) -> int:
    """How many of `rest` cells are missed at most, if `missed` of a random `sample` of them are.

    The largest number with which so few in the sample would still have a probability over 1 - confidence: in a share of at
    least `confidence` of samples the truth is no larger (the hypergeometric distribution's one-sided bound).

    >>> most_missed(1000, 0, 0), most_missed(1000, 100, 0), most_missed(1000, 1000, 3)
    (1000, 28, 3)
    """
    import scipy.stats

    low, high = missed, rest - (sample - missed)  # what the sample itself tells
    while low < high:
        middle = (low + high + 1) // 2
        if scipy.stats.hypergeom.cdf(missed, rest, middle, sample) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


def verified(
    job: AttributionJob, result: "xr.Dataset", asked: Verify, memory: int | None, progress: bool
) -> "xr.Dataset":
    """Add to every site of `result` what exact runs of some of its cells find."""
    rng = np.random.default_rng(asked.seed)
    if coincide(result):
        raise ValueError(
            f"the metric is {result.base.mean('batch').values} on the base, and the source run's is no other: they coincide, so that"
            " there is nothing of which a cell could miss a share; verify on other prompts, or by another metric"
        )
    whole = _whole(result)
    for site, nodes in job.nodes.items():
        score = _score(result, site, whole)
        chosen = choose(score, asked.k, asked.sample, rng)
        cells = np.concatenate(chosen)
        found = _exact(job, nodes, cells, Options(memory, progress))
        exact = _placed(result, site, job, cells, found)
        effect = np.abs((exact - result.base).mean("batch") / whole)
        if "metric" in effect.dims:
            effect = effect.max("metric")
        missed = int((effect.values.reshape(-1)[chosen.sample] >= asked.threshold).sum())
        mark = np.zeros(nodes.size, np.int8)
        mark[chosen.top], mark[chosen.sample] = 1, 2
        told = {
            "meaning": "0 not measured, 1 measured for its score, 2 measured in the random sample of the rest",
            "rest": nodes.size - len(chosen.top), "sample": len(chosen.sample), "missed_in_sample": missed,
            "missed_at_most": most_missed(nodes.size - len(chosen.top), len(chosen.sample), missed),
            "confidence": CONFIDENCE, "threshold": asked.threshold,
        }  # fmt: skip
        marks = (tuple(nodes.labels), mark.reshape([len(own) for own in nodes.labels.values()]), told)
        result = result.assign({f"{site}.exact": exact, f"{site}.measured": marks})
    return result


def coincide(result: "xr.Dataset") -> bool:
    """Whether a metric has one mean on source and base; whether the base's is zero, without a source."""
    return not (_whole(result) > 1e-6 * np.abs(result.base.mean("batch"))).all()


def _whole(result: "xr.Dataset") -> "xr.DataArray":
    """The size of source - base, of the batch means; of the base, without a source."""
    base = result.base.mean("batch")
    return np.abs(result.source.mean("batch") - base if "source" in result.coords else base)


def _score(result: "xr.Dataset", site: str, whole: "xr.DataArray") -> Float[np.ndarray, " cell"]:
    """How large the mean effect of each cell may be: its estimate and its error together, of the metric where it is largest."""
    size: Any = np.abs((result[site] - result.base).mean("batch")) / whole
    if f"{site}.unsigned" in result:
        size = np.maximum(size, result[f"{site}.unsigned"].mean("batch") / whole)
    if f"{site}.error" in result:
        size = size + np.abs(result[f"{site}.error"].mean("batch")) / whole
    return (size.max("metric") if "metric" in size.dims else size).values.reshape(-1)


def check_exact(job: AttributionJob, count: int, memory: int | None) -> None:
    """Raise where `count` cells of some site could not be measured, before anything runs."""
    for nodes in job.nodes.values():
        edits = {nodes.site.name: Replace(0.0, _grid(job, nodes, np.arange(min(count, nodes.size))))}
        check_sweep(job.model, job.base, edits, job.metrics, {"memory": memory})


def _exact(job: AttributionJob, nodes: Nodes, cells: Int[np.ndarray, " k"], options: Options) -> Values:
    """The metrics `[cell, batch]` of some cells with the source's activations put in."""
    grid = _grid(job, nodes, cells)
    if job.source is None:
        return swept(job.model, job.base, cells_of({nodes.site.name: Replace(0.0, grid)}), job.metrics, options).values
    return patched(job.model, job.base, job.source, nodes.site.name, grid, job.metrics, options).values


def _grid(job: AttributionJob, nodes: Nodes, cells: Int[np.ndarray, " k"]) -> Grid:
    return Grid(nodes.where(cells, job.base), {"cell": range(len(cells))})


def _placed(
    result: "xr.Dataset", site: str, job: AttributionJob, cells: Int[np.ndarray, " k"], found: Values
) -> "xr.DataArray":
    """The exact metrics in their cells, NaN in the others and where a prompt has not the position."""
    estimate = result[site]
    several = "metric" in estimate.dims
    shape = [estimate.sizes[dim] for dim in estimate.dims if dim != "metric"]
    arrays = []
    for name in job.metrics:
        own = np.full((int(np.prod(shape[:-1])), shape[-1]), np.nan, found[name].dtype)
        own[cells] = found[name]
        arrays.append(own.reshape(shape))
    return estimate.copy(data=np.stack(arrays) if several else arrays[0]).where(estimate.notnull())
