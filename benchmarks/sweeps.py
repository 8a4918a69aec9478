"""Activation patching beside TransformerLens and nnsight: the same weights and prompts, in turn, in one run.

    python -m benchmarks.sweeps --help
    python -m benchmarks.sweeps --peers .venv-tl2/bin/python .venv-tl4/bin/python .venv-nnsight/bin/python

Each tool runs in a process of its own, with the virtual environment that its `python` belongs to (`--peers`; without,
mijax is measured alone). The peers' pins clash with each other's and with mijax's; pyproject.toml lists them as groups:

    for peer in tl2 tl4 nnsight; do
      python3.11 -m venv .venv-$peer
      .venv-$peer/bin/pip install "pip>=25.1" && .venv-$peer/bin/pip install --group peer-$peer
    done

Rounds go mijax, peer, peer, ..., mijax, ...; numbers are medians over rounds. Every value is compared with mijax's, and
one that differs by more than 1e-4 of the largest ends the run. Peers, which take as long for every cell, run the
first `--cells` of a large grid and are extrapolated from there, their clean run counted once; mijax runs everything.
`mijax` is the steady state, everything compiled; `cold` the first grid of a new process without any compiled program
(which it writes to disk), `cached` that of one which finds them there; `load s` is what either took before it. Attribution
with TransformerLens is measured as it comes, when PyTorch also computes every parameter's gradient, and in another process
with parameters `frozen`. CPU seconds are those of all threads of a process, MB its peak of resident memory during the
grid, `load MB` that until its model was ready. GFLOP/s count only what
must be recomputed (`benchmarks/arithmetic.py`), whatever was; `/matmul` compares them, per CPU second on a CPU and by
the clock elsewhere, with a product of 4096 x 4096 matrices in the same run; `CPU/TL` is the CPU seconds over those
of the fastest TransformerLens that is not `frozen`.

    python -m benchmarks.sweeps --against OTHER/bin/python --rounds 5

compares two commits of mijax, the other one installed in an environment of its own (`git worktree add ../other COMMIT`, a
virtual environment there, `pip install -e ../other`): rounds alternate, and the ratio of CPU seconds is told for each grid with
its median's 90 % interval. `slower` means that the interval lies wholly above 1.03.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np
import tyro

import mijax as mj
from benchmarks import arithmetic
from benchmarks.arithmetic import GridName
from benchmarks.commits import Compared, compare, compared_table
from benchmarks.workers import SCRIPTS, Worker, started
from experiments import ioi_prompts
from mijax.files import atomic

PACKAGES = ("transformer_lens", "nnsight")
GRIDS: dict[str, tuple[GridName, ...]] = {
    "gpt2": ("resid_pre", "z_head", "z_head_pos", "qkvzp", "attribution"),
    "smollm2": ("resid_pre", "z_head"),
}
LARGE = 200
"""From how many cells on a grid of the peers is extrapolated."""
SCALE = 3.0
"""By how much the random model's matrices are scaled up: heads then change the metric by half of its size."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Activation patching beside its peers."""

    model: Literal["gpt2", "smollm2"] = "gpt2"
    """GPT-2-small's shape with random weights and 8 prompts x 16 random tokens, or SmolLM2-135M with 32 IOI prompts."""
    grids: tuple[GridName, ...] = ()
    """By default all that the model has."""
    peers: tuple[str, ...] = ()
    """Python executables, PYTHON or PYTHON:SCRIPT; by default the script is chosen by what PYTHON can import."""
    rounds: int = 3
    """Of the steady state."""
    cold_rounds: int = 1
    """New processes with and without compiled programs."""
    cells: int = 96
    """How many cells of a large grid the peers run."""
    full: bool = False
    """Let the peers run all cells."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of mijax's parameters; differences are not judged in bfloat16, and the peers have float32."""
    tiny: bool = False
    """A toy model, which checks this script and measures nothing."""
    against: str = ""
    """The Python executable of an environment with another commit of mijax, to be compared with in alternating rounds."""
    out: Path = Path("results/benchmarks/sweeps.json")
    """One record for each model, dtype and device; a further run replaces its own."""


