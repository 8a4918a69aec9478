"""What is done to a valid file: bytes, entries of JSON, tensors of safetensors, keys and tensors of GGUF, members of npz.

Every strategy draws a change of known contents: a label, which a failing test prints, and the new contents.
"""

import functools
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from tests.files.gguf_bytes import Field, Parts

Change = tuple[str, bytes]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63, 10**9, 10**12, 10**30, -(10**9), 0.0, 0.5, 1.5, -1.5,
    1e-300, 1e300, float("nan"), float("inf"), float("-inf"), "", "x", "x" * 1000, "a\0b", "\ud800", "..", "../x", "/etc/passwd", [], {},
    [0], ["x"], [[]], [None], {"x": 1}, {"": []}, [[["x", 10**9]]],
]  # fmt: skip
"""Values that stand in the place of any other."""


def described(value: Any) -> str:
    """A short form of a value."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"


# ---- bytes


@st.composite
def of_bytes(draw: Any, content: bytes, header: int | None = None) -> Change:
    """Truncated, with flipped bits, other numbers, or more bytes; `header`: how many bytes at the start are hit most often."""
    end = len(content)
    at = draw(st.one_of(st.integers(0, max(0, min(end, header or end) - 1)), st.integers(0, max(0, end - 1))))
    kind = draw(st.sampled_from(["truncate", "flip", "flip", "number", "insert", "append", "empty"]))
    if kind == "truncate":
        return f"cut at {at}", content[:at]
    if kind == "flip":
        changed = bytearray(content)
        places = [at, *draw(st.lists(st.integers(0, max(0, end - 1)), max_size=3))]
        for place in places if end else []:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        return f"bits flipped at {places}", bytes(changed)
    if kind == "number":
        width = draw(st.sampled_from("IQ"))
        number = struct.pack(f"<{width}", draw(st.sampled_from([0, 1, 255, 2**31, 2**32 - 1])))
        return f"{number.hex()} at {at}", content[:at] + number + content[at + len(number) :]
    if kind == "insert":
        more = draw(st.binary(min_size=1, max_size=8))
        return f"{more!r} inserted at {at}", content[:at] + more + content[at:]
    if kind == "append":
        return "bytes appended", content + draw(st.binary(min_size=1, max_size=64))
    return "emptied", b""


# ---- JSON


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all entries of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def replaced(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change` was called with the container of the entry at `path` and its key."""
    copy = json.loads(json.dumps(value))
    container = copy
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return copy


def moved(value: Any) -> list[Any]:
    """Values of another type or magnitude than a value, near it."""
    if isinstance(value, bool) or value is None:
        return [int(bool(value)), str(value).lower(), not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 2, value * 1000, -value, float(value), str(value), [value], value / 2]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), [value], {value: value}, {"content": value}, 3]
    if isinstance(value, list):
        return [value[:-1], value + value[:1], value * 2, value[::-1], dict(enumerate(map(str, value))), str(value)]
    return [list(value), {}, {k: None for k in value}, {k: [v] for k, v in value.items()}, str(value)]


