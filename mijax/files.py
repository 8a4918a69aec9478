"""Files that are written completely or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
