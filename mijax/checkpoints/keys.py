"""The keys of a `config.json`: those that are read, those that have no effect here, and an error for any other."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mijax.model.config import Config, RotaryScaling, check_field

REQUIRED = object()
"""The `default` of a `Key` that must be in the file."""


class Key(NamedTuple):
    """A key of `config.json` that gives one or several fields of `Config`.

    Attributes:
        fields: the fields of `Config`, all of which get the key's value.
        default: the value that transformers takes where the key is missing. Where it is `None`, the file may have
            `null` as well, and the fields are derived from the others.
        spellings: values that mijax calls by another name, and these names.
    """

    fields: tuple[str, ...]
    default: Any = REQUIRED
    spellings: Mapping[str, str] = {}


Harmless = Callable[[Any, Mapping[str, Any]], bool]
"""Of a key's value and the whole file: whether the key, at that value, has no effect on what the model computes."""

_DERIVED_SIZES = ("d_head", "n_kv_heads", "d_mlp")  # 0 makes `Config` derive them; in a file it is an error
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
"""The `spellings` of activation functions."""


def read_fields(c: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The fields of `Config` that a `config.json` gives.

    Args:
        c: the contents of the file.
        keys: the family's table of keys.

    Returns:
        The values of the fields, by their names, without those that `Config` derives.

    Raises:
        KeyError: for a required key that is missing.
        ValueError: for a value whose type or range is wrong.

    >>> read_fields({"n": 2}, {"n": Key(("n_layers",)), "eps": Key(("norm_eps",), 1e-6)})
    {'n_layers': 2, 'norm_eps': 1e-06}
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
    """The entries of a `config.json` from which `read_fields` reads a config's fields.

    Args:
        config: the config to write.
        keys: the family's table of keys.

    Returns:
        The value of each key.
    """
    return {key: getattr(config, names[0]) for key, (names, _, _) in keys.items()}


def check_keys(c: Mapping[str, Any], family: str, read: frozenset[str], harmless: Mapping[str, Harmless]) -> None:
    """Refuse a config with a key that is neither read nor harmless at its value.

    An unknown key whose value is `null` is accepted: it is taken to say that the model lacks the feature.

    Args:
        c: the contents of `config.json`.
        family: the `model_type`, for the error message.
        read: the keys that are read.
        harmless: the other known keys, with the values at which they have no effect.

    Raises:
        ValueError: naming every such key, or the key that announces quantised weights.

    >>> check_keys({"n_layer": 2, "flash": None}, "gpt2", frozenset({"n_layer"}), {})
    >>> check_keys({"is_decoder": False}, "gpt2", frozenset(), {"is_decoder": only(True)})
    Traceback (most recent call last):
    ValueError: unsupported gpt2 config: is_decoder=False
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
"""Keys that announce quantised weights."""


def only(*values: Any) -> Harmless:
    """A key that is harmless at some values.

    Args:
        values: the values, which are compared with their types (`1` is not `true`).

    Returns:
        The entry for a table of harmless keys.

    >>> only(1)(1, {}), only(1)(True, {})
    (True, False)
    """
    return lambda value, _: any(type(value) is type(v) and value == v for v in values)


def same_as(key: str) -> Harmless:
    """A key that is harmless where it repeats another key, or where the file lacks the other key.

    Args:
        key: the other key.

    Returns:
        The entry for a table of harmless keys.

    >>> same_as("n_embd")(8, {"n_embd": 8}), same_as("n_embd")(9, {"n_embd": 8})
    (True, False)
    """
    return lambda value, c: value == c.get(key, value)


def architectures(*names: str) -> Harmless:
    """The key `architectures`, which is harmless where it names none but known classes, or is `null`.

    Args:
        names: the names of the classes of models that mijax computes as transformers does.

    Returns:
        The entry for a table of harmless keys.

    >>> architectures("GPT2Model")(["GPT2Model"], {}), architectures("GPT2Model")(["BertModel"], {})
    (True, False)
    """
    return lambda value, _: value is None or (isinstance(value, list) and set(map(str, value)) <= set(names))


def _own_code(value: Any, _: Mapping[str, Any]) -> bool:
    """Whether `auto_map` names no code of a model: a checkpoint's code is never run, and only a model's code matters."""
    return isinstance(value, Mapping) and not any(str(key).startswith("AutoModel") for key in value)


def _full_attention(value: Any, _: Mapping[str, Any]) -> bool:
    """Whether `layer_types` gives every layer full attention."""
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
""".split()  # noqa: SIM905  (the second half are settings of text generation)

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
"""Keys that the config of any family of Hugging Face may have, and the values at which they have no effect."""


# ---- rotary positions

ROTARY_KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
)
_SCALINGS: dict[str, dict[str, str]] = {  # for each kind: its keys, and their fields of RotaryScaling
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq",
        "high_freq_factor": "high_freq",
        "original_max_position_embeddings": "original_n_ctx",
    },
}


