"""Compiled functions that call users' code (of a tap or a model): traced at each call, compiled where that is new."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx

from mijax.programs.convert import Converted, convert, is_array


class JitNow:
    """`equinox.filter_jit` of a function that sees changes in what the users' code among its arguments reads.

    Where an argument, or an element of one that is a tuple or list, has a true attribute `users_code`, the function
    is traced at each call (`convert`). JAX would find the program of the first call again by the argument's class,
    even where the methods of that class read other values by then.

    Args:
        function: the function; its arguments are pytrees.
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self.function: Any = function
        self.jitted: Any = eqx.filter_jit(function)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        parts = [part for a in arguments for part in (a if isinstance(a, tuple | list) else (a,))]
        if not any(getattr(part, "users_code", False) for part in parts):
            return self.jitted(*arguments)
        converted = convert(self.function, *arguments, name=self.function.__name__.strip("_"))
        return _call(converted, eqx.filter(arguments, is_array))

    def lower(self, *arguments: Any) -> Any:
        """Lower the function, as the `lower` of `jax.jit` does.

        Args:
            arguments: arguments without users' code.
        """
        return self.jitted.lower(*arguments)


@eqx.filter_jit
def _call(converted: Converted, arguments: Any) -> Any:
    return converted(*arguments)
