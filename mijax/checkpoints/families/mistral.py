"""Mistral: Llama with a sliding window."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import Key, architectures, only
from mijax.checkpoints.table import Family
from mijax.model.config import Config

KEYS = llama_layout.KEYS | {"num_key_value_heads": Key(("n_kv_heads",))}
HARMLESS_KEYS = {
    **llama_layout.HARMLESS_KEYS,
    "architectures": architectures(
        "LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM", "MistralForCausalLM", "MistralModel"
    ),
    "attention_bias": only(False),
    "mlp_bias": only(False),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {
        **llama_layout.read_window(c, fields, 4096),
        **llama_layout.read_positions(c, fields),
    }  # transformers' default


def _write(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window or None, **llama_layout.write_as("MistralForCausalLM", config)}


_layout = {
    **llama_layout.LAYOUT,
    "further": llama_layout.LAYOUT["further"] | llama_layout.ONE_WINDOW,
    "read": _read,
}
MISTRAL = Family("mistral", keys=KEYS, write=_write, harmless=HARMLESS_KEYS, **_layout)
