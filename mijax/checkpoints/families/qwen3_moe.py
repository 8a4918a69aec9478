"""Qwen3-MoE: Qwen3 with experts, in every layer or in some."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import expert_layout, llama_layout
from mijax.checkpoints.keys import BIASES, Key
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "intermediate_size"} | {
    "attention_bias": Key(("attn_bias",), False, BIASES),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    n = "num_local_experts" if "num_local_experts" in c else "num_experts"  # transformers 5, and before
    experts = expert_layout.read_experts(c, n, 8)
    windows = llama_layout.read_windows(c, fields, range(fields["n_layers"]))
    return {**windows, **experts, **expert_layout.read_dense(c, fields | experts)}


def _write(config: Config) -> dict[str, Any]:
    windows = {"use_sliding_window": bool(config.window), "sliding_window": config.window or None}
    return windows | expert_layout.write_dense(config)


QWEN3_MOE = expert_layout.with_experts(
    "qwen3_moe",
    "Qwen3Moe",
    keys=KEYS,
    fixed={"qk_norm": "head"},
    further={
        "num_local_experts": expert_layout.KEYS["num_local_experts"],
        **llama_layout.WINDOW_KEYS,
        **expert_layout.DENSE_KEYS,
    },
    read=_read,
    write=_write,
    harmless={},
)
