"""Phi-1, Phi-1.5 and Phi-2."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import ACTIVATIONS, HARMLESS, Key, architectures, only
from mijax.checkpoints.rotary_keys import ROTARY_KEYS, read_rotary, write_rotary
from mijax.checkpoints.table import Family, Weight, dense_mlp, linear, norm
from mijax.model.config import Config

KEYS = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "num_attention_heads": Key(("n_heads",)),
    "num_key_value_heads": Key(("n_kv_heads",), None),
    "intermediate_size": Key(("d_mlp",)),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "layer_norm_eps": Key(("norm_eps",), 1e-5),
    "hidden_act": Key(("activation",), "gelu_new", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), False),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {"positions": read_rotary(c, fields["d_model"] // fields["n_heads"], share=0.5)}


def _write(config: Config) -> dict[str, Any]:
    return {"architectures": ["PhiForCausalLM"], **write_rotary(config.positions, config.d_head)}


def _weights(config: Config) -> list[Weight]:
    h = llama_layout.LAYER
    return [
        Weight(("W_E",), "model.embed_tokens.weight", "vocab d -> vocab d"),
        *norm("blocks.ln1", h + "input_layernorm"),
        *llama_layout.attention(config, out="dense"),
        *dense_mlp(h + "mlp.fc1", h + "mlp.fc2"),
        *norm("ln_final", "model.final_layernorm"),
        *linear(("W_U", "b_U"), "lm_head", ("vocab d -> vocab d", "vocab -> vocab")),
    ]


PHI = Family(
    "phi",
    _weights,
    KEYS,
    {"norm": "layer", "parallel": True, "shared_norm": True, "unembed_bias": True},
    ROTARY_KEYS,
    _read,
    _write,
    {**HARMLESS, "architectures": architectures("PhiForCausalLM", "PhiModel"), "qk_layernorm": only(False)},
    prefix="model.",
    buffers=llama_layout.BUFFERS,
    head=llama_layout.HEAD,
)
