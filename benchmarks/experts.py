"""What a mixture of experts costs beside a dense MLP of equal arithmetic, and beside computing all experts.

    python -m benchmarks.experts

Models of one layer differ in their MLP: `used` computes the experts that each token uses, `every` all of them, `dense` is one MLP as wide as
these experts together, so that it multiplies as much. Rounds alternate; CPU seconds of a forward pass without readout, medians.
"""

import dataclasses

import jax
import numpy as np
import tyro

import mijax as mj
from benchmarks.rounds import cpu_seconds


def main(
    experts: int = 16, top_k: int = 4, d_model: int = 768, d_mlp: int = 1024, prompts: int = 4, tokens: int = 512, rounds: int = 5
) -> dict[str, float]:  # fmt: skip
    """Measure, and print a table."""
    config = mj.Config(
        n_layers=1, d_model=d_model, n_heads=max(1, d_model // 64), d_vocab=1000, n_ctx=tokens, d_mlp=d_mlp, norm="rms", mlp="gated",
        activation="silu", attn_bias="", mlp_bias=False, positions=mj.Rotary(), experts=mj.Experts(experts, top_k),
    )  # fmt: skip
    dense = dataclasses.replace(config, experts=None, d_mlp=top_k * d_mlp)
    mixture, single = (mj.init(c, jax.random.key(0)) for c in (config, dense))
    ids = np.random.default_rng(0).integers(0, 1000, (prompts, tokens))
    keep = lambda model, *sites: lambda: mj.run(model, ids, capture=("mlp_out", *sites), readout=False).acts["mlp_out"]
    some = mj.Where(pos=0)  # asks for all experts, and keeps those of one token
    every = lambda: mj.run(mixture, ids, capture={"mlp_out": None, "expert_out": some}, readout=False).acts["mlp_out"]
    runs = {"used": keep(mixture), "every": every, "dense": keep(single)}
    difference = float(np.abs(np.asarray(runs["used"]()) - np.asarray(runs["every"]())).max())
    medians = cpu_seconds(runs, rounds)
    for name, median in medians.items():
        print(f"{name:8}{median:9.3f} CPU s{median / medians['dense']:8.2f} times the dense one")
    print(f"largest difference of used and every: {difference:.0e}")
    return {**medians, "difference": difference}


if __name__ == "__main__":
    tyro.cli(main)
