"""Many small jobs in memory-bounded chunks of equal size: with progress, saved as they finish, on many devices."""

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mijax.files import atomic, read_arrays, read_object
from mijax.memory import compiler_memory_freed
from mijax.programs.convert import Converted
from mijax.programs.key import LIBRARIES, text_of
from mijax.rules import TEXT, mapping

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
Arrays = dict[str, np.ndarray]


def full_rows() -> int:
    """Give the number of rows of a matrix product that keep the device busy.

    A larger chunk would not run faster, and would mix jobs that could begin at different layers.

    Returns:
        The number of rows: 2048 on a CPU, 16384 on other devices.
    """
    return 2048 if jax.default_backend() == "cpu" else 16384


def long_work() -> float:
    """Give the number of operations above which saving a tenth of them is worth a compilation (a few seconds).

    Returns:
        The number of floating-point operations: 1e12 on a CPU, 1e14 on other devices.
    """
    return 1e12 if jax.default_backend() == "cpu" else 1e14


def small_work() -> float:
    """Give the number of operations up to which the time of compiling a program is all that matters.

    They take a millisecond in a slow program.

    Returns:
        The number of floating-point operations: 1e7 on a CPU, 0 on other devices.
    """
    return 1e7 if jax.default_backend() == "cpu" else 0.0


class Store:
    """A folder of finished chunks: the identity of the job, its plan, and one file for each chunk.

    Every file has a checksum of its arrays and of its place (job, plan, number of the chunk). A chunk whose
    checksum differs is computed again, with a warning. Opening a folder writes nothing.

    Args:
        folder: the folder, new, empty, or that of the same job.
        identity: the parts of the job by name, as fingerprints.

    Attributes:
        plan: the plan with which the folder was begun; `None` where it is new.

    Raises:
        ValueError: where the folder was begun with another `identity` (or version of mijax or JAX, device or
            precision), is a file, or holds other files.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, str]):
        self.folder: Path = Path(folder)
        self.identity: dict[str, str] = {**identity, **_environment()}
        self._about, self._arrays = self.folder / "job.json", self.folder / "plan.npz"
        self.plan: Arrays | None = None
        in_the_way = [path for path in (self._about, self._arrays, *self.folder.glob("chunk_*.npz")) if path.is_dir()]
        if in_the_way:
            raise ValueError(
                f"{in_the_way[0]} is a folder, expected a file of this job: delete it, or give another folder"
            )
        if os.path.lexists(self._about):
            self.plan = _kept_plan(self._about, self._arrays, self.identity)
        elif self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder")
        elif self.folder.exists() and any(map(self._is_foreign, self.folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no job: give another folder")
        self._place = self._placed()

    def begin(self, plan: Arrays, labels: Mapping[str, Any]) -> Arrays:
        """Begin the folder, if it is new, by writing its plan.

        Args:
            plan: the plan of a new folder.
            labels: further entries of `job.json`, for readers.

        Returns:
            The plan with which the folder was begun, which may differ from `plan` where it is not new.
        """
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
        """A folder within this one, for a part of the same job.

        Args:
            name: the name of the part and of its folder.
        """
        return Store(self.folder / name, {**self.identity, "part": name})

    def _placed(self) -> str:
        return fingerprint((self.identity, self.plan))

    def _is_foreign(self, path: Path) -> bool:
        return path.name != self._arrays.name and not path.name.startswith(".")

    def load(self, number: int) -> Arrays | None:
        """The arrays of a finished chunk.

        Args:
            number: the number of the chunk.

        Returns:
            The arrays by name; `None` where there is no file, and, with a warning, where it is damaged or belongs
            to another job, plan or chunk.
        """
        path = self._path(number)
        if not os.path.lexists(path):
            return None
        try:
            arrays = read_arrays(path)
        except ValueError as error:
            warnings.warn(f"{error}: computed again", stacklevel=2)
            return None
        if str(arrays.pop("checksum", "")) == self._checksum(number, arrays):
            return arrays
        warnings.warn(
            f"{path} is damaged, or no chunk {number} of this job (its checksum differs): computed again", stacklevel=2
        )
        return None

    def save(self, number: int, arrays: Arrays) -> None:
        """Write a finished chunk, completely or not at all.

        Args:
            number: the number of the chunk.
            arrays: its results by name.
        """
        with atomic(self._path(number)) as scratch, scratch.open("wb") as file:
            np.savez(file, checksum=np.asarray(self._checksum(number, arrays)), **arrays)  # pyright: ignore[reportArgumentType]

    def _checksum(self, number: int, arrays: Arrays) -> str:
        return fingerprint((self._place, number, arrays))

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:06d}.npz"


def is_begun(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a job.

    Args:
        folder: any path.

    Returns:
        Whether `job.json`, the last file that `Store.begin` writes, is in it.
    """
    return Path(folder, "job.json").exists()


