"""GGUF's bytes: header and tensors are what the gguf package reads, and a file that was cut, moved or garbled is refused."""

import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as T

import mijax as mj
from mijax.checkpoints.gguf import GGUF
from mijax.checkpoints.gguf_file import read_header
from tests.situations import refused
from tests.situations.gguf_files import write

KINDS = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]


@pytest.fixture
def quantised(tmp_path):
    """A file of one tensor of each kind, and every type of metadata."""
    writer, rng = gguf.GGUFWriter(tmp_path / "x.gguf", "llama"), np.random.default_rng(0)
    for i, kind in enumerate(
        [T.UINT8, T.INT8, T.UINT16, T.INT16, T.UINT32, T.INT32, T.UINT64, T.INT64, T.FLOAT32, T.FLOAT64]
    ):
        writer.add_key_value(f"general.x{i}", i + 1, kind)
        writer.add_key_value(f"general.y{i}", [i + 2, 3], T.ARRAY, kind)
    writer.add_key_value("general.flag", True, T.BOOL)
    writer.add_key_value("general.flags", [True, False], T.ARRAY, T.BOOL)
    writer.add_key_value("general.texts", ["", "é", "日本"], T.ARRAY, T.STRING)
    for kind in KINDS:
        values = rng.normal(size=(3, 64)).astype(np.float32)
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return tmp_path / "x.gguf"


def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(quantised):
    theirs = gguf.GGUFReader(quantised)
    fields, tensors = read_header(quantised)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert fields == expected and [type(v) for v in fields.values()] == [type(v) for v in expected.values()]
    assert [t.name for t in tensors] == [k.name for k in KINDS] and all(t.shape == (3, 64) for t in tensors)
    for ours, other in zip(tensors, theirs.tensors):
        assert (ours.read(quantised) == gguf.quants.dequantize(other.data, other.tensor_type)).all()


def end_of_data(path):
    last = gguf.GGUFReader(path).tensors[-1]
    return last.data_offset + last.n_bytes


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf")
    whole, end = path.read_bytes(), end_of_data(path)
    GGUF(path)
    for length in [*range(0, 200, 7), *range(200, end, end // 60), end - 1]:
        path.write_bytes(whole[:length])
        with refused(ValueError, "x.gguf is not a readable GGUF file"):
            GGUF(path)


def patched(path, place, form, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, place, value)
    path.write_bytes(data)
    return path


def tensor_entry(path, name):
    """Where in the file a tensor's entry begins, behind its name."""
    data, name = path.read_bytes(), name.encode()
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


NORM, UP = "output_norm.weight", "blk.1.ffn_up.weight"  # one and two dimensions
OFFSET, KIND = {NORM: 16, UP: 24}, {NORM: 12, UP: 20}


@pytest.mark.parametrize("name", [NORM, UP])
@pytest.mark.parametrize(
    "move, form", [(32, "moved further"), (-32, "over the one before"), (4, "misaligned"), (10**9, "outside the file")]
)
def test_a_tensor_that_was_moved_is_refused_by_name(tmp_path, name, move, form):
    path = write(tmp_path / "x.gguf")
    place = tensor_entry(path, name) + OFFSET[name]
    (offset,) = struct.unpack_from("<Q", path.read_bytes(), place)
    with refused(ValueError, f"x.gguf is not a readable .*: tensor {name} lies at {offset + move}, expected {offset}"):
        mj.load(patched(path, place, "<Q", offset + move))


def test_two_tensors_that_are_exchanged_are_refused(tmp_path):
    """Finite weights, of the right shapes, in each other's place."""
    path, places = write(tmp_path / "x.gguf"), {}
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        place = tensor_entry(path, name) + 24
        places[place] = struct.unpack_from("<Q", path.read_bytes(), place)[0]
    for place, offset in zip(places, reversed(places.values())):
        patched(path, place, "<Q", offset)
    with refused(ValueError, "tensor blk.0.attn_k.weight lies at .*, expected"):
        mj.load(path)


def test_a_tensor_longer_than_the_file_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf")
    with refused(ValueError, f"tensor {UP} ends at byte"):
        mj.load(patched(path, tensor_entry(path, UP) + 12, "<Q", 2**40))
    with refused(ValueError, f"tensor {UP} is empty"):
        mj.load(patched(path, tensor_entry(path, UP) + 12, "<Q", 0))


@pytest.mark.parametrize(
    "code, message",
    [
        (Q.I32, f"tensor {NORM} is of type I32"),
        (Q.I8, "of type I8"),
        (Q.F64, "of type F64"),
        (99, "of unknown type 99"),
    ],
)
def test_a_tensor_that_holds_no_weights_is_refused(tmp_path, code, message):
    path = write(tmp_path / "x.gguf")
    with refused(ValueError, message):
        mj.load(patched(path, tensor_entry(path, NORM) + KIND[NORM], "<I", code))


def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path):
    path = write(tmp_path / "x.gguf")
    key = b"tokenizer.ggml.merges"
    began = time.process_time()
    with refused(ValueError, "an array of 1152921504606846976 texts does not fit into the file"):
        mj.load(patched(path, path.read_bytes().index(key) + len(key) + 8, "<Q", 2**60))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("place, value, message", [
    (0, 1, "does not begin with 'GGUF'"), (4, 1, "of version 1, supported are 2 and 3"), (4, 4, "of version 4"),
    (4, 3 << 24, "of a machine of the other byte order"),
])  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path, place, value, message):
    with refused(ValueError, message):
        mj.load(patched(write(tmp_path / "x.gguf"), place, "<I", value))


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "x.gguf", {"general.namx": ("a", T.STRING), "general.namy": ("b", T.STRING)})
    path.write_bytes(path.read_bytes().replace(b"general.namy", b"general.namx"))
    with refused(ValueError, "the key general.namx is there twice"):
        mj.load(path)


def test_a_file_of_another_alignment_is_read(tmp_path):
    plain = GGUF(write(tmp_path / "plain.gguf"))
    wide = GGUF(write(tmp_path / "wide.gguf", {"general.alignment": (256, T.UINT32)}))
    assert all((wide.read(name) == plain.read(name)).all() for name in plain.stored)
    path = write(tmp_path / "x.gguf", {"general.alignment": (32, T.UINT32)})
    key = b"general.alignment"
    with refused(ValueError, "general.alignment must be a power of two, given 33"):
        GGUF(patched(path, path.read_bytes().index(key) + len(key) + 4, "<I", 33))
