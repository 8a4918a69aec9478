"""A forward pass of long prompts beside transformers on PyTorch: SmolLM2, one prompt, the logits of its last token.

    python -m benchmarks.long_prompts

Both have the same weights and run in turn in one process (`pip install -e ".[parity]"`; without PyTorch mijax is measured alone): CPU
seconds, medians of the rounds. `whole` keeps the scores of all queries in memory, as a run does that captures the pattern. MiB are what XLA
plans beside parameters and logits. The logits must be equal to 1e-3 of the largest.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

import mijax as mj
from benchmarks.rounds import cpu_seconds, in_transformers, tiny_llama


def main(
    lengths: tuple[int, ...] = (512, 1024, 2048), rounds: int = 5, tiny: bool = False
) -> dict[int, dict[str, float]]:
    """Measure, and print a table.

    Args:
        lengths: tokens of the prompt.
        rounds: of each.
        tiny: whether to take a random model of two layers, for a test.
    """
    model = tiny_llama(max(lengths)) if tiny else mj.load("smollm2-135m-instruct", tokenizer=False)[0]
    last = jax.jit(lambda model, ids: mj.run(model, ids).readout.logits(pos=-1))
    whole = jax.jit(lambda model, ids: mj.run(model, ids, {"pattern": mj.Add(0.0, mj.Where())}).readout.logits(pos=-1))
    peer, table = _peer(model), {}
    print(f"{'tokens':>7}{'mijax s':>10}{'whole s':>10}{'torch s':>10}{'ratio':>8}{'MiB':>8}{'whole':>8}")
    for n in lengths:
        ids = np.random.default_rng(0).integers(0, model.config.d_vocab, (1, n))
        analyses: list[Any] = [f.lower(model, ids).compile().memory_analysis() for f in (last, whole)]
        planned = [analysis.temp_size_in_bytes / 2**20 for analysis in analyses]
        runs: dict[str, Callable[[], np.ndarray]] = {
            "mijax": lambda ids=ids: np.asarray(last(model, ids)),
            "whole": lambda ids=ids: np.asarray(whole(model, ids)),
        }
        if peer is not None:
            runs["torch"] = lambda ids=ids: peer(ids)
        first = {name: run() for name, run in runs.items()}
        off = max(float(np.abs(x - first["mijax"]).max() / np.abs(first["mijax"]).max()) for x in first.values())
        assert off < 1e-3, off
        medians = cpu_seconds(runs, rounds)
        torch = medians.get("torch", float("nan"))
        table[n] = {**medians, "planned": planned[0], "planned_whole": planned[1], "difference": off}
        print(
            f"{n:>7}{medians['mijax']:>10.2f}{medians['whole']:>10.2f}{torch:>10.2f}{medians['mijax'] / torch:>8.2f}"
            f"{planned[0]:>8.0f}{planned[1]:>8.0f}",
            flush=True,
        )
    return table


def _peer(model: mj.Transformer) -> Callable[[np.ndarray], np.ndarray] | None:
    """The same model in transformers; `None` without PyTorch."""
    peer = in_transformers(model)
    if peer is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return peer(torch.tensor(ids), logits_to_keep=1).logits[:, 0].numpy()

    return logits


if __name__ == "__main__":
    tyro.cli(main)
