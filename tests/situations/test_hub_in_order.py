"""A model of the hub is judged by its config before its weights are fetched, and all that its tokenizer needs is fetched."""

import fnmatch
import json
import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

import mijax as mj
from tests.architectures import error
from tests.situations import refused
from tests.situations.checkpoints import copy, logits, set_config, stored_logits

TOKENIZER = {  # what transformers reads of a tokenizer, beside tokenizer.json
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "generation_config.json",
}  # fmt: skip
OTHER = {
    "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "original/model.safetensors", "README.md", "training_args.bin",
    "model.gguf",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository, its cache, and the list of what was fetched: huggingface_hub's own selection, without a network."""

    here = SimpleNamespace(repository=copy(tmp_path / "repository", "llama_gqa"), cache=tmp_path / "cache", fetched=[])
    for name in TOKENIZER | OTHER:
        (here.repository / name).parent.mkdir(exist_ok=True)
        (here.repository / name).write_text("{}")
    (here.repository / "outputs.npz").unlink()

    def snapshot_download(repo_id, *, revision=None, token=None, allow_patterns=None, ignore_patterns=None):
        assert (repo_id, revision, token) == ("someone/tiny", "v1", "secret")
        files = [str(p.relative_to(here.repository)) for p in here.repository.rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (here.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(here.repository / name, here.cache / name)
            here.fetched.append(name)
        return str(here.cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return here


load = lambda: mj.load("someone/tiny", revision="v1", token="secret")

UNSUPPORTED = {
    "another architecture": ({"model_type": "mamba"}, "someone/tiny: unsupported model_type 'mamba'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
    "a window": ({"model_type": "mistral", "sliding_window": -4}, "sliding_window=-4"),
    "an unknown key": ({"attention_multiplier": 0.1}, "attention_multiplier=0.1"),
    "a wrong type": ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be an integer"),
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map="),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_load_what_is_not_supported(what, hub):
    entries, message = UNSUPPORTED[what]
    set_config(hub.repository, **entries)
    with refused(ValueError, message):
        load()
    assert hub.fetched == ["config.json"]


def test_load_a_repository_without_a_config(hub):
    (hub.repository / "config.json").unlink()
    with refused(FileNotFoundError, "holds no config.json"):
        load()
    assert not hub.fetched


def test_load_a_repository_with_an_adapter(hub):
    (hub.repository / "adapter_config.json").write_text("{}")
    with refused(ValueError, "holds an adapter"):
        load()
    assert sorted(hub.fetched) == ["adapter_config.json", "config.json"]


def test_load_a_supported_model(hub):
    """All that a model and its tokenizer are made of, once, and nothing else; transformers' logits."""
    model, _ = load()
    assert error(logits(model), stored_logits("llama_gqa")) < 1e-4
    assert hub.fetched[0] == "config.json" and sorted(hub.fetched) == sorted(
        TOKENIZER | {"config.json", "model.safetensors"}
    )


def test_load_a_model_of_several_files(hub):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (hub.repository / name).write_text(json.dumps({"weight_map": {}}))
    (hub.repository / "model.safetensors").unlink()
    with pytest.raises(ValueError):
        load()
    assert len(fnmatch.filter(hub.fetched, "model*")) == 3


def test_load_a_revision_that_is_not_there(monkeypatch):
    def snapshot_download(*_, **__):
        raise RevisionNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with refused(ValueError, "the Hugging Face hub has no revision 'v1' of 'someone/tiny'"):
        load()
