"""The matrix product that the whole model uses, and the dtypes of its inputs and output."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def accumulator(dtype: Any) -> jnp.dtype:
    """The dtype of every activation of a model whose parameters have `dtype`: at least float32.

    Args:
        dtype: a floating point dtype.

    Returns:
        `dtype` where it has more than 32 bits, float32 otherwise.

    >>> accumulator(jnp.bfloat16), accumulator(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def einsum(spec: str, x: Float[Array, "..."], w: Float[Array, "..."], dtype: Any = None) -> Float[Array, "..."]:
    """Multiply in the dtype of the parameters, and accumulate in at least float32.

    float32 means float32 on every device, although GPUs and TPUs by default round it to fewer bits;
    `jax.default_matmul_precision(...)` asks for another precision.

    Args:
        spec: the subscripts, as in `jax.numpy.einsum`.
        x: the left operand.
        w: the right operand, usually parameters.
        dtype: the dtype to which both operands are converted; by default that of `w`.

    Returns:
        The product, of dtype `accumulator(dtype)`.
    """
    dtype = jnp.dtype(dtype or w.dtype)
    requested = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    precision = None if requested else jax.lax.Precision.HIGHEST
    product = lambda x, w: jnp.einsum(spec, x, w, precision=precision, preferred_element_type=accumulator(dtype))
    x, w = x.astype(dtype), w.astype(dtype)
    if dtype == accumulator(dtype):
        return product(x, w)
    # XLA's CPU backend has no product of bfloat16 into float32; the product of the widened operands is the same.
    widened = lambda x, w: product(x.astype(accumulator(dtype)), w.astype(accumulator(dtype)))
    return jax.lax.platform_dependent(x, w, cpu=widened, default=product)
