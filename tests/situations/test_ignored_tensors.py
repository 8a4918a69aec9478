"""A tensor of the checkpoint is ignored: it must be used, be seen to say nothing new, or be an error by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mijax as mj
from tests.architectures import error
from tests.situations import refused
from tests.situations.checkpoints import copy, logits, set_config, set_tensors, stored_logits

UNTIED = ("gpt2_relu_wide", "llama_gqa", "mistral")  # checkpoints whose head is not their embedding


@pytest.mark.parametrize("name", UNTIED)
def test_load_another_head_than_the_config_ties(name, tmp_path):
    """transformers' logits of the untied model: it uses the head too, and says so."""
    folder = set_config(copy(tmp_path, name), tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"ties lm_head.weight to .*(wte|embed_tokens).weight .* they differ"):
        model, _ = mj.load(folder)
    assert not model.config.tied_unembed and error(logits(model), stored_logits(name)) < 1e-4
    mj.save(model, tmp_path / "saved")
    assert (logits(mj.load(tmp_path / "saved")[0]) == logits(model)).all()


def test_load_a_bare_model_with_another_head(tmp_path):
    folder = set_config(copy(tmp_path, "llama_gqa"), tie_word_embeddings=True)
    set_tensors(folder, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    with pytest.warns(UserWarning, match="they differ"):
        model, _ = mj.load(folder)
    assert error(logits(model), stored_logits("llama_gqa")) < 1e-4


@pytest.mark.parametrize("name, embedding", [("gpt2", "transformer.wte"), ("llama_mha", "model.embed_tokens")])
def test_load_a_tied_head_that_is_stored_twice(name, embedding, tmp_path):
    """As files from torch.save come; nothing is said (tests run with warnings as errors)."""
    folder = set_tensors(copy(tmp_path, name), lambda t: t | {"lm_head.weight": t[f"{embedding}.weight"].copy()})
    model, _ = mj.load(folder)
    assert model.config.tied_unembed and error(logits(model), stored_logits(name)) < 1e-4


def test_load_a_tied_head_of_another_vocabulary(tmp_path):
    folder = set_tensors(copy(tmp_path, "gpt2"), lambda t: t | {"lm_head.weight": np.ones((70, 24), np.float32)})
    with refused(ValueError, r"lm_head.weight has shape \(70, 24\)"):
        mj.load(folder)


CAUSAL = np.tri(24, dtype=np.float32)[None, None]
INV_FREQ = (1.0 / 10000.0 ** (np.arange(0, 10, 2) / 10)).astype(
    np.float32
)  # Su et al. 2021, for llama_gqa's d_head of 10
ROTARY = "model.layers.1.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    "name, buffers",
    [
        ("gpt2", {"transformer.h.0.attn.bias": CAUSAL, "h.1.attn.masked_bias": np.float32(-1e4)}),
        ("gpt2", {"h.2.attn.bias": CAUSAL.astype(bool), "transformer.h.2.attn.masked_bias": np.float16(-1e4)}),
        ("gpt2", {"h.0.attn.bias": CAUSAL.astype(np.uint8), "h.0.attn.masked_bias": ml_dtypes.bfloat16(-1e4)}),
        ("llama_gqa", {ROTARY: INV_FREQ}),
        ("llama_gqa", {ROTARY: INV_FREQ.astype(np.float16)}),
        ("llama_gqa", {ROTARY: INV_FREQ.astype(ml_dtypes.bfloat16)}),
    ],
)
def test_load_buffers_that_say_what_the_config_says(name, buffers, tmp_path):
    model, _ = mj.load(set_tensors(copy(tmp_path, name), lambda t: t | buffers))
    assert error(logits(model), stored_logits(name)) < 1e-4


