"""Saving drops what the config does not announce: what it announces comes back exactly, the rest is an error by name."""

import dataclasses
import itertools
import warnings

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.model.norm import Norm
from tests.architectures import ARCHITECTURES, IDS, error, random_model
from tests.reference.forward import forward
from tests.situations import refused

SWITCHES = {
    "tied_unembed": (True, False), "unembed_bias": (True, False), "attn_bias": ("qkvo", "qkv", "o", "", "v"), "mlp_bias": (True, False),
}  # fmt: skip
BASES = {"gpt2": ARCHITECTURES["gpt2"], "llama": ARCHITECTURES["llama_gqa"]}


@pytest.mark.parametrize("values", list(itertools.product(*SWITCHES.values())), ids=str)
@pytest.mark.parametrize("base", BASES)
def test_save_and_load_every_combination_of_what_a_config_announces(base, values, tmp_path):
    config = dataclasses.replace(BASES[base], **dict(zip(SWITCHES, values)))
    model = random_model(config, dtype=jnp.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kind = mj.save(model, tmp_path / "saved")
    assert (kind == "mijax") == any("own format" in str(w.message) for w in said)
    back, _ = mj.load(tmp_path / "saved")
    assert back.config == model.config and jax.tree.structure(back) == jax.tree.structure(model)
    chex.assert_trees_all_equal(jax.tree.leaves(model), jax.tree.leaves(back))


@pytest.mark.parametrize("norm_bias", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_save_and_load_every_kind_of_norm(norm, norm_bias, tmp_path):
    """The NumPy statement's logits, before and after."""
    model = random_model(
        dataclasses.replace(BASES["gpt2"], norm=norm, norm_bias=norm_bias, unembed_bias=True), dtype="float32"
    )
    with pytest.warns(UserWarning, match="own format"):
        mj.save(model, tmp_path / "saved")
    run = mj.run(mj.load(tmp_path / "saved")[0], IDS).logits
    assert error(run, np.stack([forward(model, ids) for ids in IDS])) < 1e-4


UNANNOUNCED = {
    "b_U": (lambda m: m.b_U, jnp.arange(19.0), "b_U is there, which unembed_bias=False"),
    "W_U": (lambda m: m.W_U, jnp.ones((19, 12)), "W_U is there, which tied_unembed=True"),
    "b_V": (
        lambda m: m.blocks.attn.b_V,
        jnp.ones((3, 4, 3)),
        "blocks.attn.b_V is there, which attn_bias='o' .*set attn_bias='ov'",
    ),
    "W_pos": (lambda m: m.W_pos, jnp.ones((16, 12)), "W_pos is there, which positions='none'"),
    "b_in": (
        lambda m: m.blocks.experts.b_in,
        jnp.ones((3, 3, 10)),
        "blocks.experts.b_in is there, which mlp_bias=False",
    ),
    "ln1": (lambda m: m.blocks.ln1, Norm(jnp.ones((3, 12)), None), "blocks.ln1.weight is there, which norm='none'"),
}


@pytest.mark.parametrize("name", UNANNOUNCED)
def test_save_a_parameter_that_the_config_does_not_announce(name, tmp_path):
    place, value, message = UNANNOUNCED[name]
    model = random_model(ARCHITECTURES["normless"], dtype=jnp.float32)
    with refused(ValueError, message):
        mj.save(eqx.tree_at(place, model, value, is_leaf=lambda x: x is None), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_save_after_saying_what_was_added(tmp_path):
    """The remedy that the error names."""
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    bias = jnp.arange(19.0)
    config = dataclasses.replace(model.config, unembed_bias=True)
    with pytest.warns(UserWarning, match="own format"):
        mj.save(dataclasses.replace(model, b_U=bias, config=config), tmp_path / "saved")
    expected = np.stack([forward(model, ids) for ids in IDS]) + np.arange(19.0)
    assert error(mj.run(mj.load(tmp_path / "saved")[0], IDS).logits, expected) < 1e-4


def test_save_models_that_vmap_stacked(tmp_path):
    stacked = jax.vmap(lambda key: mj.init(ARCHITECTURES["gpt2"], key))(jax.random.split(jax.random.key(0), 2))
    with refused(ValueError, "leading axis of 2: vmap over the model"):
        mj.save(stacked, tmp_path / "saved")


def test_save_a_model_of_another_shape_than_its_config(tmp_path):
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    with refused(ValueError, r"W_pos has shape \(2, 12\), expected \(16, 12\)"):
        mj.save(dataclasses.replace(model, W_pos=model.W_pos[:2]), tmp_path / "saved")


def test_save_what_is_not_in_memory(tmp_path, as_a_user):
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    with refused(ValueError, "W_E is not in memory: it is a ShapeDtypeStruct"):
        mj.save(jax.eval_shape(lambda: model), tmp_path / "saved")
    with refused(ValueError, "W_E is not in memory: it is a .*Tracer"):
        jax.jit(lambda m: mj.save(m, tmp_path / "saved"))(model)


@pytest.mark.parametrize(
    "values, kind",
    [({"n_heads": 5, "d_head": 6, "n_kv_heads": 5}, "mistral"), ({"positions": mj.Rotary(dim=4)}, "mijax")],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*own format")
def test_save_a_llama_that_transformers_refuses_or_rotates_otherwise(values, kind, tmp_path):
    """Its `hidden_size` must be a multiple of `num_attention_heads` (Mistral's need not), and all of a head is rotated."""
    model = random_model(dataclasses.replace(BASES["llama"], **values), dtype=jnp.float32)
    assert mj.save(model, tmp_path / "saved") == kind
    back, _ = mj.load(tmp_path / "saved")
    assert back.config == model.config
    chex.assert_trees_all_equal(jax.tree.leaves(model), jax.tree.leaves(back))


@pytest.mark.parametrize(
    "size, kind",
    [
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_save_in_shards_of_no_size(size, kind, tmp_path, as_a_user):
    with refused(kind, "shard_bytes must be"):
        mj.save(random_model(BASES["gpt2"], dtype=jnp.float32), tmp_path / "saved", shard_bytes=size)
    assert not list(tmp_path.iterdir())


def test_save_what_is_no_model_or_no_tokenizer(tmp_path, as_a_user):
    with refused(TypeError, "save writes a mijax.Transformer, given NoneType"):
        mj.save(None, tmp_path / "saved")
    with refused(TypeError, "tokenizer must be a mijax.Tokenizer, given str"):
        mj.save(random_model(BASES["gpt2"], dtype=jnp.float32), tmp_path / "saved", "gpt2")


def test_save_where_a_link_leads_nowhere(tmp_path, monkeypatch):
    """Told before anything is written."""
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *args, **kwargs: pytest.fail("written"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with refused(FileExistsError, "link exists; give the path of a new folder"):
        mj.save(random_model(BASES["gpt2"], dtype=jnp.float32), tmp_path / "link")
