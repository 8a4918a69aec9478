"""Chat templates: reading them from a model's folder, and rendering them as `transformers` does."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mijax.checkpoints.chat_process import ChatTemplateError, rendered
from mijax.files import optional_object, read_text
from mijax.rules import TEXT, mapping, shown

DEFAULT, TOOL_USE = "default", "tool_use"
_FILE, _FOLDER, _PROCESSOR_FILE = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
_REASONING = ("reasoning_content", "thinking", "reasoning")


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder.

    Template files (chat_template.jinja, additional_chat_templates/*.jinja) replace all templates of
    tokenizer_config.json. chat_template.json, in which older processors are saved, is read where neither has any.

    Args:
        folder: the model's folder.
        settings: the contents of its tokenizer_config.json.

    Returns:
        Each template's text, by its name; empty where the folder has no template.

    Raises:
        ValueError: where `chat_template` is neither a text nor a collection of named texts.
    """
    files = {DEFAULT: folder / _FILE} if os.path.lexists(folder / _FILE) else {}
    files |= {path.stem: path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    if files:
        return {name: read_text(path) for name, path in files.items()}
    for path, entries in (
        (folder / "tokenizer_config.json", settings),
        (folder / _PROCESSOR_FILE, optional_object(folder / _PROCESSOR_FILE)),
    ):
        if entries.get("chat_template") is not None:
            return _templates(entries["chat_template"], path)
    return {}


_NAMED = mapping(TEXT)


def _templates(value: Any, path: Path) -> dict[str, str]:
    """Templates by name, from one text, a mapping of names to texts, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(value, list) and all(_NAMED.accepts(v) and v.keys() >= {"name", "template"} for v in value):
        value = {entry["name"]: entry["template"] for entry in value}
    templates: dict[str, Any] = value if isinstance(value, dict) else {DEFAULT: value}
    if not all(isinstance(text, str) for text in templates.values()):
        raise ValueError(f"{path}: chat_template must be a text or a list of names and texts, given {shown(value)}")
    return templates


def write_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write templates as files, from which `read_templates` reads them.

    Args:
        folder: the model's folder, which exists.
        templates: each template's text, by its name.

    Raises:
        ValueError: for a name that cannot be the name of a file.
    """
    for name, text in templates.items():
        path = folder / _FILE if name == DEFAULT else folder / _FOLDER / f"{name}.jinja"
        if path.name != f"{name}.jinja" and name != DEFAULT:
            raise ValueError(f"the chat template's name {name!r} cannot be a file's name")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def choose(templates: Mapping[str, str], name: str | None, tools: Any) -> str:
    """The name of the template to render.

    Args:
        templates: each template's text, by its name.
        name: the template asked for. By default it is `tool_use` where there are tools and a template of that
            name, else `default`.
        tools: the tools of the conversation, or `None`.

    Returns:
        A key of `templates`.

    Raises:
        ChatTemplateError: where there is no template, or none of that name.

    >>> choose({"default": "...", "tool_use": "..."}, None, tools=[])
    'tool_use'
    """
    key = name or (TOOL_USE if tools is not None and TOOL_USE in templates else DEFAULT)
    if not templates:
        raise ChatTemplateError("this tokenizer comes without a chat template")
    if key not in templates:
        raise ChatTemplateError(f"this tokenizer has no chat template {key!r}; template= is one of {sorted(templates)}")
    return key


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """Render a template, in a sandbox, within bounds of time and memory (`mijax.checkpoints.chat_process`).

    Args:
        template: the text of the template, in jinja2.
        messages: the conversation.
        tools: JSON schemas of functions, or `None`.
        documents: documents to answer from, or `None`.
        variables: further variables of the template.

    Returns:
        The rendered text.

    Raises:
        TypeError: for messages, tools or documents that are not lists of mappings of plain values, and for
            variables that are not plain values.
        ValueError: for an empty conversation.
        ChatTemplateError: a `ValueError`, for a template that refuses the conversation, fails, or takes too much.

    >>> render("{{ messages[0].content }}{{ end }}", [{"content": "hi"}], None, None, {"end": "</s>"})
    'hi</s>'
    """
    if len(messages) == 0:
        raise ValueError("expected a conversation of at least one message, given an empty one")
    try:
        values = {name: _plain(value, name) for name, value in variables.items()} | {
            "messages": [_message(message) for message in _mappings("message", messages)],
            "tools": None if tools is None else _plain(_mappings("tool", tools), "tools"),
            "documents": None if documents is None else _plain(_mappings("document", documents), "documents"),
        }
    except RecursionError as error:
        raise ValueError("the conversation is nested too deeply for a template") from error
    return rendered(template, values)


def _mappings(kind: str, values: Any) -> list[Mapping[str, Any]]:
    """The values as a list, checked to be mappings."""
    if isinstance(values, (str, Mapping)):
        raise TypeError(f"expected a list of {kind}s, given {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"a {kind} must be a mapping (a tool: its JSON schema), given {type(value).__name__} at {i}"
            )
    return list(values)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without entries of `None`, and with its reasoning under both names that templates read."""
    entries = {key: value for key, value in _plain(message, "message").items() if value is not None}
    reasoning = next((entries[key] for key in _REASONING if key in entries), None)
    return entries if reasoning is None else {"thinking": reasoning, **entries, "reasoning_content": reasoning}


def _plain(value: Any, place: str) -> Any:
    """A copy made of JSON's types only.

    Templates are code of unknown origin, and could call the methods of any other object.
    """
    if value is None or isinstance(value, bool):
        return value
    bases: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
    for kind, base in bases.items():
        if isinstance(value, kind):
            return base(value)  # the base type: a subclass could bring methods of its own
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    if isinstance(value, Mapping):
        return {_plain(key, place): _plain(entry, f"{place}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    raise TypeError(f"{place} must be plain JSON (texts, numbers, lists, mappings), given {type(value).__name__}")
