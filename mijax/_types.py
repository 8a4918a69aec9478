"""Array types that all of mijax uses."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

ArrayLike: TypeAlias = Array | np.ndarray | np.generic | float | int | bool | Sequence[Any]
"""Anything that `numpy.asarray` converts: arrays, numbers, and lists of them."""

Ids: TypeAlias = Int[Array, "batch pos"]
"""Token ids."""

Mask: TypeAlias = Bool[Array, "batch pos"]
"""True where a token is real, False where it is padding."""

Stream: TypeAlias = Float[Array, "batch pos d_model"]
"""The residual stream, or a term that is added to it."""

Asked: TypeAlias = Float[Array, "batch asked d_model"]
"""A `Stream` at those positions where a layer computes more than keys and values: usually all positions."""

Scores: TypeAlias = Float[Array, "batch head query key"]
"""Attention scores or attention patterns."""

Heads: TypeAlias = Float[Array, "batch pos head d_head"]
"""One vector per position and head."""

KVHeads: TypeAlias = Float[Array, "batch key kv_head d_head"]
"""One vector per position and key/value head."""

Logits: TypeAlias = Float[Array, "batch *pos_vocab"]
"""Logits for some positions and some tokens; an axis that a single (0-d) index selects from is dropped."""

__all__ = [
    "Array",
    "ArrayLike",
    "Asked",
    "Bool",
    "Float",
    "Heads",
    "Ids",
    "Int",
    "KVHeads",
    "Logits",
    "Mask",
    "Real",
    "Scores",
    "Stream",
]
