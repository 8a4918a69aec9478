"""Seven prompts of different lengths, padded, a small model, and how much memory lets how many of the prompts run together."""

import re

import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, random_model

LENGTHS = np.array([4, 3, 5, 4, 3, 5, 4])
RNG = np.random.default_rng(0)
IDS, OTHERS = RNG.integers(1, 19, (2, 7, 5))
MASK = np.arange(5) >= 5 - LENGTHS[:, None]
ANSWERS = RNG.integers(0, 19, (2, 7))
METRIC = mj.metrics.logit_diff(*ANSWERS)


def small_model() -> mj.Transformer:
    """Grouped queries, rotary positions, no parameter zero."""
    return random_model(ARCHITECTURES["llama_gqa"])


def prompts(ids: np.ndarray = IDS) -> mj.Tokens:
    """The batch, padded on the left."""
    return mj.Tokens(ids, MASK)


def bytes_of_one(call) -> int:
    """What the smallest plan takes: told by the error where nothing fits."""
    with pytest.raises(ValueError, match="one cell takes about") as caught:
        call(memory=1)
    return int(re.search(r"takes about ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
