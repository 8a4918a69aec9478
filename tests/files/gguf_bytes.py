"""The bytes of a GGUF file, taken apart and put together again: a second reading of the format, for tests alone."""

import struct
from typing import Any, NamedTuple

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Field(NamedTuple):
    """A key, its type (of an array, -1 less the type of its entries) and its value."""

    name: str
    kind: int
    value: Any

    @classmethod
    def can_be(cls, value: Any) -> bool:
        """Whether a value can be written."""
        if isinstance(value, list):
            return all(type(v) is type(value[0]) and not isinstance(v, list) and cls.can_be(v) for v in value)
        if isinstance(value, str):
            return "\ud800" not in value
        return isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63)

    @classmethod
    def of(cls, name: str, value: Any, narrow: bool) -> "Field":
        """A field of the type that fits a value, the narrower one of two."""
        if isinstance(value, list):
            return cls(name, -1 - (cls.of("", value[0], narrow).kind if value else 4), value)
        if isinstance(value, str):
            return cls(name, _STRING, value)
        if isinstance(value, bool):
            return cls(name, 7, value)
        if isinstance(value, float):
            return cls(name, 6 if narrow and (abs(value) < 3e38 or value != value) else 12, value)
        return cls(name, 4 if narrow and 0 <= value < 2**32 else 11, value)

    @property
    def bytes(self) -> bytes:
        kind = self.kind if self.kind >= 0 else -1 - self.kind
        values = self.value if self.kind < 0 else [self.value]
        body = b"".join(_text(v) if kind == _STRING else struct.pack(f"<{_FORMATS[kind]}", v) for v in values)
        head = struct.pack("<I", kind) if self.kind >= 0 else struct.pack("<IIQ", _ARRAY, kind, len(values))
        return _text(self.name) + head + body


class Tensor(NamedTuple):
    """A tensor's entry: its shape as the file has it, its type, and its place in the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def bytes(self) -> bytes:
        return _text(self.name) + struct.pack(
            f"<I{len(self.shape)}QIQ", len(self.shape), *self.shape, self.kind, self.offset
        )


class Parts(NamedTuple):
    """A GGUF file of version 3."""

    fields: list[Field]
    tensors: list[Tensor]
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> "Parts":
        at = 4

        def take(pattern: str) -> Any:
            nonlocal at
            (value,) = struct.unpack_from(f"<{pattern}", content, at)
            at += struct.calcsize(f"<{pattern}")
            return value

        def text() -> str:
            nonlocal at
            size = take("Q")
            at += size
            return content[at - size : at].decode()

        def value(kind: int) -> Any:
            return text() if kind == _STRING else take(_FORMATS[kind])

        take("I"), (n_tensors := take("Q")), (n_fields := take("Q"))
        fields = []
        for _ in range(n_fields):
            name, kind = text(), take("I")
            if kind == _ARRAY:
                inner, n = take("I"), take("Q")
                fields.append(Field(name, -1 - inner, [value(inner) for _ in range(n)]))
            else:
                fields.append(Field(name, kind, value(kind)))
        tensors = []
        for _ in range(n_tensors):
            name, n = text(), take("I")
            tensors.append(Tensor(name, tuple(take("Q") for _ in range(n)), take("I"), take("Q")))
        return cls(fields, tensors, content[-(-at // 32) * 32 :])

    @property
    def bytes(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.fields))
        head += b"".join(part.bytes for part in (*self.fields, *self.tensors))
        return head + bytes(-len(head) % 32) + self.data

    def with_fields(self, fields: list[Field]) -> "Parts":
        return self._replace(fields=fields)

    def with_field(self, i: int, field: Field) -> "Parts":
        return self._replace(fields=[*self.fields[:i], field, *self.fields[i + 1 :]])

    def with_tensors(self, tensors: list[Tensor]) -> "Parts":
        return self._replace(tensors=tensors)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
