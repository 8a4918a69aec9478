"""What the workers share: the folder that they read and the lines that they speak.

`with_<peer>.py FOLDER` runs in the peer's own virtual environment and imports nothing of mijax (`with_mijax.py` is
mijax's own, for a process like theirs). FOLDER holds `config.json` (the model's shape), `model/` (a Hugging Face
checkpoint) and `tokens.npz` (clean, corrupted [batch pos]; correct, wrong [batch]). A worker prints one JSON line when
the model is ready, with the names of its grids, then reads such names, one a line (`z_head_pos`, or `z_head_pos:48` for
its first 48 cells; the rest are NaN), and answers each with one JSON line; `quit` ends it. The result, [*grid batch] in
float32, is the logit of the correct token minus that of the wrong one at the last position, in the corrupted run with
clean activations put in.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which torch may do

Told = dict[str, Any]
"""What goes into an answer beside what `measured` finds: of a grid `clean` and `clean_cpu`, the seconds of it that do
not grow with the cells."""


class Worker(NamedTuple):
    """A model that is ready: a function from a grid and how many of its cells to run; its grids; about the software."""

    run: Callable[[str, int | None], tuple[np.ndarray, Told]]
    grids: Iterable[str]
    about: Told


class Case:
    """What FOLDER holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        tokens = np.load(folder / "tokens.npz")
        self.clean, self.corrupted, self.correct, self.wrong = (
            tokens[name].astype(np.int64) for name in ("clean", "corrupted", "correct", "wrong")
        )


def filled(values: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The cells that were run in their places of the grid, NaN in the others."""
    result = np.full((*shape, values[0].shape[-1]), np.nan, np.float32)
    result.reshape(-1, result.shape[-1])[: len(values)] = values
    return result


def serve(load: Callable[[Path], Worker]) -> None:
    """Load the model of the folder in `sys.argv`, and answer lines until `quit`."""
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints goes to stderr
    folder = Path(sys.argv[1])
    run, grids, about = load(folder)
    ready = {"grids": list(grids), "cpu": time.process_time(), "peak_rss": peak_rss()}
    print(json.dumps({**about, **ready}), file=say, flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request == "quit":
            break
        try:
            answer = measured(run, request, folder / f"{about['peer']}-{about['version']}-{request}.npy")
        except Exception:
            answer = {"grid": request, "error": traceback.format_exc()}
        print(json.dumps(answer), file=say, flush=True)


def measured(run: Callable[[str, int | None], tuple[np.ndarray, Told]], request: str, file: Path) -> Told:
    """Run a grid, write its values, and tell what it took."""
    grid, _, limit = request.partition(":")
    reset = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    values, details = run(grid, int(limit) if limit else None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_rss()
    np.save(file, values.astype(np.float32))
    cells = int(np.isfinite(values).all(axis=-1).sum())
    return {
        "grid": request, "wall": wall, "cpu": cpu, "peak_rss": peak, "peak_is_of_grid": reset, "cells": cells,
        "file": str(file), **details,
    }  # fmt: skip


def reset_peak() -> bool:
    """Start the peak of the resident memory anew, where the kernel can, so that it is not that of loading."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """The peak in bytes. `ru_maxrss` is second choice: it counts the process that started this one too."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
