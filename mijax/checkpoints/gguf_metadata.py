"""GGUF's metadata: every key is read, is known to be harmless, or is refused by name.

A missing key has the default that llama.cpp gives it (llama-model.cpp, llama-hparams.h).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mijax.checkpoints.gguf_architectures import ARCHITECTURES, Architecture, Get, decimal, head_size, yarn
from mijax.rules import COUNT, FLAG, NATURAL, NOT_NEGATIVE, POSITIVE, TEXT, Rule, faults, missing, only, shown


def _real(rule: Rule) -> Rule:
    """A rule for numbers that llama.cpp reads as floating point alone: it refuses a key of another type."""
    return Rule(rule.expected, lambda x: type(x) is float and rule.accepts(x))


_POSITIVE, _NOT_NEGATIVE = _real(POSITIVE), _real(NOT_NEGATIVE)
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
# keys that may have an array of one entry per layer
_PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
_MODEL: dict[str, Rule] = {  # the keys of an architecture that are read or whose value must be a certain one
    **dict.fromkeys(_REQUIRED, COUNT),
    "attention.head_count_kv": COUNT,
    "attention.key_length": COUNT,
    "attention.value_length": COUNT,
    "vocab_size": COUNT,
    "rope.dimension_count": COUNT,
    "rope.freq_base": _POSITIVE,
    "rope.scaling.type": only("none", "linear", "yarn"),
    "rope.scaling.factor": _POSITIVE,
    "rope.scale_linear": _POSITIVE,  # the older name of rope.scaling.factor
    "attention.scale": _NOT_NEGATIVE,
    "attention.sliding_window": NATURAL,
    # not implemented here: accepted at the values at which they have no effect
    "rope.scaling.attn_factor": only(1.0),
    "attention.causal": only(True),
    "attention.clamp_kqv": only(0.0),
    "attention.max_alibi_bias": only(0.0),
    "attn_logit_softcapping": only(0.0),
    "final_logit_softcapping": only(0.0),
    "logit_scale": only(1.0, 0.0),
    "residual_scale": only(1.0, 0.0),
    "embedding_scale": only(1.0, 0.0),
    "expert_count": only(0),
    "expert_used_count": only(0),
    "pooling_type": only(0),
    "use_parallel_residual": only(False),
    "tensor_data_layout": only("Meta AI original pth"),
}
_READ: dict[str, Rule] = {  # the keys of some architectures (`Architecture.reads`), in which they are not refused
    "expert_count": NATURAL,
    "expert_used_count": NATURAL,
    "expert_feed_forward_length": COUNT,
    "expert_shared_feed_forward_length": COUNT,
    "attention.sliding_window": NATURAL,
    "attn_logit_softcapping": _POSITIVE,
    "final_logit_softcapping": _NOT_NEGATIVE,
    "use_parallel_residual": FLAG,
    "attention.max_alibi_bias": only(8.0),
}
_FILE: dict[str, Rule] = {
    "general.architecture": TEXT,
    "general.type": only("model"),
    "general.quantization_version": only(2),
    "split.no": only(0),
    "split.count": only(1, 0),
    "split.tensors.count": COUNT,
}
_HARMLESS: dict[str, Rule] = {  # checked for their type, without effect at any value
    "rope.scaling.original_context_length": COUNT,  # read for YaRN
    "rope.scaling.finetuned": FLAG,
}
_HARMLESS_FAMILIES = ("general.", "quantize.imatrix.", "mradermacher.")  # keys that describe the origin of the file
_TOKENIZER = "tokenizer."


def rules(name: str) -> tuple[dict[str, Rule], dict[str, Rule]]:
    """The rules for the metadata of an architecture, by key.

    Args:
        name: llama.cpp's name of the architecture.

    Returns:
        Those of keys that are read or must have a certain value, and those of keys without effect.
    """
    architecture = ARCHITECTURES[name]
    keys = _MODEL | {architecture.epsilon: _NOT_NEGATIVE} | {key: _READ[key] for key in architecture.reads}
    if architecture.rotates == "none":
        keys = {key: rule for key, rule in keys.items() if not key.startswith("rope.")}
    named = lambda keys: {f"{name}.{key}": rule for key, rule in keys.items()}
    return named(keys) | _FILE, named(_HARMLESS)


def checked(fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check the metadata of the model, which are all but those of the tokenizer.

    Args:
        fields: all metadata of the file, by key.
        path: the file, for error messages.

    Returns:
        The model's metadata by key. An array of one entry per layer is replaced by the entry that all layers
        share.

    Raises:
        ValueError: for an architecture that is not read; else naming every key that is missing or unknown, or whose
            value is not supported.
    """
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{path}: unsupported GGUF architecture {name!r}; supported are {', '.join(ARCHITECTURES)}")
    values = {key: value for key, value in fields.items() if not key.startswith(_TOKENIZER)}
    differing = []
    for key in (f"{name}.{key}" for key in _PER_LAYER):
        entries = values.get(key)
        if isinstance(entries, list) and entries:
            values[key] = entries[0]
            if len(entries) != values.get(f"{name}.block_count") or len(set(entries)) > 1:
                differing.append(f"{key} must be the same in each of the layers, given {shown(entries)}")
    architecture = ARCHITECTURES[name]
    required = [f"{name}.{key}" for key in (*_REQUIRED, architecture.epsilon, *architecture.requires)]
    read, harmless = rules(name)
    refuse(
        path,
        [
            *missing(values, required),
            *unknown(values, read | harmless, _HARMLESS_FAMILIES),
            *faults(values, read | harmless),
            *differing,
        ],
    )
    return values


