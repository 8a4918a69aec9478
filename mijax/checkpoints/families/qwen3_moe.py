"""Qwen3-MoE: Qwen3 with experts in every layer."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key, architectures, only
from mijax.checkpoints.table import Family, Weight, norm
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key not in ("intermediate_size", "head_dim")} | {
    "head_dim": Key(("d_head",), None),
    "moe_intermediate_size": Key(("d_mlp",)),
    "attention_bias": Key(("attn_bias",), False, BIASES),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    n = "num_local_experts" if "num_local_experts" in c else "num_experts"  # transformers 5, and before
    return {
        **llama_layout.read_positions(c, fields),
        **llama_layout.read_windows(c, fields, range(fields["n_layers"])),
        **llama_layout.read_experts(c, n, 8),
    }


def _write(config: Config) -> dict[str, Any] | None:
    e = config.experts
    if e is None:
        return None
    sizes = {"num_experts": e.n, "num_experts_per_tok": e.top_k, "norm_topk_prob": e.normalise}
    sizes |= {"use_sliding_window": bool(config.window), "sliding_window": config.window or None}
    return {**llama_layout.write_as("Qwen3MoeForCausalLM", config), **sizes}


def _weights(config: Config) -> list[Weight]:
    h, maps = llama_layout.LAYER, {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        *llama_layout.attention(config),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        *llama_layout.expert_mlp(h + "mlp.", "gate", maps),
    ]


_keys = {"num_experts", "num_experts_per_tok", "norm_topk_prob", "num_local_experts"}
_layout = llama_layout.LAYOUT | {
    "weights": _weights,
    "fixed": llama_layout.FIXED | {"qk_norm": "head"},
    "further": llama_layout.LAYOUT["further"] | _keys | llama_layout.WINDOW_KEYS,
    "read": _read,
}
_harmless = {
    **llama_layout.HARMLESS_KEYS, "architectures": architectures("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef", "intermediate_size"), lambda value, c: True),
    "decoder_sparse_step": only(1), "mlp_only_layers": only([], None),
}  # fmt: skip
QWEN3_MOE = Family("qwen3_moe", keys=KEYS, write=_write, harmless=_harmless, **_layout)
