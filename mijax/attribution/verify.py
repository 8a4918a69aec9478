"""Measuring exactly the cells in doubt, and a sample of the others, which bounds what was missed."""

import dataclasses
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mijax._types import Float, Int
from mijax.arguments import whole_number
from mijax.attribution.estimates import AttributionJob
from mijax.attribution.nodes import Nodes
from mijax.engine.cells import cells_of
from mijax.engine.driver import check_sweep, swept
from mijax.engine.grid import Grid
from mijax.engine.labels import has_positions, mean_over_prompts
from mijax.engine.measure import Values
from mijax.engine.options import Options
from mijax.engine.pairs import patched
from mijax.interventions.edits import Replace

if TYPE_CHECKING:
    import xarray as xr

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Verify:
    """Measuring exactly, with the sweep engine, the cells in doubt and a random sample of the others.

    It adds to each site of a result `<site>.exact`, NaN where not measured, and `<site>.measured` (0 not, 1 among the
    `k`, 2 in the sample). The attribute `missed_at_most` of the latter bounds, with 95 % confidence, how many of the rest
    change the metric by at least `threshold` of source - base (of the base, without a source), as `missed_in_sample` of
    the sample do. A cell whose mean effect is not a number counts as missed; `not_finite_in_sample` of them are not
    finite.

    Args:
        k: how many cells of each site to measure: those whose mean effect and error are estimated largest together.
        sample: how many of the rest to measure at random, by default `k`.
        threshold: the part of |source - base| from which on a cell of the rest counts as missed.
        seed: the seed of the sample.

    Raises:
        TypeError: for numbers that are not whole, and a threshold that is no number.
        ValueError: for negative numbers, no cell at all, and a threshold that is not over 0.

    >>> Verify(20)
    Verify(k=20, sample=None, threshold=0.05, seed=0)
    """

    k: int
    sample: int | None = None
    threshold: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in {"k": self.k, "sample": self.n_sample, "seed": self.seed}.items():
            whole_number(name, value)
        if not self.k + self.n_sample:
            raise ValueError("verify some cells: k and sample are both 0")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, Real):
            raise TypeError(f"threshold must be a part of source - base, such as 0.05, given {self.threshold!r}")
        if not 0 < self.threshold < np.inf:
            raise ValueError(f"threshold must be a part of source - base, over 0, given {self.threshold!r}")

    @property
    def n_sample(self) -> int:
        """The number of cells of the random sample."""
        return self.k if self.sample is None else self.sample


class Chosen(NamedTuple):
    """Cells by their numbers: those of the highest score, and a random sample of the rest."""

    top: Int[np.ndarray, " k"]
    sample: Int[np.ndarray, " s"]


