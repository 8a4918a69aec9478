"""The tensors of a folder: one safetensors file, or several with an index."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mijax.checkpoints.contents import Stored, Tensors, check_name
from mijax.files import check_file, read_object, unique
from mijax.rules import TEXT, mapping, shown


def tensors_of(folder: Path) -> Tensors:
    """A folder's tensors.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: for files that cannot be read, an index that does not fit them, and a tensor in two of them.
    """
    shards, weight_map = _shards(folder)
    files = {shard: tensors_in(folder / shard) for shard in shards}
    shard_of: dict[str, str] = {}
    for shard, file in files.items():
        for name in file.stored:
            if shard_of.setdefault(name, shard) != shard:
                raise ValueError(f"{folder} holds {name} twice: in {shard_of[name]} and in {shard}")
    misplaced = [
        name for name in sorted({**shard_of, **weight_map}) if weight_map and shard_of.get(name) != weight_map.get(name)
    ]
    if misplaced:
        summary = ", ".join(
            f"{n} (in {shard_of.get(n, 'no file')}, by the index in {weight_map.get(n, 'none')})" for n in misplaced[:8]
        )
        raise ValueError(f"{folder}: the index of shards does not fit them: {summary}")
    parts = {shard: file.part for shard, file in files.items() if file.part is not None}
    return Tensors(
        {name: entry for file in files.values() for name, entry in file.stored.items()},
        lambda name: files[shard_of[name]].read(name),
        lambda name, index: parts[shard_of[name]](name, index),
    )


def tensors_in(path: Path) -> Tensors:
    """The tensors of one safetensors file.

    Each read opens the file anew: pages of a memory map that were read count as memory of this process until the
    map is closed.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read; on reading, where it has changed since.
    """
    import safetensors

    check_file(path)
    try:
        _check_header(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            stored = {name: Stored(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        for name, (_, shape) in stored.items():
            check_name(name)
            if math.prod(max(n, 1) for n in shape) > _MOST_NUMBERS:  # also beside an axis of 0
                raise ValueError(f"{name} has shape {shape}, of more than {_MOST_NUMBERS} numbers")
    except (safetensors.SafetensorError, ValueError, RecursionError, OSError, MemoryError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from error

    @contextlib.contextmanager
    def opened(name: str) -> Iterator[Any]:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                yield file
        except (safetensors.SafetensorError, OSError, MemoryError) as error:
            raise ValueError(f"{path}: {name} cannot be read: {error}") from error

    def read(name: str) -> np.ndarray:
        with opened(name) as file:
            tensor = file.get_tensor(name)
        if tensor.shape != stored[name].shape:
            raise ValueError(f"{path} has changed while it was read")
        return tensor

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        with opened(name) as file:
            return file.get_slice(name)[index]

    return Tensors(stored, read, part)


_LARGEST_HEADER, _MOST_NUMBERS = 2**24, 2**48


def _check_header(path: Path) -> None:
    """Refuse a header that is longer than any real one, or says something twice: readers disagree about which counts."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"header too large: {size} bytes, expected at most {_LARGEST_HEADER}")
        header = file.read(size)
    json.loads(header, object_pairs_hook=unique)


_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")  # a file of the folder itself


def _shards(folder: Path) -> tuple[Sequence[str], Mapping[str, str]]:
    """The names of the safetensors files, and the index's map from tensors to files (empty without an index)."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not os.path.lexists(index):
        if os.path.lexists(single):
            return [single.name], {}
        names = sorted(p.name for p in folder.iterdir())
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors, nor an index of shards; it holds {', '.join(names) or 'nothing'}"
            + (
                f". {pickled[0]} is a pickle, which can run any code when it is read: load it with transformers, where you"
                " trust it, and write it anew with save_pretrained"
                if pickled
                else ""
            )
        )
    content = read_object(
        index, {"weight_map": mapping(TEXT)}, largest=2**26
    )  # of models with a hundred thousand tensors
    if "weight_map" not in content:
        raise ValueError(f"{index} must hold a weight_map from names of tensors to names of files")
    weight_map = content["weight_map"]
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if not _SHARD.fullmatch(shard)]
    if outside:
        raise ValueError(f"{index} names what are no safetensors files of its folder: {shown(outside)}")
    if os.path.lexists(single) and single.name not in shards:
        raise ValueError(f"{folder} holds both {single.name} and an index of other files; remove one of the two")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
    return shards, weight_map
