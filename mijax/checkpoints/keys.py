"""The keys of a `config.json`: those that are read, those that do not matter, and an error for any other."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mijax.model.config import Config, RotaryScaling, check_field

REQUIRED = object()


class Key(NamedTuple):
    """A key that holds one or several fields of `Config`.

    `default` is what transformers takes where the key is left out. Where it is `None`, `null` may stand in the file as
    well, and leaves the field to be derived from the others. `spellings` are values that have another name here.
    """

    fields: tuple[str, ...]
    default: Any = REQUIRED
    spellings: Mapping[str, str] = {}


Harmless = Callable[[Any, Mapping[str, Any]], bool]
"""Of a key's value and the whole file: whether what a model computes does not depend on the key at that value."""

_DERIVED_SIZES = ("d_head", "n_kv_heads", "d_mlp")  # 0 asks `Config` to derive them; in a file it is a mistake
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}


def read_fields(c: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The fields of `Config` that the keys hold.

    Raises `KeyError` for a key that is missing, `ValueError` for one whose type or range is wrong.
    """
    fields: dict[str, Any] = {}
    for key, (names, default, spellings) in keys.items():
        value = c[key] if default is REQUIRED else c.get(key, default)
        if value is None and default is None:
            continue
        value = spellings.get(value, value) if isinstance(value, str) else value
        value = check_field(Config, names[0], value, key)
        if names[0] in _DERIVED_SIZES and value == 0:
            raise ValueError(f"{key}=0 must be positive")
        fields |= dict.fromkeys(names, value)
    return fields


def write_fields(config: Config, keys: Mapping[str, Key]) -> dict[str, Any]:
    """What `read_fields` reads."""
    return {key: getattr(config, names[0]) for key, (names, _, _) in keys.items()}


def check_keys(c: Mapping[str, Any], family: str, read: frozenset[str], harmless: Mapping[str, Harmless]) -> None:
    """Refuse a config with a key that is neither read nor harmless at its value.

    `null` is taken for an unknown key's way to say that what it is about is not there.
    """
    for key in QUANTISATION:
        if c.get(key) is not None:
            raise ValueError(f"quantised weights are not supported, and the file has {key}={c[key]!r}")
    faults = []
    for key, value in c.items():
        if key in read or key in QUANTISATION:
            continue
        if key not in harmless and value is not None:
            faults.append(f"{key}={value!r} (a key that mijax does not know, which may change what the model computes)")
        elif key in harmless and not harmless[key](value, c):
            faults.append(f"{key}={value!r}")
    if faults:
        raise ValueError(f"unsupported {family} config: {', '.join(faults)}")


QUANTISATION = ("quantization_config", "compression_config", "quantization")


def only(*values: Any) -> Harmless:
    """Harmless at these values, type and all (`1` is not `true`)."""
    return lambda value, _: any(type(value) is type(v) and value == v for v in values)


def same_as(key: str) -> Harmless:
    """Harmless where it repeats another key."""
    return lambda value, c: value == c.get(key, value)


def architectures(*names: str) -> Harmless:
    """Harmless where the model's class is one of these, or is not said."""
    return lambda value, _: value is None or (isinstance(value, list) and set(map(str, value)) <= set(names))


def _own_code(value: Any, _: Mapping[str, Any]) -> bool:
    """Code that comes with a checkpoint is never run: harmless for tokenizers, not for models."""
    return isinstance(value, Mapping) and not any(str(key).startswith("AutoModel") for key in value)


def _full_attention(value: Any, _: Mapping[str, Any]) -> bool:
    return value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value))


_ANY_VALUE = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels attention_dropout
    attn_implementation attn_pdrop bos_token_id chunk_size_feed_forward dtype embd_pdrop eos_token_id finetuning_task
    gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id max_sequence_length
    model_type n_special name_or_path num_labels output_attentions output_hidden_states output_past pad_token_id
    predict_special_tokens problem_type resid_pdrop return_dict sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params tf_legacy_loss
    tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers.js_config transformers_version
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache

    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length min_p
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores prefix remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
""".split()  # noqa: SIM905  (the second half: settings of text generation)

HARMLESS: Mapping[str, Harmless] = {
    **dict.fromkeys(_ANY_VALUE, lambda value, c: True),
    "add_cross_attention": only(False),
    "auto_map": _own_code,
    "cross_attention_hidden_size": only(None),
    "is_causal": only(True),
    "is_encoder_decoder": only(False),
    "layer_types": _full_attention,
    "pruned_heads": only({}, None),
    "tie_encoder_decoder": only(False),
}
"""Keys that every family's config may have."""


# ---- rotary positions

ROTARY_KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
)
_SCALINGS: dict[str, dict[str, str]] = {  # of each kind: the keys that it takes, and the fields of RotaryScaling
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq",
        "high_freq_factor": "high_freq",
        "original_max_position_embeddings": "original_n_ctx",
    },
}


def read_rotary(c: Mapping[str, Any], d_head: int) -> dict[str, Any]:
    """The fields of `Config` about rotary positions, from wherever in the file they stand.

    transformers 5 writes all of them into `rope_parameters`; before it was `rope_scaling`, with `rope_theta` and
    `partial_rotary_factor` beside it. Raises `ValueError` where two places disagree.
    """
    rope = _merged_rotary(c)
    kind = rope.pop("rope_type", "default")
    if kind not in _SCALINGS:
        raise ValueError(f"unsupported rotary scaling {kind!r}; supported are {', '.join(_SCALINGS)}")
    base = check_field(Config, "rotary_base", rope.pop("rope_theta", 10_000.0), "rope_theta")
    part = check_field(RotaryScaling, "factor", rope.pop("partial_rotary_factor", 1.0), "partial_rotary_factor")
    rotary_dim = int(d_head * part)
    if part > 1 or not rotary_dim:
        raise ValueError(f"partial_rotary_factor={part} must leave between 1 and d_head={d_head} dimensions to rotate")
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    unread = set(rope) - set(_SCALINGS[kind])
    if unread:
        extra = ", ".join(f"{key}={rope[key]!r}" for key in sorted(unread))
        raise ValueError(f"rotary scaling {kind!r} has no {extra}")
    values = {name: check_field(RotaryScaling, name, rope[key], key) for key, name in _SCALINGS[kind].items()}
    scaling = None if kind == "default" else RotaryScaling(kind, **values)
    return {"rotary_base": base, "rotary_dim": rotary_dim, "rotary_scaling": scaling}


def _merged_rotary(c: Mapping[str, Any]) -> dict[str, Any]:
    beside = {key: c[key] for key in ROTARY_KEYS - {"rope_scaling", "rope_parameters"} if c.get(key) is not None}
    rope: dict[str, Any] = {}
    for place in ("rope_parameters", "rope_scaling", "config.json"):
        values = beside if place == "config.json" else c.get(place)
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"{place}={values!r} must be an object or null")
        for key, value in (values or {}).items():
            key = "rope_type" if key == "type" else key
            if value is None:
                continue
            if key in rope and rope[key] != value:
                raise ValueError(f"{key} is {value!r} in {place}, and {rope[key]!r} elsewhere in the file")
            rope[key] = value
    return rope


def write_rotary(config: Config) -> dict[str, Any]:
    """What `read_rotary` reads, without the part of a head that is rotated, which transformers' Llama takes as all."""
    scaling = config.rotary_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": config.rotary_base}
    rope |= {key: getattr(scaling, name) for key, name in _SCALINGS[rope["rope_type"]].items()}
    return {"rope_parameters": rope}