WINDOW = CAUSAL * np.triu(np.ones((24, 24), np.float32), -7)
SAYING_SOMETHING = {
    "a mask with a window": ("gpt2", "transformer.h.1.attn.bias", WINDOW, "is not the causal mask of the whole context"),
    "a mask that lets all see all": ("gpt2", "h.1.attn.bias", np.ones_like(CAUSAL), "is not the causal mask"),
    "a bias under the name of the mask": ("gpt2", "h.1.attn.bias", np.ones(24, np.float32), "is not the causal mask"),
    "a masked score that does not mask": ("gpt2", "h.1.attn.masked_bias", np.float32(-1.0), "is not one number of at most"),
    "masked scores of each head": ("gpt2", "h.1.attn.masked_bias", np.full(3, -1e4, np.float32), "is not one number"),
    "frequencies of another base": ("llama_gqa", ROTARY, INV_FREQ**0.9, "is not the rotary frequencies that the config gives"),
    "frequencies of half a head": ("llama_gqa", ROTARY, INV_FREQ[:2], "is not the rotary frequencies"),
    "a bias of a layer that is not there": ("gpt2", "transformer.h.9.attn.bias", CAUSAL, "unexpected transformer.h.9.attn.bias"),
    "a parameter that ends like a buffer": ("gpt2", "transformer.h.0.crossattn.attn.bias", CAUSAL, "unexpected .*crossattn"),
    "frequencies of a part that is not there": ("llama_gqa", "vision.rotary_emb.inv_freq", INV_FREQ, "unexpected vision.rotary"),
    "an embedding under both of its names": ("gpt2", "wte.weight", np.ones((61, 24), np.float32), "unexpected wte.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAYING_SOMETHING)
def test_load_a_tensor_that_would_be_dropped(what, tmp_path):
    name, tensor, value, message = SAYING_SOMETHING[what]
    folder = set_tensors(copy(tmp_path, name), lambda t: t | {tensor: value})
    with refused(ValueError, message):
        mj.load(folder)


# ---- several files


def shards(folder, change=lambda parts: parts):
    """Two files and their index, which says what `change` does not."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    for file, inside in change(parts).items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    return folder


def test_load_shards_that_hold_a_tensor_twice(tmp_path):
    copied = lambda parts: {file: [*inside, "model.norm.weight"] for file, inside in parts.items()}
    with refused(ValueError, "holds model.norm.weight twice: in model-00001.* and in model-00002"):
        mj.load(shards(copy(tmp_path, "llama_gqa"), copied))


def test_load_shards_that_are_not_those_of_the_index(tmp_path):
    exchanged = lambda parts: dict(zip(reversed(parts), parts.values()))
    with refused(
        ValueError,
        r"the index of shards does not fit them: lm_head.weight \(in model-00002.*, by the index in model-00001",
    ):
        mj.load(shards(copy(tmp_path, "llama_gqa"), exchanged))


@pytest.mark.parametrize("place", ["../other.safetensors", "{root}/other.safetensors", "a/../../other.safetensors"])
def test_load_shards_outside_the_folder(place, tmp_path):
    folder, outside = copy(tmp_path, "llama_gqa"), place.format(root=tmp_path)
    (tmp_path / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, outside)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(ValueError, f"index.json names what are no safetensors files of its folder: .*{outside}"):
        mj.load(folder)


def test_load_a_folder_with_a_single_file_beside_shards(tmp_path):
    folder = copy(tmp_path, "llama_gqa")
    single = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(single)
    with refused(ValueError, "holds both model.safetensors and an index of other files; remove one"):
        mj.load(folder)


def test_load_a_folder_with_an_adapter(tmp_path):
    folder = copy(tmp_path, "llama_gqa")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with refused(ValueError, "holds an adapter .* merge it"):
        mj.load(folder)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNTIED)
def test_transformers_uses_the_other_head_too(name, tmp_path):
    import transformers

    from tests.reference.tiny_models import inputs, outputs

    folder = set_config(copy(tmp_path, name), tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    assert error(logits(mj.load(folder)[0]), outputs(theirs, *inputs("none"))["logits"]) < 1e-4
