"""Phi-3 and Phi-4-mini: Llama with fused tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import Key, architectures
from mijax.checkpoints.rotary_keys import read_rotary, write_rotary
from mijax.checkpoints.table import FUSED, Convert, Family, Weight, norm
from mijax.model.config import Config

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "head_dim"} | {
    "rms_norm_eps": Key(("norm_eps",), 1e-5),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    rotary = {k: v for k, v in c.items() if k != "original_max_position_embeddings"}  # of the scaling `longrope` alone
    return {
        **llama_layout.read_window(c, fields, None),
        "positions": read_rotary(rotary, fields["d_model"] // fields["n_heads"]),
    }


def _write(config: Config) -> dict[str, Any]:
    rotary = write_rotary(config.positions, config.d_head)
    context = {
        "original_max_position_embeddings": config.n_ctx
    }  # beyond which transformers would look for longrope's factors
    return {
        "architectures": ["Phi3ForCausalLM"],
        "pad_token_id": None,
        "sliding_window": config.window or None,
        **context,
        **rotary,
    }


def _apart(x: np.ndarray, config: Config) -> list[np.ndarray]:
    """Of `[head, ...]`: the queries, the keys and the values."""
    parts = np.split(x, [config.n_heads, config.n_heads + config.n_kv_heads])
    return [np.moveaxis(part, 2, 0) for part in parts]


def _together(parts: Sequence[np.ndarray], config: Config) -> np.ndarray:
    """The inverse of `_apart`."""
    del config
    return np.concatenate([np.moveaxis(part, 0, 2) for part in parts])


def _weights(config: Config) -> list[Weight]:
    h = llama_layout.LAYER
    fused = tuple(f"blocks.attn.W_{name}" for name in "QKV")
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        Weight(fused, h + "self_attn.qkv_proj.weight", "(heads e) d -> heads e d", Convert(_apart, _together)),
        Weight(("blocks.attn.W_O",), h + "self_attn.o_proj.weight", "d (head e) -> head e d"),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        Weight(("blocks.mlp.W_gate", "blocks.mlp.W_in"), h + "mlp.gate_up_proj.weight", "(two m) d -> two d m", FUSED),
        Weight(("blocks.mlp.W_out",), h + "mlp.down_proj.weight", "d m -> m d"),
    ]


_layout = llama_layout.LAYOUT | {
    "weights": _weights,
    "further": llama_layout.LAYOUT["further"] | llama_layout.ONE_WINDOW,
    "read": _read,
}
_harmless = {
    **llama_layout.HARMLESS_KEYS, "architectures": architectures("Phi3ForCausalLM", "Phi3Model"),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop"), lambda value, c: True),
}  # fmt: skip
PHI3 = Family("phi3", keys=KEYS, write=_write, harmless=_harmless, **_layout)
