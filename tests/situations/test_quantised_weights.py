"""Weights that are no floats: never their raw numbers, but an error that names the tensor and the quantisation."""

import ml_dtypes
import numpy as np
import pytest

import mijax as mj
from tests.architectures import error
from tests.situations import refused
from tests.situations.checkpoints import copy, logits, set_config, set_tensors, stored_logits

RAW = {"I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "BOOL": bool,
       "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}  # fmt: skip
TENSORS = {
    "gpt2": "transformer.h.1.attn.c_attn.weight",
    "llama_gqa": "model.layers.2.mlp.down_proj.weight",
    "mistral": "model.norm.weight",
}


@pytest.mark.parametrize("stored", RAW)
@pytest.mark.parametrize("name", TENSORS)
def test_load_one_tensor_that_is_not_floating_point(name, stored, tmp_path):
    tensor = TENSORS[name]
    folder = set_tensors(copy(tmp_path, name), lambda t: t | {tensor: t[tensor].astype(RAW[stored])})
    with refused(ValueError, rf"{tensor} is stored as {stored}, which is no floating point"):
        mj.load(folder)


def test_load_a_head_of_integers_beside_a_tied_embedding(tmp_path):
    folder = set_tensors(copy(tmp_path, "gpt2"), lambda t: t | {"lm_head.weight": np.ones((61, 24), np.int8)})
    with refused(ValueError, "lm_head.weight is stored as I8"):
        mj.load(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},  # MLX
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TENSORS)
def test_load_a_config_that_says_quantised(name, entry, tmp_path):
    (key,) = entry
    with refused(ValueError, f"quantised weights are not supported, and the file has {key}="):
        mj.load(set_config(copy(tmp_path, name), **entry))


@pytest.mark.parametrize(
    "dtype, rounding", [(np.float64, 0), (np.float32, 0), (np.float16, 2**-11), (ml_dtypes.bfloat16, 2**-8)]
)
def test_load_floats_of_every_width(dtype, rounding, tmp_path):
    """transformers' logits, up to what rounding the weights does."""
    folder = set_tensors(copy(tmp_path, "llama_gqa"), lambda t: {k: v.astype(dtype) for k, v in t.items()})
    assert error(logits(mj.load(folder)[0]), stored_logits("llama_gqa")) < 1e-4 + 10 * rounding


def test_load_numbers_too_large_for_the_dtype_asked_for(tmp_path):
    folder = set_tensors(copy(tmp_path, "llama_gqa"), lambda t: t | {"model.norm.weight": np.full(24, 1e6, np.float32)})
    with refused(ValueError, "model.norm.weight has values that are not finite in float16"):
        mj.load(folder, dtype="float16")
