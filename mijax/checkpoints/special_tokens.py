"""Special tokens (beginning, end, padding, ...) of a Hugging Face folder, read as `transformers` reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from mijax.checkpoints.backend import LONGEST_TOKEN, failures
from mijax.files import optional_object
from mijax.rules import ANYTHING, FLAG, NATURAL, NULL, Rule, array, either, mapping, shown

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The standard names of special tokens."""

_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_MODEL_SPECIFIC = "model_specific_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_is_text = lambda x: isinstance(x, str) and 0 < len(x) <= LONGEST_TOKEN
_has_flags = lambda x: all(FLAG.accepts(x[flag]) for flag in _FLAGS if flag in x)
_TOKEN = Rule(
    f"a token (a text of up to {LONGEST_TOKEN} characters, or an object with it as its content and true or false as its flags)",
    lambda x: _is_text(x.get("content")) and _has_flags(x) if isinstance(x, Mapping) else _is_text(x),
)
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What chat templates call the conversation, which no special token may be called."""
RULES = dict.fromkeys(NAMES, either(_TOKEN, NULL)) | {
    _EXTRA: either(array(_TOKEN), mapping(_TOKEN), NULL),
    _OLD_EXTRA: either(array(_TOKEN), mapping(ANYTHING), NULL),
    _MODEL_SPECIFIC: either(mapping(_TOKEN), NULL),
    "added_tokens_decoder": mapping(_TOKEN),
}
"""What keys about special tokens may hold, in tokenizer_config.json and special_tokens_map.json."""


class SpecialTokens(NamedTuple):
    """The special tokens of a tokenizer.

    Attributes:
        named: the text of each token that has a name: a standard name (`bos_token`, ...) or one of this model
            (`image_token`, ...).
        extra: the texts of the tokens without a name.
    """

    named: dict[str, str]
    extra: tuple[str, ...]


def read_special_tokens(folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> SpecialTokens:
    """Read a folder's special tokens, and add those to `backend` that it does not know as special.

    special_tokens_map.json and added_tokens.json are read only where tokenizer_config.json has no
    `added_tokens_decoder`; then special_tokens_map.json takes precedence over tokenizer_config.json. Where no file
    names a padding token, it is the one with which tokenizer.json pads.

    Args:
        folder: the model's folder.
        settings: the contents of tokenizer_config.json.
        backend: the tokenizer of tokenizer.json, which is changed in place.

    Returns:
        The special tokens.

    Raises:
        ValueError: naming the file and the entry, for a token that is neither a text nor an object with one.
    """
    main, overrides = _Entries.read(settings, folder / "tokenizer_config.json"), _Entries({}, {}, [], [])
    if "added_tokens_decoder" not in settings:
        path = folder / "special_tokens_map.json"
        overrides = _Entries.read(optional_object(path, RULES), path)
    padding = {} if backend.padding is None else {"pad_token": AddedToken(backend.padding["pad_token"], special=True)}
    merged = padding | main.standard | overrides.standard | overrides.specific | main.specific
    named = {name: token for name, token in merged.items() if token is not None}
    extra = [*(main.extra or main.old_extra), *overrides.extra] or overrides.old_extra
    special = [*named.values(), *extra]
    added = _added_tokens(folder, settings, backend, {token.content for token in special})
    with failures(f"{folder / 'tokenizer.json'} cannot take the special tokens of the files beside it"):
        _add(backend, added, special, {token.content for token in named.values()})
    texts = dict.fromkeys(token.content for token in extra)
    return SpecialTokens({name: token.content for name, token in named.items()}, tuple(texts))


def add_special_tokens(tokens: SpecialTokens, backend: tokenizers.Tokenizer) -> None:
    """Add to `backend` those special tokens that it does not cut out of a text yet.

    Args:
        tokens: the special tokens.
        backend: the tokenizer, which is changed in place.
    """
    texts = (*tokens.named.values(), *tokens.extra)
    with failures("the tokenizer cannot take the special tokens"):
        _add(backend, [], [AddedToken(text, special=True) for text in texts], set(tokens.named.values()))


def settings_of(tokens: SpecialTokens) -> dict[str, Any]:
    """The entries of tokenizer_config.json from which `read_special_tokens` reads these tokens.

    Args:
        tokens: the special tokens.

    Returns:
        The entries; lists and mappings that would be empty are left out.

    >>> settings_of(SpecialTokens({"eos_token": "</s>", "image_token": "<image>"}, ()))
    {'eos_token': '</s>', 'extra_special_tokens': {'image_token': '<image>'}}
    """
    standard = {name: text for name, text in tokens.named.items() if name in NAMES}
    specific = {name: text for name, text in tokens.named.items() if name not in NAMES}
    return standard | {k: v for k, v in {_EXTRA: specific, _OLD_EXTRA: list(tokens.extra)}.items() if v}


class _Entries(NamedTuple):
    """The special tokens of one file.

    Attributes:
        standard: those with a name in `NAMES`; `None` (`null` in the file) removes the token.
        specific: those with a name of this model.
        extra: those without a name.
        old_extra: those without a name under the key of earlier versions of transformers.
    """

    standard: dict[str, AddedToken | None]
    specific: dict[str, AddedToken]
    extra: list[AddedToken]
    old_extra: list[AddedToken]

    @classmethod
    def read(cls, entries: Mapping[str, Any], path: Path) -> "_Entries":
        """From the contents of the file at `path`."""
        names = [key for key in entries if key.endswith("_token") and isinstance(entries[key], (str, dict))]
        specific: Mapping[str, Any] = {key: entries[key] for key in names if key not in NAMES}
        if isinstance(entries.get(_EXTRA), dict):
            specific |= entries[_EXTRA]
        if not specific and isinstance(entries.get(_MODEL_SPECIFIC), dict):
            specific = entries[_MODEL_SPECIFIC]
        reserved = sorted(RESERVED & specific.keys())
        if reserved:
            raise ValueError(
                f"{path}: a special token is called {reserved[0]}, as chat templates call the conversation"
            )
        lists = [[] if isinstance(entries.get(key), dict) else entries.get(key) or [] for key in (_EXTRA, _OLD_EXTRA)]
        token = lambda key, value: None if value is None else _token(value, key, path)
        return cls(
            {key: token(key, entries[key]) for key in NAMES if key in entries},
            {key: _token(value, key, path) for key, value in specific.items()},
            *([_token(value, _EXTRA, path) for value in tokens] for tokens in lists),
        )


def _token(value: Any, key: str, path: Path) -> AddedToken:
    """A token from its entry: a text, or an object with `content` and flags."""
    if not _TOKEN.accepts(value):
        raise ValueError(f"{path}: {key} must be {_TOKEN.expected}, given {shown(value)}")
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(value["content"], special=True, **{k: value[k] for k in _FLAGS if k in value})


def _added_tokens(
    folder: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer, special: set[str]
) -> list[AddedToken]:
    """The added tokens that other files than tokenizer.json list, in the order of their ids."""
    path = folder / "tokenizer_config.json"
    if "added_tokens_decoder" in settings:
        try:
            tokens = {
                int(i): AddedToken(**{k: v for k, v in token.items() if k != "__type"})
                for i, token in settings["added_tokens_decoder"].items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: added_tokens_decoder must map ids to tokens: {error}") from error
    else:
        present, listed = backend.get_added_tokens_decoder(), optional_object(folder / "added_tokens.json")
        if not mapping(NATURAL).accepts(listed) or not all(map(_is_text, listed)):
            raise ValueError(
                f"{folder / 'added_tokens.json'} must map texts of up to {LONGEST_TOKEN} characters to ids, given {shown(listed)}"
            )
        texts = {i: text for text, i in listed.items() if i not in present}
        tokens = {i: AddedToken(t, normalized=t not in special, special=t in special) for i, t in texts.items()}
    return [tokens[i] for i in sorted(tokens)]


def _add(
    backend: tokenizers.Tokenizer, added: Sequence[AddedToken], special: Sequence[AddedToken], named: set[str]
) -> None:
    """Add tokens to the backend, which then finds them in a text before it splits the text in any other way."""
    present = list(backend.get_added_tokens_decoder().values())
    known = set(map(repr, present))
    new = [token for token in added if repr(token) not in known]
    texts = {token.content for token in (*present, *new)}
    for token in special:
        if token.content not in texts:
            new.append(token)
            texts.add(token.content)
    for token in new:
        token.special = token.special or token.content in named
    backend.add_tokens(new)
