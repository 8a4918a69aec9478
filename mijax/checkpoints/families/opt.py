"""OPT, with norms before attention and MLP or (350m) in the stream."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mijax.checkpoints.keys import ACTIVATIONS, BIASES, HARMLESS, Key, architectures, only, same_as
from mijax.checkpoints.llama_layout import attention
from mijax.checkpoints.table import Convert, Family, Weight, dense_mlp, norm
from mijax.model.config import Config

KEYS = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "num_attention_heads": Key(("n_heads",)),
    "ffn_dim": Key(("d_mlp",)),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "activation_function": Key(("activation",), "relu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), True),
    "enable_bias": Key(("attn_bias",), True, BIASES),
    "do_layer_norm_before": Key(("norm_at",), True, {True: "input", False: "stream"}),
}
OFFSET = 2
"""The number of rows before that of position 0 in the table of positions, of which no real token reads any."""


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    removed = c.get("_remove_final_layer_norm", False)
    if not isinstance(removed, bool):
        raise ValueError(f"_remove_final_layer_norm={removed!r} must be a boolean")
    return {"mlp_bias": fields["attn_bias"] != "", "final_norm": fields["norm_at"] == "input" and not removed}


def _write(config: Config) -> dict[str, Any]:
    removed = config.norm_at == "input" and not config.final_norm
    return {"architectures": ["OPTForCausalLM"], "_remove_final_layer_norm": removed}


def _without_offset(x: np.ndarray, _: Config) -> list[np.ndarray]:
    return [x[OFFSET:]]


def _with_offset(parts: Sequence[np.ndarray], _: Config) -> np.ndarray:
    return np.concatenate([np.zeros_like(parts[0][:OFFSET]), parts[0]])


def _weights(config: Config) -> list[Weight]:
    h, norms = (
        "model.decoder.layers.{layer}.",
        ("ln1", "ln2") if config.norm_at == "input" else ("ln1_post", "ln2_post"),
    )
    positions = Convert(_without_offset, _with_offset)
    return [
        Weight(("W_E",), "model.decoder.embed_tokens.weight", "vocab d -> vocab d"),
        Weight(("W_pos",), "model.decoder.embed_positions.weight", "ctx d -> ctx d", positions),
        *norm(f"blocks.{norms[0]}", h + "self_attn_layer_norm"),
        *attention(config, h + "self_attn.", "out_proj"),
        *norm(f"blocks.{norms[1]}", h + "final_layer_norm"),
        *dense_mlp(h + "fc1", h + "fc2"),
        *norm("ln_final", "model.decoder.final_layer_norm"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


OPT = Family(
    "opt",
    _weights,
    KEYS,
    {"positions": "learned", "norm": "layer", "norm_eps": 1e-5},
    frozenset({"_remove_final_layer_norm"}),
    _read,
    _write,
    {**HARMLESS, "architectures": architectures("OPTForCausalLM", "OPTModel"), "layer_norm_elementwise_affine": only(True),
     "word_embed_proj_dim": same_as("hidden_size"),
     **dict.fromkeys(("dropout", "activation_dropout", "layerdrop", "init_std"), lambda value, c: True)},
    prefix="model.",
    head="lm_head.weight",
)  # fmt: skip
