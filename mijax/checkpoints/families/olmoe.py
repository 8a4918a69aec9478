"""OLMoE: experts, and norms of all queries and keys."""

from mijax.checkpoints import expert_layout, llama_layout
from mijax.checkpoints.keys import BIASES, Key, only

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "head_dim"} | {
    "rms_norm_eps": Key(("norm_eps",), 1e-5),
    "attention_bias": Key(("attn_bias",), False, BIASES),
}
OLMOE = expert_layout.with_experts(
    "olmoe",
    "Olmoe",
    keys=KEYS,
    fixed={"qk_norm": "all"},
    read=lambda c, fields: expert_layout.read_experts(c, "num_experts", 8),
    harmless={"clip_qkv": only(None)},
)
