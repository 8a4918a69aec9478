"""Qwen2-MoE: Qwen2 with experts, in every layer or in some, beside an MLP that all tokens use."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import expert_layout, llama_layout
from mijax.checkpoints.keys import Key
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "intermediate_size"} | {
    "qkv_bias": Key(("attn_bias",), True, {True: "qkv", False: ""}),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    # beyond `max_window_layers` all layers see all tokens, before it every second one
    local = [i for i in range(fields["n_layers"]) if i % 2 == 0 and i < c.get("max_window_layers", 28)]
    experts = expert_layout.read_experts(c, "num_experts", 4, shared=5632)
    windows = llama_layout.read_windows(c, fields, local)
    return {**windows, **experts, **expert_layout.read_dense(c, fields | experts)}


def _write(config: Config) -> dict[str, Any]:
    shared = config.experts.shared if config.experts else 0
    sizes = {"shared_expert_intermediate_size": shared}
    return llama_layout.write_windows(config) | expert_layout.write_dense(config) | sizes


QWEN2_MOE = expert_layout.with_experts(
    "qwen2_moe",
    "Qwen2Moe",
    keys=KEYS,
    fixed={},
    further={
        "shared_expert_intermediate_size": expert_layout.KEYS["shared_expert_intermediate_size"],
        **llama_layout.WINDOW_KEYS,
        **expert_layout.DENSE_KEYS,
    },
    read=_read,
    write=_write,
    harmless={},
)
