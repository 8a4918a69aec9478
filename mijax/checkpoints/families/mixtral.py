"""Mixtral: Mistral with experts."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import expert_layout, llama_layout
from mijax.checkpoints.keys import Key, architectures
from mijax.checkpoints.rotary_keys import read_rotary
from mijax.checkpoints.table import Family, Weight, norm
from mijax.model.config import Config

KEYS = llama_layout.KEYS | {"num_key_value_heads": Key(("n_kv_heads",), 8), "rms_norm_eps": Key(("norm_eps",), 1e-5)}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {
        **llama_layout.read_window(c, fields, None),
        "positions": read_rotary(c, theta=1_000_000.0),
        **expert_layout.read_experts(c, "num_local_experts", 2, normalise=True),
    }


def _write(config: Config) -> dict[str, Any] | None:
    e = config.experts
    if e is None:
        return None
    sizes = {"num_local_experts": e.n, "num_experts_per_tok": e.top_k, "sliding_window": config.window or None}
    return {**llama_layout.write_as("MixtralForCausalLM", config), **sizes}


def _weights(config: Config) -> list[Weight]:
    h, maps = llama_layout.LAYER, {"in": "w3", "gate": "w1", "out": "w2"}
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        *llama_layout.attention(config),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        *expert_layout.expert_mlp(h + "block_sparse_moe.", "gate", maps),
    ]


_layout = llama_layout.LAYOUT | {
    "weights": _weights,
    "further": llama_layout.LAYOUT["further"]
    | llama_layout.ONE_WINDOW
    | {key: expert_layout.KEYS[key] for key in ("num_local_experts", "num_experts_per_tok")},
    "read": _read,
}
_harmless = {
    **llama_layout.HARMLESS_KEYS, "architectures": architectures("MixtralForCausalLM", "MixtralModel"),
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"), lambda value, c: True),
}  # fmt: skip
MIXTRAL = Family("mixtral", keys=KEYS, write=_write, harmless=_harmless, **_layout)
