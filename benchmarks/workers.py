"""Processes of their own, which measure a tool each: started, asked by lines, and ended."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "peers"


class Worker:
    """A worker process, ready: `hello` is what it said of itself, with the wall seconds until then."""

    def __init__(self, command: Sequence[str], folder: Path):
        python, script, *options = command
        self.log = folder / f"{Path(script).stem}-{time.monotonic_ns()}.log"
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        begin = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, script, str(folder), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, cwd=folder, env=environment,
            )  # fmt: skip
        self.hello = self._answer()
        self.hello["wall"] = time.perf_counter() - begin
        self.name = f"{self.hello['peer']} {self.hello['version']}"

    def ask(self, request: str) -> dict[str, Any]:
        """Its answer to a request; `RuntimeError` where that is none."""
        assert self.process.stdin is not None
        print(request, file=self.process.stdin, flush=True)
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(f"{self.name} on {request}:\n{answer['error']}")
        return answer

    def close(self) -> None:
        """End it: at the end of its input or, where it is still at work, by force."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended ({self.process.wait()}):\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[Worker]:
    """A worker, ended at the end."""
    worker = Worker(command, folder)
    try:
        yield worker
    finally:
        worker.close()
