"""GGUF's metadata of Llama models: every key is read, is known to be harmless, or is refused by name.

A missing key has the default that llama.cpp gives it (llama-model.cpp, llama-hparams.h).
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Rule(NamedTuple):
    """The values that a key may have.

    Attributes:
        expected: a description of these values, for error messages.
        accepts: whether a value is one of them.
    """

    expected: str
    accepts: Callable[[Any], bool]


def only(*values: Any) -> Rule:
    """A rule that accepts the listed values only, compared with their types.

    Args:
        values: the values, for a key that would change the computation at any other.

    Returns:
        The rule.

    >>> only(0).accepts(0), only(0).accepts(False)
    (True, False)
    """
    known = [(type(value), value) for value in values]
    return Rule(" or ".join(map(repr, values)), lambda x: (type(x), x) in known)


def array(kind: str, *types: type) -> Rule:
    """A rule that accepts lists.

    Args:
        kind: the description of the entries, for error messages.
        types: the types that the entries may have.

    Returns:
        The rule.

    >>> array("texts", str).accepts(["a"]), array("texts", str).accepts([1])
    (True, False)
    """
    return Rule(f"an array of {kind}", lambda x: isinstance(x, list) and all(type(entry) in types for entry in x))


_is_number = lambda x: type(x) is float and math.isfinite(x)
COUNT = Rule("a positive integer", lambda x: type(x) is int and x > 0)
NATURAL = Rule("an integer that is not negative", lambda x: type(x) is int and x >= 0)
POSITIVE = Rule("a positive number", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Rule("a number that is not negative", lambda x: _is_number(x) and x >= 0)
FLAG = Rule("true or false", lambda x: type(x) is bool)
TEXT = Rule("a text", lambda x: type(x) is str)

_REQUIRED = (
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon",
)  # fmt: skip
# keys that may have an array of one entry per layer
_PER_LAYER = ("llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv")
KEYS: dict[str, Rule] = {  # the model's keys that are read or whose value must be a certain one
    **dict.fromkeys(_REQUIRED, COUNT),
    "llama.attention.layer_norm_rms_epsilon": NOT_NEGATIVE,
    "llama.attention.head_count_kv": COUNT,
    "llama.attention.key_length": COUNT,
    "llama.attention.value_length": COUNT,
    "llama.vocab_size": COUNT,
    "llama.rope.dimension_count": COUNT,
    "llama.rope.freq_base": POSITIVE,
    "llama.rope.scaling.type": only("none", "linear"),
    "llama.rope.scaling.factor": POSITIVE,
    "llama.rope.scale_linear": POSITIVE,  # the older name of rope.scaling.factor
    "llama.attention.scale": NOT_NEGATIVE,
    "llama.attention.sliding_window": NATURAL,
    # not implemented here: accepted at the values at which they have no effect
    "llama.rope.scaling.attn_factor": only(1.0),
    "llama.attention.causal": only(True),
    "llama.attention.clamp_kqv": only(0.0),
    "llama.attention.max_alibi_bias": only(0.0),
    "llama.attn_logit_softcapping": only(0.0),
    "llama.final_logit_softcapping": only(0.0),
    "llama.logit_scale": only(1.0, 0.0),
    "llama.residual_scale": only(1.0, 0.0),
    "llama.embedding_scale": only(1.0, 0.0),
    "llama.expert_count": only(0),
    "llama.expert_used_count": only(0),
    "llama.pooling_type": only(0),
    "llama.use_parallel_residual": only(False),
    "llama.tensor_data_layout": only("Meta AI original pth"),
    "general.architecture": only("llama"),
    "general.type": only("model"),
    "general.quantization_version": only(2),
    "split.no": only(0),
    "split.count": only(1, 0),
    "split.tensors.count": COUNT,
}
HARMLESS: dict[str, Rule] = {  # checked for their type, without effect at any value
    "llama.rope.scaling.original_context_length": COUNT,  # read for YaRN only, which is refused
    "llama.rope.scaling.finetuned": FLAG,
}
_HARMLESS_FAMILIES = ("general.", "quantize.imatrix.", "mradermacher.")  # keys that describe the origin of the file
_TOKENIZER = "tokenizer."


def checked(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check the metadata of the model, which are all but those of the tokenizer.

    Args:
        fields: all metadata of the file, by key.
        path: the file, for error messages.

    Returns:
        The model's metadata by key. An array of one entry per layer is replaced by the entry that all layers
        share.

    Raises:
        ValueError: for another architecture than Llama; else naming every key that is missing or unknown, or whose
            value is not supported.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: unsupported GGUF architecture {architecture!r}; supported is llama")
    values = {key: value for key, value in fields.items() if not key.startswith(_TOKENIZER)}
    differing = []
    for key in _PER_LAYER:
        entries = values.get(key)
        if isinstance(entries, list) and entries:
            values[key] = entries[0]
            if len(entries) != values.get("llama.block_count") or len(set(entries)) > 1:
                differing.append(f"{key} must be the same in each of the layers, given {reprlib.repr(entries)}")
    refuse(path, [*missing(values, _REQUIRED), *faults(values, KEYS | HARMLESS, _HARMLESS_FAMILIES), *differing])
    return values


def missing(values: Mapping[str, Any], required: Sequence[str]) -> list[str]:
    """Messages about missing keys.

    Args:
        values: metadata by key.
        required: the keys that must be present.

    Returns:
        One message for each missing key.

    >>> missing({"a": 1}, ["a", "b"])
    ['the key b is missing']
    """
    return [f"the key {key} is missing" for key in required if key not in values]


def faults(values: Mapping[str, Any], rules: Mapping[str, Rule], families: tuple[str, ...] = ()) -> list[str]:
    """Messages about unknown keys and unsupported values.

    Args:
        values: metadata by key.
        rules: the rule of each known key.
        families: prefixes of further keys, which may have any value.

    Returns:
        One message for each key that has neither a rule nor such a prefix, and for each value that its rule
        refuses.

    >>> faults({"a": 1, "b": 2, "c.d": 3}, {"a": only(0)}, ("c.",))
    ['the key b (2) is not known', 'a must be 0, given 1']
    """
    unknown = [k for k in values if k not in rules and not k.startswith(families)]
    wrong = [(k, rules[k].expected) for k in values if k in rules and not rules[k].accepts(values[k])]
    return [
        *(f"the key {key} ({reprlib.repr(values[key])}) is not known" for key in unknown),
        *(f"{key} must be {expected}, given {reprlib.repr(values[key])}" for key, expected in wrong),
    ]


def refuse(path: Path, faults: Sequence[str]) -> None:
    """Raise one error for all faults; do nothing where there are none.

    Args:
        path: the file, for the error message.
        faults: messages about them.

    Raises:
        ValueError: where there are faults.
    """
    if faults:
        raise ValueError(f"{path}: unsupported GGUF metadata: {'; '.join(faults)}")


def config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """The contents of the `config.json` that the model came from, as far as mijax reads it.

    Args:
        values: the model's metadata, as `checked` returns them.
        shapes: the shape of each tensor, by its Hugging Face name.
        path: the file, for error messages.

    Returns:
        The contents of a Llama's `config.json`.

    Raises:
        ValueError: for values that contradict each other or the tensors.
    """
    get = lambda key, default=None: values.get(f"llama.{key}", default)
    heads, d_model = get("attention.head_count"), get("embedding_length")
    d_head = get("attention.key_length", d_model // heads)
    if "model.embed_tokens.weight" not in shapes:
        raise ValueError(f"{path}: the tensor token_embd.weight is missing")
    n_vocab = shapes["model.embed_tokens.weight"][0]
    refuse(path, [*_contradictions(values, d_head), *_counts(values, len(shapes), n_vocab)])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": get("block_count"),
        "hidden_size": d_model,
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": d_head,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(get("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(values),
        "vocab_size": n_vocab,
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def _rope_scaling(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry `rope_scaling`: linear where there is a factor, unless the type is `none`."""
    factor = values.get("llama.rope.scaling.factor", values.get("llama.rope.scale_linear"))
    kind = values.get("llama.rope.scaling.type", "linear")
    return None if factor is None or kind == "none" else {"rope_type": kind, "factor": _decimal(factor)}


