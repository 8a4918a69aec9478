"""GPT-OSS: experts, attention sinks, and windows in every second layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import expert_layout, llama_layout
from mijax.checkpoints.contents import Tensors
from mijax.checkpoints.keys import BIASES, Key, architectures, only
from mijax.checkpoints.mxfp4 import is_mxfp4, unpacked
from mijax.checkpoints.rotary_keys import read_rotary
from mijax.checkpoints.table import FUSED, Family, Weight, linear, norm
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "hidden_act"} | {
    "head_dim": Key(("d_head",), 64),
    "num_key_value_heads": Key(("n_kv_heads",), 8),
    "rms_norm_eps": Key(("norm_eps",), 1e-5),
    "attention_bias": Key(("attn_bias",), True, BIASES),
}
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    said = c.get("rope_parameters") is not None or c.get(
        "rope_scaling"
    )  # an empty object there says that there is none
    local = range(0, fields["n_layers"], 2)
    experts = expert_layout.read_experts(c, "num_local_experts", 4, normalise=True)["experts"]
    return {
        "positions": read_rotary(c if said else {**c, "rope_parameters": _YARN}, theta=150_000.0),
        **llama_layout.read_windows({"sliding_window": 128, **c, "use_sliding_window": True}, fields, local),
        "experts": dataclasses.replace(experts, router_bias=True),
    }


def _write(config: Config) -> dict[str, Any] | None:
    e = config.experts
    if e is None:
        return None
    windows = {k: v for k, v in llama_layout.write_windows(config).items() if k != "use_sliding_window"}
    windows["sliding_window"] = windows["sliding_window"] or config.n_ctx
    sizes = {"num_local_experts": e.n, "num_experts_per_tok": e.top_k, "pad_token_id": None}
    return {**llama_layout.write_as("GptOssForCausalLM", config), **sizes, **windows}


def _weights(config: Config) -> list[Weight]:
    h = llama_layout.LAYER
    gate_up = lambda kind: (f"blocks.experts.{kind}_gate", f"blocks.experts.{kind}_in")
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        *llama_layout.attention(config),
        Weight(("blocks.attn.sinks",), h + "self_attn.sinks", "head -> head"),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        *linear(("blocks.experts.W_router", "blocks.experts.b_router"), h + "mlp.router", ("n d -> d n", "n -> n")),
        Weight(gate_up("W"), h + "mlp.experts.gate_up_proj", "n d (m two) -> two n d m", FUSED),
        Weight(gate_up("b"), h + "mlp.experts.gate_up_proj_bias", "n (m two) -> two n m", FUSED),
        Weight(("blocks.experts.W_out",), h + "mlp.experts.down_proj", "n m d -> n m d"),
        Weight(("blocks.experts.b_out",), h + "mlp.experts.down_proj_bias", "n d -> n d"),
    ]


_layout = llama_layout.LAYOUT | {
    "weights": _weights,
    "fixed": llama_layout.FIXED | {"mlp_bias": True, "activation": "clamped_swiglu", "sinks": True},
    "further": llama_layout.LAYOUT["further"]
    | {key: llama_layout.WINDOW_KEYS[key] for key in ("layer_types", "sliding_window")}
    | {key: expert_layout.KEYS[key] for key in ("num_local_experts", "num_experts_per_tok")},
    "read": _read,
}
_harmless = {
    **llama_layout.HARMLESS_KEYS, "architectures": architectures("GptOssForCausalLM", "GptOssModel"), "hidden_act": only("silu"),
    "swiglu_alpha": only(1.702), "swiglu_limit": only(7.0), "experts_per_token": lambda value, c: value == c.get("num_experts_per_tok", 4),
    "initial_context_length": lambda value, c: True, "quantization_config": lambda value, c: is_mxfp4(value),
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), lambda value, c: True),
}  # fmt: skip


def _decode(tensors: Tensors, c: Mapping[str, Any], source: str) -> Tensors:
    return unpacked(tensors, source) if is_mxfp4(c.get("quantization_config")) else tensors


GPT_OSS = Family("gpt_oss", keys=KEYS, write=_write, harmless=_harmless, decode=_decode, **_layout)
