"""Weights in MXFP4, as GPT-OSS is published: numbers of four bits, 32 of which share a power of two.

OCP Microscaling Formats (MX) Specification, version 1.0. A matrix of experts is stored transposed, as `NAME_blocks`,
`[expert, outputs, block, 16]` with two numbers in a byte, and `NAME_scales`, `[expert, outputs, block]`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mijax.checkpoints.contents import Made, Stored, Tensors, derived

_NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def is_mxfp4(quantisation: Any) -> bool:
    """Whether a config's `quantization_config` says that experts are in MXFP4.

    Args:
        quantisation: the entry.
    """
    return isinstance(quantisation, Mapping) and quantisation.get("quant_method") == "mxfp4"


def unpacked(tensors: Tensors, source: str) -> Tensors:
    """A checkpoint whose tensors in MXFP4 are read as float32, under their names.

    Args:
        tensors: the checkpoint.
        source: its name in error messages.

    Returns:
        The checkpoint without the blocks and scales.

    Raises:
        ValueError: for blocks without scales, scales without blocks, and shapes that do not belong together.
    """
    names = {name.removesuffix(end) for name in tensors.stored for end in ("_blocks", "_scales") if name.endswith(end)}
    packed = {f"{name}{end}" for name in names for end in ("_blocks", "_scales")}
    missing = sorted(name for name in packed if tensors.stored.get(name, Stored("", ())).dtype != "U8")
    if missing:
        raise ValueError(f"{source} says that it is in MXFP4, and does not hold {', '.join(missing[:8])} as U8")

    def entry_of(name: str) -> Made:
        blocks, scales = tensors.stored[f"{name}_blocks"].shape, tensors.stored[f"{name}_scales"].shape
        if len(blocks) != 4 or blocks[-1] != 16 or scales != blocks[:-1]:
            raise ValueError(
                f"{source}: {name}_blocks {blocks} and {name}_scales {scales} must be [expert, outputs, block, 16]"
                " and [expert, outputs, block]"
            )
        return Made((blocks[0], blocks[2] * 32, blocks[1]), functools.partial(read, name))

    def read(name: str) -> np.ndarray:
        blocks, scales = tensors.read(f"{name}_blocks"), tensors.read(f"{name}_scales")
        numbers = np.stack([_NUMBERS[blocks & 15], _NUMBERS[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
        numbers *= scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]
        return numbers.reshape(*blocks.shape[:2], -1).swapaxes(-1, -2)

    return derived(tensors, {name: entry_of(name) for name in names}, packed)
