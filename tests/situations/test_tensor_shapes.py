"""A tensor of the right size in another arrangement of axes: never taken as it is, but an error that says what was expected."""

import numpy as np
import pytest

import mijax as mj
from mijax.checkpoints.registry import FAMILIES
from mijax.checkpoints.tensors import get
from tests.situations import refused
from tests.situations.checkpoints import copy, set_tensors

TENSORS = {  # of each tensor whose axes are rearranged, a checkpoint and the shape that it has there
    "transformer.h.1.attn.c_attn.weight": ("gpt2", (24, 72)),
    "transformer.h.1.attn.c_attn.bias": ("gpt2", (72,)),
    "transformer.h.1.attn.c_proj.weight": ("gpt2", (24, 24)),
    "model.layers.1.self_attn.q_proj.weight": ("llama_mqa_biases", (24, 24)),
    "model.layers.1.self_attn.k_proj.weight": ("llama_mqa_biases", (8, 24)),
    "model.layers.1.self_attn.v_proj.bias": ("llama_mqa_biases", (8,)),
    "model.layers.1.self_attn.o_proj.weight": ("llama_mqa_biases", (24, 24)),
}


@pytest.mark.parametrize("tensor", TENSORS)
def test_load_a_tensor_in_the_arrangement_of_mijax(tensor, tmp_path):
    """Its axes were never exchanged, so that its numbers would stand in other places."""
    name, shape = TENSORS[tensor]
    folder = copy(tmp_path, name)
    model, _ = mj.load(folder)
    family = FAMILIES["gpt2" if name == "gpt2" else "llama"]
    (weight,) = [w for w in family.weights(model.config) if w.theirs == tensor.replace(".1.", ".{layer}.")]
    parts = [np.asarray(get(model, path))[1] for path in weight.ours]
    arranged = np.stack(parts) if len(parts) > 1 else parts[0]
    text = lambda shape: str(shape).replace("(", r"\(").replace(")", r"\)")
    message = rf"{tensor} has shape {text(arranged.shape)}, expected {text(shape)}, which gives {weight.ours[0]} its"
    set_tensors(folder, lambda t: t | {tensor: arranged})
    with refused(ValueError, message):
        mj.load(folder)
    set_tensors(folder, lambda t: t | {tensor: arranged.reshape(shape)[None]})
    with refused(ValueError, rf"{tensor} has shape \(1, .* expected {text(shape)}"):
        mj.load(folder)
