"""The `tokenizers` library: its file, checked before the library reads it, and its failures as errors of ours.

The library is in Rust. What it cannot allocate, or frees too deeply, ends the process, and what it did not expect is a panic, which is no
`Exception` in Python. So lengths are bounded here first, far above those of any tokenizer that is in use.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mijax.files import read_object
from mijax.rules import ANYTHING, NULL, Rule, array, either, mapping, shown

LONGEST_TOKEN = 1024
"""The number of characters of the longest token."""
_LARGEST_FILE = 2**26  # bytes: twice that of Gemma's 256,000 tokens
_LONGEST_PATTERN, _LONGEST_CONTENT, _MOST_GROWTH = 4096, 64, 64.0

_ID = Rule("an id (an integer of 32 bits)", lambda x: type(x) is int and 0 <= x < 2**31)
_STEP = either(mapping(ANYTHING), NULL)
_RULES = {
    "model": mapping(ANYTHING), "added_tokens": either(array(mapping(ANYTHING)), NULL), "normalizer": _STEP, "pre_tokenizer": _STEP,
    "post_processor": _STEP, "decoder": _STEP,
}  # fmt: skip


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Args:
        path: the file.

    Returns:
        The tokenizer of the library.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the file, where it is not valid JSON, has an entry beyond the bounds of this module, or is refused by
            the library.
    """
    content = read_object(path, _RULES, largest=_LARGEST_FILE)
    wrong = [*_vocabulary(content), *_steps(content)]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong[:8])}")
    with failures(f"{path} is not a readable tokenizer.json"):
        return tokenizers.Tokenizer.from_file(str(path))


@contextlib.contextmanager
def failures(message: str) -> Iterator[None]:
    """Turn whatever the library raises in the block into a `ValueError`: bare exceptions, and panics.

    Args:
        message: the start of the error's message.

    Raises:
        ValueError: where the block fails.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{message}: {error}") from error


def _vocabulary(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tokens: their lengths and ids."""
    vocabulary, added = content.get("model", {}).get("vocab"), content.get("added_tokens") or []
    ids: list[tuple[Any, Any]] = [(token.get("content"), token.get("id")) for token in added]
    if isinstance(vocabulary, Mapping):
        ids += vocabulary.items()
        texts = list(vocabulary)
    else:  # of a unigram model: pairs of a token and a score
        pairs = vocabulary if isinstance(vocabulary, list) else []  # the library says what is wrong with others
        texts = [pair[0] for pair in pairs if isinstance(pair, list) and pair]
    for text, i in ids:
        if not _ID.accepts(i):
            yield f"the token {shown(text)} has the id {shown(i)}, expected {_ID.expected}"
    for text in [*texts, *(token.get("content") for token in added)]:
        if isinstance(text, str) and len(text) > LONGEST_TOKEN:
            yield f"a token has {len(text)} characters, {shown(text)}, expected at most {LONGEST_TOKEN}"


def _steps(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the steps that change texts: their patterns, and how long they could make a text."""
    for place in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1.0
        for step in _mappings(content.get(place)):
            pattern = step.get("pattern")
            replaced = pattern.values() if isinstance(pattern, Mapping) else [pattern]
            written = [step.get("prepend"), step.get("content") if pattern is not None else None]
            for texts, most, noun in (
                (replaced, _LONGEST_PATTERN, "pattern"),
                (written, _LONGEST_CONTENT, "replacement"),
            ):
                for text in texts:
                    if isinstance(text, str) and len(text) > most:
                        yield f"{place} has a {noun} of {len(text)} characters, expected at most {most}"
            if isinstance(pattern, Mapping) and isinstance(step.get("content"), str):
                growth *= _growth(pattern, step["content"])
        if growth > _MOST_GROWTH:
            yield f"{place} can make a text {growth:.0f} times as long, expected at most {_MOST_GROWTH:.0f}"


def _growth(pattern: Mapping[str, Any], content: str) -> float:
    """How many times as long a text can become by a replacement; a regular expression may match between all characters."""
    text = pattern.get("String")
    return max(1.0, len(content) / len(text)) if isinstance(text, str) and text else 1.0 + len(content)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """All objects in a value of JSON."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
