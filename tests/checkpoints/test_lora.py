"""`mj.load(..., adapter=)`: the sum by hand in float64, and what cannot be merged. (PEFT itself: `tests/parity/test_peft.py`.)"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import mijax as mj
from tests.situations import refused
from tests.situations.checkpoints import copy

SETTINGS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "use_dora": False,
    "target_modules": ["q_proj", "down_proj"],
    "loftq_config": {},
}
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def adapter(folder, model, tensors=None, **settings):
    """An adapter of the queries of layer 1; returns its folder and the change of the matrix `[out, in]`."""
    folder.mkdir()
    draw = np.random.default_rng(0).normal
    c = model.config
    a, b = draw(size=(2, c.d_model)).astype(np.float32), draw(size=(c.n_heads * c.d_head, 2)).astype(np.float32)
    entries = {k: v for k, v in (SETTINGS | settings).items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    pair = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    merged = {name: tensor for name, tensor in {**pair, **(tensors or {})}.items() if tensor is not None}
    save_file(merged, folder / "adapter_model.safetensors")
    return folder, b.astype(np.float64) @ a.astype(np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings, factor", [({}, 3 / 2), ({"use_rslora": True}, 3 / 2**0.5), ({"alpha_pattern": {"q_proj": 8}}, 4)]
)
def test_the_sum(settings, factor, dtype, tmp_path):
    """The change is added in float32 before the cast: one rounding of the dtype asked for, and nothing else moves."""
    base = copy(tmp_path, "llama_gqa")
    model, _ = mj.load(base)
    folder, change = adapter(tmp_path / "adapter", model, **settings)
    merged, _ = mj.load(base, adapter=str(folder), dtype=dtype)
    c = model.config
    before = np.asarray(model.blocks.attn.W_Q, np.float64)
    expected = before[1] + factor * change.T.reshape(c.d_model, c.n_heads, c.d_head)
    eps = {"float32": 2**-22, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(np.asarray(merged.blocks.attn.W_Q[1], np.float64), expected, rtol=eps, atol=eps)
    assert (np.asarray(merged.blocks.attn.W_Q[0]) == np.asarray(mj.load(base, dtype=dtype)[0].blocks.attn.W_Q[0])).all()
    assert not np.allclose(before[1], expected, atol=0.1)


REFUSED = {
    "DoRA": ({}, {"use_dora": True}, "use_dora=True"),
    "another method": ({}, {"peft_type": "IA3"}, "peft_type must be 'LORA', given 'IA3'"),
    "another method without a rank": ({}, {"peft_type": "LOHA", "r": ...}, "the key r is missing.*peft_type must be 'LORA', given 'LOHA'"),
    "a start that changes the base": ({}, {"init_lora_weights": "pissa"}, "init_lora_weights must be a start that leaves the base weights as they are .*given 'pissa'"),
    "tokens of its own": ({}, {"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters of experts": ({}, {"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "an unknown key": ({}, {"scale_by_moon": 2}, "scale_by_moon=2"),
    "a rank that is not the config's": ({}, {"r": 4}, "have rank 2, and adapter_config.json says 4"),
    "a pattern that is none": ({}, {"alpha_pattern": {"q_(": 2}}, "alpha_pattern holds the pattern 'q_.', expected a regular expression"),
    "ranks that are no map": ({}, {"rank_pattern": [2]}, "rank_pattern must be an object that maps patterns of names to positive numbers"),
    "one half": ({f"{Q}.lora_B.weight": None}, {}, "lora_A.weight lacks its other half"),
    "halves that do not fit": ({f"{Q}.lora_B.weight": np.ones((3, 2), np.float32)}, {}, "have shapes .* which do not give its shape"),
    "a module that is not there": ({f"{Q}_2.lora_A.weight": np.ones((2, 2), np.float32)}, {}, "q_proj_2.lora_A.weight fits no tensor"),
    "a magnitude": ({f"{Q}.lora_magnitude_vector.weight": np.ones(2, np.float32)}, {}, "lora_magnitude_vector.* fits no tensor"),
    "integers": ({f"{Q}.lora_A.weight": np.ones((2, 2), np.int8)}, {}, "is stored as I8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged(case, tmp_path):
    tensors, settings, message = REFUSED[case]
    base = copy(tmp_path, "llama_gqa")
    folder, _ = adapter(tmp_path / "adapter", mj.load(base)[0], tensors, **settings)
    with refused(ValueError, message):
        mj.load(base, adapter=folder)


def test_values_that_are_not_finite(tmp_path):
    base = copy(tmp_path, "llama_gqa")
    model, _ = mj.load(base)
    _, change = adapter(tmp_path / "adapter", model)
    folder, _ = adapter(tmp_path / "inf", model, {f"{Q}.lora_B.weight": np.full((len(change), 2), np.inf, np.float32)})
    with refused(ValueError, "model with .*inf does not hold .*q_proj.weight has values that are not finite"):
        mj.load(base, adapter=folder)


def test_an_adapter_of_a_tied_embedding(tmp_path):
    """PEFT merges such a change into both, and applies it to the embedding alone where it is not merged."""
    base = copy(tmp_path, "gpt2")
    model, _ = mj.load(base)
    assert model.config.tied_unembed
    wte = {
        "base_model.model.transformer.wte.weight": np.asarray(model.W_E) + 1,
        f"{Q}.lora_A.weight": None,
        f"{Q}.lora_B.weight": None,
    }
    folder, _ = adapter(tmp_path / "adapter", model, wte)
    with refused(ValueError, "changes .*wte.weight, to which the unembedding is tied"):
        mj.load(base, adapter=folder)
    folder, _ = adapter(tmp_path / "both", model, wte, ensure_weight_tying=True)
    assert np.array_equal(mj.load(base, adapter=folder)[0].W_E, np.asarray(model.W_E) + 1)


def test_files(tmp_path):
    base = copy(tmp_path, "llama_gqa")
    folder, _ = adapter(tmp_path / "adapter", mj.load(base)[0], base_model_name_or_path="org/base")
    with refused(ValueError, "holds an adapter alone: give mijax.load 'org/base', with this as adapter="):
        mj.load(folder)
    with refused(FileNotFoundError, "no such folder"):
        mj.load(base, adapter=tmp_path / "nowhere")
    with refused(FileNotFoundError, "holds no adapter_config.json"):
        mj.load(base, adapter=base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with refused(FileNotFoundError, "adapter_model.bin is a pickle"):
        mj.load(base, adapter=folder)
    (folder / "adapter_model.safetensors").write_bytes(b"12")
    with refused(ValueError, "is not a readable safetensors file"):
        mj.load(base, adapter=folder)
