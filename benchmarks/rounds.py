"""What benchmarks in one process share: rounds of several functions in turn, and a model beside itself in transformers."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import mijax as mj


def cpu_seconds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The medians of the CPU seconds of functions that are called in turn; each waits for its arrays."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            jax.block_until_ready(run())
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def in_transformers(model: mj.Transformer) -> Any:
    """The same model in transformers, in float32; `None` without PyTorch."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as scratch:
        mj.save(model, Path(scratch) / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(scratch) / "model", dtype=torch.float32).eval()


def tiny_llama(n_ctx: int) -> mj.Transformer:
    """A random model of two layers, for tests."""
    config = mj.Config(
        n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, d_mlp=32, d_vocab=61, n_ctx=n_ctx, norm="rms", mlp="gated", activation="silu",
        positions=mj.Rotary(), attn_bias="", mlp_bias=False,
    )  # fmt: skip
    return mj.init(config, jax.random.key(0))
