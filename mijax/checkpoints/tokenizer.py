"""Text to tokens and back, by the `tokenizers` library."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from mijax._types import ArrayLike
from mijax.checkpoints.json_files import read_object
from mijax.checkpoints.special_tokens import SpecialTokens, read_special_tokens, settings_of
from mijax.model.tokens import Tokens

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What `Tokenizer.from_folder` reads of a folder, beside config.json."""


class Tokenizer:
    """A model's tokenizer: `tokenizer(["some", "prompts"])` gives a padded batch of `Tokens`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        extra_special_tokens: Sequence[str] = (),
        end_tokens: Sequence[int] = (),
    ):
        """Wrap `backend`, the library's own tokenizer.

        `chat_template` is the model's own, in jinja2, or several by name. `special_tokens` are those that it may use by
        name (`bos_token`, `eos_token`, ...), `extra_special_tokens` those without one. `end_tokens` are the ids that
        end the model's answers, beside that of `eos_token`.
        """
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        if isinstance(chat_template, Mapping):  # one template is its text, none is None
            chat_template = dict(chat_template) if chat_template.keys() - {"default"} else chat_template.get("default")
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.extra_special_tokens = tuple(extra_special_tokens)
        self._end_tokens = tuple(end_tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """Read `tokenizer.json`, with what stands beside it; `None` where there is none.

        Raises `ValueError`, naming the file, where one cannot be read or holds something else than it should.
        """
        from mijax.checkpoints import chat

        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        settings = read_object(folder / "tokenizer_config.json")
        special = read_special_tokens(folder, settings, backend)
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
        return cls(
            backend,
            chat.read_templates(folder, settings),
            special.named,
            extra_special_tokens=special.extra,
            end_tokens=_read_end_tokens(folder),
        )

    def save(self, folder: Path) -> None:
        """Write what `from_folder` reads, as Hugging Face does."""
        from mijax.checkpoints import chat

        write = lambda name, content: (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        self.backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings |= settings_of(SpecialTokens(self.special_tokens, self.extra_special_tokens))
        if self.backend.encode_special_tokens:
            settings["split_special_tokens"] = True
        write("tokenizer_config.json", settings)
        chat.write_templates(folder, self._templates)
        if self._end_tokens:
            write("generation_config.json", {"eos_token_id": list(self._end_tokens)})

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that end what the model says: that of `eos_token`, then those of its configuration."""
        name = self.special_tokens.get("eos_token")
        eos = None if name is None else self.backend.token_to_id(name)
        return tuple(dict.fromkeys((*(() if eos is None else (eos,)), *self._end_tokens)))

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
        for row, tokens in enumerate(encoded):
            place = slice(width - len(tokens), None) if padding == "left" else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, True
        strings = [[s if real else "" for s, real in zip(self.strings(i), m)] for i, m in zip(ids, mask)]
        return Tokens(ids, mask, strings, self.end_tokens)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        *,
        prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        padding: Literal["left", "right"] = "right",
        **variables: Any,
    ) -> Tokens:
        """Render conversations by the model's own template and encode them as one batch.

        Each conversation is a list of `{"role": "user", "content": "..."}`; `padding` is as in `tokenizer(...)`, and
        the other arguments are as in `render`. Special tokens are those that the template writes, and no others.

        Raises what `render` raises, and `TypeError` for one conversation in place of a list of them.
        """
        if isinstance(conversations, (str, Mapping)) or any(isinstance(c, (str, Mapping)) for c in conversations):
            raise TypeError(
                "chat takes a list of conversations, each a list of messages; given one of messages or texts"
            )
        shared = {"prompt": prompt, "tools": tools, "documents": documents, "template": template, **variables}
        return self([self.render(c, **shared) for c in conversations], padding=padding, special=False)

    def render(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text that `chat` encodes, equal to that of `apply_chat_template` in `transformers`.

        `prompt` ends the text with the words that make the model answer. `tools` are JSON schemas of functions,
        `documents` texts to answer from. `template` names one of several templates: by default it is `tool_use` where
        tools are given and there is one, else `default`. `variables` are further ones that the template knows
        (`enable_thinking=False`); they go before special tokens.

        Raises `ValueError` where there is no such template, or it refuses the conversation or fails on it; `TypeError`
        for messages or tools that are no mappings of plain values.

        >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        >>> Tokenizer(backend, template, {"eos_token": "</s>"}).render([{"role": "user", "content": "hi"}])
        'user: hi</s>'
        """
        from mijax.checkpoints import chat

        reserved = variables.keys() & {"messages", "add_generation_prompt"}
        if reserved:
            raise TypeError(
                f"{', '.join(sorted(reserved))} cannot be given: render sets it from conversation and prompt"
            )
        text = self._templates[chat.choose(self._templates, template, tools)]
        variables = self.special_tokens | variables | {"add_generation_prompt": prompt}
        return chat.render(text, conversation, tools, documents, variables)

    def decode(self, ids: ArrayLike, mask: ArrayLike | None = None) -> str:
        """The text of a list of token ids, special tokens included; with a `mask`, of those where it is true.

        >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> Tokenizer(backend).decode([0, 1, 0], [False, True, True])
        'b a'
        """
        ids = np.asarray(ids)
        if mask is not None:
            mask = np.asarray(mask)
            if mask.shape != ids.shape or mask.dtype != bool:
                raise ValueError(f"mask must be boolean of ids' shape {ids.shape}, given {mask.dtype} of {mask.shape}")
            ids = ids[mask]
        return self.backend.decode(ids.reshape(-1).tolist(), skip_special_tokens=False)

    def strings(self, ids: ArrayLike) -> list[str]:
        """Each token as text, for labels."""
        return [self.decode([i]) for i in np.asarray(ids).reshape(-1).tolist()]

    def token_id(self, text: str) -> int:
        """The id of a text that is one token; `ValueError`, showing how it is split, where it is not."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"{text!r} is not a single token: it is split into {self.strings(ids)}")
        return ids[0]

    @property
    def _templates(self) -> Mapping[str, str]:
        return {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template or {}


def _read_end_tokens(folder: Path) -> list[int]:
    """`eos_token_id` of generation_config.json, or of config.json where that has none."""
    for name in ("generation_config.json", "config.json"):
        value = read_object(folder / name).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{folder / name}: eos_token_id must be an id or a list of ids, given {value!r}")
            return ids
    return []
