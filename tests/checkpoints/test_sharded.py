"""`mj.load(..., mesh=)`: the same parameters, of which each device holds its part, read by itself."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mijax as mj
from mijax.checkpoints import load
from mijax.checkpoints.tensors import get
from tests.architectures import error
from tests.situations import refused
from tests.situations.checkpoints import copy, set_config

IDS = [[1, 2, 3, 4, 5]]
SPECS = {
    "W_E": P("model"), "W_U": P("model"), "blocks.attn.W_Q": P(None, None, "model"), "blocks.attn.W_O": P(None, "model"), "blocks.mlp.W_in": P(None, None, "model"),
    "blocks.mlp.W_gate": P(None, None, "model"), "blocks.mlp.W_out": P(None, "model"), "blocks.ln1.weight": P(),
}  # fmt: skip


def llama(tmp_path):
    config = mj.Config(
        n_layers=2, d_model=16, n_heads=8, d_head=4, d_mlp=64, d_vocab=64, n_ctx=16, norm="rms", mlp="gated", activation="silu",
        positions=mj.Rotary(), attn_bias="", mlp_bias=False, tied_unembed=False,
    )  # fmt: skip
    model = mj.init(config, jax.random.key(0))
    assert mj.save(model, tmp_path / "model") == "llama"
    return tmp_path / "model"


def same(ours, reference):
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference)):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.fixture
def amounts(monkeypatch):
    """The numbers of each read from a folder, and whether it was of a part."""
    reads = []

    def counted(folder):
        tensors = real(folder)

        def read(name):
            reads.append((tensors.read(name).size, False))
            return tensors.read(name)

        def part(name, index):
            values = tensors.part(name, index)
            reads.append((values.size, True))
            return values

        return tensors._replace(read=read, part=part)

    real = load.tensors_of
    monkeypatch.setattr(load, "tensors_of", counted)
    return reads


def test_each_device_reads_its_part(tmp_path, amounts):
    """Eight devices: of every matrix an eighth each, of norms all; read once."""
    folder = llama(tmp_path)
    reference = mj.load(folder)[0]
    amounts.clear()
    ours, _ = mj.load(folder, mesh=jax.make_mesh((8,), ("model",)))
    same(ours, reference)
    for path, spec in SPECS.items():
        array = get(ours, path)
        assert array.sharding.spec == P(*spec, *[None] * (len(array.sharding.spec) - len(spec))), path
        assert {s.data.size for s in array.addressable_shards} == {array.size // (8 if spec != P() else 1)}
    whole = sum(a.size for a in jax.tree.leaves(reference))
    assert sum(size for size, _ in amounts) == whole
    largest = max(a.size // 2 for a in jax.tree.leaves(reference.blocks.mlp))
    assert max(size for size, _ in amounts) == largest // 8 and all(part for size, part in amounts if size > 16)
    assert error(mj.run(ours, IDS).logits, mj.run(reference, IDS).logits) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "llama_mqa_biases", "mistral"])
def test_other_layouts(name, tmp_path):
    """Fused queries, keys and values, transposed maps, biases, and numbers that do not divide: two of four devices per part."""
    folder = copy(tmp_path, name)
    reference = mj.load(folder)[0]
    ours, _ = mj.load(folder, mesh=jax.make_mesh((4, 2), ("cells", "model")))
    same(ours, reference)
    assert ours.blocks.mlp.W_in.sharding.spec == P(None, None, "model")
    assert ours.blocks.mlp.W_in.addressable_shards[0].data.shape[-1] * 2 == ours.blocks.mlp.W_in.shape[-1]
    assert {d.id for d in ours.blocks.mlp.W_in.devices()} == set(range(8))
    assert error(mj.run(ours, IDS).logits, mj.run(reference, IDS).logits) < 1e-5


def test_bfloat16(tmp_path):
    folder = llama(tmp_path)
    same(
        mj.load(folder, dtype="bfloat16", mesh=jax.make_mesh((8,), ("model",)))[0], mj.load(folder, dtype="bfloat16")[0]
    )


def test_a_tensor_that_is_too_long(tmp_path):
    """Its part exists: the shape of the whole is held against the config."""
    folder = set_config(copy(tmp_path, "llama_gqa"), intermediate_size=20)
    with refused(ValueError, r"up_proj.weight has shape \(40, 24\), expected \(20, 24\)"):
        mj.load(folder, mesh=jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))


def test_what_is_no_mesh(tmp_path, as_a_user):
    with refused(TypeError, "mesh must be a jax.sharding.Mesh, given int"):
        mj.load(copy(tmp_path, "llama_gqa"), mesh=8)
