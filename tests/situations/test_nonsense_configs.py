"""Nonsense in a config: types and ranges are checked by name, in files and in configs made by hand alike."""

import dataclasses
import json

import numpy as np
import pytest

import mijax as mj
from mijax.model.rotary import RotaryScaling
from tests.architectures import ARCHITECTURES, IDS, batch, error, random_model
from tests.reference.forward import forward
from tests.situations import refused
from tests.situations.checkpoints import copy, set_config

pytestmark = pytest.mark.usefixtures("as_a_user")
NAN, INF = float("nan"), float("inf")
SIZES = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_vocab": 11, "n_ctx": 16}

FIELDS = [
    ("norm_eps", -1.0, "must not be negative"), ("norm_eps", NAN, "must be finite"), ("norm_eps", INF, "must be finite"),
    ("norm_eps", "1e-5", "must be a number, given str"), ("norm_eps", True, "must be a number, given bool"),
    ("norm_eps", 1e300, "is outside float32, which would make it infinite"), ("norm_eps", 1e-46, "is outside float32, .* it 0"),
    ("attn_scale", 1e39, "is outside float32, which would make it infinite"), ("attn_scale", 1e-50, "is outside float32, .* it 0"),
    ("attn_scale", NAN, "must be finite"), ("attn_scale", -0.5, "must not be negative"),
    ("tied_unembed", "false", "must be a boolean, given str"), ("causal", 0, "must be a boolean, given int"),
    ("attn_bias", None, "must be a string, given NoneType"), ("attn_bias", "qx", "must be letters of"), ("attn_bias", "qq", "letters"), ("n_layers", True, "must be an integer, given bool"),
    ("n_layers", -1, "must not be negative"), ("n_heads", 2.0, "must be an integer, given float"), ("d_vocab", "11", "an integer"),
    ("d_model", 0, "must be positive"), ("n_kv_heads", -1, "must not be negative"),
    ("positions", "rope", "is none of 'learned'"), ("norm", ["layer"], "is none of"), ("activation", None, "is none of"),
    ("positions", {"base": 2.0}, "is none of 'learned'"), ("name", 3, "must be a string"),
    ("window", -1, "must be an integer of at least 0"), ("window", 2.0, "must be an integer"), ("window", "all", "must be an integer"),
    ("logits_cap", -1.0, "must not be negative"), ("embed_scale", 0.0, "must be positive"), ("norm_at", "end", "is none of 'input'"),
    ("scores_cap", NAN, "must be finite"), ("qk_norm", True, "is none of 'none', 'head', 'all'"),
]  # fmt: skip


@pytest.mark.parametrize("field, value, message", FIELDS, ids=str)
def test_make_a_config_by_hand(field, value, message):
    with refused(ValueError, rf"invalid Config: {field}=.* {message}"):
        mj.Config(**SIZES | {"positions": mj.Rotary()} | {field: value})
    with refused(ValueError, rf"invalid Config: {field}="):
        dataclasses.replace(mj.Config(**SIZES, positions=mj.Rotary()), **{field: value})


MISFITS = [
    ({"positions": (mj.Rotary(),)}, "positions has 1 entries, expected one for each of 2 layers"),
    ({"positions": (mj.Rotary(), "none")}, "positions='none' must be a Rotary or None"),
    ({"positions": (mj.Rotary(dim=2), mj.Rotary(dim=4))}, "layers must rotate equally many dimensions, given 2, 4"),
    ({"positions": mj.Rotary(dim=6)}, "rotary dim=6 must be even and at most d_head=4"),
    ({"window": (1, 2, 3)}, "window has 3 entries, expected one for each of 2 layers"),
    ({"window": (1, True)}, "window=True must be an integer of at least 0"),
    ({"window": 3, "causal": False}, "causal=False does not go with"),
    ({"positions": "alibi", "causal": False}, "causal=False does not go with"),
    ({"shared_norm": True}, "shared_norm=True needs parallel=True"),
    ({"parallel": True, "norm_at": "stream"}, "parallel=True does not go with norm_at='stream'"),
]


@pytest.mark.parametrize("values, message", MISFITS, ids=str)
def test_fields_that_do_not_fit_together(values, message):
    with refused(ValueError, message):
        mj.Config(**SIZES | values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"base": -1.0}, "base=-1.0 must be positive"), ({"base": 0.0}, "base=0.0 must be positive"), ({"base": INF}, "must be finite"),
        ({"base": 10**400}, "must be finite"), ({"base": 10**39}, "is outside float32, which would make it infinite"),
        ({"dim": -2}, "dim=-2 must not be negative"), ({"scaling": {"factor": 2.0}}, "must be .*RotaryScaling"),
    ],
)  # fmt: skip
def test_make_rotary_positions_by_hand(values, message):
    with refused(ValueError, f"invalid Rotary: .*{message}"):
        mj.Rotary(**values)


def test_equal_architectures_are_equal_configs():
    same = mj.Config(**SIZES, positions=mj.Rotary(dim=4), window=3)
    assert mj.Config(**SIZES, positions=(mj.Rotary(), mj.Rotary()), window=[3, 3]) == same
    assert mj.Config(**SIZES, positions=(None, None), window=(0, 0)) == mj.Config(**SIZES, positions="none")
    assert mj.Config(**SIZES, attn_bias="okvq") == mj.Config(**SIZES)


def test_every_fault_is_named_at_once():
    with refused(ValueError, "n_layers=2.0 .*; n_heads=-2 .*; norm_eps=nan .*"):
        mj.Config(**SIZES | {"n_layers": 2.0, "n_heads": -2, "norm_eps": NAN})


