"""The key `add_prefix_space` of tokenizer_config.json: whether a text is read as if a space stood before it.

tokenizer.json says so too. transformers 5 rebuilds the tokenizers of some classes from their vocabulary and obeys the key, where
a missing one has a value too; it reads the others from tokenizer.json alone. Here it is as there, but for tokenizers converted from
sentencepiece (Llama 2): the rebuilt ones split texts that begin with a space, or continue after a special token, in another
way than sentencepiece does. tokenizer.json has its way, and is followed; where the key contradicts it, it is an error.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from mijax.files import optional_object

_KEY = "add_prefix_space"
_BYTE_LEVEL = ("GPT2Tokenizer", "CodeGenTokenizer", "RobertaTokenizer")  # for which a missing key is false
_SENTENCEPIECE = "LlamaTokenizer"


def apply_prefix_space(folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Make a tokenizer obey `add_prefix_space` where transformers does.

    Args:
        folder: the model's folder, whose config.json names the class of the tokenizer where its settings do not.
        settings: the contents of tokenizer_config.json.
        backend: the tokenizer of tokenizer.json, which is changed in place.

    Raises:
        ValueError: for a value that contradicts tokenizer.json in a way that cannot be mended.
    """
    value = settings.get(_KEY)
    name, pre_tokenizer = _class_name(folder, settings), backend.pre_tokenizer
    stated = f"{_KEY} is {json.dumps(bool(value))}" + (f" (the default of {name})" if value is None else "")
    parts = list(_parts(pre_tokenizer))
    byte_levels = [part for part in parts if part["type"] == "ByteLevel"]
    if name in _BYTE_LEVEL:
        if isinstance(pre_tokenizer, ByteLevel):
            pre_tokenizer.add_prefix_space = bool(value)
            backend.pre_tokenizer = pre_tokenizer
        elif any(part[_KEY] != bool(value) for part in byte_levels):
            raise ValueError(_contradiction(folder, stated, not value))
    elif name == _SENTENCEPIECE and value is not None and not byte_levels:
        prepends = any(part["type"] == "Prepend" for part in _parts(backend.normalizer))
        prepends |= any(part["type"] == "Metaspace" and part["prepend_scheme"] != "never" for part in parts)
        if prepends != value:
            raise ValueError(_contradiction(folder, stated, prepends))


def _class_name(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The class of the tokenizer that transformers makes of the folder; `None` where it reads tokenizer.json alone."""
    config = optional_object(folder / "config.json")
    kind = config.get("model_type")
    if kind == "mistral":
        return None
    default = "GPT2Tokenizer" if kind == "gpt2" else ""
    return str(settings.get("tokenizer_class") or config.get("tokenizer_class") or default).removesuffix("Fast")


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of a normaliser or pre-tokeniser, or of those in a sequence, each with its `type`."""
    if component is None:
        return
    states = [json.loads(component.__getstate__())]
    while states:
        state = states.pop()
        states += state.get("normalizers", []) + state.get("pretokenizers", [])
        yield state


def _contradiction(folder: Path, stated: str, prepends: bool) -> str:
    """The message where the two files differ, of which tokenizer.json puts a space before texts, or none."""
    return (
        f"{folder / 'tokenizer_config.json'}: {stated}, but tokenizer.json puts {'a' if prepends else 'no'} space before"
        " texts: make the two files agree"
    )