@st.composite
def of_json(draw: Any, content: bytes) -> Change:
    """An entry of other type or magnitude, dropped, renamed, there twice, exchanged, nested; or a new one."""
    value = json.loads(content)
    paths = list(places(value))
    kind = draw(
        st.sampled_from(
            ["value", "value", "value", "near", "near", "drop", "rename", "twice", "swap", "new", "deep", "top"]
        )
    )
    if kind == "top" or not paths:
        top = draw(st.sampled_from(VALUES))
        return f"it holds {described(top)}", dumped(top)
    # the top level as often as all that is below it: a tokenizer's vocabulary has most of the entries
    path = draw(st.one_of(st.sampled_from([p for p in paths if len(p) == 1]), st.sampled_from(paths)))
    label, key = ".".join(map(str, path)), path[-1]
    if kind in ("value", "near"):
        old = value
        for step in path:
            old = old[step]
        new = draw(st.sampled_from(VALUES if kind == "value" else moved(old)))
        return f"{label}={described(new)}", dumped(replaced(value, path, lambda c, k: c.__setitem__(k, new)))
    if kind == "drop":
        return f"without {label}", dumped(replaced(value, path, lambda c, k: c.pop(k)))
    if kind == "deep":
        text = dumped(replaced(value, path, lambda c, k: c.__setitem__(k, "@deep@"))).decode()
        n = draw(st.sampled_from([100, 100_000]))
        return f"{label} is {n} lists deep", text.replace('"@deep@"', "[" * n + "]" * n).encode()
    if kind == "swap":
        other = draw(st.sampled_from([p for p in paths if p[:-1] == path[:-1]]))[-1]

        def swap(container: Any, k: Any):
            container[k], container[other] = container[other], container[k]

        return f"{label} and {other} exchanged", dumped(replaced(value, path, swap))
    if isinstance(key, int):
        return f"{label} twice", dumped(replaced(value, path, lambda c, k: c.insert(k, c[k])))
    if kind == "rename":
        name = draw(st.sampled_from([key + "_", key[:-1], key.upper(), "x", ""]))
        return f"{label} is called {name!r}", dumped(replaced(value, path, lambda c, k: c.__setitem__(name, c.pop(k))))
    if kind == "twice":
        new = draw(st.sampled_from(VALUES))
        marked = replaced(value, path, lambda c, k: c.__setitem__(k, [c[k], "@twice@"]))
        text = json.dumps(marked)
        old = json.dumps([*_at(marked, path)])
        both = f"{json.dumps(_at(marked, path)[0])}, {json.dumps(key)}: {dumped(new).decode()}"
        return f"{label} twice, then {described(new)}", text.replace(old, both).encode()
    name, new = (
        draw(st.sampled_from(["x", "rope_scaling", "quantization_config", "n_layer", ""])),
        draw(st.sampled_from(VALUES)),
    )
    return f"new {name}={described(new)}", dumped(replaced(value, path, lambda c, k: c.__setitem__(name, new)))


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def dumped(value: Any) -> bytes:
    """As JSON with the constants that Python's reader takes: NaN, Infinity; half a surrogate pair as an escape."""
    return json.dumps(value).encode()


