"""Checks of users' arguments that many functions take."""

import operator
from numbers import Real
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


def whole_number(name: str, value: Any, least: int | None = 0) -> int:
    """Convert an argument to a Python integer.

    Args:
        name: what messages call it.
        value: the argument.
        least: the smallest number that is allowed; `None` for no limit.

    Returns:
        The integer.

    Raises:
        TypeError: for anything but one whole number whose value is known; a boolean is none.
        ValueError: for a number below `least`.

    >>> whole_number("draws", np.int64(10))
    10
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        when = " that is known before anything is compiled" if isinstance(value, jax.core.Tracer) else ""
        raise TypeError(f"{name} must be a whole number{when}, given {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, given {number}")
    return number


def bytes_of(memory: int | float | None) -> int | None:
    """Convert the argument `memory` of a driver.

    Args:
        memory: a number of bytes, or `None`.

    Returns:
        The same as an integer.

    Raises:
        TypeError: for anything that is no number.
        ValueError: for a number that is not positive.
    """
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, Real):
        raise TypeError(f"memory must be a number of bytes, given {memory!r}")
    if not 0 < memory < 2**63:
        raise ValueError(f"memory must be a number of bytes over 0, given {memory!r}")
    return int(memory)


def check_flag(value: Any, label: str) -> bool:
    """Check a boolean argument: `"false"` would be read as true.

    Args:
        value: the argument.
        label: what the message calls it.

    Returns:
        The value.

    Raises:
        TypeError: for anything but a boolean.

    >>> check_flag(np.True_, "special")
    True
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{label} must be True or False, given {value!r}")
    return bool(value)


def check_key(key: Any) -> None:
    """Check that a value is one random key.

    Args:
        key: `jax.random.key(seed)`, or the older array of two numbers.

    Raises:
        TypeError: for anything else, a seed or several keys among them.
    """
    is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_raw = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1
    if not (is_raw or (is_typed and key.ndim == 0)):
        shown = f"an array {key.dtype}{list(key.shape)}" if isinstance(key, jax.Array | np.ndarray) else repr(key)
        raise TypeError(f"key must be one random key, jax.random.key(0) say, given {shown}")


def with_known_values(tree: T, rng: np.random.Generator) -> T:
    """Put random arrays in place of those that are being traced, for a check of what a function does with any values.

    Args:
        tree: any pytree.
        rng: NumPy's random generator.

    Returns:
        The tree; floats are normal, integers 0, and booleans true.
    """

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, leaf.dtype == bool, leaf.dtype)

    return jax.tree.map(known, tree)


def check_known(name: str, tree: Any) -> None:
    """Check that a function which plans on the host is not called inside `jax.jit`, `vmap` or `grad`.

    Args:
        name: the name of the function.
        tree: a pytree of its arguments.

    Raises:
        TypeError: where an array is being traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{name} plans its runs by values, which are not known inside jax.jit, vmap, grad and the like: call it outside of them"
            " (for several models, once for each); mijax.run, generate and gradients can stand inside"
        )
