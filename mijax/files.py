"""Files: written completely or not at all, and read only where they are what they should be."""

import contextlib
import json
import math
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mijax.rules import Rule, faults, shown

LARGEST_TEXT = 2**22
"""The size in bytes of the largest file that is read as a text where nothing else is said: 4 MiB."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path, which replaces `path` on exit from the context if nothing is raised.

    The temporary file has the name of `path` and stands in a temporary folder beside it, so that the replacement is
    atomic. Parent folders are created.

    Args:
        path: the file to be written.

    Yields:
        The temporary path, at which the context writes the file.

    Raises:
        OSError: where a folder cannot be created, or the context wrote no file.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "new" / "note.txt"
    >>> with atomic(target) as scratch:
    ...     _ = scratch.write_text("done")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('done', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        scratch = Path(folder) / path.name
        yield scratch
        scratch.replace(path)


def check_file(path: Path) -> None:
    """Check that a path leads to a regular file that can be read: opening a pipe would wait for ever.

    Args:
        path: the path.

    Raises:
        FileNotFoundError: where there is nothing.
        ValueError: where there is another thing than a file, or one that may not be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}, expected a file")
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        link = " but a link to nothing" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path.parent} holds no {path.name}{link}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Read a text file in UTF-8.

    Args:
        path: the file.
        largest: the size in bytes of the largest file that is read.

    Returns:
        Its contents.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read, is larger, or is not in UTF-8.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:  # of files that the system makes up, in /proc say
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > largest:
        raise ValueError(f"{path} has more than {largest} bytes, which is the most that is read of such a file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from error


def read_object(path: Path, rules: Mapping[str, Rule] | None = None, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: the file.
        rules: what the values of keys must be; other keys may have any value.
        largest: as in `read_text`. (What is made of the text may take twenty times its size.)

    Returns:
        The object.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not valid JSON, holds something else than an object or a key twice in one object, or a value
            breaks its rule: all such values are named.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.json"
    >>> _ = path.write_text('{"a": 1, "a": 2}')
    >>> read_object(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...a.json is not valid JSON: the key 'a' is there twice
    """
    text = read_text(path, largest)
    try:
        content = json.loads(text, object_pairs_hook=unique)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a surrogate pair is no text that could be written again
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # also of integers with thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, given {type(content).__name__}")
    wrong = faults(content, rules or {})
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    return content


def optional_object(path: Path, rules: Mapping[str, Rule] | None = None) -> dict[str, Any]:
    """As `read_object`, of a file that may be missing.

    Args:
        path: the file.
        rules: as in `read_object`.

    Returns:
        The object; an empty one where there is no such file. (A link to nothing is an error.)

    Raises:
        ValueError: as in `read_object`.
    """
    return read_object(path, rules) if os.path.lexists(path) else {}


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, whose keys must differ: readers disagree about which of two counts.

    Args:
        pairs: its keys and values; the function is the `object_pairs_hook` of `json.loads`.

    Returns:
        The object.

    Raises:
        ValueError: for a key that is there twice.
    """
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {shown(key)} is there twice")
        entries[key] = value
    return entries


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file that `numpy.savez` wrote, without making anything larger than the file.

    Args:
        path: the file.

    Returns:
        The arrays by name.

    Raises:
        ValueError: for a file that is damaged, compressed, or holds what are no plain arrays.
    """
    try:
        check_file(path)
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"{packed[0]} is compressed")
        with path.open("rb") as file, np.load(file) as saved:
            return {name: _array(saved, name, size) for name in saved.files}
    except Exception as error:  # whatever NumPy and zipfile make of a damaged file
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _array(saved: Any, name: str, size: int) -> np.ndarray:
    """One array, whose header must not speak of more than the file holds."""
    with saved.zip.open(name if name in saved.zip.namelist() else f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(member)
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"{name} would have the shape {shape}, in a file of {size} bytes")
    return saved[name]