class Example(NamedTuple):
    """What is measured on: a model, of which transformers reads the family, and prompts."""

    model: mj.Transformer
    family: str
    tokens: dict[str, np.ndarray]


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print a table, and write it all to `settings.out`."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
    record: dict[str, Any] = {"settings": dataclasses.asdict(settings), "machine": machine()}
    grids = settings.grids or GRIDS[settings.model]
    if settings.against:
        return {"against": settings.against, "grids": against(settings, grids)}
    commands = [command for peer in settings.peers for command in peer_commands(peer, "attribution" in grids)]
    example = tiny(settings.model) if settings.tiny else {"gpt2": gpt2, "smollm2": smollm2}[settings.model]()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        write_case(folder, example)
        config, differs = example.model.config, example.tokens["clean"] != example.tokens["corrupted"]
        del example
        workers = [stack.enter_context(started(command, folder)) for command in [own_command(settings), *commands]]
        beside = stack.enter_context(started(own_command(settings), folder))
        bench = Bench(settings, config, differs, folder, workers, beside)
        record |= {"tools": {w.name: w.hello for w in workers}, "overhead": beside.ask("overhead")}
        record["batch"], record["pos"] = differs.shape
        record["base"], record["grids"] = bench.base(), {}
        for grid in grids:
            record["grids"][grid] = bench.grid(grid, np.asarray(record["base"]))
            write(settings, record)
    print(f"\n{table(record)}\n\nwrote {settings.out}")
    return record


def against(settings: Settings, grids: Sequence[GridName]) -> dict[str, Compared]:
    """This commit beside another one, on every grid and a plain forward pass; prints a table."""
    make = {"gpt2": gpt2, "smollm2": smollm2}[settings.model]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        workers = []
        for python in (sys.executable, settings.against):
            folder = Path(scratch) / str(len(workers))
            folder.mkdir()
            write_case(folder, tiny(settings.model) if settings.tiny else make())
            command = [python, *own_command(settings)[1:]]
            workers.append(stack.enter_context(started(command, folder)))
        current, other = workers
        results = {grid: compare(current, other, grid, settings.rounds) for grid in ("forward", *grids)}
    print(f"\n{compared_table(results)}")
    return results


def gpt2() -> Example:
    """GPT-2-small's shape, random weights and tokens."""
    config = mj.Config(n_layers=12, d_model=768, n_heads=12, d_vocab=50257, n_ctx=1024)
    return Example(random_model(config), "gpt2", random_tokens(config, 8, 16))


def smollm2() -> Example:
    """SmolLM2 and 32 IOI prompts of one length: the peers are given no mask."""
    model, tokenizer = mj.load("smollm2-135m-instruct")
    assert tokenizer is not None
    ioi = ioi_prompts.make(tokenizer, 64)
    lengths = np.asarray(ioi.clean.lengths)
    length = np.bincount(lengths).argmax()
    rows = np.flatnonzero(lengths == length)[:32]
    real = lambda tokens: np.stack([np.asarray(tokens.ids)[i][np.asarray(tokens.mask)[i]] for i in rows])
    answers = {"correct": ioi.io[rows], "wrong": ioi.subject[rows]}
    return Example(model, "llama", {"clean": real(ioi.clean), "corrupted": real(ioi.corrupted), **answers})


def tiny(model: str) -> Example:
    """A toy of the model's family."""
    llama = {
        "positions": mj.Rotary(), "norm": "rms", "mlp": "gated", "activation": "silu", "n_kv_heads": 2, "attn_bias": "",
        "mlp_bias": False,
    }  # fmt: skip
    options: dict[str, Any] = {} if model == "gpt2" else llama
    config = mj.Config(n_layers=2, d_model=32, n_heads=4, d_vocab=101, n_ctx=32, **options)
    return Example(random_model(config), "gpt2" if model == "gpt2" else "llama", random_tokens(config, 2, 5))


def random_model(config: mj.Config) -> mj.Transformer:
    """Fresh weights, the layers' matrices scaled up."""
    model = mj.init(config, jax.random.key(0))
    scaled = jax.tree.map(lambda x: SCALE * x if x.ndim > 2 else x, model.blocks)
    return eqx.tree_at(lambda m: m.blocks, model, scaled)


