"""Models of TransformerLens against logits and activations that it computed (`tests/reference/transformer_lens_models.py`)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, batch, error, on_real, random_model
from tests.reference.transformer_lens_models import CONFIGS, IDS, STORED


def stored(name):
    """The state dict, the config, and what TransformerLens computed."""
    arrays = dict(np.load(STORED / f"{name}.npz"))
    state = {key.removeprefix("state."): x for key, x in arrays.items() if key.startswith("state.")}
    return state, json.loads((STORED / f"{name}.json").read_text()), arrays


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_every_activation_are_those_of_transformer_lens(name):
    """float32 in another order of additions: 2e-5 of the largest."""
    state, config, arrays = stored(name)
    model = mj.from_transformer_lens(state, config)
    sites = [key.removeprefix("acts.") for key in arrays if key.startswith("acts.")]
    out = mj.run(model, IDS, capture=tuple(sites))
    assert len(sites) >= 7 and error(out.logits, arrays["logits"]) < 2e-5
    for site in sites:
        expected = arrays[f"acts.{site}"]
        if site == "post" and config["gated_mlp"]:  # there `b_in` is added to it
            expected = expected - np.stack([state[f"blocks.{layer}.mlp.b_in"] for layer in range(2)])[:, None, None]
        assert error(out.acts[site], expected) < 2e-5, site
    again, entries = mj.to_transformer_lens(model)
    assert error(mj.run(mj.from_transformer_lens(again, entries), IDS).logits, out.logits) < 2e-6
    if "Pre" not in str(config["normalization_type"]):  # as it was, but for what TransformerLens does not use
        unused = ("rotary_sin", "rotary_cos", *["W_pos"] * (name == "attention_only"))
        unused += ("b_in", "b_out") if config["gated_mlp"] else ()
        assert again.keys() == state.keys()
        assert all(np.array_equal(again[key], x) for key, x in state.items() if not key.endswith(unused))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_wrong_reading_fails(name):
    """Heads in another order, another scale, another pairing of rotary dimensions."""
    state, config, arrays = stored(name)
    swapped = {key: x[::-1] if key.endswith("attn.W_Q") else x for key, x in state.items()}
    for wrong, c in ((swapped, config), (state, config | {"attn_scale": 1.0}), (state, config | {"eps": 0.5})):
        assert error(mj.run(mj.from_transformer_lens(wrong, c), IDS).logits, arrays["logits"]) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_it_can_express_comes_back_and_all_else_is_refused(x64, name):
    model, tokens = random_model(ARCHITECTURES[name]), batch("none")
    if name not in ("gpt2", "llama_gqa", "parallel_two_norms"):
        with pytest.raises(ValueError, match="TransformerLens has no model like this"):
            mj.to_transformer_lens(model)
        return
    again = mj.from_transformer_lens(*mj.to_transformer_lens(model), dtype=jnp.float64)
    assert error(on_real(mj.run(again, tokens).logits, tokens), on_real(mj.run(model, tokens).logits, tokens)) < 1e-12


def test_a_classifier_is_run_swept_saved_and_loaded_and_does_not_generate(tmp_path):
    """Prompts of several lengths, bidirectional: equal to the prompt alone; class ids are not fed back."""
    state, config, _ = stored("classifier")
    model = mj.from_transformer_lens(state, config)
    assert model.config.d_vocab_out == 3 and mj.run(model, IDS).logits.shape == (2, 7, 3)
    padded = mj.Tokens(IDS, np.arange(7) < np.array([[7], [4]]))
    assert error(mj.run(model, padded).logits[1, :4], mj.run(model, IDS[1:, :4]).logits[0]) < 1e-5
    swept = mj.ablate(model, padded, site="z", over=("layer", "head"), metric=mj.metrics.logit(2, pos=0), kind="zero")
    edited = mj.run(model, padded, {"z": mj.Replace(0.0, mj.Where(layer=1, head=0))}).logits[:, 0, 2]
    assert error(swept.sel(layer=1, head=0), edited) < 1e-5
    with pytest.warns(UserWarning, match="mijax's own format"):
        mj.save(model, tmp_path / "saved")
    loaded, _ = mj.load(tmp_path / "saved")
    assert (
        loaded.config == model.config
        and (mj.run(loaded, padded).logits[1, :4] == mj.run(model, padded).logits[1, :4]).all()
    )
    with pytest.raises(IndexError, match="token 3 is outside the vocabulary of 3"):
        mj.metrics.logit(3)(mj.run(model, IDS))
    causal = mj.init(dataclasses.replace(model.config, causal=True), jax.random.key(0))
    with pytest.raises(ValueError, match="a model with 3 logits for 11 tokens cannot generate"):
        mj.generate(causal, IDS[:, :2], max_new_tokens=2)
    with pytest.raises(ValueError, match="d_vocab_out=3 needs tied_unembed=False"):
        dataclasses.replace(model.config, tied_unembed=True)


FAULTS = {
    "a missing tensor": (lambda s, c: (without(s, "blocks.1.attn.W_K"), c), "missing blocks.1.attn.W_K"),
    "a surplus tensor": (lambda s, c: (s | {"blocks.0.attn.extra": s["unembed.b_U"]}, c), "unexpected blocks.0.attn.extra"),
    "a wrong shape": (lambda s, c: (s | {"embed.W_E": s["embed.W_E"].T}, c), r"embed.W_E has shape \(8, 11\)"),
    "a value that is no number": (lambda s, c: (s | {"unembed.b_U": s["unembed.b_U"] * np.nan}, c), "unembed.b_U has values that are not finite"),
    "another mask": (lambda s, c: (s | {"blocks.0.attn.mask": ~s["blocks.0.attn.mask"]}, c), "blocks.0.attn.mask would be dropped"),
    "experts": (lambda s, c: (s, c | {"num_experts": 4}), "num_experts=4"),
    "adjacent pairs": (lambda s, c: (s, c | {"rotary_adjacent_pairs": True}), "rotary_adjacent_pairs=True"),
    "an unknown field": (lambda s, c: (s, c | {"something": 1}), "something=1"),
    "shortformer": (lambda s, c: (s, c | {"positional_embedding_type": "shortformer"}), "'shortformer' must be 'standard' or"),
    "an unknown activation": (lambda s, c: (s, c | {"act_fn": "solu_ln"}), "act_fn='solu_ln'"),
    "a flag that is text": (lambda s, c: (s, c | {"attn_only": "False"}), "attn_only='False' must be true or false"),
    "no size": (lambda s, c: (s, without(c, "n_heads")), "lacks 'n_heads'"),
    "an unknown norm": (lambda s, c: (s, c | {"normalization_type": "BN"}), "normalization_type='BN' must be None or 'LN' or"),
    "folded, and yet not": (lambda s, c: (s, c | {"normalization_type": "LNPre"}), "unexpected blocks.0.ln1.b"),
    "a scale of zero": (lambda s, c: (s, c | {"attn_scale": 0.0}), "attn_scale=0.0 must be -1 or -1.0 or a positive number"),
    "a cap that is text": (lambda s, c: (s, c | {"attn_scores_soft_cap": "2"}), "attn_scores_soft_cap='2' must be -1 or"),
    "a window that is none": (lambda s, c: (s, c | {"use_local_attn": True, "attn_types": ["local"] * 2}), "window=None must be"),
    "alibi of three heads": (lambda s, c: (s, c | {"positional_embedding_type": "alibi", "n_heads": 3}), "no power of 2"),
}  # fmt: skip


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


@pytest.mark.parametrize("fault", FAULTS)
def test_message(fault, as_a_user):
    change, message = FAULTS[fault]
    state, config, _ = stored("gpt2")
    with pytest.raises(ValueError, match=message):
        mj.from_transformer_lens(*change(state, config))


def test_arguments_of_another_kind(as_a_user):
    state, config, _ = stored("gpt2")
    with pytest.raises(TypeError, match=r"config must be a mapping \(cfg.to_dict\(\)\), given object"):
        mj.from_transformer_lens(state, object())
    with pytest.raises(TypeError, match="state must be a mapping from names to arrays, given list"):
        mj.from_transformer_lens([], config)
    with pytest.raises(TypeError, match=r"takes a mijax\.Transformer, given int"):
        mj.to_transformer_lens(3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 8, "n_ctx": 4, "act_fn": "relu"}, r"give it and the arrays to mijax\.from_transformer_lens"),
        ({"model_type": "bert"}, "encoders and encoder-decoders are out of mijax's scope"),
        ({"model_type": "t5"}, "encoders and encoder-decoders are out of mijax's scope"),
    ],
)
def test_a_folder_of_another_kind_says_what_to_do(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        mj.load(tmp_path)
