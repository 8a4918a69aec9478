"""What a checkpoint holds, before anything is known of its architecture: tensors by name, and how they are read."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from mijax.rules import shown

LONGEST_NAME = 256
"""The number of characters of the longest name of a tensor or key."""


def check_name(name: str) -> None:
    """Check that a name can be written in a message, and is none that only fills memory.

    Args:
        name: the name of a tensor, or of a key of GGUF's metadata.

    Raises:
        ValueError: for a name that is too long or has characters that cannot be printed.
    """
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(
            f"a name of {len(name)} characters, {shown(name)}: expected at most {LONGEST_NAME}, printable ones"
        )


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


def derived(tensors: Tensors, computed: Mapping[str, Made], sources: Collection[str]) -> Tensors:
    """A checkpoint with tensors that are computed from others.

    Args:
        tensors: the checkpoint.
        computed: the tensors that are computed when they are read, by name; one may replace its source.
        sources: the names of tensors that only serve to compute them, and are no longer there.
    """
    read = lambda name: computed[name].read() if name in computed else tensors.read(name)

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return tensors.part(name, index) if name not in computed and tensors.part is not None else read(name)[index]

    kept = {name: entry for name, entry in tensors.stored.items() if name not in sources}
    return Tensors(kept | {name: Stored("F32", entry.shape) for name, entry in computed.items()}, read, part)


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
