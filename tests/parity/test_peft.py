"""`mj.load(..., adapter=)` against PEFT on CPU torch, which applies the adapter beside the weights."""

import pytest

import mijax as mj
from tests.architectures import error
from tests.parity.test_families import outputs
from tests.reference.families import make
from tests.reference.tiny_models import inputs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LINEAR = {"target_modules": "all-linear"}
ADAPTERS = {  # family, variant, arguments of LoraConfig
    "GPT-2: maps as [inputs, outputs], biases": ("gpt2", 0, {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "norms and the unembedding trained whole": ("llama", 0, LINEAR | {"modules_to_save": ["lm_head", "norm"]}),
    "ranks and scales by module": (
        "qwen3", 0, LINEAR | {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 5}, "alpha_pattern": {"^model.layers.1": 11}},
    ),
    "rank-stabilised scale": ("phi3", 0, LINEAR | {"use_rslora": True}),
    "heads interleaved in one map": ("gpt_neox", 0, LINEAR),
    "an embedding": ("mistral", 0, {"target_modules": ["embed_tokens", "q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter(case, tmp_path):
    """float32, logits at 1e-4 relative, as the families themselves; the adapter moves them by far more."""
    import peft
    import torch

    family, variant, arguments = ADAPTERS[case]
    model = make(family, variant)
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **arguments)).eval()
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
            if name.endswith("norm.weight"):
                parameter.data += 1
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = mj.load(tmp_path / "base", adapter=tmp_path / "adapter")
    ids, mask = inputs("none")
    expected, _ = outputs(theirs, ids, mask)
    assert error(mj.run(ours, ids).logits, expected) < 1e-4
    assert error(mj.run(mj.load(tmp_path / "base")[0], ids).logits, expected) > 1e-2
    assert ours.name == "base with adapter"
