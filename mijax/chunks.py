"""Many small jobs in memory-bounded batches of equal size, with progress."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def default_memory() -> int:
    """The bytes that a batch of jobs may take: half of what the device has left, at most 1 GiB on a CPU.

    (A CPU's matrix products are at full speed well below that, and smaller batches show progress.)
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        free = 2**31
    return min(2**30, free // 2)


def chunk_size(jobs: int, bytes_per_job: int, memory: int | None) -> int:
    """How many jobs to run at once: as many as `memory` holds, in batches as equal as can be.

    Raises `ValueError` where not even one job fits.

    >>> chunk_size(100, bytes_per_job=10, memory=400)
    34
    """
    budget = default_memory() if memory is None else memory
    most = budget // max(1, bytes_per_job)
    if most < 1:
        raise ValueError(f"one job takes about {bytes_per_job:,} bytes, memory={budget:,} allows none")
    return -(-jobs // -(-jobs // most))


def full_rows() -> int:
    """How many rows of a matrix product fill the device; more in one chunk would only blur where cells begin."""
    return 2048 if jax.default_backend() == "cpu" else 16384


def run_chunks(
    run: Callable[[int], Any],
    keep: Callable[[int, Any], int],
    chunks: int,
    jobs: int,
    *,
    label: str,
    progress: bool,
) -> None:
    """Run every chunk and hand its results, as NumPy arrays, to `keep`, which says how many jobs they were."""
    from tqdm import tqdm

    # The bar appears only where the work takes more than a second.
    with tqdm(total=jobs, desc=label, unit="cell", delay=1.0, disable=not progress, leave=False) as bar:
        for number in range(chunks):
            bar.update(keep(number, jax.tree.map(np.asarray, run(number))))
