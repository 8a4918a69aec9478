"""Activation patching as nnsight's documentation does it: a loop over cells, a trace for each."""

# pyright: reportMissingImports=false

from functools import partial
from typing import Any

from torch_worker import Case, Run, serve, since
from worker import Told, filled


def load(case: Case) -> Run:
    """The model, and the function that runs a grid on it."""
    from nnsight import NNsight

    return partial(run, NNsight(case.huggingface()), case)


def run(model: Any, case: Case, grid: str, limit: int | None) -> tuple[Any, Told]:
    """The values of a grid, and what the clean run took of it."""
    import nnsight

    if grid == "forward":
        with model.trace(case.corrupted):
            values = case.metric(model.output.logits).save()
        return values.cpu().numpy(), {}
    if grid != "resid_pre":
        raise ValueError(f"no grid {grid!r}: this worker has forward and resid_pre")
    blocks = model.transformer.h if case.config["family"] == "gpt2" else model.model.layers
    sizes = len(blocks), case.corrupted.shape[1]

    start = case.seconds()
    with model.trace(case.clean):
        clean = nnsight.save([])
        for block in blocks:
            clean.append(block.input)
    details = since(case, start)

    cells = [(layer, pos) for layer in range(sizes[0]) for pos in range(sizes[1])][:limit]
    kept = []
    for layer, pos in cells:
        with model.trace(case.corrupted):
            blocks[layer].input[:, pos] = clean[layer][:, pos]
            values = case.metric(model.output.logits).save()
        kept.append(values.cpu().numpy())
    return filled(kept, sizes), details


if __name__ == "__main__":
    serve("nnsight", ("forward", "resid_pre"), load)