def random_tokens(config: mj.Config, batch: int, pos: int) -> dict[str, np.ndarray]:
    """Two batches of prompts, and for each prompt two answers."""
    rng = np.random.default_rng(0)
    correct, wrong = np.array([rng.choice(config.d_vocab, 2, replace=False) for _ in range(batch)]).T
    clean, corrupted = rng.integers(0, config.d_vocab, (2, batch, pos))
    return {"clean": clean, "corrupted": corrupted, "correct": correct, "wrong": wrong}


def write_case(folder: Path, example: Example) -> None:
    """The folder that the workers read."""
    mj.save(example.model, folder / "model")
    config = dataclasses.asdict(example.model.config) | {"family": example.family}
    (folder / "config.json").write_text(json.dumps(config))
    np.savez(folder / "tokens.npz", **example.tokens)  # pyright: ignore[reportArgumentType]


def own_command(settings: Settings, *cache: Path) -> list[str]:
    """The command of mijax's worker."""
    return [sys.executable, str(SCRIPTS / "with_mijax.py"), settings.dtype, *map(str, cache)]


def peer_commands(peer: str, attribution: bool) -> list[list[str]]:
    """The command of a peer's worker, and of a second one if attribution is measured; the process ends where there is none."""
    python, _, script = peer.partition(":")
    executable = shutil.which(python)
    if executable is None:
        raise SystemExit(f"--peers: {python} is no executable")
    if script:
        return [[str(Path(executable).absolute()), str(Path(script).absolute())]]
    find = f"from importlib.util import find_spec; print(*[p for p in {PACKAGES} if find_spec(p)])"
    packages = subprocess.run([executable, "-c", find], capture_output=True, text=True, check=True).stdout.split()
    if not packages:
        raise SystemExit(f"--peers: {python} can import none of {', '.join(PACKAGES)}")
    command = [str(Path(executable).absolute()), str(SCRIPTS / f"with_{packages[0]}.py")]
    return [command, *([[*command, "frozen"]] if attribution and packages[0] == "transformer_lens" else [])]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The workers, mijax's first, and what they are measured on; `beside` is one of mijax for what is no grid, so that it
    leaves no memory behind in the first."""

    settings: Settings
    config: mj.Config
    differs: np.ndarray
    folder: Path
    workers: Sequence[Worker]
    beside: Worker

    def base(self) -> list[float]:
        """The metric of the corrupted run, on which all agree."""
        answers = [worker.ask("forward") for worker in self.workers]
        first = np.load(answers[0]["file"])
        for worker, answer in zip(self.workers, answers):
            self.checked(worker.name, "forward", np.load(answer["file"]), first)
        return first.tolist()

    def grid(self, grid: GridName, base: np.ndarray) -> dict[str, Any]:
        """Everything of a grid."""
        (batch, pos), config = self.differs.shape, self.config
        cells = arithmetic.cells(config, grid, pos)
        naive, floor = arithmetic.naive(config, grid, batch, pos), arithmetic.floor(config, grid, self.differs)
        values, answers, product = self.steady(grid, cells)
        answers |= self.fresh(grid, values)
        tools = {name: summary(rounds, floor, product) for name, rounds in answers.items()}
        lens = [t["cpu"] for name, t in tools.items() if name.startswith("transformer_lens") and "frozen" not in name]
        for tool in tools.values():
            tool["cpu_of_fastest_transformer_lens"] = tool["cpu"] / min(lens) if lens else None
        return {
            "cells": cells, "naive_gflop": naive / 1e9, "floor_gflop": floor / 1e9, "naive_to_floor": naive / floor,
            "largest": float(np.abs(values).max()), "largest_effect": float(np.abs(values - base).max()),
            "matmul": product, "tools": tools,
        }  # fmt: skip

    def steady(self, grid: GridName, cells: int) -> tuple[np.ndarray, dict[str, list[dict]], dict[str, float]]:
        """mijax's values; each tool's answers of all rounds; and the rate of a matrix product among them."""
        reference, *peers = self.workers
        peers = [worker for worker in peers if grid in worker.hello["grids"]]
        limited = not self.settings.full and grid != "attribution" and cells > (20 if self.settings.tiny else LARGE)
        requests = {worker: f"{grid}:{min(cells, self.settings.cells)}" if limited else grid for worker in peers}
        values = np.load(reference.ask(grid)["file"])
        size = 256 if self.settings.tiny else 4096
        for worker in peers:
            worker.ask(f"{grid}:2")  # compiled and warm, as mijax is
        answers: dict[str, list[dict]] = {worker.name: [] for worker in (reference, *peers)}
        products = []
        for _ in range(self.settings.rounds):
            for worker in (reference, *peers):
                answer = self.asked(worker, requests.get(worker, grid), values)
                answer |= {"load_rss": worker.hello["peak_rss"]}
                answers[worker.name].append(answer if worker is reference else extrapolated(answer, cells))
                if worker is reference:
                    products.append(self.beside.ask(f"matmul:{size}"))
        return values, answers, rates(products)

    def fresh(self, grid: GridName, values: np.ndarray) -> dict[str, list[dict]]:
        """mijax in new processes: without any compiled program, and with all of them on disk."""
        answers: dict[str, list[dict]] = {}
        for number in range(self.settings.cold_rounds):
            cache = self.folder / f"compiled-{grid}-{number}"
            for name in ("cold", "cached"):
                with started(own_command(self.settings, cache), self.folder) as worker:
                    answer = self.asked(worker, grid, values, f", {name}")
                    until = {
                        "load_wall": worker.hello["wall"],
                        "load_cpu": worker.hello["cpu"],
                        "load_rss": worker.hello["peak_rss"],
                    }
                    answers.setdefault(f"{worker.name}, {name}", []).append(answer | until)
        return answers

    def asked(self, worker: Worker, request: str, values: np.ndarray, note: str = "") -> dict[str, Any]:
        """A worker's answer, which agrees with `values`."""
        time.sleep(0.0 if self.settings.tiny else 0.5)  # threads of the last one come to rest
        answer = worker.ask(request)
        difference = self.checked(worker.name, request, np.load(answer["file"]), values)
        print(f"{request:14} {worker.name}{note}: {answer['wall']:.2f} s, {difference:.1e} off", flush=True)
        return answer | {"difference": difference}

    def checked(self, name: str, request: str, result: np.ndarray, values: np.ndarray) -> float:
        """The largest difference by the largest value; `RuntimeError` where that is not small."""
        if result.shape != values.shape:
            raise RuntimeError(f"{name} on {request} gave {result.shape}, mijax {values.shape}")
        run = np.isfinite(result)
        difference = float(np.abs(result[run] - values[run]).max() / np.abs(result[run]).max())
        if not difference <= 1e-4 and self.settings.dtype == "float32":
            raise RuntimeError(f"{name} on {request} differs from mijax by {difference:.1e} of the largest value")
        return difference


