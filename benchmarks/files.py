"""All figures of files from strangers in one command: mutations of every format, the same on another commit, and what loading costs.

    python -m benchmarks.files --mutations 2000 --against OTHER/bin/python

`OTHER` is an environment with the commit before (left out, the comparisons are). The mutations are those of `python -m tests.files`,
the same at each run. SmolLM2 is loaded from the cache in fresh processes, in turn by both.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from benchmarks.commits import interval

LOAD = """
import time
import jax
import mijax as mj
wall, cpu = time.perf_counter(), time.process_time()
model, tokenizer = mj.load("smollm2-135m-instruct")
jax.block_until_ready(jax.tree.leaves(model))
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main(mutations: int = 2000, against: str = "", rounds: int = 7, load: bool = True) -> dict[str, float]:
    """Measure, and print.

    Args:
        mutations: of each format.
        against: the Python executable of an environment with another commit of mijax.
        rounds: loads by each commit.
        load: whether to load SmolLM2.

    Returns:
        Faults of each kind found in this commit and in the other; seconds of loading and their ratio.
    """
    pythons = {"this": sys.executable, **({"other": against} if against else {})}
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:  # a folder with the tests, and without this mijax
        Path(scratch, "tests").symlink_to(Path(__file__).parents[1] / "tests")
        for name, python in pythons.items():
            print(f"mutations, read by {name} commit:", flush=True)
            number = mutations if name == "this" else min(mutations, 100)  # it may wait ten seconds for many a file
            figures[f"faults, {name}"] = _faults(python, number, scratch if name == "other" else None)
    if not load:
        return figures
    seconds: dict[str, list[list[float]]] = {name: [] for name in pythons}
    for number in range(rounds + 1):  # the first makes the cache
        for name, python in pythons.items():
            command = [python, "-c", LOAD]
            shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(python).parent)
            if number:
                seconds[name].append([float(word) for word in shown.stdout.split()[-2:]])
    for name, rows in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows))
        figures |= {f"wall seconds, {name}": wall, f"CPU seconds, {name}": cpu}
        print(f"SmolLM2 from the cache by {name} commit: {wall:.2f} s, {cpu:.2f} CPU s (medians of {rounds})")
    if against:
        ratios = [this[1] / other[1] for this, other in zip(seconds["this"], seconds["other"])]
        figures["ratio"] = statistics.median(ratios)
        low, high = interval(ratios)
        print(f"CPU seconds, this / other: {figures['ratio']:.3f} [{low:.3f}, {high:.3f}] (bound 1.05)")
    return figures


def _faults(python: str, mutations: int, folder: str | None) -> int:
    """Run the mutations by a Python; returns how many kinds of faults they show."""
    command = [python, "-W", "ignore", "-m", "tests.files", "--mutations", str(mutations)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": ""}
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    process.wait()
    return int(last.rpartition(" ")[2])


if __name__ == "__main__":
    tyro.cli(main)
