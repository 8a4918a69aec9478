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