def extrapolated(answer: Mapping[str, Any], cells: int) -> dict[str, Any]:
    """What all cells would have taken, the clean run counted once."""
    factor = cells / answer["cells"]
    whole = lambda of, clean: answer[clean] + (answer[of] - answer[clean]) * factor
    return {**answer, "wall": whole("wall", "clean"), "cpu": whole("cpu", "clean_cpu")}


def rates(products: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """GFLOP/s of the matrix products, by the clock and by CPU seconds."""
    flop = 2 * products[0]["size"] ** 3
    rate = lambda of: flop / statistics.median(p[of] for p in products) / 1e9
    return {"size": products[0]["size"], "gflops": rate("wall"), "gflops_per_cpu": rate("cpu")}


def summary(answers: Sequence[Mapping[str, Any]], floor: float, product: Mapping[str, float]) -> dict[str, Any]:
    """Medians over rounds, and what follows from them."""
    numbers = ("wall", "cpu", "peak_rss", "peak_device", "load_wall", "load_cpu", "load_rss")
    medians = {n: statistics.median(a[n] for a in answers) for n in numbers if n in answers[0]}
    rate, per_cpu = floor / medians["wall"] / 1e9, floor / medians["cpu"] / 1e9
    return {
        **medians, "difference": max(a["difference"] for a in answers), "cells_run": answers[0]["cells"],
        "floor_gflops": rate, "floor_gflops_per_cpu": per_cpu, "of_matmul": rate / product["gflops"],
        "of_matmul_per_cpu": per_cpu / product["gflops_per_cpu"], "rounds": list(answers),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What the times depend on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        return {"cpu": model, **_system()}
    return {"cpu": platform.processor(), **_system()}


def _system() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(), "load": os.getloadavg(), "system": platform.platform(),
        "python": platform.python_version(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def write(settings: Settings, record: Mapping[str, Any]) -> None:
    """Put the record among those of other models, dtypes and devices."""
    tool = next(iter(record["tools"].values()))
    key = " ".join([settings.model, settings.dtype, tool["device"], *(["tiny"] if settings.tiny else [])])
    others = json.loads(settings.out.read_text()) if settings.out.exists() else {}
    with atomic(settings.out) as scratch:
        scratch.write_text(json.dumps({**others, key: record}, indent=1, default=str))


def table(record: Mapping[str, Any]) -> str:
    """What was found, to be read."""
    about, tool = record["machine"], next(iter(record["tools"].values()))
    overhead, on_cpu = record["overhead"], tool["platform"] == "cpu"
    lines = [
        f"{record['settings']['model']}{' (tiny)' * record['settings']['tiny']}, {record['batch']} prompts x {record['pos']} tokens; jax {tool['jax']} {tool['dtype']} on"
        f" {tool['device']}; {about['cpu']}, {about['cores']} cores, load {about['load'][0]:.2f} at the start",
        f"a sweep of a toy model: {overhead['total_ms']:.2f} ms a call, {overhead['programs_ms']:.2f} ms of them in"
        f" programs, {overhead['host_ms']:.2f} ms beside them",
    ]
    for name, grid in record["grids"].items():
        lines += ["", *grid_table(name, grid, on_cpu)]
    return "\n".join(lines)


def grid_table(name: str, grid: Mapping[str, Any], on_cpu: bool) -> list[str]:
    """The lines of one grid."""
    product, suffix = grid["matmul"], "_per_cpu" * on_cpu
    lines = [
        f"{name}: {grid['cells']:,} cells; naive {grid['naive_gflop']:,.4g} GFLOP, floor {grid['floor_gflop']:,.4g}"
        f" ({grid['naive_to_floor']:.2f} times less); a {product['size']:.0f}^3 product: {product['gflops']:.1f} GFLOP/s,"
        f" {product['gflops_per_cpu']:.1f} per CPU second; effects up to {grid['largest_effect']:.2g}, values {grid['largest']:.2g}",
        f"{'':32}{'wall s':>9}{'CPU s':>9}{'MB':>7}{'load MB':>8}{'load s':>8}{'GFLOP/s':>9}{'/CPU s':>8}{'/matmul':>8}{'CPU/TL':>8}  off",
    ]
    for tool, stats in grid["tools"].items():
        share = stats["cells_run"] / grid["cells"]
        lines.append(
            f"{tool:32}{stats['wall']:9.2f}{stats['cpu']:9.2f}{stats['peak_rss'] / 1e6:7.0f}{stats['load_rss'] / 1e6:8.0f}{_or(stats.get('load_wall'), 8)}"
            f"{stats['floor_gflops']:9.1f}{stats['floor_gflops_per_cpu']:8.1f}{stats[f'of_matmul{suffix}']:8.3f}"
            f"{_or(stats['cpu_of_fastest_transformer_lens'], 8, 3)}  {stats['difference']:.0e}"
            + (f"  extrapolated from {stats['cells_run']} cells" if not math.isclose(share, 1) else "")
        )
    return lines


def _or(number: float | None, width: int, digits: int = 2) -> str:
    """A number, or the space that it would take."""
    return " " * width if number is None else f"{number:{width}.{digits}f}"


if __name__ == "__main__":
    main(tyro.cli(Settings))