def _contradictions(values: Mapping[str, Any], d_head: int) -> list[str]:
    """Messages about keys of attention and positions that contradict other keys."""
    get = lambda key, default=None: values.get(f"llama.{key}", default)
    heads, d_model, n_ctx = get("attention.head_count"), get("embedding_length"), get("context_length")
    scale, window, factor = get("attention.scale", 0.0), get("attention.sliding_window", 0), get("rope.scaling.factor")
    checks = [
        (f"rope.dimension_count must be the head's size {d_head}", get("rope.dimension_count", d_head) != d_head),
        (f"attention.value_length must be the key's length {d_head}", get("attention.value_length", d_head) != d_head),
        (
            f"embedding_length must be a multiple of {heads} heads",
            "llama.attention.key_length" not in values and d_model % heads,
        ),
        (f"attention.scale must be 1 / sqrt({d_head})", scale and not math.isclose(scale, d_head**-0.5, rel_tol=1e-6)),
        (f"attention.sliding_window must not be below the context's {n_ctx}", 0 < window < n_ctx),
        (
            f"rope.scale_linear must be rope.scaling.factor's {factor}",
            factor and get("rope.scale_linear", factor) != factor,
        ),
    ]
    return [f"llama.{text}, given {values[f'llama.{text.split()[0]}']}" for text, wrong in checks if wrong]


def _counts(values: Mapping[str, Any], n_tensors: int, n_vocab: int) -> list[str]:
    """Messages about counts in the metadata that differ from those of the tensors."""
    counts = {"llama.vocab_size": n_vocab, "split.tensors.count": n_tensors}
    return [f"{k} is {values[k]}, the file has {n}" for k, n in counts.items() if values.get(k, n) != n]


def _decimal(x: float) -> float:
    """The shortest decimal number that rounds to a float32: 1e-05 for 9.999999747378752e-06."""
    return float(np.float32(x).astype(str))
