"""What a checkpoint holds, before anything is known of its architecture: tensors by name, and how they are read."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np


class Tensors(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        dtypes: the dtype of each tensor, by its safetensors name (`"F32"`, ...), keyed by the tensor's name.
        read: reads one tensor, given its name.
        part: reads a part of a tensor, given its name and a slice for each axis, and returns the shape of the whole
            too; `None` where tensors can only be read whole.
    """

    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray]
    part: Callable[[str, tuple[slice, ...]], tuple[tuple[int, ...], np.ndarray]] | None = None


def derived(tensors: Tensors, made: Mapping[str, Callable[[], np.ndarray]], sources: Collection[str]) -> Tensors:
    """A checkpoint with tensors that are computed from others, as float32.

    Args:
        tensors: the checkpoint.
        made: the tensors that are computed when they are read, by name; one may replace its source.
        sources: the names of tensors that only serve to compute them, and are no longer there.
    """
    read = lambda name: made[name]() if name in made else tensors.read(name)

    def part(name: str, index: tuple[slice, ...]) -> tuple[tuple[int, ...], np.ndarray]:
        if name not in made and tensors.part is not None:
            return tensors.part(name, index)
        whole = read(name)
        return whole.shape, whole[index]

    kept = {name: dtype for name, dtype in tensors.dtypes.items() if name not in sources}
    return Tensors(kept | dict.fromkeys(made, "F32"), read, part)


class Lookup:
    """Maps a tensor's full name to its name in the checkpoint, which may lack the family's prefix; `None` if absent.

    Args:
        prefix: the family's prefix.
        names: the names in the checkpoint.
    """

    def __init__(self, prefix: str, names: Collection[str]):
        self.prefix, self.names = prefix, set(names)

    def __call__(self, name: str) -> str | None:
        """The name in the checkpoint."""
        return next((n for n in (name, name.removeprefix(self.prefix)) if n in self.names), None)
