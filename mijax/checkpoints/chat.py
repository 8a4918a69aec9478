"""Chat templates: where a model's folder keeps them, and rendering them as `transformers` does."""

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
    """A folder's templates by name; `settings` is the content of its tokenizer_config.json.

    Files of their own replace all that the settings hold. Processors kept theirs in chat_template.json, which is read
    last.

    Raises `ValueError` where the settings hold something else than templates.
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
    """One template, a mapping of names, or a list of `{"name": ..., "template": ...}`."""
    if isinstance(value, list) and all(isinstance(v, dict) and v.keys() >= {"name", "template"} for v in value):
        value = {entry["name"]: entry["template"] for entry in value}
    templates: dict[Any, Any] = value if isinstance(value, dict) else {DEFAULT: value}
    if not all(isinstance(part, str) for pair in templates.items() for part in pair):
        raise ValueError(f"{path}: chat_template must be a text or a list of names and texts, given {value!r}")
    return templates


def write_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write what `read_templates` reads."""
    for name, text in templates.items():
        path = folder / _FILE if name == DEFAULT else folder / _FOLDER / f"{name}.jinja"
        if path.name != f"{name}.jinja" and name != DEFAULT:
            raise ValueError(f"the chat template's name {name!r} cannot be a file's name")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def choose(templates: Mapping[str, str], name: str | None, tools: Any) -> str:
    """The name of the template that is meant: the one named, else `tool_use` where tools are given, else `default`."""
    wanted = name or (TOOL_USE if tools is not None and TOOL_USE in templates else DEFAULT)
    if not templates:
        raise ValueError("this tokenizer comes without a chat template")
    if wanted not in templates:
        raise ValueError(f"this tokenizer has no chat template {wanted!r}; template= is one of {sorted(templates)}")
    return wanted


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """Fill in a template, in a sandbox.

    Raises `TypeError` for messages, tools or documents that are no mappings of plain values, `ValueError` for an empty
    conversation and for whatever goes wrong in the template.
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
    except Exception as error:  # a template is a program: it can fail in any way
        raise ValueError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from error


def _mappings(kind: str, values: Any) -> list[Mapping[str, Any]]:
    if isinstance(values, (str, Mapping)):
        raise TypeError(f"expected a list of {kind}s, given {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"a {kind} must be a mapping (a tool: its JSON schema), given {type(value).__name__} at {i}"
            )
    return list(values)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its empty entries; its reasoning under each name that templates read it by."""
    plain = {key: value for key, value in _plain(message, "message").items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any, place: str) -> Any:
    """A copy out of JSON's types: templates come from strangers, and other objects have methods for them to call."""
    if value is None or isinstance(value, bool):
        return value
    bases: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
    for kind, base in bases.items():
        if isinstance(value, kind):
            return base(value)  # without the methods of a subclass
    if isinstance(value, np.generic):
        return _plain(value.item(), place)
    if isinstance(value, Mapping):
        return {_plain(key, place): _plain(entry, f"{place}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    raise TypeError(f"{place} must be plain JSON (texts, numbers, lists, mappings), given {type(value).__name__}")


class _Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant says; rendering gives its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` in templates: the type itself would offer its class attributes to the template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # as jinja2's: `self` stays free as an attribute's name
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
    """JSON as it stands: jinja2's own filter escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that Hugging Face's templates are written for (transformers.utils.chat_template_utils)."""
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
