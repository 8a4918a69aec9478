"""GPT-J."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mijax.checkpoints import gpt2_layout
from mijax.checkpoints.buffers import masks
from mijax.checkpoints.keys import Key, architectures, only
from mijax.checkpoints.table import Convert, Family, Weight, dense_mlp, linear, norm
from mijax.model.config import Config
from mijax.model.rotary import Rotary
from mijax.rules import COUNT

KEYS = gpt2_layout.KEYS | {"tie_word_embeddings": Key(("tied_unembed",), False)}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    del fields
    return {"positions": Rotary(dim=c.get("rotary_dim", 64))}


def _write(config: Config) -> dict[str, Any]:
    dim = config.positions.dim if isinstance(config.positions, Rotary) else 0
    return {"architectures": ["GPTJForCausalLM"], "rotary_dim": dim}


def _rotary_dim(config: Config) -> int:
    assert isinstance(config.positions, Rotary)
    return config.positions.dim


def _in_halves(x: np.ndarray, config: Config) -> list[np.ndarray]:
    """Dimensions that GPT-J rotates in neighbouring pairs, first all first ones and then all second ones."""
    dim = _rotary_dim(config)
    return [np.concatenate([x[..., 0:dim:2], x[..., 1:dim:2], x[..., dim:]], axis=-1)]


def _in_pairs(parts: Any, config: Config) -> np.ndarray:
    """The inverse of `_in_halves`."""
    x, dim = parts[0], _rotary_dim(config)
    pairs = np.stack([x[..., : dim // 2], x[..., dim // 2 : dim]], axis=-1).reshape(*x.shape[:-1], dim)
    return np.concatenate([pairs, x[..., dim:]], axis=-1)


def _weights(config: Config) -> list[Weight]:
    h = "transformer.h.{layer}."
    heads, rotated = "(head e) d -> d head e", Convert(_in_halves, _in_pairs)
    return [
        Weight(("W_E",), "transformer.wte.weight", "vocab d -> vocab d"),
        *norm("blocks.ln1", h + "ln_1"),
        Weight(("blocks.attn.W_Q",), h + "attn.q_proj.weight", heads, rotated),
        Weight(("blocks.attn.W_K",), h + "attn.k_proj.weight", heads, rotated),
        Weight(("blocks.attn.W_V",), h + "attn.v_proj.weight", heads),
        Weight(("blocks.attn.W_O",), h + "attn.out_proj.weight", "d (head e) -> head e d"),
        *dense_mlp(h + "mlp.fc_in", h + "mlp.fc_out"),
        *norm("ln_final", "transformer.ln_f"),
        *linear(("W_U", "b_U"), "lm_head", ("vocab d -> vocab d", "vocab -> vocab")),
    ]


GPTJ = Family(
    "gptj",
    _weights,
    KEYS,
    {"norm": "layer", "parallel": True, "shared_norm": True, "unembed_bias": True, "attn_bias": ""},
    {"rotary_dim": COUNT},
    _read,
    _write,
    {**gpt2_layout.HARMLESS_KEYS, "architectures": architectures("GPTJForCausalLM", "GPTJModel"), "rotary": only(True)},
    gpt2_layout.ALIASES,
    "transformer.",
    masks("transformer.h.{layer}.attn."),
    "lm_head.weight",
)  # fmt: skip
