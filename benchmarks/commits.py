"""Two commits of mijax on the same weights and prompts, in alternating rounds."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats

from benchmarks.workers import Worker

SLOWER = 1.03
"""The ratio from which on a commit counts as slower."""
SHORT = 2.0
"""CPU seconds that a round takes at least: what is shorter is repeated."""


class Compared(NamedTuple):
    """CPU seconds of this commit over those of the other, of each round; the median's 90 % interval; how far values differ."""

    ratios: list[float]
    low: float
    high: float
    seconds: tuple[float, float]
    difference: float

    @property
    def slower(self) -> bool:
        """Whether the interval lies wholly above `SLOWER`."""
        return self.low > SLOWER


def compare(current: Worker, other: Worker, grid: str, rounds: int) -> Compared:
    """Both on one grid, warm, in alternating rounds that begin with each in turn."""
    first = [worker.ask(grid) for worker in (current, other)]
    values = [np.load(answer["file"]) for answer in first]
    repeats = max(1, round(SHORT / max(1e-3, current.ask(grid)["cpu"])))
    seconds: dict[Worker, list[float]] = {current: [], other: []}
    for number in range(rounds):
        for worker in (current, other) if number % 2 == 0 else (other, current):
            seconds[worker].append(sum(worker.ask(grid)["cpu"] for _ in range(repeats)) / repeats)
        print(
            f"{grid:14} round {number + 1}: {seconds[current][-1]:.3f} and {seconds[other][-1]:.3f} CPU s", flush=True
        )
    ratios = [a / b for a, b in zip(seconds[current], seconds[other])]
    medians = statistics.median(seconds[current]), statistics.median(seconds[other])
    off = float(np.nanmax(np.abs(values[0] - values[1])) / np.nanmax(np.abs(values[1])))
    return Compared(ratios, *interval(ratios), medians, off)


def interval(ratios: list[float], level: float = 0.9) -> tuple[float, float]:
    """The median's interval by order statistics: at least `level`, or all that there are.

    >>> interval([1.0, 1.1, 0.9, 1.2, 0.8])
    (0.8, 1.2)
    >>> interval([float(i) for i in range(1, 11)])
    (2.0, 9.0)
    """
    ordered, n = sorted(ratios), len(ratios)
    inside = lambda k: 1 - 2 * scipy.stats.binom.cdf(k, n, 0.5)  # between the k-th from either end, counted from 0
    k = max((k for k in range(n // 2) if inside(k) >= level), default=0)
    return ordered[k], ordered[n - 1 - k]


def compared_table(results: Mapping[str, Compared]) -> str:
    """What was found, to be read."""
    lines = [f"{'':14}{'CPU s':>9}{'other':>9}{'ratio':>8}{'90 % interval':>18}{'':>9}  off"]
    for grid, result in results.items():
        verdict = "slower" if result.slower else "faster" if result.high < 1 / SLOWER else ""
        lines.append(
            f"{grid:14}{result.seconds[0]:9.3f}{result.seconds[1]:9.3f}{statistics.median(result.ratios):8.3f}"
            f"     [{result.low:5.3f}, {result.high:5.3f}]{verdict:>9}  {result.difference:.0e}"
        )
    return "\n".join(lines)