def choose(score: Float[np.ndarray, " cell"], k: int, sample: int, rng: np.random.Generator) -> Chosen:
    """The `k` cells of the highest score, and up to `sample` of the others, each as likely as any other.

    Args:
        score: of each cell.
        k: the number of cells of the highest score.
        sample: the number of others.
        rng: draws them.

    Returns:
        The numbers of the cells.

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

    Args:
        rest: the number of cells that the sample was drawn from.
        sample: the size of the sample.
        missed: how many of the sample are missed.
        confidence: the probability that the bound holds.

    Returns:
        The bound, a number of cells from `missed` to `rest`.

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
    job: AttributionJob, result: "xr.Dataset", verify: Verify, memory: int | None, progress: bool
) -> "xr.Dataset":
    """Add exact measurements of some cells to every site of a result.

    Args:
        job: what is attributed.
        result: the estimates, as `mijax.attribute` returns them.
        verify: which cells.
        memory: the bytes that the sweeps may take.
        progress: whether to show bars.

    Returns:
        The result with `<site>.exact` and `<site>.measured`: see `Verify`.

    Raises:
        ValueError: where the metric's means on base and source coincide.
    """
    rng = np.random.default_rng(verify.seed)
    if coincide(result):
        raise ValueError(
            f"the metric is {result.base.mean('batch').values} on the base, and the source run's is no other: they coincide, so that"
            " there is nothing of which a cell could miss a share; verify on other prompts, or by another metric"
        )
    whole = _whole(result)
    for site, nodes in job.nodes.items():
        score = _score(result, site, whole)
        chosen = choose(score, verify.k, verify.n_sample, rng)
        cells = np.concatenate(chosen)
        measured = _exact(job, nodes, cells, Options(memory, progress))
        exact = _placed(result, site, job, cells, measured)
        effect = _largest(abs(mean_over_prompts(exact - result.base) / whole))[chosen.sample]
        missed = int((~(effect < verify.threshold)).sum())  # NaN may be any effect
        mark = np.zeros(nodes.size, np.int8)
        mark[chosen.top], mark[chosen.sample] = 1, 2
        attrs = {
            "meaning": "0 not measured, 1 measured for its score, 2 measured in the random sample of the rest",
            "rest": nodes.size - len(chosen.top), "sample": len(chosen.sample), "missed_in_sample": missed,
            "missed_at_most": most_missed(nodes.size - len(chosen.top), len(chosen.sample), missed),
            "not_finite_in_sample": int((~np.isfinite(effect)).sum()),
            "confidence": CONFIDENCE, "threshold": verify.threshold,
        }  # fmt: skip
        marks = (tuple(nodes.labels), mark.reshape([len(labels) for labels in nodes.labels.values()]), attrs)
        result = result.assign({f"{site}.exact": exact, f"{site}.measured": marks})
    return result


def coincide(result: "xr.Dataset") -> bool:
    """Whether some metric has one mean on source and base, or, without a source, a mean of zero on the base.

    Args:
        result: the estimates, as `mijax.attribute` returns them.

    Returns:
        Whether there is such a metric.
    """
    return not (_whole(result) > 1e-6 * np.abs(result.base.mean("batch"))).all()


def _whole(result: "xr.Dataset") -> "xr.DataArray":
    """The size of source - base, of the batch means; of the base, without a source."""
    base = result.base.mean("batch")
    return np.abs(result.source.mean("batch") - base if "source" in result.coords else base)


def _score(result: "xr.Dataset", site: str, whole: "xr.DataArray") -> Float[np.ndarray, " cell"]:
    """How large the mean effect of each cell may be: its estimate and its error together, of the metric where it is largest."""
    size: Any = np.abs(mean_over_prompts(result[site] - result.base)) / whole
    if f"{site}.unsigned" in result:
        size = np.maximum(size, mean_over_prompts(result[f"{site}.unsigned"]) / whole)
    if f"{site}.error" in result:
        size = size + np.abs(mean_over_prompts(result[f"{site}.error"])) / whole
    return _largest(size)


def _largest(size: "xr.DataArray") -> Float[np.ndarray, " cell"]:
    """The size of each cell, by the metric where it is largest; NaN where it is NaN by some metric."""
    return (size.max("metric", skipna=False) if "metric" in size.dims else size).values.reshape(-1)


def check_exact(job: AttributionJob, verify: Verify, memory: int | None) -> None:
    """Raise where cells could not be measured, before anything runs.

    Args:
        job: what is attributed.
        verify: which cells are to be measured.
        memory: the bytes that the sweeps may take.

    Raises:
        ValueError: for more cells than a site has, and for memory that holds no cell.
    """
    for site, nodes in job.nodes.items():
        if verify.k > nodes.size:
            raise ValueError(f"verify must be from 0 to the {nodes.size} cells of site {site!r}, given {verify.k}")
        some = np.arange(min(verify.k + verify.n_sample, nodes.size))
        edits = {nodes.site.name: Replace(0.0, _grid(job, nodes, some))}
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
    result: "xr.Dataset", site: str, job: AttributionJob, cells: Int[np.ndarray, " k"], measured: Values
) -> "xr.DataArray":
    """The exact metrics in their cells, NaN in the others and where a prompt has not the position."""
    estimate = result[site]
    several = "metric" in estimate.dims
    shape = [estimate.sizes[dim] for dim in estimate.dims if dim != "metric"]
    arrays = []
    for name in job.metrics:
        values = np.full((int(np.prod(shape[:-1])), shape[-1]), np.nan, measured[name].dtype)
        values[cells] = measured[name]
        arrays.append(values.reshape(shape))
    exact, has = estimate.copy(data=np.stack(arrays) if several else arrays[0]), has_positions(estimate)
    return exact if has is None else exact.where(has)
