"""What Gemma 2 and 3 share: names of tensors, scales, caps and keys of the config."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import ACTIVATIONS, BIASES, Key, only
from mijax.checkpoints.table import Convert, Weight, norm
from mijax.model.config import Config
from mijax.rules import NULL, POSITIVE, either

KEYS = {key: value for key, value in llama_layout.KEYS.items() if key != "hidden_act"} | {
    "hidden_activation": Key(("activation",), "gelu_pytorch_tanh", ACTIVATIONS),
    "head_dim": Key(("d_head",), 256),
    "num_key_value_heads": Key(("n_kv_heads",), 4),
    "tie_word_embeddings": Key(("tied_unembed",), True),
    "attention_bias": Key(("attn_bias",), False, BIASES),
}
FURTHER = {
    "query_pre_attn_scalar": POSITIVE,
    "final_logit_softcapping": either(POSITIVE, NULL),
    "attn_logit_softcapping": either(POSITIVE, NULL),
}
PLUS_ONE = Convert(lambda x, _: [x + 1], lambda parts, _: parts[0] - 1)
"""The checkpoint holds the weight of a norm less one."""
HARMLESS_KEYS = {
    **llama_layout.HARMLESS_KEYS, "hidden_act": lambda value, c: value == c.get("hidden_activation", "gelu_pytorch_tanh"),
    "use_bidirectional_attention": only(None, False), "cache_implementation": lambda value, c: True,
}  # fmt: skip


def read_scales(
    c: Mapping[str, Any], fields: Mapping[str, Any], caps: tuple[float | None, float | None]
) -> dict[str, Any]:
    """The fields of Gemma's scales and caps.

    Args:
        c: the contents of `config.json`.
        fields: the fields read so far.
        caps: those of scores and of logits where the file gives none.
    """
    scores, logits = (
        c.get(key, cap) or 0.0 for key, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), caps)
    )
    return {
        "scores_cap": scores, "logits_cap": logits, "attn_scale": c.get("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": fields["d_model"] ** 0.5,
    }  # fmt: skip


def write_scales(config: Config) -> dict[str, Any]:
    """The entries from which `read_scales` reads.

    Args:
        config: the config.
    """
    squared = config.attn_scale**-2
    return {
        "query_pre_attn_scalar": round(squared) if abs(squared - round(squared)) < 1e-6 else squared,
        "attn_logit_softcapping": config.scores_cap or None,
        "final_logit_softcapping": config.logits_cap or None,
    }


def weights(config: Config) -> list[Weight]:
    """The tensors of Gemma 2 and 3.

    Args:
        config: the architecture.
    """
    h, names = llama_layout.LAYER, {
        "ln1": "input_layernorm", "ln1_post": "post_attention_layernorm", "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    }  # fmt: skip
    norms = [weight for ours, theirs in names.items() for weight in norm(f"blocks.{ours}", h + theirs, bias=False)]
    table = [*llama_layout.ends(), *norms, *llama_layout.attention(config), *llama_layout.gated_mlp()]
    shifted = lambda path: path.endswith((".weight", "q_norm", "k_norm")) and "W_" not in path
    return [weight._replace(convert=PLUS_ONE) if shifted(weight.ours[0]) else weight for weight in table]
