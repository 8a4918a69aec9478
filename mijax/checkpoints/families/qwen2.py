"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import architectures
from mijax.checkpoints.table import Family
from mijax.model.config import Config


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return llama_layout.read_positions(c, fields) | llama_layout.read_windows(c, fields)


def _write(config: Config) -> dict[str, Any]:
    return {**llama_layout.write_as("Qwen2ForCausalLM", config), **llama_layout.write_windows(config)}


_layout = llama_layout.LAYOUT | {
    "fixed": llama_layout.FIXED | {"attn_bias": "qkv"},
    "further": llama_layout.LAYOUT["further"] | llama_layout.WINDOW_KEYS,
    "read": _read,
}
_harmless = {**llama_layout.HARMLESS_KEYS, "architectures": architectures("Qwen2ForCausalLM", "Qwen2Model")}
QWEN2 = Family("qwen2", keys=llama_layout.KEYS, write=_write, harmless=_harmless, **_layout)
