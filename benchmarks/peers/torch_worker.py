"""What the workers on PyTorch share: the case as tensors, on the GPU where there is one."""

# pyright: reportMissingImports=false

import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worker

Run = Callable[[str, int | None], tuple[np.ndarray, worker.Told]]


class Case(worker.Case):
    """What FOLDER holds, as tensors."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clean, self.corrupted, self.correct, self.wrong = (
            torch.from_numpy(ids).to(self.device) for ids in (self.clean, self.corrupted, self.correct, self.wrong)
        )

    def huggingface(self, **options: Any) -> Any:
        """The checkpoint as transformers reads it, in float32."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32, **options)
        return model.to(self.device).eval()

    def metric(self, logits: torch.Tensor) -> Any:
        """Each example's logit difference at the last position."""
        last, rows = logits[:, -1], torch.arange(len(logits), device=logits.device)
        return last[rows, self.correct] - last[rows, self.wrong]

    def seconds(self) -> tuple[float, float]:
        """Wall clock and CPU time, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def since(case: Case, start: tuple[float, float]) -> worker.Told:
    """What the clean run took that began at `start`."""
    wall, cpu = case.seconds()
    return {"clean": wall - start[0], "clean_cpu": cpu - start[1]}


def serve(peer: str, grids: Iterable[str], load: Callable[[Case], Run]) -> None:
    """`worker.serve` for a peer on PyTorch."""

    def loaded(folder: Path) -> worker.Worker:
        case = Case(folder)
        about = {
            "peer": peer,
            "version": version(peer.split(",")[0]),
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
        about |= {
            "device": str(case.device),
            "threads": torch.get_num_threads(),
            "transformers": version("transformers"),
        }
        return worker.Worker(inferring(case, load(case)), grids, about)

    worker.serve(loaded)


def inferring(case: Case, run: Run) -> Run:
    """`run` without gradients, and what memory it took of the GPU."""

    def inferred(grid: str, limit: int | None) -> tuple[np.ndarray, worker.Told]:
        if case.device.type != "cuda":
            with torch.inference_mode():
                return run(grid, limit)
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            values, details = run(grid, limit)
        return values, {**details, "peak_device": torch.cuda.max_memory_allocated()}

    return inferred
