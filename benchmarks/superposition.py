"""Toy models beside the straightforward PyTorch loop, at equal steps and batch, in turn, in one process.

    pip install -e ".[parity]"   # PyTorch
    python -m benchmarks.superposition --help

The loop is the paper's notebook: instances batched by `einsum`, AdamW, every instance's examples drawn anew in each step. mijax draws once for each
seed. `first` includes compilation, `CPU s` is a further call; both are for `steps` steps. PyTorch, which takes as long for every step,
runs fewer of a large case and is extrapolated. `random` is the share of drawing random numbers, timed alone; `per step`
is microseconds of CPU for one model's step. The exact diagram is trained to convergence from nothing compiled.
"""

import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.sweeps import machine
from mijax import superposition as sp
from mijax.files import atomic
from mijax.superposition import geometry, phase


@dataclasses.dataclass(frozen=True)
class Settings:
    """Toy models beside PyTorch."""

    batch: int = 1024
    """Examples in each step."""
    rounds: int = 3
    """Of which the median is taken."""
    scale: float = 1.0
    """Of the numbers of steps; below 1 for a check that measures little."""
    torch: bool = True
    """Measure PyTorch too."""
    out: Path = Path("results/benchmarks/superposition.json")
    """Where the record goes."""


class Case(NamedTuple):
    """Models `[seed, cell]`: sizes, densities and importances of the cells, and how many steps are run."""

    n: int
    m: int
    density: np.ndarray
    importance: np.ndarray
    seeds: int
    steps: int
    peer_steps: int


def cases() -> dict[str, Case]:
    """The paper's intro, its feature figure, and a phase diagram."""
    grid = np.meshgrid(np.geomspace(0.1, 10, 50), np.geomspace(1, 0.01, 50), indexing="ij")
    return {
        "intro: 5 in 2, 10 instances": Case(5, 2, 20.0 ** -np.linspace(0, 1, 10), np.tile(0.9 ** np.arange(5), (10, 1)), 1, 10_000, 2_000),
        "100 in 20, 20 instances": Case(100, 20, 20.0 ** -np.linspace(0, 1, 20), np.tile(100 ** -np.linspace(0, 1, 100), (20, 1)), 1, 1_000, 100),
        "phase diagram: 2 in 1, 50 x 50, 2 seeds": Case(2, 1, grid[1].ravel(), np.stack([np.ones(2500), grid[0].ravel()], 1), 2, 500, 20),
    }  # fmt: skip


def cpu() -> float:
    """CPU seconds of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds."""
    wall, before = time.perf_counter(), cpu()
    jax.block_until_ready(run())
    return {"wall": time.perf_counter() - wall, "cpu": cpu() - before}


def with_mijax(case: Case, batch: int, steps: int) -> tuple[Callable, Callable]:
    """One training, and its drawing of random numbers alone."""
    density, importance = (jnp.asarray(v, jnp.float32) for v in (case.density, case.importance))
    make = lambda cell: sp.Toy(sp.relu_output(case.n, case.m), sp.sparse(case.n, density[cell]), importance[cell])
    over = {"cell": np.arange(len(case.density))}
    optimizer = lambda: optax.adamw(1e-3, weight_decay=0.01)
    run = lambda: sp.train(make, {**over, "seed": range(case.seeds)}, optimizer=optimizer, steps=steps, batch=batch, judged_on=batch, progress=False).W.values  # fmt: skip

    @jax.jit
    def draws():
        sample = lambda i, seed: sp.sparse(case.n, 1.0).sample(jax.random.fold_in(jax.random.key(seed), i), batch)
        every = lambda i: jax.vmap(lambda seed: sample(i, seed))(jnp.arange(case.seeds))
        return jax.lax.fori_loop(0, steps, lambda i, total: total + every(i), every(0))

    return run, draws


