"""The process in which chat templates are rendered: started as a script by `chat_process`, with bounds on time and memory.

A template is a program of unknown origin. jinja2's sandbox keeps it from the rest of the process, but not from running for ever
or making a text of ten gigabytes; the system's limits on a process do. This file imports the standard library and jinja2 alone,
since it starts for itself.
"""

import datetime
import functools
import json
import marshal
import signal
import struct
import sys
from typing import IO, Any, NoReturn

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES, CHARACTERS = 1.0, 160 * 2**20, 500_000
"""What one rendering may take: seconds of processor time, bytes of memory, characters of its text beyond `GROWTH` for each
byte that it is given."""
GROWTH = 4
RENDERED, REFUSED, FAILED = b"r", b"x", b"f"
"""The first byte of an answer: the text follows, or the template's own refusal, or another failure."""


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


def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


_SHORT = 2**15  # characters of a template that is kept once it is compiled; longer ones would take each other's memory
_kept = functools.lru_cache(maxsize=16)(_compiled)


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


def _answer(template: str, values: dict[str, Any], most: int) -> tuple[bytes, str]:
    """The kind of the answer, and its text, of at most so many characters."""
    try:
        compiled = _kept(template) if len(template) <= _SHORT else _compiled(template)
        text = compiled.render(values)
    except MemoryError:
        return FAILED, f"it takes more than {BYTES >> 20} MiB of memory"
    except jinja2.TemplateError as error:
        return REFUSED, _message(error)
    except Exception as error:  # a template is a program and can raise any exception
        return FAILED, f"{type(error).__name__}: {_message(error)}"
    if len(text) > most:
        return FAILED, f"it gives {len(text)} characters, expected at most {most}"
    return RENDERED, text


def _message(error: Exception) -> str:
    """The message of an error, which a template can make long, or impossible to write."""
    try:
        text = str(error)
    except Exception:
        return "an error whose message cannot be written"
    return text if len(text) <= 2000 else f"{text[:2000]}... ({len(text)} characters)"


def _limited(template: str, values: dict[str, Any], most: int) -> tuple[bytes, bytes]:
    """As `_answer`, in UTF-8; where the system has timers, one ends this process after `SECONDS` of processor time."""
    _set_timer(SECONDS)
    try:
        kind, text = _answer(template, values, most)
        return kind, text.encode(errors="surrogatepass")
    except MemoryError:
        return FAILED, b"it takes too much memory"
    finally:
        _set_timer(0.0)


def _set_timer(seconds: float) -> None:
    """End this process after so much processor time (0: not), where the system has such timers."""
    if hasattr(signal, "setitimer"):  # Windows has none: `chat_process` ends the process by the clock
        signal.setitimer(signal.ITIMER_PROF, seconds)


def message(stream: IO[bytes]) -> bytes | None:
    """Read a length, and as many bytes.

    Args:
        stream: where they come from.

    Returns:
        The bytes; `None` where the stream has ended.
    """
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    body = stream.read(size)
    return body if len(body) == size else None


def send(stream: IO[bytes], body: bytes) -> None:
    """Write a length, and the bytes.

    Args:
        stream: where they go.
        body: the bytes.
    """
    stream.write(struct.pack("<Q", len(body)))
    stream.write(body)
    stream.flush()


def _serve() -> None:
    """Answer until the other side closes the stream."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, hard))
    except (ImportError, OSError, ValueError):  # not on every system
        pass
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := message(requests)) is not None:
        template, values = marshal.loads(request)
        kind, text = _limited(template, values, CHARACTERS + GROWTH * len(request))
        send(answers, kind + text)
        if kind == FAILED:  # with it goes the memory that it took: the next template has a process of its own
            return


if __name__ == "__main__":
    _serve()
