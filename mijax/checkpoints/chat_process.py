"""Renders chat templates in a process of their own, which is started when it is needed first and ended where it takes too long."""

import atexit
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import chat_worker

LONGEST = 10.0
"""Seconds by the clock after which a rendering is ended: the bound where the system has no timer of processor time."""


class ChatTemplateError(ValueError):
    """A chat template that cannot be rendered: it refuses the conversation, fails on it, or takes too much time or memory."""


class _Worker:
    """The process; one for this process and its threads, started anew after it has been ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def answer(self, request: bytes) -> bytes:
        """The answer to a request; `ChatTemplateError` where the process ends instead."""
        with self.lock:
            process = self.process = self.process or _started()
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(LONGEST, process.kill)
            timer.start()
            try:
                chat_worker.send(process.stdin, request)
                answer = chat_worker.message(process.stdout)
            except OSError:  # the process has ended before it read all
                answer = None
            except BaseException:  # Ctrl-C: an answer would be left in the stream
                self.end()
                raise
            finally:
                timer.cancel()
            if answer is None:
                raise ChatTemplateError(f"the chat template fails on this conversation: {_ending(self.end())}")
            if answer.startswith(chat_worker.FAILED):
                self.end()
            return answer

    def end(self) -> int:
        """End the process; returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # what was not sent is lost with the process
                pass
        process.kill() if process.poll() is None else None
        return process.wait()

    def forget(self) -> None:
        """In a forked process: the worker is the parent's."""
        if self.process is not None:
            self.process.returncode = 0  # it is not ours to wait for
        self.__init__()


def _started() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", chat_worker.__file__]  # -P: the folder of the script is no place to import from
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _ending(status: int) -> str:
    """Why the process has ended."""
    if os.name != "nt" and status == -signal.SIGPROF:
        return f"it takes more than {chat_worker.SECONDS:g} s of processor time"
    if os.name != "nt" and status == -signal.SIGKILL:
        return f"it takes more than {LONGEST:g} s"
    return f"the process that renders it ended with status {status} (it needs jinja2, and bounds time and memory)"


_WORKER = _Worker()
atexit.register(_WORKER.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WORKER.forget)


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """Render a template, within the bounds of `chat_worker`: time, memory, and the length of the text.

    Args:
        template: the text of the template, in jinja2.
        values: its variables, of JSON's types and tuples.

    Returns:
        The text.

    Raises:
        ChatTemplateError: where the template refuses the conversation, fails, or takes too much.

    >>> rendered("{{ a }}", {"a": 1})
    '1'
    """
    try:
        request = marshal.dumps((template, dict(values)))
    except ValueError as error:  # "object too deeply nested to marshal"
        raise ValueError(f"the conversation cannot be given to a template: {error}") from error
    answer = _WORKER.answer(request)
    kind, text = answer[:1], answer[1:].decode(errors="surrogatepass")
    if kind == chat_worker.RENDERED:
        return text
    verb = "refuses" if kind == chat_worker.REFUSED else "fails on"
    raise ChatTemplateError(f"the chat template {verb} this conversation: {text}")
