"""SmolLM3: Llama with layers that have no rotary positions."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key, architectures
from mijax.checkpoints.rotary_keys import read_rotary, write_rotary
from mijax.checkpoints.table import Family
from mijax.model.config import Config
from mijax.rules import COUNT, NULL, array, either, only, shown

KEYS = llama_layout.KEYS | {
    "num_key_value_heads": Key(("n_kv_heads",), 4),
    "attention_bias": Key(("attn_bias",), False, BIASES),
    "mlp_bias": Key(("mlp_bias",), False),
    "tie_word_embeddings": Key(("tied_unembed",), True),
}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    n, interval, has = fields["n_layers"], c.get("no_rope_layer_interval", 4), c.get("no_rope_layers")
    if has is None:
        has = [int((layer + 1) % interval != 0) for layer in range(n)]
    if len(has) != n:
        raise ValueError(f"no_rope_layers={shown(has)} must be 0 or 1 for each of {n} layers")
    rotary = read_rotary(c, theta=2_000_000.0)
    local = [layer for layer in range(n) if not has[layer]]
    windows = llama_layout.read_windows(c, fields, local)
    return {"positions": tuple(rotary if rotates else None for rotates in has), **windows}


def _write(config: Config) -> dict[str, Any]:
    rotaries = config.rotaries or (None,) * config.n_layers
    rotary = next((rotary for rotary in rotaries if rotary is not None), None)
    layers = {"no_rope_layers": [int(rotary is not None) for rotary in rotaries]}
    return {
        "architectures": ["SmolLM3ForCausalLM"], "pad_token_id": None, **layers, **write_rotary(rotary), **llama_layout.write_windows(config)
    }  # fmt: skip


_layout = llama_layout.LAYOUT | {
    "further": llama_layout.LAYOUT["further"]
    | llama_layout.WINDOW_KEYS
    | {"no_rope_layers": either(array(only(0, 1, False, True)), NULL), "no_rope_layer_interval": COUNT},
    "read": _read,
}
_harmless = {**llama_layout.HARMLESS_KEYS, "architectures": architectures("SmolLM3ForCausalLM", "SmolLM3Model"),
             "pretraining_tp": lambda value, c: True}  # fmt: skip
SMOLLM3 = Family("smollm3", keys=KEYS, write=_write, harmless=_harmless, **_layout)
