"""mijax in a worker of its own, measured as its peers are: `with_mijax.py FOLDER DTYPE [CACHE]`.

CACHE is a folder for compiled programs. Beside grids it answers `matmul:N` (a product of two N x N matrices) and
`overhead` (what a call of `mj.sweep` takes on the host).
"""

import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from worker import Case, Told, Worker, serve

import mijax as mj

PARTS = {
    "resid_pre": [("resid_pre", ("layer", "pos"))],
    "z_head": [("z", ("layer", "head"))],
    "z_head_pos": [("z", ("layer", "pos", "head"))],
    "qkvzp": [(site, ("layer", "head")) for site in ("q", "k", "v", "z", "pattern")],
}
"""The calls of `mj.patch` that make up each grid, stacked where there are several."""

ATTRIBUTED = ("resid_pre", "z", "mlp_out", "attn_out", "q", "k", "v", "pattern")


def load(folder: Path) -> Worker:
    """The model, and the function that runs a grid on it."""
    dtype, *cache = sys.argv[2:]
    if cache:
        keep_compiled(cache[0])
    model, _ = mj.load(folder / "model", dtype=dtype, tokenizer=False)
    jax.block_until_ready(jax.tree.leaves(model))
    about = {"peer": "mijax", "version": version("mijax"), "jax": jax.__version__, "numpy": np.__version__}
    about |= {"device": jax.devices()[0].device_kind, "platform": jax.default_backend(), "dtype": dtype}
    about |= {"threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    return Worker(partial(run, model, Case(folder)), ("forward", "attribution", *PARTS), about)


def keep_compiled(folder: str) -> None:
    """Write every compiled program to `folder`, and take from there those that it holds."""
    offered = getattr(mj, "compilation_cache", None)
    if offered is not None:
        offered(folder)
        if not jax.config.values["jax_compilation_cache_dir"]:
            raise RuntimeError("mj.compilation_cache set no folder")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(model: mj.Transformer, case: Case, grid: str, limit: int | None) -> tuple[np.ndarray, Told]:
    """The values of a grid."""
    if grid == "overhead":
        return np.zeros(1), overhead()
    if grid == "matmul":
        return np.zeros(1), matmul(limit or 4096, model.W_E.dtype)
    if limit is not None:
        raise ValueError("mijax runs a grid in full")
    metric = mj.metrics.logit_diff(case.correct, case.wrong)
    if grid == "forward":
        return np.asarray(metric(mj.run(model, case.corrupted).readout)), {}  # pyright: ignore[reportArgumentType]  # of older commits too
    if grid == "attribution":
        return attribution(model, case, metric)
    patched = partial(
        mj.patch, model, clean=case.clean, corrupted=case.corrupted, metric=metric, direction="denoise", progress=False
    )
    parts = [patched(site=site, over=over).values for site, over in PARTS[grid]]
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # since the process began
    details = {"clean": 0.0, "clean_cpu": 0.0} | ({} if peak is None else {"peak_device": peak})
    return parts[0] if len(parts) == 1 else np.stack(parts), details


def attribution(model: mj.Transformer, case: Case, metric: mj.metrics.Metric) -> tuple[np.ndarray, Told]:
    """Every cell of every site, [cell, batch]."""
    result = mj.attribute(
        model, clean=case.clean, corrupted=case.corrupted, sites=ATTRIBUTED, metric=metric, progress=False
    )
    cells = [result[site].values.reshape(-1, result.sizes["batch"]) for site in ATTRIBUTED]
    return np.concatenate(cells), {"clean": 0.0, "clean_cpu": 0.0}


def matmul(size: int, dtype, repeats: int = 3) -> Told:
    """The median seconds of a matrix product, as exact as those of mijax."""
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    call = lambda: product(a, b).block_until_ready()
    call()
    wall, cpu = zip(*(timed(call) for _ in range(repeats)))
    return {"size": size, "wall": statistics.median(wall), "cpu": statistics.median(cpu)}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def overhead(calls: int = 50) -> Told:
    """Median milliseconds of a compiled `mj.sweep` on a toy model: all, the device's programs, and the rest."""
    config = mj.Config(n_layers=2, d_model=16, n_heads=4, d_vocab=31, n_ctx=16)
    model, tokens = mj.init(config, jax.random.key(0)), np.random.default_rng(0).integers(0, 31, (3, 6))
    metric, heads = mj.metrics.logit_diff(3, 4), mj.grid(layer=range(2), head=range(4))
    sweep = lambda: mj.sweep(model, tokens, {"z": mj.Scale(0.0, heads)}, metric, progress=False)
    for _ in range(3):
        sweep()
    total = [timed(sweep)[0] for _ in range(calls)]
    programs = []
    with programs_timed() as spent:
        for _ in range(calls):
            spent.clear()
            sweep()
            programs.append(sum(spent))
    total, programs = 1e3 * statistics.median(total), 1e3 * statistics.median(programs)
    return {"total_ms": total, "programs_ms": programs, "host_ms": total - programs, "calls": calls}


@contextlib.contextmanager
def programs_timed() -> Iterator[list[float]]:
    """The seconds of every program that a sweep runs, each waited for."""
    module, spent = importlib.import_module("mijax.engine.driver"), []

    def waited(program, *arguments):
        jax.block_until_ready([a for a in jax.tree.leaves(arguments) if isinstance(a, jax.Array)])
        begin = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        spent.append(time.perf_counter() - begin)
        return result

    originals = {name: getattr(module, name) for name in ("_based", "_chunk")}
    for name, program in originals.items():
        in_its_way = lambda how, program=program: partial(waited, program.compiled(how))
        setattr(module, name, SimpleNamespace(compiled=in_its_way))
    try:
        yield spent
    finally:
        for name, program in originals.items():
            setattr(module, name, program)


if __name__ == "__main__":
    serve(load)