def _kept_plan(about: Path, arrays: Path, identity: Mapping[str, str]) -> Arrays | None:
    """The plan of a folder that was begun before; `None`, with a warning, where its files cannot be read."""
    try:
        job = read_object(about, _JOB, largest=2**26)
        begun_with, checksum = job["identity"], job["plan"]
    except (ValueError, KeyError) as error:
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
    with contextlib.suppress(ValueError):
        plan = read_arrays(arrays)
        if fingerprint(plan) == checksum:
            return plan
    warnings.warn(
        f"{arrays} is damaged: chunks are planned again, and those that do not fit are computed again", stacklevel=4
    )
    return None


_JOB = {"identity": mapping(TEXT), "plan": TEXT}


def _environment() -> dict[str, str]:
    """What the numbers of any job depend on: versions of mijax and of libraries known by name, device, precision."""
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "version of mijax": _source(),
        **{f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES if name != "mijax"},
        "device": jax.devices()[0].device_kind,
        "precision": f"{jnp.result_type(float)}, {precision or 'default'}",
    }


@functools.cache
def _source() -> str:
    """The version of mijax; in a git checkout, where versions do not tell changes apart, a checksum of its code."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return importlib.metadata.version("mijax")
    files = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def progress_bar(jobs: int, label: str, unit: str, progress: bool) -> "tqdm[NoReturn]":
    """Make a progress bar that appears where the work takes more than a second.

    Args:
        jobs: the number of jobs.
        label: the text before the bar.
        unit: the name of a job.
        progress: whether to show the bar.

    Returns:
        The bar, a context manager, with the method `update(jobs)`.
    """
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
    """Run all chunks and hand over the results of each.

    Args:
        run: called with a list of chunk numbers, returns arrays by name. The list has one number; with `width`, up
            to `width` numbers, and the arrays have an axis of chunks in front.
        keep: called with a chunk's number and its arrays, first for all saved chunks, then for the others in order;
            returns how many jobs the chunk held.
        chunks: the number of chunks.
        bar: the progress bar, advanced by the number of jobs.
        width: how many chunks run at once, on as many devices; `None` for one, without an axis of chunks.
        store: where finished chunks are saved; chunks that it holds are not run again.
    """
    with compiler_memory_freed():
        pending = []
        for number in range(chunks):
            saved = store.load(number) if store else None
            if saved is None:
                pending.append(number)
            else:
                bar.update(keep(number, saved))
        groups = [pending[i : i + (width or 1)] for i in range(0, len(pending), width or 1)]
        for group, results in _in_flight(run, groups):
            arrays = {name: np.asarray(value) for name, value in results.items()}
            for i, number in enumerate(group):
                chunk = arrays if width is None else {name: value[i] for name, value in arrays.items()}
                if store:
                    store.save(number, chunk)
                bar.update(keep(number, chunk))


def _in_flight(run: Callable, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Mapping[str, Any]]]:
    """The results of the groups in order; the next group is dispatched before the results of one are waited for."""
    waiting: collections.deque = collections.deque()
    for group in groups:
        waiting.append((group, run(group)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def fingerprint(tree: Any) -> str:
    """A checksum of a pytree that is the same in every process.

    It covers the tree's structure, arrays by their values, and converted functions by their programs and the arrays
    that these reach.

    Args:
        tree: the pytree.

    Returns:
        A hexadecimal SHA-256 digest.

    Raises:
        TypeError: for a function that is not converted, or whose program has a part that no checksum can cover.

    >>> fingerprint({"x": np.arange(3)}) == fingerprint({"x": np.arange(3)})
    True
    >>> fingerprint({"x": np.arange(3)}) == fingerprint({"x": np.arange(4)})
    False
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
            digest.update(array.reshape(-1).view(np.uint8).data)  # as bytes: Python's buffer protocol has no bfloat16
        else:
            digest.update(text_of(leaf).encode())
    return digest.hexdigest()


def repeatable(convert: Callable[[], T], save: Any) -> T:
    """Convert users' functions, and check that a second conversion gives the same where the job is to be saved.

    A function that draws random numbers or reads a clock has no result that a later process could continue.

    Args:
        convert: converts users' functions; returns a pytree of them.
        save: the folder of the job; `None` for no folder and no check.

    Returns:
        The result of the first conversion.

    Raises:
        ValueError: where a second conversion differs from the first.
        TypeError: with `save`, for a function whose program has a part that no checksum can cover (`fingerprint`).

    >>> repeatable(lambda: {"x": np.ones(2)}, None)
    {'x': array([1., 1.])}
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