def read_rotary(c: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Config` about rotary positions, from all places of a `config.json` that may hold them.

    transformers 5 writes all of them into `rope_parameters`. Earlier versions wrote `rope_scaling`, with
    `rope_theta` and `partial_rotary_factor` at the top level of the file. Llama and Mistral in transformers ignore
    `partial_rotary_factor` and rotate all dimensions of a head, so that a file which asks for another share does not
    say what its model was trained with.

    Args:
        c: the contents of the file.

    Returns:
        The fields `rotary_base` and `rotary_scaling`.

    Raises:
        KeyError: where Llama 3's scaling needs `max_position_embeddings` and the file lacks it, or a scaling lacks
            one of its keys.
        ValueError: where two places disagree, for an unsupported kind of scaling, for a key that the kind does not
            have, for a value of wrong type or range, and where `partial_rotary_factor` is not 1.

    >>> read_rotary({"rope_theta": 5000.0, "partial_rotary_factor": 1.0})
    {'rotary_base': 5000.0, 'rotary_scaling': None}
    """
    rope = _merged_rotary(c)
    kind = rope.pop("rope_type", "default")
    if kind not in _SCALINGS:
        raise ValueError(f"unsupported rotary scaling {kind!r}; supported are {', '.join(_SCALINGS)}")
    base = check_field(Config, "rotary_base", rope.pop("rope_theta", 10_000.0), "rope_theta")
    fraction = check_field(RotaryScaling, "factor", rope.pop("partial_rotary_factor", 1.0), "partial_rotary_factor")
    if fraction != 1:
        raise ValueError(
            f"partial_rotary_factor={fraction} must be 1: this family rotates all dimensions of a head, also in"
            " transformers, which ignores the key"
        )
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    unread = set(rope) - set(_SCALINGS[kind])
    if unread:
        extra = ", ".join(f"{key}={rope[key]!r}" for key in sorted(unread))
        raise ValueError(f"rotary scaling {kind!r} has no {extra}")
    values = {name: check_field(RotaryScaling, name, rope[key], key) for key, name in _SCALINGS[kind].items()}
    scaling = None if kind == "default" else RotaryScaling(kind, **values)
    return {"rotary_base": base, "rotary_scaling": scaling}


def _merged_rotary(c: Mapping[str, Any]) -> dict[str, Any]:
    """The entries about rotary positions: of `rope_parameters`, of `rope_scaling` and of the file's top level."""
    top_level = {key: c[key] for key in ROTARY_KEYS - {"rope_scaling", "rope_parameters"} if c.get(key) is not None}
    rope: dict[str, Any] = {}
    for place in ("rope_parameters", "rope_scaling", "config.json"):
        values = top_level if place == "config.json" else c.get(place)
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
    """The entries of a `config.json` from which `read_rotary` reads a config's rotary positions.

    `partial_rotary_factor` is left out, since Llama in transformers always rotates all dimensions of a head.

    Args:
        config: the config to write.

    Returns:
        The entry `rope_parameters`.
    """
    scaling = config.rotary_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": config.rotary_base}
    rope |= {key: getattr(scaling, name) for key, name in _SCALINGS[rope["rope_type"]].items()}
    return {"rope_parameters": rope}