def unknown(values: Mapping[str, Any], rules: Mapping[str, Rule], families: tuple[str, ...] = ()) -> list[str]:
    """Messages about unknown keys.

    Args:
        values: metadata by key.
        rules: the rule of each known key.
        families: prefixes of further keys, which may have any value.

    Returns:
        One message for each key that has neither a rule nor such a prefix.

    >>> unknown({"a": 1, "b": 2, "c.d": 3}, {"a": COUNT}, ("c.",))
    ['the key b (2) is not known']
    """
    keys = [key for key in values if key not in rules and not key.startswith(families)]
    messages = [f"the key {shown(key)[1:-1]} ({shown(values[key])}) is not known" for key in keys[:8]]
    return messages + ([f"{len(keys) - 8} more keys are not known"] if len(keys) > 8 else [])


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
        shapes: the shape of each tensor, by its name in the file.
        path: the file, for error messages.

    Returns:
        The contents of a `config.json`.

    Raises:
        ValueError: for values that contradict each other or the tensors.
    """
    name = values["general.architecture"]
    architecture = ARCHITECTURES[name]
    get = lambda key, default=None: values.get(f"{name}.{key}", default)
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path}: the tensor token_embd.weight is missing")
    n_vocab, heads = shapes["token_embd.weight"][0], get("attention.head_count")
    wrong = [f"{name}.{text}, given {get(text.split()[0])}" for text in _contradictions(get, architecture)]
    refuse(path, [*wrong, *_counts(values, name, shapes, n_vocab)])
    rotary = {} if architecture.rotates == "none" else _rotary(get)
    return {
        "model_type": architecture.model_type,
        "num_hidden_layers": get("block_count"),
        "hidden_size": get("embedding_length"),
        "num_attention_heads": heads,
        "max_position_embeddings": get("context_length"),
        "vocab_size": n_vocab,
        "tie_word_embeddings": "output.weight" not in shapes,
        **rotary,
        **architecture.config(get, shapes),
    }


def _rotary(get: Get) -> dict[str, Any]:
    """The entries of rotary positions: scaled linearly where there is a factor, unless the type is another."""
    factor = get("rope.scaling.factor", get("rope.scale_linear"))
    kind = get("rope.scaling.type", "linear")
    scaling = None if factor is None or kind == "none" else {"rope_type": kind, "factor": decimal(factor)}
    scaling = yarn(get) if kind == "yarn" else scaling
    return {"rope_theta": decimal(get("rope.freq_base", 10_000.0)), "rope_scaling": scaling}


def _contradictions(get: Get, architecture: Architecture) -> list[str]:
    """Messages, without the architecture's name, about keys of attention and positions that contradict other keys."""
    heads, d_model, n_ctx, d_head = (
        get("attention.head_count"), get("embedding_length"), get("context_length"), head_size(get)
    )  # fmt: skip
    scale, window, factor = get("attention.scale", 0.0), get("attention.sliding_window", 0), get("rope.scaling.factor")
    rotated, reads_window = get("rope.dimension_count", d_head), "attention.sliding_window" in architecture.reads
    whole = architecture.rotates == "all"
    size = f"the head's size {d_head}" if whole else f"even and at most the head's size {d_head}"
    bad_part = rotated != d_head if whole else rotated > d_head or rotated % 2
    experts, used = get("expert_count", 0), get("expert_used_count", 0)
    # fmt: off
    checks = [
        (f"expert_count must be above 0 where expert_used_count is {used}", used and not experts),
        (f"expert_used_count must be from 1 to expert_count, {experts}", experts and not 0 < used <= experts),
        (f"rope.dimension_count must be {size}", architecture.rotates != "none" and bad_part),
        (f"attention.value_length must be the key's length {d_head}", get("attention.value_length", d_head) != d_head),
        (f"embedding_length must be a multiple of {heads} heads", get("attention.key_length") is None and d_model % heads),
        (f"attention.scale must be 1 / sqrt({d_head})", scale and d_head and not math.isclose(scale, d_head**-0.5, rel_tol=1e-6)),
        (f"attention.sliding_window must not be below the context's {n_ctx}", not reads_window and 0 < window < n_ctx),
        (f"rope.scale_linear must be rope.scaling.factor's {factor}", factor and get("rope.scale_linear", factor) != factor),
    ]
    # fmt: on
    return [text for text, wrong in checks if wrong]


def _counts(values: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]], n_vocab: int) -> list[str]:
    """Messages about counts in the metadata that differ from those of the tensors."""
    n_tensors = len(shapes)
    counts = {f"{name}.vocab_size": n_vocab, "split.tensors.count": n_tensors}
    messages = [f"{k} is {values[k]}, the file has {n}" for k, n in counts.items() if values.get(k, n) != n]
    experts = values.get(f"{name}.expert_count", 0)
    messages += [
        f"{name}.expert_count is {experts}, and {tensor} has shape {shape}"
        for tensor, shape in shapes.items()
        if "_exps." in tensor and shape[0] != experts
    ][:1]
    if experts and not any("_exps." in tensor for tensor in shapes):
        messages.append(f"{name}.expert_count is {experts}, and the file has no tensors of experts (..._exps)")
    layers = values[f"{name}.block_count"]
    return messages + (
        [f"{name}.block_count is {layers}, the file has {n_tensors} tensors"] if layers > n_tensors else []
    )
