"""The `tokenizers` library: its file, checked before the library reads it, and its failures as errors of ours.

The library is in Rust. What it cannot allocate, or frees too deeply, ends the process, and what it did not expect is a panic, which is no
`Exception` in Python. So lengths are bounded here first, far above those of any tokenizer that is in use.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
    vocabulary = content.get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, Mapping):
        texts: Sequence[Any] = list(vocabulary)
        yield from (
            f"model.vocab gives {shown(t)} {shown(i)}, expected {_ID.expected}"
            for t, i in vocabulary.items()
            if not _ID.accepts(i)
        )
    else:  # of a unigram model: pairs of a token and a score
        texts = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary]
    yield from _long("model.vocab", texts)
    added = content.get("added_tokens") or []
    yield from _long("added_tokens", [token.get("content") for token in added])
    yield from (
        f"added_tokens has the id {shown(t['id'])}, expected {_ID.expected}"
        for t in added
        if not _ID.accepts(t.get("id", 0))
    )


def _long(place: str, texts: Sequence[Any]) -> Iterator[str]:
    """Messages about tokens that are too long."""
    long = [text for text in texts if isinstance(text, str) and len(text) > LONGEST_TOKEN]
    yield from (
        f"{place} has a token of {len(t)} characters, {shown(t)}, expected at most {LONGEST_TOKEN}" for t in long
    )


def _steps(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the steps that change texts: their patterns, and how long they could make a text."""
    for place in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        growth = 1.0
        for step in _mappings(content.get(place)):
            pattern = step.get("pattern")
            patterns = [
                text
                for text in (pattern.values() if isinstance(pattern, Mapping) else [pattern])
                if isinstance(text, str)
            ]
            yield from (
                f"{place} has a pattern of {len(t)} characters, expected at most {_LONGEST_PATTERN}"
                for t in patterns
                if len(t) > _LONGEST_PATTERN
            )
            keys = ("content", "prepend") if pattern is not None else ("prepend",)
            written = [step[key] for key in keys if isinstance(step.get(key), str)]
            yield from (
                f"{place} writes {len(t)} characters in place of a pattern, expected at most {_LONGEST_CONTENT}"
                for t in written
                if len(t) > _LONGEST_CONTENT
            )
            if isinstance(pattern, Mapping) and isinstance(step.get("content"), str):
                replaced = (
                    len(pattern["String"]) if isinstance(pattern.get("String"), str) else 0
                )  # a regex may match nothing
                growth *= max(1.0, len(step["content"]) / replaced if replaced else 1.0 + len(step["content"]))
        if growth > _MOST_GROWTH:
            yield f"{place} can make a text {growth:.0f} times as long, expected at most {_MOST_GROWTH:.0f}"


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