@pytest.mark.parametrize(
    "values, message",
    [
        (("linear", 0.0), "factor=0.0 must be positive"), (("linear", NAN), "factor=nan must be finite"),
        (("linear", -2.0), "factor=-2.0 must be positive"), (("su", 2.0), "kind='su' is none of 'linear', 'llama3', 'yarn'"),
        (("llama3", 8.0, 4.0, 4.0), "high_freq=4.0 must be above low_freq=4.0"), (("llama3", 8.0, 0.0), "low_freq=0.0 must be"),
        (("llama3", 8.0, 1.0, 4.0, 0), "original_n_ctx=0 must be positive"),
        (("llama3", 8.0, 1.0, 4.0, 8192.0), "original_n_ctx=8192.0 must be an integer"),
    ],
)  # fmt: skip
def test_make_a_rotary_scaling_by_hand(values, message):
    with refused(ValueError, f"invalid RotaryScaling: {message}"):
        RotaryScaling(*values)


def test_numpys_numbers_are_numbers():
    config = mj.Config(
        **{key: np.int64(value) for key, value in SIZES.items()},
        norm_eps=np.float64(1e-6),
        causal=np.bool_(True),
        attn_scale=np.float16(0.5),
    )
    assert config == mj.Config(**SIZES, norm_eps=1e-6, attn_scale=0.5) and json.dumps(dataclasses.asdict(config))
    assert type(config.n_layers) is int and type(config.norm_eps) is float and config.causal is True


IN_FILES = [
    ("gpt2", "layer_norm_epsilon", -1.0), ("gpt2", "layer_norm_epsilon", NAN), ("gpt2", "layer_norm_epsilon", "1e-5"),
    ("gpt2", "n_layer", 3.0), ("gpt2", "n_layer", True), ("gpt2", "n_inner", 0), ("gpt2", "n_head", 0), ("gpt2", "n_embd", None),
    ("gpt2", "tie_word_embeddings", "false"), ("gpt2", "tie_word_embeddings", 1), ("gpt2", "activation_function", ["relu"]),
    ("llama_gqa", "rms_norm_eps", INF), ("llama_gqa", "rms_norm_eps", None), ("llama_gqa", "attention_bias", "false"),
    ("llama_gqa", "mlp_bias", None), ("llama_gqa", "head_dim", 0), ("llama_gqa", "head_dim", 10.0),
    ("llama_gqa", "num_key_value_heads", 0), ("llama_gqa", "num_key_value_heads", "2"), ("llama_gqa", "intermediate_size", None),
    ("llama_gqa", "partial_rotary_factor", 0.0), ("llama_gqa", "partial_rotary_factor", 2.0),
    ("llama_gqa", "partial_rotary_factor", 0.01), ("llama_gqa", "partial_rotary_factor", "half"),
    ("mistral", "rms_norm_eps", -1e-6), ("mistral", "rms_norm_eps", 1e300), ("mistral", "max_position_embeddings", -24), ("mistral", "sliding_window", 24.0),
]  # fmt: skip


@pytest.mark.parametrize("name, key, value", IN_FILES, ids=str)
def test_load_a_config_with(name, key, value, tmp_path):
    with refused(ValueError, rf"config.json .*{key}="):
        mj.load(set_config(copy(tmp_path, name), **{key: value}))


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be positive"), ({"rope_theta": 0}, "rope_theta=0 must be positive"),
        ({"rope_theta": 1e39}, "rope_theta=1e.39 is outside float32"),
        ({"rope_theta": NAN}, "rope_theta=nan must be finite"), ({"rope_theta": "10000"}, "rope_theta='10000' must be a number"),
        ({"rope_type": "linear", "factor": 0}, "factor=0 must be positive"),
        ({"rope_type": "linear", "factor": "2"}, "factor='2' must be a number"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_freq=1.0 must be above"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 0}, "original_max_position_embeddings=0 must be positive"),
    ],
)  # fmt: skip
def test_load_rotary_parameters_with(rope, message, tmp_path):
    with refused(ValueError, message):
        mj.load(set_config(copy(tmp_path, "llama_gqa"), rope_parameters=rope))


def test_load_our_own_layout_with_nonsense(tmp_path):
    model = random_model(ARCHITECTURES["parallel_mqa_partial_rotary"], dtype="float32")
    with pytest.warns(UserWarning, match="own format"):
        mj.save(model, tmp_path / "model")
    for key, value in {
        "norm_eps": NAN,
        "causal": "true",
        "n_heads": 4.0,
        "positions": {"scaling": {"kind": "linear", "factor": 0}},
    }.items():
        before = (tmp_path / "model/config.json").read_text()
        with refused(ValueError, "config.json does not describe"):
            mj.load(set_config(tmp_path / "model", **{key: value}))
        (tmp_path / "model/config.json").write_text(before)


def test_a_config_that_is_not_utf8(tmp_path):
    folder = copy(tmp_path, "gpt2")
    (folder / "config.json").write_bytes(b'{"model_type": "gpt2\xff"}')
    with refused(ValueError, "config.json is not in UTF-8"):
        mj.load(folder)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_an_eps_of_zero_is_allowed(norm, x64):
    """As the NumPy statement computes it."""
    model = random_model(mj.Config(**SIZES, norm=norm, norm_eps=0.0))
    ids = IDS[0] % 11
    assert error(mj.run(model, batch("none", ids[None])).logits[0], forward(model, ids)) < 1e-10
