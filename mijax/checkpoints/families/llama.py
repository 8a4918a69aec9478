"""Llama 1 to 3, and what has its form: SmolLM2, TinyLlama, Vicuna, ..."""

from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key, architectures, only
from mijax.checkpoints.table import Family
from mijax.model.config import Config

KEYS = llama_layout.KEYS | {
    "attention_bias": Key(("attn_bias",), False, BIASES),
    "mlp_bias": Key(("mlp_bias",), False),
}
HARMLESS_KEYS = {
    **llama_layout.HARMLESS_KEYS,
    "architectures": architectures(
        "LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM", "MistralForCausalLM", "MistralModel"
    ),
    "sliding_window": only(None),
}


def _write(config: Config) -> dict[str, Any] | None:
    if config.d_model % config.n_heads:  # transformers refuses such a file, also where it gives head_dim
        return None
    return llama_layout.write_as("LlamaForCausalLM", config)


LLAMA = Family("llama", keys=KEYS, write=_write, harmless=HARMLESS_KEYS, **llama_layout.LAYOUT)
