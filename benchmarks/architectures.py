"""All figures of the architectures in one command: what each costs, the bound that it must keep, and the verified activations.

    python -m benchmarks.architectures --against OTHER/bin/python

`OTHER` is an environment with the commit before (left out, that comparison is). With PyTorch and transformers (`pip install -e ".[parity]"`) beside
them, otherwise alone. It takes some twenty minutes on two CPU cores: `python -m benchmarks.long_prompts`, `.generation`, `.experts` and
`.sweeps --against` print its parts by themselves.
"""

import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro

import mijax as mj
from benchmarks import experts, generation, long_prompts, sweeps


class Figure(NamedTuple):
    """A measured number, and the largest that is accepted."""

    name: str
    value: float
    bound: float

    @property
    def verdict(self) -> str:
        """Whether it is within its bound."""
        return "not measured" if np.isnan(self.value) else "met" if self.value <= self.bound else "NOT MET"


def main(against: str = "", rounds: int = 5, tiny: bool = False) -> list[Figure]:
    """Measure, and print a table.

    Args:
        against: the Python executable of an environment with another commit of mijax.
        rounds: of each benchmark.
        tiny: whether to take toys, which checks this script and measures nothing.
    """
    figures = [*_verified(), *_depth()]
    lengths = (300, 600) if tiny else (512, 1024)
    for n, row in long_prompts.main(lengths=lengths, rounds=rounds, tiny=tiny).items():
        ratio = row["mijax"] / row.get("torch", float("nan"))
        figures.append(Figure(f"logits of the last of {n} tokens, CPU seconds / transformers'", ratio, 1.0))
    for n, row in generation.main(tokens=4 if tiny else 64, rounds=rounds, tiny=tiny).items():
        ratio = row["plain"] / row.get("torch", float("nan"))
        figures += [
            Figure(f"generation for {n} prompts, CPU seconds / transformers'", ratio, 1.0),
            Figure(f"generation for {n} prompts, edited / plain", row["ratio"], 1.03),
            Figure(f"generation for {n} prompts, programs compiled for new vectors", row["compiled"], 0),
        ]
    sizes = {"experts": 4, "top_k": 2, "d_model": 16, "d_mlp": 8, "prompts": 1, "tokens": 12} if tiny else {}
    row = experts.main(rounds=rounds, **sizes)
    figures.append(
        Figure("experts, CPU seconds / those of a dense MLP of the same products", row["used"] / row["dense"], 1.5)
    )
    if against:
        settings = sweeps.Settings(against=against, rounds=rounds, grids=("resid_pre",), tiny=tiny)
        for grid, compared in sweeps.against(settings, settings.grids).items():
            low = compared.low
            figures.append(
                Figure(f"{grid} of GPT-2's shape / the commit before, lower end of the 90 % interval", low, 1.03)
            )
    print()
    for figure in figures:
        print(f"{figure.name:<80}{figure.value:>10.3g}{figure.bound:>8g}  {figure.verdict}")
    return figures


def _verified() -> list[Figure]:
    """The largest error of an activation in docs/verification.md, which `python -m tests.reference.sites` writes."""
    page = Path(__file__).parents[1] / "docs" / "verification.md"
    cells = re.findall(r"\| =?(\d+e[-+]\d+)(?= \|)", page.read_text())
    return [Figure(f"largest error of {len(cells)} activations, family by site", max(map(float, cells)), 1e-4)]


def _depth() -> list[Figure]:
    """Compilation of a model whose layers differ in window and rotary base, of 24 layers over that of 4."""

    def seconds(n: int) -> float:
        windows, bases = tuple(i % 3 for i in range(n)), tuple(mj.Rotary(1e4 * (1 + i % 2)) for i in range(n))
        config = mj.Config(n_layers=n, d_model=32, n_heads=2, d_vocab=61, n_ctx=32, window=windows, positions=bases)
        model = mj.init(config, jax.random.key(0))
        run = jax.jit(lambda model, ids: mj.run(model, ids).logits)
        lowered = run.lower(model, np.ones((1, 8), np.int32))
        begin = time.process_time()
        lowered.compile()
        return time.process_time() - begin

    seconds(2)
    return [Figure("compilation of layers of several kinds, 24 layers / 4", seconds(24) / seconds(4), 1.5)]


if __name__ == "__main__":
    tyro.cli(main)
