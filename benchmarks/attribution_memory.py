"""The memory of attribution patching, against the length of a prompt and the depth of the model.

    python -m benchmarks.attribution_memory --help

GPT-2-small's shape, random weights, one prompt, the sites `resid_pre z mlp_out attn_out q k v`: the bytes that XLA
plans for the compiled program beside parameters (what it works in and what it gives), those that mijax computed from
shapes, and the peak of the process while it runs, beyond what it held before. By what the backward pass computes again: `0` nothing that is
dear, `1` each layer, `2` groups of layers and then each layer.
"""

import contextlib
import ctypes
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import mijax as mj
from benchmarks.peers.worker import peak_rss, reset_peak
from benchmarks.sweeps import machine, random_model, random_tokens
from mijax.attribution.estimates import AttributionJob, _chunk, layers_bytes, prompt_bytes
from mijax.attribution.method import Examples
from mijax.attribution.nodes import nodes_of
from mijax.files import atomic

SITES = ("resid_pre", "z", "mlp_out", "attn_out", "q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Memory of attribution patching."""

    lengths: tuple[int, ...] = (64, 256, 512, 1024)
    """Tokens of the prompt, at 12 layers."""
    depths: tuple[int, ...] = (6, 12, 24, 48)
    """Layers, at the second longest of these lengths; compiled only."""
    d_model: int = 768
    """The width; an eighth of it makes a test."""
    out: Path = Path("results/benchmarks/attribution_memory.json")
    """Where the figures go."""


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print a table, and write it all to `settings.out`."""
    rows = [measured(settings, 12, n, checkpoint, run=True) for n in settings.lengths for checkpoint in (0, 1, 2)]
    length = settings.lengths[-2:][0]
    rows += [measured(settings, n, length, checkpoint, run=False) for n in settings.depths for checkpoint in (0, 1, 2)]
    record = {"settings": dataclasses.asdict(settings), "machine": machine(), "jax": jax.__version__, "rows": rows}
    print(f"{'layers':>7}{'tokens':>8}{'checkpoint':>12}{'planned MiB':>13}{'computed':>10}{'peak':>8}{'CPU s':>8}")
    for row in rows:
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}"
        seconds = "" if row["cpu"] is None else f"{row['cpu']:.2f}"
        planned, computed = row["planned"] / 2**20, row["computed"] / 2**20
        print(
            f"{row['layers']:>7}{row['tokens']:>8}{row['checkpoint']:>12}{planned:>13.0f}{computed:>10.0f}{peak:>8}{seconds:>8}"
        )
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(settings.out) as scratch:
        scratch.write_text(json.dumps(record, indent=1, default=str))
    return record


def measured(settings: Settings, n_layers: int, tokens: int, checkpoint: int, run: bool) -> dict[str, Any]:
    """One line of the table."""
    config = mj.Config(n_layers=n_layers, d_model=settings.d_model, n_heads=12, d_vocab=1000, n_ctx=tokens)
    model = random_model(config)
    given = random_tokens(config, 1, tokens)
    metric = mj.metrics.logit_diff(given["correct"], given["wrong"])
    base = mj.Tokens(given["corrupted"])
    job = AttributionJob(model, base, base, {"m": metric}, nodes_of(model, base, SITES), mj.AtP())
    examples = Examples(jnp.zeros(1, jnp.int32), jax.random.key(0))
    arguments: Any = (
        job.method,
        model,
        base,
        jnp.asarray(given["clean"]),
        {"m": metric},
        {},
        examples,
        job.layout,
        checkpoint,
    )
    compiled = _chunk.lower(*arguments, how="in_little_memory" if checkpoint else "for_speed").compile()
    analysis = compiled.compiled.memory_analysis()
    row = {
        "layers": n_layers, "tokens": tokens, "checkpoint": checkpoint, "peak": None, "cpu": None,
        "planned": analysis.temp_size_in_bytes + analysis.output_size_in_bytes,
        "computed": layers_bytes(model) + prompt_bytes(job, checkpoint),
    }  # fmt: skip
    if run:
        jax.block_until_ready(compiled(*arguments))
        with contextlib.suppress(OSError):  # else the next run lives on what the last one gave back
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset, before, start = reset_peak(), peak_rss(), time.process_time()
        jax.block_until_ready(compiled(*arguments))
        row |= {"peak": peak_rss() - before if reset else None, "cpu": time.process_time() - start}
    return row


if __name__ == "__main__":
    main(tyro.cli(Settings))
