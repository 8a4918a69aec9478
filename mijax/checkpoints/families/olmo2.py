"""OLMo 2: norms of what attention and MLP write, and of all queries and keys."""

from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key, architectures
from mijax.checkpoints.table import Family, Weight, norm
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "head_dim"} | {
    "rms_norm_eps": Key(("norm_eps",), 1e-5),
    "attention_bias": Key(("attn_bias",), False, BIASES),
}


def _weights(config: Config) -> list[Weight]:
    h = llama_layout.LAYER
    return [
        *llama_layout.ends(),
        *llama_layout.attention(config),
        *norm("blocks.ln1_post", h + "post_attention_layernorm", bias=False),
        *llama_layout.gated_mlp(),
        *norm("blocks.ln2_post", h + "post_feedforward_layernorm", bias=False),
    ]


def _write(config: Config) -> dict[str, Any]:
    return llama_layout.write_as("Olmo2ForCausalLM", config)


_layout = llama_layout.LAYOUT | {
    "weights": _weights,
    "fixed": llama_layout.FIXED | {"norm_at": "output", "qk_norm": "all"},
}
_harmless = {**llama_layout.HARMLESS_KEYS, "architectures": architectures("Olmo2ForCausalLM", "Olmo2Model")}
OLMO2 = Family("olmo2", keys=KEYS, write=_write, harmless=_harmless, **_layout)
