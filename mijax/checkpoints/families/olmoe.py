"""OLMoE: experts, and norms of all queries and keys."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key, architectures, only
from mijax.checkpoints.table import Family, Weight, norm
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "head_dim"} | {
    "rms_norm_eps": Key(("norm_eps",), 1e-5),
    "attention_bias": Key(("attn_bias",), False, BIASES),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {**llama_layout.read_positions(c, fields), **llama_layout.read_experts(c, "num_experts", 8)}


def _write(config: Config) -> dict[str, Any] | None:
    e = config.experts
    if e is None:
        return None
    sizes = {"num_experts": e.n, "num_experts_per_tok": e.top_k, "norm_topk_prob": e.normalise}
    return {**llama_layout.write_as("OlmoeForCausalLM", config), **sizes}


def _weights(config: Config) -> list[Weight]:
    h, maps = llama_layout.LAYER, {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        *llama_layout.attention(config),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        *llama_layout.expert_mlp(h + "mlp.", "gate", maps),
    ]


_keys = {"num_experts", "num_experts_per_tok", "norm_topk_prob"}
_layout = llama_layout.LAYOUT | {
    "weights": _weights,
    "fixed": llama_layout.FIXED | {"qk_norm": "all"},
    "further": llama_layout.LAYOUT["further"] | _keys,
    "read": _read,
}
_harmless = {
    **llama_layout.HARMLESS_KEYS, "architectures": architectures("OlmoeForCausalLM", "OlmoeModel"),
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), lambda value, c: True),
    "clip_qkv": only(None),
}  # fmt: skip
OLMOE = Family("olmoe", keys=KEYS, write=_write, harmless=_harmless, **_layout)
