"""Chat templates: reading them from a model's folder, and rendering them as `transformers` does."""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mijax.checkpoints.json_files import read_object

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
    files = {DEFAULT: folder / _FILE} if (folder / _FILE).exists() else {}
    files |= {path.stem: path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    for path, entries in (
        (folder / "tokenizer_config.json", settings),
        (folder / _PROCESSOR_FILE, read_object(folder / _PROCESSOR_FILE)),
    ):
        if entries.get("chat_template") is not None:
            return _templates(entries["chat_template"], path)
    return {}


def _templates(value: Any, path: Path) -> dict[str, str]:
    """Templates by name, from one text, a mapping of names to texts, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(value, list) and all(isinstance(v, dict) and v.keys() >= {"name", "template"} for v in value):
        value = {entry["name"]: entry["template"] for entry in value}
    templates: dict[Any, Any] = value if isinstance(value, dict) else {DEFAULT: value}
    if not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise ValueError(f"{path}: chat_template must be a text or a list of names and texts, given {value!r}")
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
        ValueError: where there is no template, or none of that name.

    >>> choose({"default": "...", "tool_use": "..."}, None, tools=[])
    'tool_use'
    """
    key = name or (TOOL_USE if tools is not None and TOOL_USE in templates else DEFAULT)
    if not templates:
        raise ValueError("this tokenizer comes without a chat template")
    if key not in templates:
        raise ValueError(f"this tokenizer has no chat template {key!r}; template= is one of {sorted(templates)}")
    return key


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """Render a template, in a sandbox.

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
        ValueError: for an empty conversation, and for any error that the template raises.

    >>> render("{{ messages[0].content }}{{ end }}", [{"content": "hi"}], None, None, {"end": "</s>"})
    'hi</s>'
    """
    if len(messages) == 0:
        raise ValueError("expected a conversation of at least one message, given an empty one")
    values = {
        "messages": [_message(message) for message in _mappings("message", messages)],
        "tools": None if tools is None else _plain(_mappings("tool", tools), "tools"),
        "documents": None if documents is None else _plain(_mappings("document", documents), "documents"),
    } | {name: _plain(value, name) for name, value in variables.items()}
    try:
        return _compiled(template).render(values)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    except Exception as error:  # a template is a program and can raise any exception
        raise ValueError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from error


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


class _Generation(ext.Extension):
    """The tag `{% generation %}...{% endgeneration %}`, which marks the assistant's text; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: Any) -> nodes.Node:
        """The node of the tag, which calls `_content` with the tag's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` in templates, where the type itself would give access to its class attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # no `self`, as in jinja2: an attribute may have that name
        for name in dict(*args[1:], **kwargs):
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any):
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}, which begins with an underscore")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers: unlike that of jinja2, it does not escape HTML or sort keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment for which Hugging Face's templates are written (transformers.utils.chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
