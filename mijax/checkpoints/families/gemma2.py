"""Gemma 2: norms before and after attention and MLP, capped scores and logits, windows in every second layer."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import gemma_layout, llama_layout
from mijax.checkpoints.keys import architectures
from mijax.checkpoints.table import Family
from mijax.model.config import Config


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    local = range(0, fields["n_layers"], 2)
    windows = llama_layout.read_windows({"use_sliding_window": True, "sliding_window": 4096, **c}, fields, local)
    return {
        **windows,
        **llama_layout.read_positions(c, fields),
        **gemma_layout.read_scales(c, fields, caps=(50.0, 30.0)),
    }


def _write(config: Config) -> dict[str, Any]:
    windows = {k: v for k, v in llama_layout.write_windows(config).items() if k != "use_sliding_window"}
    windows["sliding_window"] = windows["sliding_window"] or config.n_ctx
    return {**llama_layout.write_as("Gemma2ForCausalLM", config), **windows, **gemma_layout.write_scales(config)}


_layout = llama_layout.LAYOUT | {
    "weights": gemma_layout.weights,
    "fixed": llama_layout.FIXED | {"norm_at": "both"},
    "further": llama_layout.LAYOUT["further"] | llama_layout.WINDOW_KEYS | gemma_layout.FURTHER,
    "read": _read,
}
_harmless = {**gemma_layout.HARMLESS_KEYS, "architectures": architectures("Gemma2ForCausalLM", "Gemma2Model")}
GEMMA2 = Family("gemma2", keys=gemma_layout.KEYS, write=_write, harmless=_harmless, **_layout)
