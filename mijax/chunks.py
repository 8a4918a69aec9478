"""Many small jobs in memory-bounded chunks of equal size: with progress, saved as they finish, over many devices."""

import collections
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mijax.files import atomic
from mijax.memory import compiler_memory_freed
from mijax.programs.convert import Converted
from mijax.programs.key import text_of

T = TypeVar("T")
Arrays = dict[str, np.ndarray]
UNREADABLE = (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile)
"""What is raised by reading a file that is damaged."""


def full_rows() -> int:
    """How many rows of a matrix product fill the device; more in one chunk would only blur where jobs begin."""
    return 2048 if jax.default_backend() == "cpu" else 16384


def long_work() -> float:
    """Floating-point operations from which on a compilation (a few seconds) is worth a tenth less of them."""
    return 1e12 if jax.default_backend() == "cpu" else 1e14


class Store:
    """A folder of finished chunks: what the job is, its plan, and one file for each chunk.

    Every file has a checksum of what it holds and of its place (job, plan, number of the chunk); what does not fit is made
    again, with a warning. Opening a folder writes nothing; it raises `ValueError` where `identity`, which names the parts of the job by
    their fingerprints, is not that with which the folder was begun. `plan` is the one that it was begun with, `None` where it is new.
    """

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, str]):
        self.folder, self.identity = Path(folder), {**identity, **_environment()}
        self._about, self._arrays = self.folder / "job.json", self.folder / "plan.npz"
        self.plan: Arrays | None = None
        if self._about.exists():
            self.plan = _kept_plan(self._about, self._arrays, self.identity)
        elif self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder")
        elif self.folder.exists() and any(map(self._is_foreign, self.folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no job: give another folder")
        self._place = self._placed()

    def begin(self, plan: Arrays, labels: Mapping[str, Any]) -> Arrays:
        """The plan that the folder was begun with, whatever would be planned now; in a new one, `plan`, which is written."""
        if self.plan is None:
            self.plan = plan
            self._place = self._placed()
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(self._arrays) as scratch, scratch.open("wb") as file:
                np.savez(file, **plan)  # pyright: ignore[reportArgumentType]
            job = {"identity": self.identity, "plan": fingerprint(plan), **labels}
            with atomic(self._about) as scratch:  # last: a folder with it is complete
                scratch.write_text(json.dumps(job, indent=1, default=str))
        return self.plan

    def inside(self, name: str) -> "Store":
        """A folder within this one, for a part of the same job."""
        return Store(self.folder / name, {**self.identity, "part": name})

    def _placed(self) -> str:
        return fingerprint((self.identity, self.plan))

    def _is_foreign(self, path: Path) -> bool:
        return path.name != self._arrays.name and not path.name.startswith(".")

    def load(self, number: int) -> Arrays | None:
        """A finished chunk; `None` where there is none, or where it is damaged or another's."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as saved:
                arrays = dict(saved)
            if str(arrays.pop("checksum")) == self._checksum(number, arrays):
                return arrays
        except UNREADABLE as error:
            warnings.warn(f"{path} cannot be read ({error}): computed again", stacklevel=2)
            return None
        warnings.warn(
            f"{path} is damaged, or no chunk {number} of this job (its checksum differs): computed again", stacklevel=2
        )
        return None

    def save(self, number: int, arrays: Arrays) -> None:
        """Write a finished chunk, whole or not at all."""
        with atomic(self._path(number)) as scratch, scratch.open("wb") as file:
            np.savez(file, checksum=np.asarray(self._checksum(number, arrays)), **arrays)  # pyright: ignore[reportArgumentType]

    def _checksum(self, number: int, arrays: Arrays) -> str:
        return fingerprint((self._place, number, arrays))

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:06d}.npz"


def is_begun(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a job."""
    return Path(folder, "job.json").exists()


def _kept_plan(about: Path, arrays: Path, identity: Mapping[str, str]) -> Arrays | None:
    """The plan of a folder that was begun before; `None` where it cannot be read any more."""
    try:
        job = json.loads(about.read_text())
        begun_with, checksum = dict(job["identity"]), str(job["plan"])
    except (*UNREADABLE, TypeError) as error:
        warnings.warn(
            f"{about} cannot be read ({error}): it is written again, and chunks that do not fit it are computed again",
            stacklevel=4,
        )
        return None
    differ = [part for part in sorted({*begun_with, *identity}) if begun_with.get(part) != identity.get(part)]
    if differ:
        raise ValueError(
            f"{about.parent} was begun with another {', another '.join(differ)}: give another folder, or delete this one"
        )
    try:
        with arrays.open("rb") as file, np.load(file) as saved:
            plan = dict(saved)
        if fingerprint(plan) == checksum:
            return plan
    except UNREADABLE:
        pass
    warnings.warn(
        f"{arrays} is damaged: chunks are planned again, and those that do not fit are computed again", stacklevel=4
    )
    return None


def _environment() -> dict[str, str]:
    """What else decides the numbers of any job."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "version of mijax": _source(),
        "version of jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "precision": f"{jnp.result_type(float)}, {precision or 'default'}",
    }


@functools.cache
def _source() -> str:
    """mijax's version; in a checkout, where that says little, a checksum of its code."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return importlib.metadata.version("mijax")
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def progress_bar(jobs: int, label: str, unit: str, progress: bool) -> Any:
    """A bar, to be used by `with`, that appears where the work takes more than a second."""
    from tqdm import tqdm

    return tqdm(total=jobs, desc=label, unit=unit, delay=1.0, disable=not progress, leave=False)


def run_chunks(
    run: Callable[[Sequence[int]], Mapping[str, Any]],
    keep: Callable[[int, Arrays], int],
    chunks: int,
    bar: Any,
    *,
    width: int | None = None,
    store: Store | None = None,
) -> None:
    """Run all chunks and hand the results of each to `keep`, which says how many jobs they were: by so many `bar` moves on.

    `run` is given one chunk's number; or, with `width`, up to that many, and its results have an axis of them in front. Chunks that `store` holds are not run again.
    """
    with compiler_memory_freed():
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


def fingerprint(tree: Any) -> str:
    """A checksum of a pytree that is the same in every process: its structure, arrays by their numbers, converted functions by
    their programs and the arrays that these reach.

    Raises `TypeError` for a function that is not converted, or whose program no checksum can tell.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_converted)
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(treedef)).encode())
    for path, leaf in leaves:
        digest.update(jax.tree_util.keystr(path).encode())
        if _is_converted(leaf):
            digest.update(f"{leaf.program.digest()}{fingerprint((leaf.leaves, leaf.constants))}".encode())
        elif isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array = _numbers(leaf)
            digest.update(f"{leaf.dtype}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)  # (a buffer of bfloat16 is none to Python)
        else:
            digest.update(text_of(leaf).encode())
    return digest.hexdigest()


def repeatable(convert: Callable[[], T], save: Any) -> T:
    """What `convert()` makes of users' functions; where it is for a folder `save`, the same a second time.

    Raises `ValueError` where it is not: a function that draws numbers, or reads a clock, has no result to go on from.
    """
    result = convert()
    if save is not None and fingerprint(result) != fingerprint(convert()):
        names = {leaf.program.name for leaf in jax.tree.leaves(result, is_leaf=_is_converted) if _is_converted(leaf)}
        raise ValueError(
            f"{', '.join(sorted(names))}: what is computed differs from call to call (numbers are drawn, or a clock is read), so"
            f" that {save} could not be gone on with: draw before, or from a key of jax.random; or leave `save=` out"
        )
    return result


def _is_converted(leaf: Any) -> bool:
    return isinstance(leaf, Converted)


def _numbers(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf)
