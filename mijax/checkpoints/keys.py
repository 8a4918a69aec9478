"""The keys of a `config.json`: those that are read, those that have no effect here, and an error for any other."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mijax.model.config import Config
from mijax.model.fields import check_field
from mijax.rules import Rule, shown

REQUIRED = object()
"""The `default` of a `Key` that must be in the file."""


class Key(NamedTuple):
    """A key of `config.json` that gives one or several fields of `Config`.

    Attributes:
        fields: the fields of `Config`, all of which get the key's value.
        default: the value that transformers takes where the key is missing. Where it is `None`, the file may have
            `null` as well, and the fields are derived from the others.
        spellings: values that mijax calls by another name, and these names. Where `True` is among them, the key holds a
            boolean.
    """

    fields: tuple[str, ...]
    default: Any = REQUIRED
    spellings: Mapping[Any, Any] = {}


Harmless = Callable[[Any, Mapping[str, Any]], bool]
"""Of a key's value and the whole file: whether the key, at that value, has no effect on what the model computes."""

_DERIVED_SIZES = ("d_head", "n_kv_heads", "d_mlp")  # 0 makes `Config` derive them; in a file it is an error
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
"""The `spellings` of activation functions."""
BIASES = {True: "qkvo", False: ""}
"""The `spellings` of whether attention has all of its biases, or none."""


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
        if True in spellings and not isinstance(value, bool):
            raise ValueError(f"{key}={shown(value)} must be a boolean, given {type(value).__name__}")
        value = spellings.get(value, value) if isinstance(value, str | bool) else value
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
        The value of each key; `None` where no boolean says it.
    """
    entries = {}
    for key, (names, _, spellings) in keys.items():
        value = getattr(config, names[0])
        entries[key] = {v: k for k, v in spellings.items()}.get(value) if True in spellings else value
    return entries


def check_keys(
    c: Mapping[str, Any], family: str, read: Mapping[str, Rule | None], harmless: Mapping[str, Harmless]
) -> None:
    """Refuse a config with a key that is neither read nor harmless at its value.

    An unknown key whose value is `null` is accepted: it is taken to say that the model lacks the feature.

    Args:
        c: the contents of `config.json`.
        family: the `model_type`, for the error message.
        read: the keys that are read, and what they may hold; `None` where whoever reads the key says it.
        harmless: the other known keys, with the values at which they have no effect.

    Raises:
        ValueError: naming every such key, or the key that announces quantised weights.

    >>> check_keys({"n_layer": 2, "flash": None}, "gpt2", {"n_layer": None}, {})
    >>> check_keys({"is_decoder": False}, "gpt2", {}, {"is_decoder": only(True)})
    Traceback (most recent call last):
    ValueError: unsupported gpt2 config: is_decoder=False
    """
    for key in QUANTISATION:
        accepts = harmless.get(key, only(None))
        if c.get(key) is not None and not accepts(c[key], c):
            raise ValueError(f"quantised weights are not supported, and the file has {key}={shown(c[key])}")
    faults = []
    for key, value in c.items():
        rule = read.get(key)
        if rule is not None and not rule.accepts(value):
            faults.append(f"{key}={shown(value)} must be {rule.expected}")
        if key in read or key in QUANTISATION:
            continue
        if key not in harmless and value is not None:
            unknown = "(a key that mijax does not know, which may change what the model computes)"
            faults.append(f"{shown(key)[1:-1]}={shown(value)} {unknown}")
        elif key in harmless and not harmless[key](value, c):
            faults.append(f"{key}={shown(value)}")
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


def windows_of(
    kinds: Any, window: Any, n_layers: int, local: str = "sliding_attention", full: str = "full_attention"
) -> tuple[int, ...]:
    """The window of each layer, by the kind of its attention.

    Args:
        kinds: of each layer, `local` or `full`.
        window: the number of tokens that local attention sees.
        n_layers: the number of layers.
        local: the name of the kind that sees `window` tokens.
        full: the name of the kind that sees all.

    Returns:
        The windows, 0 for full attention.

    Raises:
        ValueError: for other kinds, another number of layers, or a window that is no positive integer.
    """
    if not isinstance(kinds, list) or len(kinds) != n_layers or not set(map(str, kinds)) <= {local, full}:
        raise ValueError(
            f"layer_types={shown(kinds)} must be one of {local!r} and {full!r} for each of {n_layers} layers"
        )
    if local in kinds and not (type(window) is int and window > 0):
        raise ValueError(f"the window {window!r} must be a positive integer")
    return tuple(window if kind == local else 0 for kind in kinds)


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
