"""Mixtures of experts (Shazeer et al. 2017): how many there are, and which of them each token uses."""

import dataclasses

import jax
import jax.numpy as jnp

from mijax._types import Array, Float
from mijax.model.fields import check_fields


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of a layer's MLP.

    A router scores the experts for each token; the token uses the `top_k` best, and the output is the sum of theirs,
    weighted by the softmax of the scores.

    Args:
        n: the number of experts.
        top_k: the number of experts that a token uses.
        normalise: whether the weights of these experts are made to sum to 1; otherwise they are those of a softmax over
            all experts.
        router_bias: whether the router has a bias.
        shared: number of neurons of a further MLP that all tokens use, whose output is added; 0 for none.
        shared_gate: whether that output is multiplied by the sigmoid of a projection of the stream (Qwen2-MoE).
        d_mlp: number of neurons of each expert; 0 for the `d_mlp` of the config.

    Raises:
        ValueError: naming every invalid field.

    >>> Experts(8, top_k=2).normalise
    True
    """

    n: int
    top_k: int
    normalise: bool = True
    router_bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    d_mlp: int = 0  # 0: that of the config

    def __post_init__(self) -> None:
        """Check all fields."""
        faults = list(check_fields(self).values())
        if not faults and self.top_k > self.n:
            faults.append(f"top_k={self.top_k} must be at most n={self.n}")
        if not faults and self.shared_gate and not self.shared:
            faults.append("shared_gate=True needs shared")
        if faults:
            raise ValueError("invalid Experts: " + "; ".join(faults))

    def weights(self, logits: Float[Array, "batch pos expert"]) -> Float[Array, "batch pos expert"]:
        """The weight of each expert's output, by the router's logits.

        Args:
            logits: the scores of the experts.

        Returns:
            `top_k` weights for each token, and zeros; NaN for a token with a logit of NaN.
        """
        weights = jax.nn.softmax(logits, axis=-1)
        _, best = jax.lax.top_k(logits, self.top_k)
        used = jnp.any(best[..., None] == jnp.arange(self.n, dtype=best.dtype)[None, None, None], axis=-2)
        # Where all are used, none is cut: a weight of NaN stays.
        weights = jnp.where(used | jnp.isnan(weights), weights, 0.0)
        return weights / jnp.sum(weights, axis=-1, keepdims=True) if self.normalise else weights
