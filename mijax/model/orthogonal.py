"""Orthogonal matrices that users give: checked where their values are known, NaN inside a trace."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array
from mijax.model.numerics import accumulator, einsum
from mijax.model.tokens import is_concrete


def orthogonal(rotation: Any, shape: tuple[int, ...], dtype: Any, parameters: Any) -> Array:
    """Check that matrices are orthogonal, as far as rounding to a model's parameters allows.

    Args:
        rotation: the matrices, as the user gave them.
        shape: the shape that they must have, the last two axes of equal size.
        dtype: the dtype of the model's activations.
        parameters: the dtype of its parameters.

    Returns:
        The matrices in `dtype`; NaN where a trace finds them not orthogonal.

    Raises:
        TypeError: for what is no real numbers.
        ValueError: for another shape, and for matrices that are not orthogonal.

    >>> orthogonal(np.eye(2)[::-1], (2, 2), jnp.float32, jnp.float32).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    x: Any = rotation if isinstance(rotation, jax.Array) else np.asarray(rotation)
    if not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)):
        raise TypeError(f"rotation must be real numbers, given dtype {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"rotation must have shape {shape}, given {x.shape}")
    tolerance = _tolerance(parameters, shape[-1])
    if is_concrete(x):
        exact = np.asarray(x, np.float64)
        deviation = np.abs(exact @ exact.swapaxes(-1, -2) - np.eye(shape[-1])).max(initial=0.0)
        if not deviation <= tolerance:
            raise ValueError(
                f"rotation must be orthogonal: rotation @ rotation.T differs from the identity by up to {deviation:.2g}"
            )
        return jnp.asarray(x).astype(dtype)
    x = x.astype(dtype)
    products = einsum("...ij,...kj->...ik", x, x)
    deviations = jnp.abs(products - jnp.broadcast_to(jnp.eye(shape[-1], dtype=x.dtype), shape))
    return jnp.where(jnp.max(deviations, initial=0.0) <= tolerance, x, jnp.nan)


def _tolerance(dtype: Any, size: int) -> float:
    """How far from orthogonal matrices may be for a model of this dtype: what rounding leaves of those made in it.

    They are computed in at least float32, and then rounded to the dtype.
    """
    computed, stored = (float(jnp.finfo(d).eps) for d in (accumulator(dtype), dtype))
    return max(2 * stored, 16 * size**0.5 * computed)
