"""The tensors of a folder: one safetensors file, or several with an index."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mijax.checkpoints.contents import Tensors
from mijax.checkpoints.json_files import required_object


def tensors_of(folder: Path) -> Tensors:
    """A folder's tensors.

    Each read opens the file anew: pages of a memory map that were read count as memory of this process until the
    map is closed.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: for files that cannot be read, an index that does not fit them, and a tensor in two of them.
    """
    import safetensors

    shard_of, dtypes = {}, {}
    shards, weight_map = _shards(folder)
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    if shard_of.setdefault(name, shard) != shard:
                        raise ValueError(f"{folder} holds {name} twice: in {shard_of[name]} and in {shard}")
                    dtypes[name] = file.get_slice(name).get_dtype()
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{folder / shard} is not a readable safetensors file (truncated?): {error}") from error
    misplaced = [
        name for name in sorted({**shard_of, **weight_map}) if weight_map and shard_of.get(name) != weight_map.get(name)
    ]
    if misplaced:
        summary = ", ".join(
            f"{n} (in {shard_of.get(n, 'no file')}, by the index in {weight_map.get(n, 'none')})" for n in misplaced[:8]
        )
        raise ValueError(f"{folder}: the index of shards does not fit them: {summary}")

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(folder / shard_of[name], framework="numpy") as file:
            return file.get_tensor(name)

    def part(name: str, index: tuple[slice, ...]) -> tuple[tuple[int, ...], np.ndarray]:
        with safetensors.safe_open(folder / shard_of[name], framework="numpy") as file:
            lazy = file.get_slice(name)
            return tuple(lazy.get_shape()), lazy[index]

    return Tensors(dtypes, read, part)


def _shards(folder: Path) -> tuple[Sequence[str], Mapping[str, str]]:
    """The names of the safetensors files, and the index's map from tensors to files (empty without an index)."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if single.exists():
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
    weight_map = required_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} must hold a weight_map from names of tensors to names of files")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]
    if outside:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    if single.exists() and single.name not in shards:
        raise ValueError(f"{folder} holds both {single.name} and an index of other files; remove one of the two")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
    return shards, weight_map
