"""GPT-Neo: GPT-2 with local attention in every second layer, and scores that are not scaled."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mijax.checkpoints.buffers import masks
from mijax.checkpoints.keys import ACTIVATIONS, HARMLESS, Key, architectures, windows_of
from mijax.checkpoints.llama_layout import attention
from mijax.checkpoints.table import Buffer, Family, Weight, dense_mlp, norm
from mijax.model.config import Config
from mijax.rules import COUNT, NULL, TEXT, Rule, array, either, shown

KEYS = {
    "num_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "num_heads": Key(("n_heads",)),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "intermediate_size": Key(("d_mlp",), None),
    "layer_norm_epsilon": Key(("norm_eps",), 1e-5),
    "activation_function": Key(("activation",), "gelu_new", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), True),
}


_GROUP = Rule(
    "a pair of an array of texts and a positive integer",
    lambda x: isinstance(x, list) and len(x) == 2 and array(TEXT).accepts(x[0]) and COUNT.accepts(x[1]),
)


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    types = c.get("attention_types", [[["global", "local"], 12]])
    n = sum(len(group) * count for group, count in types)
    if n != fields["n_layers"]:
        raise ValueError(f"attention_types={shown(types)} are of {n} layers, num_layers is {fields['n_layers']}")
    kinds = [kind for group, count in types if group for _ in range(count) for kind in group]
    if c.get("attention_layers") not in (None, kinds):
        raise ValueError(f"attention_layers={shown(c['attention_layers'])} is not what attention_types says")
    windows = windows_of(kinds, c.get("window_size", 256), fields["n_layers"], "local", "global")
    return {"window": tuple(0 if window >= fields["n_ctx"] else window for window in windows)}


def _write(config: Config) -> dict[str, Any]:
    windows = config.windows or (0,) * config.n_layers
    kinds = [[["local" if window else "global"], 1] for window in windows]
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "attention_types": kinds,
        "window_size": max(windows, default=0) or 256,
    }


def _weights(config: Config) -> list[Weight]:
    h = "transformer.h.{layer}."
    return [
        Weight(("W_E",), "transformer.wte.weight", "vocab d -> vocab d"),
        Weight(("W_pos",), "transformer.wpe.weight", "ctx d -> ctx d"),
        *norm("blocks.ln1", h + "ln_1"),
        *attention(config, h + "attn.attention.", "out_proj"),
        *norm("blocks.ln2", h + "ln_2"),
        *dense_mlp(h + "mlp.c_fc", h + "mlp.c_proj"),
        *norm("ln_final", "transformer.ln_f"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


def _is_mask(config: Config, x: np.ndarray) -> bool:
    """Whether it is the causal mask of the whole context, or that of one of the windows."""
    n = config.n_ctx
    if x.shape != (1, 1, n, n):
        return False
    band = lambda window: np.tri(n, dtype=bool) & ~np.tri(n, k=-window if window else -n, dtype=bool)
    return any(np.array_equal(x[0, 0], band(window)) for window in {0, *config.windows})


_attention = "transformer.h.{layer}.attn.attention."
GPT_NEO = Family(
    "gpt_neo",
    _weights,
    KEYS,
    {"positions": "learned", "norm": "layer", "attn_bias": "o", "attn_scale": 1.0},
    {"attention_types": array(_GROUP), "attention_layers": either(array(TEXT), NULL), "window_size": COUNT},
    _read,
    _write,
    {**HARMLESS, "architectures": architectures("GPTNeoForCausalLM", "GPTNeoModel"),
     **dict.fromkeys(("classifier_dropout", "embed_dropout", "resid_dropout"), lambda value, c: True)},
    {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    "transformer.",
    (Buffer(_attention + "bias", _is_mask, "the mask of a layer"), masks(_attention)[1]),
    "lm_head.weight",
)  # fmt: skip
