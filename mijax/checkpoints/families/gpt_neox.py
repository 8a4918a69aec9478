"""GPT-NeoX: Pythia, and others of EleutherAI."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints.buffers import masks, rotary_buffers
from mijax.checkpoints.keys import ACTIVATIONS, BIASES, HARMLESS, Key, architectures
from mijax.checkpoints.rotary_keys import ROTARY_KEYS, read_rotary, write_rotary
from mijax.checkpoints.table import INTERLEAVED, Family, Weight, dense_mlp, fused_attention, norm
from mijax.model.config import Config
from mijax.rules import NULL, POSITIVE, either

KEYS = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "num_attention_heads": Key(("n_heads",)),
    "intermediate_size": Key(("d_mlp",)),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "layer_norm_eps": Key(("norm_eps",), 1e-5),
    "hidden_act": Key(("activation",), "gelu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), False),
    "use_parallel_residual": Key(("parallel",), True),
    "attention_bias": Key(("attn_bias",), True, BIASES),
}
_OLD = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}  # as files of before transformers 5 say


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    old = {new: c[key] for key, new in _OLD.items() if c.get(key) is not None}
    said = {key: value for key, value in c.items() if key in ROTARY_KEYS or key == "max_position_embeddings"}
    return {"positions": read_rotary({**old, **said}, fields["d_model"] // fields["n_heads"], share=0.25)}


def _write(config: Config) -> dict[str, Any]:
    return {"architectures": ["GPTNeoXForCausalLM"], **write_rotary(config.positions, config.d_head)}


def _weights(config: Config) -> list[Weight]:
    h = "gpt_neox.layers.{layer}."
    return [
        Weight(("W_E",), "gpt_neox.embed_in.weight", "vocab d -> vocab d"),
        *norm("blocks.ln1", h + "input_layernorm"),
        *fused_attention(h + "attention.query_key_value", h + "attention.dense", INTERLEAVED),
        *norm("blocks.ln2", h + "post_attention_layernorm"),
        *dense_mlp(h + "mlp.dense_h_to_4h", h + "mlp.dense_4h_to_h"),
        *norm("ln_final", "gpt_neox.final_layer_norm"),
        Weight(("W_U",), "embed_out.weight", "vocab d -> vocab d"),
    ]


GPT_NEOX = Family(
    "gpt_neox",
    _weights,
    KEYS,
    {"norm": "layer"},
    ROTARY_KEYS | dict.fromkeys(_OLD, either(POSITIVE, NULL)),
    _read,
    _write,
    {**HARMLESS, "architectures": architectures("GPTNeoXForCausalLM", "GPTNeoXModel"),
     **dict.fromkeys(("classifier_dropout", "hidden_dropout"), lambda value, c: True)},
    prefix="gpt_neox.",
    buffers=(*masks("gpt_neox.layers.{layer}.attention."), *rotary_buffers("gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq")),
    head="embed_out.weight",
)  # fmt: skip
