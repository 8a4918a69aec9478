"""Checks of the texts that users give to a tokenizer."""

from collections.abc import Iterable, Mapping, Set
from typing import Any


def prompts_of(texts: Any) -> list[str]:
    """Convert one text, or several, to a list.

    Args:
        texts: the text or texts.

    Returns:
        The texts in their order.

    Raises:
        TypeError: for anything else.
        ValueError: for a text that no encoding can write.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, Mapping | Set | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"prompts must be a text or a list of texts, given {type(texts).__name__}")
    texts = list(texts)
    for i, text in enumerate(texts):
        check_text(text, f"prompt {i}")
    return texts


def check_text(text: Any, label: str) -> None:
    """Check a text.

    Args:
        text: the text.
        label: what messages call it.

    Raises:
        TypeError: for what is no text.
        ValueError: for a text that no encoding can write.
    """
    if not isinstance(text, str):
        raise TypeError(f"{label} must be a string, given {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{label} has half of a surrogate pair at {error.start}: {text!r}") from error


def text_list(texts: Any, label: str) -> tuple[str, ...]:
    """Convert texts to a tuple.

    Args:
        texts: an iterable of texts.
        label: what messages call it.

    Returns:
        The texts.

    Raises:
        TypeError: for a single text, and for elements that are no texts.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{label} must be texts, given {texts!r}")
    return tuple(texts)
