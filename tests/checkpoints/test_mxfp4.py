"""GPT-OSS with experts in MXFP4, in a Hugging Face folder and in a GGUF file."""

import json

import numpy as np
import pytest
import safetensors.numpy

import mijax as mj
from mijax.checkpoints.contents import Stored, Tensors
from mijax.checkpoints.mxfp4 import unpacked
from tests.architectures import error
from tests.situations import refused

DTYPES = {"uint8": "U8", "float32": "F32", "int8": "I8"}


def of(tensors):
    stored = {name: Stored(DTYPES[str(x.dtype)], x.shape) for name, x in tensors.items()}
    return unpacked(Tensors(stored, tensors.__getitem__), "x")


def test_a_block_by_hand():
    """E2M1: a sign, two bits of exponent, one of mantissa; the low half of a byte comes first; the scale is 2^(byte - 127)."""
    blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.array([[[127], [128]]], np.uint8)
    blocks[0, 0, 0] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, *[0] * 8]
    blocks[0, 1, 0, 0] = 0x7F
    tensors = of({"W_blocks": blocks, "W_scales": scales, "b": np.ones(2, np.float32)})
    assert tensors.stored == {"W": ("F32", (1, 32, 2)), "b": ("F32", (2,))}
    expected = np.zeros((1, 32, 2), np.float32)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected[0, :16, 0] = [*positive, *(-x for x in positive)]
    expected[0, :2, 1] = [-12, 12]
    assert (tensors.read("W") == expected).all() and (tensors.read("b") == 1).all()


def test_a_scale_that_is_not_a_number_is_nan():
    tensors = of({"W_blocks": np.zeros((1, 1, 1, 16), np.uint8), "W_scales": np.full((1, 1, 1), 255, np.uint8)})
    assert np.isnan(tensors.read("W")).all()


def test_blocks_that_do_not_fit():
    blocks = np.zeros((1, 2, 1, 16), np.uint8)
    with refused(ValueError, "does not hold W_scales as U8"):
        of({"W_blocks": blocks})
    with refused(ValueError, "does not hold W_scales as U8"):
        of({"W_blocks": blocks, "W_scales": np.zeros((1, 2, 1), np.int8)})
    with refused(ValueError, r"W_blocks \(1, 2, 1, 16\) and W_scales \(1, 3, 1\) must be"):
        of({"W_blocks": blocks, "W_scales": np.zeros((1, 3, 1), np.uint8)})


def _of_torch():
    """A tiny GPT-OSS of torch whose experts are numbers that MXFP4 has; and their blocks and scales, by name."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from tests.reference.gguf_models import CASES, make

    sizes = {"hidden_size": 32, "intermediate_size": 32}
    case = CASES["gpt_oss"]._replace(arguments=CASES["gpt_oss"].arguments | sizes)
    theirs, packed, rng = make(case), {}, np.random.default_rng(0)
    for name, parameter in theirs.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = parameter.shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(123, 127, blocks.shape[:-1], np.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            whole = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
            parameter.data = whole
    return case, theirs, packed


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_folder_gives_the_logits_of_transformers(tmp_path):
    """Whose own reading of blocks and scales is the reference: 1e-4 of the largest logit, in float32."""
    from tests.parity.test_families import outputs
    from tests.reference.tiny_models import inputs

    _, theirs, packed = _of_torch()
    theirs.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    whole = {name.rpartition("_")[0] for name in packed}
    rest = {name: x for name, x in safetensors.numpy.load_file(file).items() if name not in whole}
    safetensors.numpy.save_file(rest | packed, file)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids, mask = inputs("none")
    ours, _ = mj.load(tmp_path)
    assert error(mj.run(ours, ids).logits, outputs(theirs, ids, mask)[0]) < 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_gguf_file_gives_the_logits_of_transformers(tmp_path):
    from tests.parity.test_families import outputs
    from tests.reference.gguf_models import write
    from tests.reference.tiny_models import inputs

    case, theirs, _ = _of_torch()
    path = write(case, theirs, tmp_path, quantised="MXFP4")
    ids, mask = inputs("none")
    ours, _ = mj.load(path, tokenizer=False)
    assert error(mj.run(ours, ids).logits, outputs(theirs, ids, mask)[0]) < 1e-4
