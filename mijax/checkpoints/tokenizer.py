"""Text to tokens and back, by the `tokenizers` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from mijax._types import ArrayLike
from mijax.model.tokens import Tokens


class Tokenizer:
    """A model's tokenizer: `tokenizer(["some", "prompts"])` gives a padded batch of `Tokens`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wrap `backend`, the library's own tokenizer."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`; `ValueError` where it cannot be read."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error

    def __call__(
        self, texts: Sequence[str] | str, *, padding: Literal["left", "right"] = "right", special: bool = True
    ) -> Tokens:
        """Encode prompts as one batch, padded to the longest.

        `special` lets the tokenizer add what its model expects (a beginning-of-sequence token, say).
        Raises `TypeError` for anything but strings, `ValueError` for no prompt or an empty one.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"prompts must be strings, given {type(text).__name__} at {i}")
        encoded = [self.backend.encode(text, add_special_tokens=special).ids for text in texts]
        if not encoded or not all(encoded):
            at = next((f" at {i}: {texts[i]!r}" for i, ids in enumerate(encoded) if not ids), "")
            raise ValueError(f"expected at least one prompt with at least one token, given {len(texts)} prompts{at}")
        width = max(map(len, encoded))
        ids, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), bool)
        for row, own in enumerate(encoded):
            place = slice(width - len(own), None) if padding == "left" else slice(len(own))
            ids[row, place], mask[row, place] = own, True
        strings = [[s if real else "" for s, real in zip(self.strings(i), m)] for i, m in zip(ids, mask)]
        return Tokens(ids, mask, strings)

    def decode(self, ids: ArrayLike) -> str:
        """The text of a list of token ids, special tokens included."""
        return self.backend.decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens=False)

    def strings(self, ids: ArrayLike) -> list[str]:
        """Each token as text, for labels."""
        return [self.decode([i]) for i in np.asarray(ids).reshape(-1).tolist()]

    def token_id(self, text: str) -> int:
        """The id of a text that is one token; `ValueError`, showing how it is split, where it is not."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"{text!r} is not a single token: it is split into {self.strings(ids)}")
        return ids[0]
