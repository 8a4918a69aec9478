"""Compiled functions that call code of the user's, a tap's or a model's: traced as it is now, compiled where that is new."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx

from mijax.programs.convert import Converted, convert, is_array


class JitNow:
    """`equinox.filter_jit` of a function; where an argument says `users_code`, of the program that it is at this call.

    JAX would find the first call's program again by the argument's class, whatever its methods read since.
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self.function: Any = function
        self.jitted: Any = eqx.filter_jit(function)

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives."""
        parts = [part for a in arguments for part in (a if isinstance(a, tuple | list) else (a,))]
        if not any(getattr(part, "users_code", False) for part in parts):
            return self.jitted(*arguments)
        converted = convert(self.function, *arguments, name=self.function.__name__.strip("_"))
        return _call(converted, eqx.filter(arguments, is_array))

    def lower(self, *arguments: Any) -> Any:
        """As `jax.jit` does, for arguments without code of the user's."""
        return self.jitted.lower(*arguments)


@eqx.filter_jit
def _call(converted: Converted, arguments: Any) -> Any:
    return converted(*arguments)
