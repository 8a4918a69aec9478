"""Array types that every floor uses."""

from typing import TypeAlias

from jaxtyping import Array, Bool, Float, Int, Real
from numpy.typing import ArrayLike

Ids: TypeAlias = Int[Array, "batch pos"]
"""Token ids."""

Mask: TypeAlias = Bool[Array, "batch pos"]
"""True where a token is real, False where it is padding."""

Stream: TypeAlias = Float[Array, "batch pos d_model"]
"""The residual stream, or something that is added to it."""

Scores: TypeAlias = Float[Array, "batch head query key"]
"""Attention scores or attention patterns."""

Heads: TypeAlias = Float[Array, "batch pos head d_head"]
"""One vector per position and head."""

Logits: TypeAlias = Float[Array, "batch *pos vocab"]
"""Logits for some positions and some tokens."""

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Heads", "Ids", "Int", "Logits", "Mask", "Real", "Scores", "Stream"]
