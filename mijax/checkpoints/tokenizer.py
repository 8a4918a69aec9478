"""From text to tokens and back, with the `tokenizers` library."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from mijax._types import ArrayLike
from mijax.arguments import check_flag
from mijax.checkpoints import special_tokens
from mijax.checkpoints.backend import failures, read_backend
from mijax.checkpoints.prefix_space import apply_prefix_space
from mijax.checkpoints.special_tokens import SpecialTokens, add_special_tokens, read_special_tokens, settings_of
from mijax.checkpoints.texts import check_text, prompts_of, text_list
from mijax.files import optional_object
from mijax.model.tokens import Tokens, integers
from mijax.rules import FLAG, INTEGER, NULL, TEXT, array, either

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""The files that `Tokenizer.from_folder` reads, beside config.json."""
SETTINGS = special_tokens.RULES | {
    "add_prefix_space": either(FLAG, NULL),
    "tokenizer_class": either(TEXT, NULL),
    "split_special_tokens": either(FLAG, NULL),
}
"""What the keys of tokenizer_config.json may hold that are read."""


class Tokenizer:
    """A model's tokenizer: `tokenizer(["some", "prompts"])` returns a padded batch of `Tokens`.

    Args:
        backend: the tokenizer of the `tokenizers` library, which is changed in place: its padding and truncation are
            switched off, and it gets those special tokens that it does not have.
        chat_template: the model's template in jinja2, or several by name.
        special_tokens: the tokens that the template may use by name (`bos_token`, `eos_token`, ...).
        extra_special_tokens: special tokens without a name.
        end_tokens: ids that end the model's answers, beside that of `eos_token`.

    Raises:
        TypeError: for special tokens that are not texts, and end tokens that are not integers.
        ValueError: for an end token that the tokenizer does not have.

    >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokens = Tokenizer(backend)(["a b", "b"])
    >>> tokens.ids.tolist(), tokens.mask.tolist()
    ([[0, 1], [1, 0]], [[True, True], [True, False]])
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        *,
        extra_special_tokens: Sequence[str] = (),
        end_tokens: Sequence[int] = (),
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        if isinstance(chat_template, Mapping):  # a single template is stored as its text, none as None
            chat_template = dict(chat_template) if chat_template.keys() - {"default"} else chat_template.get("default")
        self.chat_template = chat_template
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.extra_special_tokens: tuple[str, ...] = text_list(extra_special_tokens, "extra_special_tokens")
        text_list(list(self.special_tokens.values()), "special_tokens")
        add_special_tokens(SpecialTokens(self.special_tokens, self.extra_special_tokens), backend)
        self._end_tokens = tuple(self._known(list(end_tokens)))

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """Read a tokenizer from `tokenizer.json` and the other files of `FILES`.

        tokenizer.json says how texts are split, also where transformers would build a tokenizer of another kind from
        its vocabulary (`mijax.checkpoints.prefix_space`). A `UserWarning` names an end token that is no token of the
        tokenizer.

        Args:
            folder: the model's folder.

        Returns:
            The tokenizer; `None` where the folder has no `tokenizer.json`.

        Raises:
            ValueError: naming the file, where one cannot be read or has contents of another form than expected.
        """
        from mijax.checkpoints import chat

        path = folder / "tokenizer.json"
        if not os.path.lexists(path):
            return None
        backend = read_backend(path)
        settings = optional_object(folder / "tokenizer_config.json", SETTINGS)
        special = read_special_tokens(folder, settings, backend)
        apply_prefix_space(folder, settings, backend)
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
        return cls(
            backend,
            chat.read_templates(folder, settings),
            special.named,
            extra_special_tokens=special.extra,
            end_tokens=_read_end_tokens(folder, backend),
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer in Hugging Face's format, which `from_folder` reads.

        Args:
            folder: the model's folder, which exists.

        Raises:
            ValueError: for a chat template whose name cannot be the name of a file.
        """
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
        """The ids of the tokens that end the model's answers: that of `eos_token`, then the constructor's `end_tokens`."""
        name = self.special_tokens.get("eos_token")
        eos = None if name is None else self.backend.token_to_id(name)
        return tuple(dict.fromkeys((*(() if eos is None else (eos,)), *self._end_tokens)))

    def __call__(
        self, texts: Sequence[str] | str, *, padding: Literal["left", "right"] = "right", special: bool = True
    ) -> Tokens:
        """Encode prompts as one batch, padded to the longest.

        Args:
            texts: the prompts, or one prompt.
            padding: the side on which shorter prompts are padded.
            special: whether the tokenizer adds the special tokens that its model expects (a beginning-of-sequence
                token, say).

        Returns:
            The batch, `[batch, pos]`, with the mask of real tokens, the tokens as text and the model's end tokens.

        Raises:
            TypeError: for prompts that are not strings, or have no order (a set, a dict), and for `special` that is no
                boolean.
            ValueError: for no prompt, a prompt without tokens or with half of a surrogate pair, an unknown side of
                padding, and where the `tokenizers` library fails on a text.
        """
        if padding not in ("left", "right"):
            raise ValueError(f"padding must be 'left' or 'right', given {padding!r}")
        texts, special = prompts_of(texts), check_flag(special, "special")
        with failures("the tokenizer fails on these texts"):
            encoded = [self.backend.encode(text, add_special_tokens=special).ids for text in texts]
        if not encoded or not all(encoded):
            where = next((f" at {i}: {texts[i]!r}" for i, ids in enumerate(encoded) if not ids), "")
            raise ValueError(f"expected at least one prompt with at least one token, given {len(texts)} prompts{where}")
        largest = max(map(max, encoded))
        if largest >= 2**31:
            raise ValueError(f"the tokenizer gives the id {largest}, and ids are integers of 32 bits")
        width = max(map(len, encoded))
        ids, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), bool)
        for row, tokens in enumerate(encoded):
            columns = slice(width - len(tokens), None) if padding == "left" else slice(len(tokens))
            ids[row, columns], mask[row, columns] = tokens, True
        strings = [
            [self._string(i) if real else "" for i, real in zip(row, kept)]
            for row, kept in zip(ids.tolist(), mask.tolist())
        ]
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
        """Render conversations with the model's chat template and encode them as one batch.

        Only the special tokens that the template writes are added.

        Args:
            conversations: each is a list of messages, `{"role": "user", "content": "..."}`.
            prompt: as in `render`.
            tools: as in `render`.
            documents: as in `render`.
            template: as in `render`.
            padding: the side on which shorter conversations are padded.
            variables: as in `render`.

        Returns:
            The batch, `[batch, pos]`.

        Raises:
            TypeError: for one conversation in place of a list of conversations, and where `render` raises it.
            ValueError: where `render` raises it, and for no conversation.
        """
        if isinstance(conversations, (str, Mapping)) or any(isinstance(c, (str, Mapping)) for c in conversations):
            raise TypeError(
                "chat takes a list of conversations, each a list of messages; given one of messages or texts"
            )
        options = {"prompt": prompt, "tools": tools, "documents": documents, "template": template, **variables}
        return self([self.render(c, **options) for c in conversations], padding=padding, special=False)

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
        """Render a conversation as text, with the model's chat template.

        The text is that of `apply_chat_template` in `transformers`; `chat` encodes it.

        Args:
            conversation: a list of messages, `{"role": "user", "content": "..."}`.
            prompt: whether to end the text with the template's start of an answer.
            tools: JSON schemas of functions that the model may call.
            documents: texts to answer from.
            template: the name of a template, where there are several. By default it is `tool_use` where there are
                tools and a template of that name, else `default`.
            variables: further variables that the template reads (`enable_thinking=False`); they take precedence
                over special tokens of the same name.

        Returns:
            The text.

        Raises:
            ValueError: where there is no such template, the template refuses the conversation or fails on it, and
                for an empty conversation.
            TypeError: for messages, tools, documents or variables that are not plain values, for variables that
                `conversation` and `prompt` set, and for `prompt` that is no boolean.

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
        variables = self.special_tokens | variables | {"add_generation_prompt": check_flag(prompt, "prompt")}
        return chat.render(text, conversation, tools, documents, variables)

    def decode(self, ids: ArrayLike, mask: ArrayLike | None = None) -> str:
        """The text of token ids, special tokens included.

        Args:
            ids: the ids, of any shape; they are decoded in the order of the flattened array.
            mask: of the shape of `ids`; only ids where it is true are decoded.

        Returns:
            The text.

        Raises:
            TypeError: for ids that are not integers.
            ValueError: for an id without a token (`generate` gives -1 where the logits were not finite), and for a mask
                that is not boolean or not of the shape of `ids`.

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
        return self.backend.decode(self._known(ids), skip_special_tokens=False)

    def strings(self, ids: ArrayLike) -> list[str]:
        """Each token as text, for labels.

        Args:
            ids: token ids, of any shape.

        Returns:
            One text per id, in the order of the flattened array.

        Raises:
            TypeError: for ids that are not integers.
            ValueError: for an id without a token.

        >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> Tokenizer(backend).strings([0, 1, 0])
        ['a', 'b', 'a']
        """
        return [self._string(i) for i in self._known(ids)]

    def token_id(self, text: str) -> int:
        """The id of a text that is a single token.

        Args:
            text: the text, with its leading space where the token has one (`" Mary"`).

        Returns:
            The id.

        Raises:
            TypeError: for what is no text.
            ValueError: showing how the text is split, where it is not a single token.

        >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> Tokenizer(backend).token_id("b")
        1
        """
        check_text(text, "text")
        with failures(f"the tokenizer fails on {text!r}"):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"{text!r} is not a single token: it is split into {self.strings(ids)}")
        return ids[0]

    def _string(self, i: int) -> str:
        """The text of one token."""
        return self.backend.decode([i], skip_special_tokens=False)

    def _known(self, ids: ArrayLike) -> list[int]:
        """Ids as a flat list; an error for those without a token, which the backend would leave out of a text."""
        ids = np.asarray(ids)
        if integers(ids, "token ids").dtype == bool:
            raise TypeError("token ids must be integers, given booleans: a mask is the second argument of decode")
        flat = ids.reshape(-1).tolist()
        for i in dict.fromkeys(flat):
            if not _is_token(self.backend, i):
                hint = ": generate gives -1 where the logits were not finite" if i == -1 else ""
                raise ValueError(
                    f"id {i} is no token of the tokenizer, which has {self.backend.get_vocab_size()}{hint}"
                )
        return flat

    @property
    def _templates(self) -> Mapping[str, str]:
        """The chat templates, by name."""
        return {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template or {}


def _is_token(backend: tokenizers.Tokenizer, i: int) -> bool:
    """Whether an integer is the id of a token; the backend takes none outside 32 bits."""
    return 0 <= i < 2**32 and backend.id_to_token(i) is not None


def _read_end_tokens(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """The ids in `eos_token_id` of generation_config.json, or of config.json where the former has none.

    transformers writes 50256 into the config of every GPT-2, however small its vocabulary, and takes -1 for none.
    """
    for name in ("generation_config.json", "config.json"):
        value = optional_object(folder / name, {"eos_token_id": either(INTEGER, array(INTEGER), NULL)}).get(
            "eos_token_id"
        )
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            unknown = {i for i in ids if not _is_token(backend, i)}
            if unknown:
                warnings.warn(
                    f"{folder / name}: eos_token_id {next(i for i in ids if i in unknown)} is no token of the tokenizer: generate will not stop at it",
                    stacklevel=4,
                )
            return [i for i in ids if i not in unknown]
    return []
