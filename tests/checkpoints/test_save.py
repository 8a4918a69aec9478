"""Saving: what is read back is what was written, whole or not at all."""

import contextlib
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, random_model
from tests.reference.tiny_models import MODELS, STORED

EXPRESSED = {
    "gpt2": "gpt2",
    "llama_gqa": "llama",
    "gpt_oss": "gpt_oss",
}  # of these architectures; the others have no such config
_of_all_layers = {"experts": mj.Experts(4, top_k=2, router_bias=True), "dense_layers": (), "d_mlp": 10}
SAVED = ARCHITECTURES | {"gpt_oss": dataclasses.replace(ARCHITECTURES["experts"], **_of_all_layers)}


@contextlib.contextmanager
def says_so(kind):
    with (
        pytest.warns(UserWarning, match="no Hugging Face architecture") if kind == "mijax" else contextlib.nullcontext()
    ):
        yield


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(name, dtype, tmp_path):
    model = jax.tree.map(lambda x: x.astype(dtype), random_model(SAVED[name], dtype=jnp.float32))
    kind = EXPRESSED.get(name, "mijax")
    with says_so(kind):
        assert mj.save(model, tmp_path / "saved") == kind
    back, tokenizer = mj.load(tmp_path / "saved", dtype=dtype)
    assert tokenizer is None and back.config == model.config
    assert jax.tree.structure(back) == jax.tree.structure(model)
    chex.assert_trees_all_equal(jax.tree.leaves(model), jax.tree.leaves(back))


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_others_come_out_as_they_went_in(name, tmp_path):
    """Tensor by tensor, by their names: what transformers wrote is what we write."""
    model, _ = mj.load(STORED / name)
    assert mj.save(model, tmp_path / "saved") == {"mistral": "llama"}.get(
        name, name.split("_")[0].replace("llama3", "llama")
    )
    theirs, ours = load_file(STORED / name / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all((ours[n] == theirs[n]).all() for n in theirs)


def test_processed_models_keep_their_logits(tmp_path):
    for name in ("gpt2", "llama_gqa"):
        model = mj.processing.simplify(random_model(ARCHITECTURES[name], dtype=jnp.float32))
        with says_so("mijax" if model.config.unembed_bias else "llama"):
            mj.save(model, tmp_path / name)
        assert (mj.run(mj.load(tmp_path / name)[0], IDS).logits == mj.run(model, IDS).logits).all()


def test_shards_and_tokenizer(tmp_path):
    model = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32)
    tokenizer = mj.Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    mj.save(model, tmp_path / "saved", tokenizer, shard_bytes=2000)
    files = sorted(p.name for p in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    largest = max(a.nbytes for a in jax.tree.leaves(model))
    assert all(sum(t.nbytes for t in load_file(tmp_path / "saved" / f).values()) <= max(2000, largest) for f in files)
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(model))
    back, same = mj.load(tmp_path / "saved")
    chex.assert_trees_all_equal(jax.tree.leaves(model), jax.tree.leaves(back))
    assert same.backend.to_str() == tokenizer.backend.to_str()


def test_what_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists"):
        mj.save(model, tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        mj.save(model, tmp_path / "file" / "model")
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), model)
    with pytest.raises(ValueError, match=r"the model's .W_E has values that are not finite"):
        mj.save(broken, tmp_path / "broken")

    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", crash)
    with pytest.raises(OSError, match="no space left"):
        mj.save(model, tmp_path / "half")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]
