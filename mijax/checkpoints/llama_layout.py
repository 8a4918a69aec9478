"""What the families that descend from Llama share: names of tensors, keys of the config, and buffers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mijax.checkpoints.keys import ACTIVATIONS, HARMLESS, Key, only
from mijax.checkpoints.rotary_keys import ROTARY_KEYS, read_rotary, write_rotary
from mijax.checkpoints.table import Buffer, Weight, linear, norm
from mijax.model.config import Config
from mijax.model.rotary import Rotary, frequencies

LAYER = "model.layers.{layer}."
"""The start of the names of a layer's tensors."""
KEYS: dict[str, Key] = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "intermediate_size": Key(("d_mlp",)),
    "num_attention_heads": Key(("n_heads",)),
    "num_key_value_heads": Key(("n_kv_heads",), None),
    "head_dim": Key(("d_head",), None),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "rms_norm_eps": Key(("norm_eps",), 1e-6),
    "hidden_act": Key(("activation",), "silu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), False),
}
FIXED = {"norm": "rms", "mlp": "gated", "attn_bias": "", "mlp_bias": False}
"""The fields of a family without biases."""
HARMLESS_KEYS = {**HARMLESS, "pretraining_tp": only(1, None), "rope_interleaved": only(False)}
HEAD = "lm_head.weight"


def read_positions(c: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The field `positions` of a family that rotates all dimensions of a head.

    Args:
        c: the contents of `config.json`.
        fields: the fields read so far.
    """
    del fields
    return {"positions": read_rotary(c)}


def write_as(architecture: str, config: Config) -> dict[str, Any]:
    """The entries of such a family beside its keys.

    Args:
        architecture: the name of transformers' class.
        config: the config.
    """
    return {"architectures": [architecture], **write_rotary(config.positions)}


def weights(config: Config) -> list[Weight]:
    """The tensors of Llama, with the norms of queries and keys that some descendants have.

    Args:
        config: the architecture.
    """
    return [*ends(), *norm("blocks.ln1", LAYER + "input_layernorm", bias=False), *attention(config), *gated_mlp(),
            *norm("blocks.ln2", LAYER + "post_attention_layernorm", bias=False)]  # fmt: skip


def ends() -> list[Weight]:
    """The tensors of embedding, last norm and unembedding."""
    return [
        Weight(("W_E",), "model.embed_tokens.weight", "vocab d -> vocab d"),
        *norm("ln_final", "model.norm", bias=False),
        Weight(("W_U",), HEAD, "vocab d -> vocab d"),
    ]


def attention(config: Config, start: str = LAYER + "self_attn.", out: str = "o_proj") -> list[Weight]:
    """The tensors of attention.

    Args:
        config: the architecture.
        start: the start of their names.
        out: the name of the output's map.
    """
    maps = (("Q", "q_proj", "head"), ("K", "k_proj", "kv_head"), ("V", "v_proj", "kv_head"))
    table = linear(("blocks.attn.W_O", "blocks.attn.b_O"), start + out, ("d (head e) -> head e d", "d -> d"))
    for ours, theirs, heads in maps:
        axes = (f"({heads} e) d -> d {heads} e", f"({heads} e) -> {heads} e")
        table += linear((f"blocks.attn.W_{ours}", f"blocks.attn.b_{ours}"), start + theirs, axes)
    for ours, heads in (("q_norm", "head"), ("k_norm", "kv_head")):
        axes = f"({heads} e) -> {heads} e" if config.qk_norm == "all" else "(one e) -> one e"
        table.append(Weight((f"blocks.attn.{ours}",), f"{start}{ours}.weight", axes))
    return table


def gated_mlp(start: str = LAYER + "mlp.") -> list[Weight]:
    """The tensors of a gated MLP.

    Args:
        start: the start of their names.
    """
    table = []
    for ours, theirs in (("in", "up_proj"), ("gate", "gate_proj"), ("out", "down_proj")):
        table += linear((f"blocks.mlp.W_{ours}", f"blocks.mlp.b_{ours}"), start + theirs, ("o i -> i o", "o -> o"))
    return table


def _is_of_config(config: Config, x: np.ndarray) -> bool:
    """Whether it holds the rotary frequencies of the config, rounded to float32 and then to the buffer's dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or not isinstance(config.positions, Rotary):
        return False
    expected = frequencies(config.positions)
    precision = jnp.finfo(x.dtype)
    tolerance = 2e-6 * expected + float(precision.eps) * expected + float(precision.smallest_subnormal)
    return x.shape == expected.shape and bool((np.abs(x.astype(np.float64) - expected) <= tolerance).all())


def rotary_buffers(*names: str) -> tuple[Buffer, ...]:
    """Buffers that hold rotary frequencies.

    Args:
        *names: their names.
    """
    return tuple(Buffer(name, _is_of_config, "the rotary frequencies that the config gives") for name in names)


BUFFERS = rotary_buffers(LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
LAYOUT: dict[str, Any] = {
    "weights": weights, "fixed": FIXED, "further": ROTARY_KEYS, "read": read_positions, "prefix": "model.",
    "buffers": BUFFERS, "head": HEAD,
}  # fmt: skip
"""The arguments of `Family` for one that has Llama's tensors and rotates all dimensions of a head."""
