"""Text to tokens and back, by the `tokenizers` library."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from mijax._types import ArrayLike
from mijax.model.tokens import Tokens


class Tokenizer:
    """A model's tokenizer: `tokenizer(["some", "prompts"])` gives a padded batch of `Tokens`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wrap `backend`, the library's own tokenizer.

        `chat_template` is the model's own, in jinja2, and `special_tokens` the names that it may use
        (`bos_token`, `eos_token`).
        """
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """Read `tokenizer.json`, with what stands beside it; `None` where there is none.

        Raises `ValueError` where a file cannot be read.
        """
        path, settings, template = (
            folder / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        )
        if not path.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        try:
            told = json.loads(settings.read_text()) if settings.exists() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{settings} is not valid JSON: {error}") from error
        content = lambda token: token["content"] if isinstance(token, Mapping) else token
        special = {name: content(told[name]) for name in ("bos_token", "eos_token") if told.get(name) is not None}
        own = template.read_text() if template.exists() else told.get("chat_template")
        return cls(backend, own if isinstance(own, str) else None, special)

    def save(self, folder: Path) -> None:
        """Write what `from_folder` reads, as Hugging Face does."""
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template)

    def __call__(
        self, texts: Sequence[str] | str, *, padding: Literal["left", "right"] = "right", special: bool = True
    ) -> Tokens:
        """Encode prompts as one batch, padded to the longest.

        `special` lets the tokenizer add what its model expects (a beginning-of-sequence token, say).
        Raises `TypeError` for anything but strings, `ValueError` for no prompt or an empty one.
        """
        if padding not in ("left", "right"):
            raise ValueError(f"padding must be 'left' or 'right', given {padding!r}")
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

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        *,
        prompt: bool = True,
        padding: Literal["left", "right"] = "right",
    ) -> Tokens:
        """Render conversations by the model's own template and encode them as one batch.

        Each is a list of `{"role": "user", "content": "..."}`; `prompt` ends it with the words that make the model
        answer. Raises `ValueError` for a model without a template, or a conversation that the template refuses.
        """
        return self([self.render(c, prompt=prompt) for c in conversations], padding=padding, special=False)

    def render(self, conversation: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str:
        """The text that `chat` encodes."""
        import datetime

        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ValueError("this tokenizer comes without a chat template")

        def refuse(message: str):
            raise jinja2.TemplateError(message)

        # The settings that Hugging Face's templates are written for.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda f: datetime.datetime.now().strftime(f),
        }
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=list(conversation), add_generation_prompt=prompt, **self.special_tokens)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

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
