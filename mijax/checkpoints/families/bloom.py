"""BLOOM."""

from mijax.checkpoints.keys import HARMLESS, Key, architectures, only
from mijax.checkpoints.table import INTERLEAVED, Family, Weight, dense_mlp, fused_attention, norm
from mijax.model.config import Config

KEYS = {
    "n_layer": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "n_head": Key(("n_heads",)),
    "vocab_size": Key(("d_vocab",)),
    "seq_length": Key(("n_ctx",), 2048),
    "layer_norm_epsilon": Key(("norm_eps",), 1e-5),
    "tie_word_embeddings": Key(("tied_unembed",), True),
}


def _weights(config: Config) -> list[Weight]:
    h = "transformer.h.{layer}."
    return [
        Weight(("W_E",), "transformer.word_embeddings.weight", "vocab d -> vocab d"),
        *norm("ln_embed", "transformer.word_embeddings_layernorm"),
        *norm("blocks.ln1", h + "input_layernorm"),
        *fused_attention(h + "self_attention.query_key_value", h + "self_attention.dense", INTERLEAVED),
        *norm("blocks.ln2", h + "post_attention_layernorm"),
        *dense_mlp(h + "mlp.dense_h_to_4h", h + "mlp.dense_4h_to_h"),
        *norm("ln_final", "transformer.ln_f"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


BLOOM = Family(
    "bloom",
    _weights,
    KEYS,
    {"positions": "alibi", "norm": "layer", "embed_norm": True, "activation": "gelu_new"},
    write=lambda config: {"architectures": ["BloomForCausalLM"]},
    harmless={
        **HARMLESS, "architectures": architectures("BloomForCausalLM", "BloomModel"), "n_inner": only(None),
        "apply_residual_connection_post_layernorm": only(False), "slow_but_exact": only(False),
        **dict.fromkeys(
            ("hidden_dropout", "pretraining_tp", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion",
             "skip_bias_add", "skip_bias_add_qkv", "offset_alibi"), lambda value, c: True),
    },
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    prefix="transformer.",
    head="lm_head.weight",
)  # fmt: skip
