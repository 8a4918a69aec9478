"""Qwen3: Llama with norms of queries and keys."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key, architectures
from mijax.checkpoints.table import Family
from mijax.model.config import Config

KEYS = llama_layout.KEYS | {"head_dim": Key(("d_head",), 128), "attention_bias": Key(("attn_bias",), False, BIASES)}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return llama_layout.read_positions(c, fields) | llama_layout.read_windows(c, fields)


def _write(config: Config) -> dict[str, Any]:
    return {**llama_layout.write_as("Qwen3ForCausalLM", config), **llama_layout.write_windows(config)}


_layout = llama_layout.LAYOUT | {
    "fixed": llama_layout.FIXED | {"qk_norm": "head"},
    "further": llama_layout.LAYOUT["further"] | llama_layout.WINDOW_KEYS,
    "read": _read,
}
_harmless = {**llama_layout.HARMLESS_KEYS, "architectures": architectures("Qwen3ForCausalLM", "Qwen3Model")}
QWEN3 = Family("qwen3", keys=KEYS, write=_write, harmless=_harmless, **_layout)