def with_torch(case: Case, batch: int, steps: int) -> tuple[Callable, Callable]:
    """The same by PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    instances = len(case.density) * case.seeds
    density = torch.tensor(np.tile(case.density, case.seeds), dtype=torch.float32)[:, None]
    importance = torch.tensor(np.tile(case.importance, (case.seeds, 1)), dtype=torch.float32)
    w = torch.nn.Parameter(torch.nn.init.xavier_normal_(torch.empty(instances, case.n, case.m)))
    b = torch.nn.Parameter(torch.zeros(instances, case.n))
    optimizer = torch.optim.AdamW([w, b], lr=1e-3)

    def drawn():
        amount = torch.rand(batch, instances, case.n)
        return torch.where(torch.rand(batch, instances, case.n) <= density, amount, torch.zeros(()))

    def run():
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            x = drawn()
            hidden = torch.einsum("bif,ifh->bih", x, w)
            out = torch.relu(torch.einsum("bih,ifh->bif", hidden, w) + b)
            (importance * (x - out) ** 2).mean((0, 2)).sum().backward()
            optimizer.step()

    def draws():
        for _ in range(steps):
            torch.rand(batch, instances, case.n)
            torch.rand(batch, instances, case.n)

    return run, draws


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Both sides of a case, in turn."""
    steps = max(2, int(case.steps * settings.scale))
    run, draws = with_mijax(case, settings.batch, steps)
    timings: dict[str, Any] = {"steps": steps, "models": len(case.density) * case.seeds, "first": timed(run)}
    sides = {"mijax": (run, draws, 1.0)}
    draws()
    if settings.torch:
        fewer = max(2, int(case.peer_steps * settings.scale))
        sides["torch"] = (*with_torch(case, settings.batch, fewer), steps / fewer)
    for _ in range(settings.rounds):
        for name, (training, alone, factor) in sides.items():
            for key, what in ((name, training), (f"{name} random", alone)):
                timings.setdefault(key, []).append({k: v * factor for k, v in timed(what).items()})
    return timings


def exact(settings: Settings) -> dict[str, Any]:
    """The 100 x 100 diagram by the exact loss, compilation included, and its agreement with theory."""
    axes = {"importance": np.geomspace(0.1, 10, 100), "density": np.geomspace(1, 0.01, 100)}
    steps = max(20, int(300 * settings.scale))
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.04, steps))
    kept: list[Any] = []
    run = lambda: kept.append(sp.best(sp.train(phase.toy(2, 1), {**axes, "seed": range(4)}, optimizer=optimizer, steps=steps, batch=None, progress=False)))  # fmt: skip
    spent = timed(run)
    share, _ = phase.agreement(
        geometry.role(kept[0].W.values), phase.closed_form(2, 1, *axes.values()), phase.free(2, 1, *axes.values())
    )
    return {**spent, "steps": steps, "models": 40_000, "agreement": share}


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print, write."""
    record: dict[str, Any] = {"machine": machine(), "exact": exact(settings), "cases": {}}
    for name, case in cases().items():
        record["cases"][name] = measure(case, settings)
        print(row(name, record["cases"][name]), flush=True)
    e = record["exact"]
    print(
        f"exact diagram, 100 x 100, {e['models']} models, {e['steps']} steps: {e['wall']:.1f} s, {e['cpu']:.1f} CPU s, agreement {e['agreement']:.2%}"
    )
    with atomic(settings.out) as scratch:
        scratch.write_text(json.dumps(record, indent=1, default=str))
    return record


def row(name: str, timings: dict[str, Any]) -> str:
    """A case's line of the table."""
    middle = lambda key, what="cpu": float(np.median([timing[what] for timing in timings[key]]))
    each = lambda key: middle(key) / timings["steps"] / timings["models"] * 1e6
    parts = [
        f"{name}, {timings['steps']} steps: mijax first {timings['first']['cpu']:.2f} CPU s ({timings['first']['wall']:.2f} s)"
    ]
    parts += [
        f"{key} {middle(key):.2f} CPU s ({middle(key, 'wall'):.2f} s), random {middle(f'{key} random') / middle(key):.0%}, per step {each(key):.2f} us"
        for key in ("mijax", "torch") if key in timings
    ]  # fmt: skip
    ratio = [f"ratio {middle('torch') / middle('mijax'):.1f}"] if "torch" in timings else []
    return "; ".join([*parts, *ratio])


if __name__ == "__main__":
    main(tyro.cli(Settings))
