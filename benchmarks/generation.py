"""Generation of 64 tokens under an edit, beside generation without one and beside transformers on PyTorch: SmolLM2.

    python -m benchmarks.generation

`edited` adds a vector to the residual stream of a middle layer at every step; each round has another vector, which must compile nothing. All
have the same weights and prompts of one length, run in turn in one process and choose greedily without an end (`pip install -e ".[parity]"`;
without PyTorch mijax is measured alone): CPU seconds, medians of the rounds. The texts of mijax and transformers must be the same, up to a first
difference at two logits that are nearly equal.
"""

from collections.abc import Callable

import jax
import jax.monitoring
import numpy as np
import tyro

import mijax as mj
from benchmarks.rounds import cpu_seconds, in_transformers, tiny_llama


def main(
    prompts: tuple[int, ...] = (1, 8), pos: int = 16, tokens: int = 64, rounds: int = 5, tiny: bool = False
) -> dict[int, dict[str, float]]:
    """Measure, and print a table.

    Args:
        prompts: how many at once.
        pos: tokens of each prompt.
        tokens: new tokens of each.
        rounds: of each.
        tiny: whether to take a random model of two layers, for a test.
    """
    model = tiny_llama(pos + tokens) if tiny else mj.load("smollm2-135m-instruct", tokenizer=False)[0]
    peer, table = _peer(model), {}
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    print(f"{'prompts':>7}{'plain s':>10}{'edited s':>10}{'ratio':>8}{'compiled':>10}{'torch s':>10}{'ratio':>8}")
    for n in prompts:
        ids = np.random.default_rng(0).integers(0, model.config.d_vocab, (n, pos))
        draw = np.random.default_rng(1)

        def edited(ids: np.ndarray = ids, draw: np.random.Generator = draw) -> np.ndarray:
            vector = draw.normal(size=model.config.d_model).astype(np.float32) * 0.01
            edit = {"resid_pre": mj.Add(vector, mj.Where(layer=model.n_layers // 2))}
            return np.asarray(mj.generate(model, ids, edit, max_new_tokens=tokens, stop=()).ids)

        runs: dict[str, Callable[[], np.ndarray]] = {
            "plain": lambda ids=ids: np.asarray(mj.generate(model, ids, max_new_tokens=tokens, stop=()).ids),
            "edited": edited,
        }
        if peer is not None:
            runs["torch"] = lambda ids=ids: peer(ids, tokens)
        first = {name: run() for name, run in runs.items()}
        if peer is not None:
            _check_equal(model, first["plain"], first["torch"], pos)
        before, medians = len(compiled), cpu_seconds(runs, rounds)
        ratio, torch = medians["edited"] / medians["plain"], medians.get("torch", float("nan"))
        table[n] = {**medians, "ratio": ratio, "compiled": float(len(compiled) - before)}
        print(
            f"{n:>7}{medians['plain']:>10.2f}{medians['edited']:>10.2f}{ratio:>8.3f}{len(compiled) - before:>10}"
            f"{torch:>10.2f}{medians['plain'] / torch:>8.2f}",
            flush=True,
        )
    return table


def _peer(model: mj.Transformer) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """The same model in transformers; `None` without PyTorch."""
    peer = in_transformers(model)
    if peer is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    def generate(ids: np.ndarray, tokens: int) -> np.ndarray:
        with torch.no_grad():
            return peer.generate(
                torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            ).numpy()  # fmt: skip

    return generate


def _check_equal(model: mj.Transformer, ours: np.ndarray, theirs: np.ndarray, pos: int) -> None:
    """Where two texts part, the two tokens' logits are equal to 1e-3 of the largest."""
    for mine, other in zip(ours, theirs):
        different = np.flatnonzero(mine != other)
        if len(different):
            at = int(different[0])
            assert at >= pos
            logits = np.asarray(mj.run(model, mine[None, :at]).readout.logits(pos=-1))[0]
            assert abs(logits[mine[at]] - logits[other[at]]) < 1e-3 * np.abs(logits).max(), at


if __name__ == "__main__":
    tyro.cli(main)
