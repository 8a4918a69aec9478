"""Falcon with rotary positions: 7b (one norm, one key/value head) and 40b (two norms, grouped heads)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mijax.checkpoints.buffers import rotary_buffers
from mijax.checkpoints.keys import ACTIVATIONS, BIASES, HARMLESS, Key, architectures, only
from mijax.checkpoints.rotary_keys import ROTARY_KEYS, read_rotary, write_rotary
from mijax.checkpoints.table import Convert, Family, Weight, dense_mlp, fused_attention, norm
from mijax.model.config import Config
from mijax.rules import COUNT, FLAG, NULL, either
from mijax.rules import only as only_values

KEYS = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "num_attention_heads": Key(("n_heads",)),
    "ffn_hidden_size": Key(("d_mlp",), None),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",), 2048),
    "layer_norm_epsilon": Key(("norm_eps",), 1e-5),
    "activation": Key(("activation",), "gelu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), True),
    "parallel_attn": Key(("parallel",), True),
    "bias": Key(("attn_bias",), False, BIASES),
}
_FLAGS = {"new_decoder_architecture": False, "multi_query": True}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    new, multi_query = (c.get(key, default) for key, default in _FLAGS.items())
    heads, norms = fields["n_heads"], c.get("num_ln_in_parallel_attn")
    if (norms == 2 and not new) or (new and not fields["parallel"]):
        raise ValueError(
            f"num_ln_in_parallel_attn={norms!r} does not go with new_decoder_architecture={new} and parallel_attn"
        )
    kv_heads = (c.get("num_kv_heads") or heads) if new else 1 if multi_query else heads
    two = new and norms != 1
    return {
        "n_kv_heads": kv_heads, "mlp_bias": fields["attn_bias"] != "", "positions": read_rotary(c),
        "shared_norm": fields["parallel"] and not two,
    }  # fmt: skip


def _write(config: Config) -> dict[str, Any]:
    new = config.parallel and not (config.shared_norm and config.n_kv_heads in (1, config.n_heads))
    flags = {"new_decoder_architecture": new, "multi_query": not new and config.n_kv_heads == 1}
    heads = {
        "num_kv_heads": config.n_kv_heads,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if new else None,
    }
    return {"architectures": ["FalconForCausalLM"], **flags, **heads, **write_rotary(config.positions)}


def _apart(x: np.ndarray, config: Config) -> list[np.ndarray]:
    """Of `[part, kv_head, e, ...]`: a group's queries, its key and its value."""
    group = config.n_heads // config.n_kv_heads
    queries = np.moveaxis(x[:group], 0, 1)
    parts = [queries.reshape(-1, *queries.shape[2:]), x[group], x[group + 1]]
    return [part if part.ndim == 2 else np.moveaxis(part, -1, 0) for part in parts]


def _together(parts: Sequence[np.ndarray], config: Config) -> np.ndarray:
    """The inverse of `_apart`."""
    q, k, v = (part if part.ndim == 2 else np.moveaxis(part, 0, -1) for part in parts)
    queries = np.moveaxis(q.reshape(config.n_kv_heads, -1, *q.shape[1:]), 1, 0)
    return np.concatenate([queries, k[None], v[None]])


def _weights(config: Config) -> list[Weight]:
    h = "transformer.h.{layer}."
    two = config.parallel and not config.shared_norm
    names = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    qkv, out = h + "self_attention.query_key_value", h + "self_attention.dense"
    # (With a key/value head for each head, a group is a head with its query, key and value.)
    axes = ("(kv_head part e) d -> part kv_head e d", "(kv_head part e) -> part kv_head e")
    return [
        Weight(("W_E",), "transformer.word_embeddings.weight", "vocab d -> vocab d"),
        *norm("blocks.ln1", h + names[0]),
        *fused_attention(qkv, out, axes, Convert(_apart, _together)),
        *norm("blocks.ln2", h + names[1]),
        *dense_mlp(h + "mlp.dense_h_to_4h", h + "mlp.dense_4h_to_h"),
        *norm("ln_final", "transformer.ln_f"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


FALCON = Family(
    "falcon",
    _weights,
    KEYS,
    {"norm": "layer"},
    {**ROTARY_KEYS, **dict.fromkeys(_FLAGS, FLAG), "num_kv_heads": either(COUNT, NULL), "num_ln_in_parallel_attn": only_values(None, 1, 2)},
    _read,
    _write,
    {**HARMLESS, "architectures": architectures("FalconForCausalLM", "FalconModel"), "alibi": only(False),
     "apply_residual_connection_post_layernorm": only(False),
     "hidden_dropout": lambda value, c: True},
    {"n_embed": "hidden_size"},
    "transformer.",
    rotary_buffers("transformer.h.{layer}.self_attention.rotary_emb.inv_freq"),
    "lm_head.weight",
)  # fmt: skip
