"""What it costs to keep an early layer's activations: nothing above the layer is computed.

    python -m benchmarks.early_layers

Rounds alternate between a run with its readout and one without that keeps the stream of one layer; CPU seconds, medians.
"""

import statistics
import time

import jax
import numpy as np
import tyro

import mijax as mj


def main(layer: int = 3, prompts: int = 8, tokens: int = 64, rounds: int = 7) -> dict[str, float]:
    """Keep the stream after `layer` of SmolLM2's 30."""
    model, _ = mj.load("smollm2-135m-instruct")
    ids = np.random.default_rng(0).integers(0, model.config.d_vocab, (prompts, tokens))
    capture = {"resid_post": mj.Where(layer=layer)}
    whole = lambda: mj.run(model, ids, capture=capture)
    early = lambda: mj.run(model, ids, capture=capture, readout=False)
    same = np.abs(np.asarray(whole().acts["resid_post"]) - np.asarray(early().acts["resid_post"])).max()
    seconds: dict[str, list[float]] = {"whole": [], "early": []}
    for _ in range(rounds):
        for name, run in (("whole", whole), ("early", early)):
            begin = time.process_time()
            out = run()
            jax.block_until_ready((out.acts, out.readout and out.readout.final))
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    share, necessary = medians["early"] / medians["whole"], (layer + 1) / model.n_layers
    print(f"{'whole':12}{medians['whole']:9.3f} CPU s\n{'early':12}{medians['early']:9.3f} CPU s")
    print(f"share {share:.3f}, layers {layer + 1} of {model.n_layers} = {necessary:.3f}; largest difference {same:.0e}")
    return {**medians, "share": share, "difference": float(same)}


if __name__ == "__main__":
    tyro.cli(main)