# ---- safetensors


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def packed(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


@st.composite
def of_safetensors(draw: Any, content: bytes) -> Change:
    """Bytes; the header's JSON; two tensors exchanged, one dropped, one's numbers not finite."""
    header, data = unpacked(content)
    names = [name for name in header if name != "__metadata__"]
    kind = draw(st.sampled_from(["bytes", "bytes", "json", "json", "json", "swap", "drop", "numbers", "dtype"]))
    if kind == "bytes":
        return draw(of_bytes(content, header=len(content) - len(data)))
    if kind == "json":
        label, text = draw(of_json(json.dumps(header).encode()))
        return f"header: {label}", packed(text, data)
    name = draw(st.sampled_from(names))
    start, stop = header[name]["data_offsets"]
    if kind == "swap":
        other = draw(st.sampled_from(names))
        exchanged = header | {name: header[other], other: header[name]}
        return f"{name} and {other} exchanged", packed(json.dumps(exchanged).encode(), data)
    if kind == "drop":
        kept = {n: entry for n, entry in header.items() if n != name}
        for entry in kept.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [x - (stop - start if x >= stop else 0) for x in entry["data_offsets"]]
        return f"without {name}", packed(json.dumps(kept).encode(), data[:start] + data[stop:])
    if kind == "dtype":
        dtypes = ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "BOOL", "I32", "F64", "F16", "BF16", "C64", "XXX"]
        entry = header[name] | {"dtype": draw(st.sampled_from(dtypes))}
        return f"{name} is {entry['dtype']}", packed(json.dumps(header | {name: entry}).encode(), data)
    number = draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0, 1e-45]))
    place = start + 4 * draw(st.integers(0, (stop - start) // 4 - 1))
    return f"{number} in {name}", packed(
        json.dumps(header).encode(), data[:place] + struct.pack("<f", number) + data[place + 4 :]
    )


# ---- GGUF


@st.composite
def of_gguf(draw: Any, content: bytes) -> Change:
    """Bytes; a key's type, value, name or place; a tensor's name, shape, type, offset or place."""
    parts = Parts.of(content)
    kind = draw(
        st.sampled_from(
            ["bytes", "value", "value", "near", "drop", "twice", "swap", "key", "tensor", "tensor", "alignment"]
        )
    )
    if kind == "bytes":
        return draw(of_bytes(content, header=len(content) - len(parts.data)))
    i = draw(st.integers(0, len(parts.fields) - 1))
    name, old = parts.fields[i].name, parts.fields[i].value
    if kind in ("value", "near"):
        values = (
            [v for v in VALUES if Field.can_be(v)] if kind == "value" else [v for v in moved(old) if Field.can_be(v)]
        )
        new = Field.of(name, draw(st.sampled_from(values)), draw(st.booleans()))
        return f"{name}={described(new.value)} ({new.kind})", parts.with_field(i, new).bytes
    if kind == "drop":
        return f"without {name}", parts.with_fields(parts.fields[:i] + parts.fields[i + 1 :]).bytes
    if kind == "twice":
        return f"{name} twice", parts.with_fields([*parts.fields, parts.fields[i]]).bytes
    if kind == "key":
        new = parts.fields[i]._replace(name=draw(st.sampled_from([name + "_", name.upper(), "x", "", name[:-1]])))
        return f"{name} is called {new.name!r}", parts.with_field(i, new).bytes
    if kind == "swap":
        other = parts.fields[draw(st.integers(0, len(parts.fields) - 1))]
        return f"{name} has the value of {other.name}", parts.with_field(i, other._replace(name=name)).bytes
    if kind == "alignment":
        field = Field.of("general.alignment", draw(st.sampled_from([1, 8, 64, 0, 3, 2**31])), True)
        return f"alignment {field.value}", parts.with_fields([*parts.fields, field]).bytes
    i = draw(st.integers(0, len(parts.tensors) - 1))
    tensor = parts.tensors[i]
    change = draw(st.sampled_from(["name", "shape", "type", "offset", "drop", "twice", "swap"]))
    tensors = list(parts.tensors)
    if change == "name":
        tensors[i] = tensor._replace(
            name=draw(st.sampled_from([tensor.name + "x", "", "token_embd.weight", "x" * 100]))
        )
    elif change == "shape":
        n = draw(st.sampled_from([0, 1, 2, 2**31, 2**32, 2**63]))
        tensors[i] = tensor._replace(
            shape=draw(st.sampled_from([tensor.shape[::-1], (*tensor.shape, 1), (n,), (n, *tensor.shape[1:]), ()]))
        )
    elif change == "type":
        tensors[i] = tensor._replace(kind=draw(st.sampled_from([*range(40), 2**31])))
    elif change == "offset":
        tensors[i] = tensor._replace(
            offset=draw(st.sampled_from([0, 32, 2**31, 2**63, 2**64 - 32, tensor.offset + 32, tensor.offset + 1]))
        )
    elif change == "drop":
        del tensors[i]
    elif change == "twice":
        tensors.append(tensor)
    else:
        j = draw(st.integers(0, len(tensors) - 1))
        tensors[i], tensors[j] = tensor._replace(name=tensors[j].name), tensors[j]._replace(name=tensor.name)
    return f"tensor {tensor.name}: {change} {described(tensors[i] if i < len(tensors) else '')}", parts.with_tensors(
        tensors
    ).bytes


# ---- npz


@st.composite
def of_npz(draw: Any, content: bytes) -> Change:
    """Bytes; a member dropped, renamed, or with a header of another shape or dtype."""
    if draw(st.booleans()):
        return draw(of_bytes(content))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    name = draw(st.sampled_from(sorted(members)))
    kind = draw(st.sampled_from(["drop", "rename", "shape", "dtype", "compress", "new"]))
    if kind == "drop":
        del members[name]
    elif kind == "rename":
        members["x.npy"] = members.pop(name)
    elif kind == "new":
        members["x.npy"] = members[name]
    elif kind == "compress":
        return "a member of 300 MB in a few kB", _compressed(content)
    else:
        old, new = (b"'shape': (", b"'shape': (999999999999, ") if kind == "shape" else (b"'descr': '<", b"'descr': 'O")
        members[name] = members[name].replace(old, new)
    return f"{name}: {kind}", _archive(members)


def _archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for member, data in members.items():
            file.writestr(member, data)
    return out.getvalue()


@functools.cache  # it takes a second
def _compressed(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    return _archive({**members, "zeros.npy": bytes(300 * 2**20)}, zipfile.ZIP_DEFLATED)
