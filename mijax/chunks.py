"""Many small jobs in memory-bounded chunks of equal size: with progress, saved as they finish, over many devices."""

import collections
import functools
import hashlib
import inspect
import json
import os
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from mijax.files import atomic
from mijax.memory import compiler_memory_freed

Found = dict[str, np.ndarray]


def full_rows() -> int:
    """How many rows of a matrix product fill the device; more in one chunk would only blur where jobs begin."""
    return 2048 if jax.default_backend() == "cpu" else 16384


def long_work() -> float:
    """Floating-point operations from which on a compilation (a few seconds) is worth a tenth less of them."""
    return 1e12 if jax.default_backend() == "cpu" else 1e14


class Store:
    """A folder of finished chunks: what the job is, its plan, and one file with a checksum for each chunk.

    A folder that was begun before gives back its `plan`, whatever would be planned now, and raises `ValueError` where
    `identity`, which names the parts of the job by their fingerprints, is not that with which it was begun.
    """

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, str], plan: Found, labels: Mapping[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        about, arrays = self.folder / "job.json", self.folder / "plan.npz"
        if about.exists():
            told = json.loads(about.read_text())["identity"]
            differ = [part for part in sorted({*told, *identity}) if told.get(part) != identity.get(part)]
            if differ:
                raise ValueError(
                    f"{folder} was begun with another {', another '.join(differ)}: give another folder, or delete this one"
                )
            with np.load(arrays) as saved:
                self.plan = dict(saved)
            return
        if any(path.name != arrays.name and not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no job: give another folder")
        self.plan = plan
        with atomic(arrays) as scratch, scratch.open("wb") as file:
            np.savez(file, **plan)  # pyright: ignore[reportArgumentType]
        with atomic(about) as scratch:  # last: a folder with it is complete
            scratch.write_text(json.dumps({"identity": dict(identity), **labels}, indent=1, default=str))

    def load(self, number: int) -> Found | None:
        """A finished chunk; `None` where there is none, or where it is damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as saved:
                found = dict(saved)
            if str(found.pop("checksum")) == fingerprint(found):
                return found
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(f"{path} cannot be read ({error}): computed again", stacklevel=2)
            return None
        warnings.warn(f"{path} is damaged (its checksum differs): computed again", stacklevel=2)
        return None

    def save(self, number: int, found: Found) -> None:
        """Write a finished chunk, whole or not at all."""
        with atomic(self._path(number)) as scratch, scratch.open("wb") as file:
            np.savez(file, checksum=np.asarray(fingerprint(found)), **found)  # pyright: ignore[reportArgumentType]

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:06d}.npz"


def run_chunks(
    run: Callable[[Sequence[int]], Mapping[str, Any]],
    keep: Callable[[int, Found], int],
    chunks: int,
    jobs: int,
    *,
    label: str,
    progress: bool,
    unit: str = "cell",
    width: int | None = None,
    store: Store | None = None,
) -> None:
    """Run all chunks and hand the results of each to `keep`, which says how many jobs they were.

    `run` is given one chunk's number; or, with `width`, up to that many, and its results have an axis of them in front. Chunks that `store` holds are not run again.
    """
    from tqdm import tqdm

    # The bar appears only where the work takes more than a second.
    bar = tqdm(total=jobs, desc=label, unit=unit, delay=1.0, disable=not progress, leave=False)
    with bar, compiler_memory_freed():
        left = []
        for number in range(chunks):
            held = store.load(number) if store else None
            if held is None:
                left.append(number)
            else:
                bar.update(keep(number, held))
        groups = [left[i : i + (width or 1)] for i in range(0, len(left), width or 1)]
        for group, found in _in_flight(run, groups):
            arrays = {name: np.asarray(value) for name, value in found.items()}
            for i, number in enumerate(group):
                own = arrays if width is None else {name: value[i] for name, value in arrays.items()}
                if store:
                    store.save(number, own)
                bar.update(keep(number, own))


def _in_flight(run: Callable, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Mapping[str, Any]]]:
    """Results in order, the next ones dispatched before the last are waited for."""
    waiting: collections.deque = collections.deque()
    for group in groups:
        waiting.append((group, run(group)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def fingerprint(tree: Any, _seen: frozenset[int] = frozenset()) -> str:
    """A checksum of all arrays in a pytree, its structure, and the functions in it: their code, and what it reaches.

    That is what they close over, defaults, and globals that they name: data by their values, functions of the same package by
    their own code, others by their names.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    digest = hashlib.sha256(_without_addresses(str(treedef)))
    for path, leaf in leaves:
        digest.update(jax.tree_util.keystr(path).encode())
        if eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.data if array.size else b"")
        else:
            digest.update(_told(leaf, _seen))
    return digest.hexdigest()


def _told(leaf: Any, seen: frozenset[int]) -> bytes:
    if isinstance(leaf, functools.partial):
        return fingerprint((leaf.func, leaf.args, leaf.keywords), seen).encode()
    function = inspect.unwrap(leaf) if callable(leaf) else leaf
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return _without_addresses(repr(leaf))
    seen = seen | {id(code)}
    reached = [getattr(function, "__self__", None), function.__defaults__, function.__kwdefaults__]
    reached += [cell.cell_contents for cell in function.__closure__ or ()]
    inside = [function.__qualname__, *(fingerprint(own, seen) for own in reached)]
    names = sorted(_names(code) & function.__globals__.keys())
    inside += [f"{name}={_of_global(function.__globals__[name], function.__module__, seen)}" for name in names]
    return _instructions(code) + "".join(inside).encode()


def _of_global(value: Any, module: str, seen: frozenset[int]) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type) or (callable(value) and not _same_package(value, module)):
        return (
            f"{value.__module__}.{value.__qualname__}"
            if hasattr(value, "__qualname__")
            else _without_addresses(repr(value)).decode()
        )
    return fingerprint(value, seen)


def _same_package(function: Any, module: str) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == str(module).partition(".")[0]


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _instructions(code: types.CodeType) -> bytes:
    consts = [
        _instructions(c) if isinstance(c, types.CodeType) else _without_addresses(repr(c)) for c in code.co_consts
    ]
    return b"".join([code.co_code, repr(code.co_names).encode(), *consts])


def _without_addresses(text: str) -> bytes:
    return re.sub(r" at 0x[0-9a-f]+", "", text).encode()
