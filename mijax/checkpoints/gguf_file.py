"""The header of a GGUF file: typed metadata and the tensors' places. Lengths are checked against that of the file."""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mijax.checkpoints.contents import check_name

_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    10: "u8",
    11: "i8",
    12: "f8",
}  # NumPy's dtypes of GGUF's number types
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMENSIONS = 4


class Tensor(NamedTuple):
    """A tensor's place in the file.

    Attributes:
        name: its GGUF name.
        shape: in NumPy's order of axes, the reverse of GGUF's.
        kind: its type, a `gguf.GGMLQuantizationType`.
        start: the place of its first byte in the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    start: int
    size: int

    def read(self, path: Path) -> np.ndarray:
        """Read the tensor.

        Args:
            path: the file.

        Returns:
            The values, of shape `shape`, dequantised to float32.
        """
        from gguf import quants

        data = np.memmap(path, np.uint8, "r", self.start, (self.size,))
        rows = data.reshape(quants.quant_shape_to_byte_shape(self.shape, self.kind))
        return quants.dequantize(rows, self.kind).astype(np.float32, copy=False)


def read_header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Read the metadata and the places of the tensors.

    Tensors must follow each other without gaps, as llama.cpp demands, so that a tensor that was moved or that
    overlaps another is an error.

    Args:
        path: the file.

    Returns:
        The metadata by key (values are int, float, bool, str, and lists of them), and the tensors in the file's
        order.

    Raises:
        ValueError: naming the file, where it is truncated, corrupt or not GGUF.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except (ValueError, OSError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is not a readable GGUF file (truncated or corrupt?): {error}") from error


class _Cursor:
    """Reads values one after the other from the file's bytes; `at` is the place of the next byte."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if self.at + size > len(self.data):
            raise ValueError(f"{size} bytes are needed at {self.at}, the file has {len(self.data)} in all")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, dtype: str, count: int) -> list[Any]:
        """`count` numbers of a dtype of NumPy, in little-endian order."""
        dtype = f"<{dtype}"
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype).tolist()

    def count(self) -> int:
        """A uint64: a length or an offset."""
        return struct.unpack("<Q", self.take(8))[0]

    def code(self) -> int:
        """A uint32: a type, a version or a number of dimensions."""
        return struct.unpack("<I", self.take(4))[0]

    def text(self) -> str:
        """A string: its length, then its bytes in UTF-8."""
        return self.take(self.count()).decode()

    def value(self, kind: int) -> Any:
        """A metadata value of GGUF type `kind`."""
        if kind == _ARRAY:
            return self.values(self.code(), self.count())
        return self.values(kind, 1)[0]

    def values(self, kind: int, count: int) -> list[Any]:
        """`count` metadata values of GGUF type `kind`, which is not that of arrays."""
        if kind == _STRING:
            if count * 8 > len(self.data):  # the length of each takes 8 bytes
                raise ValueError(f"an array of {count} texts does not fit into the file")
            return [self.text() for _ in range(count)]
        if kind == _BOOL:
            flags = self.numbers("u1", count)
            if not set(flags) <= {0, 1}:
                raise ValueError(f"a truth value must be 0 or 1, given {max(flags)}")
            return [flag == 1 for flag in flags]
        if kind not in _NUMBERS:
            raise ValueError(f"a metadata value of unknown type {kind}")
        return self.numbers(_NUMBERS[kind], count)

    def header(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The metadata and the tensors' places."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self.code()
        if version not in (2, 3):
            hint = " (of a machine of the other byte order)" if version % 65536 == 0 else ""
            raise ValueError(f"it is of version {version}{hint}, supported are 2 and 3")
        n_tensors, n_fields = self.count(), self.count()
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self.name()
            if name in fields:
                raise ValueError(f"the key {name} is there twice")
            fields[name] = self.value(self.code())
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment must be a power of two, given {alignment!r}")
        entries = [self.entry() for _ in range(n_tensors)]
        return fields, _placed(entries, -(-self.at // alignment) * alignment, alignment, len(self.data))

    def name(self) -> str:
        """The name of a key or tensor."""
        name = self.text()
        check_name(name)
        return name

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape (in NumPy's order), type and offset."""
        name, n_dimensions = self.name(), self.code()
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {n_dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self.count() for _ in range(n_dimensions))[::-1]
        return name, shape, self.code(), self.count()


def _placed(
    entries: Sequence[tuple[str, tuple[int, ...], int, int]], base: int, alignment: int, end: int
) -> list[Tensor]:
    """The tensors of a file of `end` bytes, from which offsets count at `base`."""
    expected, tensors = 0, {}
    for name, shape, code, offset in entries:
        if name in tensors:
            raise ValueError(f"tensor {name} is there twice")
        if 0 in shape:
            raise ValueError(f"tensor {name} is empty: its shape is {shape}")
        kind, size = _quantisation(name, shape, code)
        if offset != expected:
            raise ValueError(
                f"tensor {name} lies at {offset}, expected {expected}: each follows the one before, at a multiple of"
                f" {alignment}"
            )
        if base + offset + size > end:
            raise ValueError(f"tensor {name} ends at byte {base + offset + size}, the file has {end}")
        tensors[name] = Tensor(name, shape, kind, base + offset, size)
        expected += -(-size // alignment) * alignment
    return list(tensors.values())


def _quantisation(name: str, shape: tuple[int, ...], code: int) -> tuple[Any, int]:
    """A tensor's `GGMLQuantizationType`, and its size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    if code not in set(GGMLQuantizationType):
        raise ValueError(f"tensor {name} is of unknown type {code}")
    kind = GGMLQuantizationType(code)
    block, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(
            f"tensor {name} is of type {kind.name}, which is no floating-point or quantised one"
        ) from error
    if shape[-1] % block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]} in blocks of {block}")
    return kind, int(np.prod(shape, dtype=object)) // block * size
