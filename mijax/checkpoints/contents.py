"""What a checkpoint holds, before anything is known of its architecture: tensors by name, and how they are read."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np


class Stored(NamedTuple):
    """What the header of a file says of a tensor: its dtype by safetensors' name (`"F32"`, ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Tensors(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        stored: dtype and shape of each tensor, by its name: all that a checkpoint can be refused for before it is read.
        read: reads one tensor, given its name.
        part: reads a part of a tensor, given its name and a slice for each axis; `None` where tensors can only be read
            whole.
    """

    stored: Mapping[str, Stored]
    read: Callable[[str], np.ndarray]
    part: Callable[[str, tuple[slice, ...]], np.ndarray] | None = None


class Made(NamedTuple):
    """A tensor that is computed from others, as float32: its shape, and what computes it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def derived(tensors: Tensors, made: Mapping[str, Made], sources: Collection[str]) -> Tensors:
    """A checkpoint with tensors that are computed from others.

    Args:
        tensors: the checkpoint.
        made: the tensors that are computed when they are read, by name; one may replace its source.
        sources: the names of tensors that only serve to compute them, and are no longer there.
    """
    read = lambda name: made[name].read() if name in made else tensors.read(name)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return tensors.part(name, index) if name not in made and tensors.part is not None else read(name)[index]

    kept = {name: entry for name, entry in tensors.stored.items() if name not in sources}
    return Tensors(kept | {name: Stored("F32", entry.shape) for name, entry in made.items()}, read, part)


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
