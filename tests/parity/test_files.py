"""Mutated files that mijax reads, read by transformers: a config gives the same logits, a tokenizer the same ids."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import mijax as mj
from tests.architectures import error
from tests.files import formats, mutations
from tests.files.law import FORMATS, mutation, written
from tests.reference.tiny_models import inputs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
KINDS = [kind for kind in formats.FAMILIES if kind in formats.REFERENCES]


def each(n, strategy, check):
    """Call `check` with so many values of a strategy, the same at each run."""

    @settings(max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(value):
        check(value)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_configs(kind, tmp_path_factory):
    """float32 at 1e-4, where transformers reads the folder too and finds all weights; at least one does."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    prompts = inputs("none")[0][:2]
    counts = {"ours": 0, "both": 0}

    def check(change):
        label, content = change
        folder = tmp_path_factory.mktemp("m")
        formats.write_family(kind, folder)
        (folder / "config.json").write_bytes(content)
        try:
            ours, _ = mj.load(folder, tokenizer=False)
        except (ValueError, FileNotFoundError):
            return
        counts["ours"] += 1
        ids = prompts[:, : ours.config.n_ctx]
        try:
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="float32", attn_implementation="eager", output_loading_info=True
            )
            if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
                return
            with torch.no_grad():
                logits = theirs.eval()(torch.tensor(ids)).logits.numpy()
        except Exception:
            return
        counts["both"] += 1
        assert error(np.asarray(mj.run(ours, ids).logits), logits) < 1e-4, label

    each(100, mutations.of_json(formats.family_json(kind)), check)
    assert counts["both"] > 0, counts


NEITHER = {"rope_parameters": None, "rope_theta": None, "rope_scaling": None}
_default = {"rope_type": "default"}
ROTARY = [
    ("mixtral", {"rope_parameters": _default}), ("mixtral", {}), ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": _default, "full_attention": _default}}), ("gemma3_text", {}),
    ("gemma3_text", {"rope_theta": 50.0}), ("gemma3_text", {"rope_local_base_freq": 50.0}),
    ("gpt_oss", {"rope_scaling": {}}), ("gpt_oss", {"rope_parameters": {}}), ("gpt_oss", {"rope_theta": 5.0}), ("gpt_oss", {}),
    ("gpt_neox", {"rope_parameters": _default}), ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}), ("gpt_neox", {"rotary_pct": 0.5}),
    ("phi", {"rope_parameters": _default}), ("phi", {"rope_scaling": {"type": "linear", "factor": 2.0}}), ("phi", {}),
    ("phi3", {"rope_parameters": _default}), ("smollm3", {"rope_parameters": _default}), ("smollm3", {}), ("llama", {"rope_parameters": _default}),
    ("qwen2", {}), ("qwen3_moe", {"rope_parameters": _default}), ("falcon", {"rope_parameters": _default}), ("olmo2", {"rope_theta": 50.0}),
]  # fmt: skip


@pytest.mark.parametrize("kind, entries", ROTARY)
def test_rotary_defaults(kind, entries, tmp_path):
    """What a file leaves out is what transformers takes: bases, shares and YaRN have defaults that differ by family."""
    import torch
    import transformers

    sizes = {"hidden_size": 64} if kind in ("gpt_neox", "phi") else {}  # heads of 16, of which a quarter is even
    formats.write_family(kind, tmp_path, **sizes)
    config = json.loads(formats.family_json(kind, **sizes)) | NEITHER
    config = {key: value for key, value in (config | entries).items() if value is not None or key not in NEITHER}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = inputs("none")[0][:2]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(ids)).logits.numpy()
    assert error(np.asarray(mj.run(mj.load(tmp_path, tokenizer=False)[0], ids).logits), logits) < 1e-4


def test_tokenizers(tmp_path_factory):
    """Ids of texts with special tokens in them, where transformers reads the folder too."""
    format = FORMATS["tokenizer"]()
    counts = {"ours": 0, "both": 0}

    def check(change):
        folder = written(tmp_path_factory.mktemp("t") / "t", format, change)
        try:
            ours = mj.Tokenizer.from_folder(folder)
        except (ValueError, FileNotFoundError):
            return
        if ours is None:
            return
        counts["ours"] += 1
        try:
            theirs = formats.folders.theirs(folder)
            expected = [theirs(text)["input_ids"] for text in formats.TEXTS]
        except Exception:
            return
        counts["both"] += 1
        assert [ours(text).ids[0].tolist() for text in formats.TEXTS] == expected, change.label

    each(400, mutation(format), check)
    assert counts["both"] > 50, counts


def test_chat_templates(tmp_path_factory):
    """The same text; a template that is refused here may be one that transformers waits for."""
    format = FORMATS["chat template"]()
    counts = {"both": 0}

    def check(change):
        if (
            "**" in change.label or "999" in change.label
        ):  # jinja2 computes constants when it compiles: transformers would not end
            return
        folder = written(tmp_path_factory.mktemp("t") / "t", format, change)
        try:
            text = mj.Tokenizer.from_folder(folder).render(formats.CONVERSATION)
        except (ValueError, FileNotFoundError):
            return
        expected = formats.folders.theirs(folder).apply_chat_template(
            json.loads(json.dumps(formats.CONVERSATION)), tokenize=False, add_generation_prompt=True
        )
        counts["both"] += 1
        assert text == expected, change.label

    each(150, mutation(format), check)
    assert counts["both"] > 20, counts
