"""Compiled functions that call users' code (of a tap or a model): traced at each call, compiled where that is new."""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jaxlib.version

from mijax.programs.convert import Converted, convert, is_array

Lowered: TypeAlias = Any
"""What the `lower` of `equinox.filter_jit` returns, a class that Equinox does not export."""

How: TypeAlias = Literal["for_speed", "quickly", "in_little_memory"]
"""What a program is compiled for."""

_OPTIONS: dict[How, dict[str, Any]] = {
    "for_speed": {},
    # on a CPU a program compiles in a third of the time, and its loops run several times slower
    "quickly": {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    | ({"xla_cpu_use_fusion_emitters": False} if jaxlib.version.__version_info__ < (0, 11) else {}),
    # on a CPU attribution whose layers are computed again takes 12 to 21 % less memory, and up to 7 % more time
    "in_little_memory": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}


class UsersCode:
    """The base of what users subclass: a class is taken for a user's unless its own body says `users_code = False`.

    Attributes:
        users_code: whether methods of the class may read what changes between two calls.
    """

    users_code = True

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.users_code = vars(cls).get("users_code", True)  # not inherited: a subclass may read anything


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
        self.jitted: dict[How, Any] = _jitted(function)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return self.compiled("for_speed")(*arguments)

    def compiled(self, how: How) -> Callable:
        """The function, compiled in one of several ways.

        Args:
            how: `"quickly"` is for so little work, on a CPU, that the program takes no time either way. Only what is
                compiled `"for_speed"` can be called in another `jax.jit`.

        Returns:
            A function of the same arguments.
        """
        return functools.partial(self._called, how)

    def _called(self, how: How, *arguments: Any) -> Any:
        parts = [part for a in arguments for part in (a if isinstance(a, tuple | list) else (a,))]
        if not any(getattr(part, "users_code", False) for part in parts):
            return self.jitted[how](*arguments)
        converted = convert(self.function, *arguments, name=self.function.__name__.strip("_"))
        return _call[how](converted, eqx.filter(arguments, is_array))

    def lower(self, *arguments: Any, how: How = "for_speed") -> Lowered:
        """Lower the function, as the `lower` of `jax.jit` does.

        Args:
            arguments: arguments without users' code.
            how: as in `compiled`.
        """
        return self.jitted[how].lower(*arguments)


def _jitted(function: Callable) -> dict[How, Any]:
    return {
        how: eqx.filter_jit(function, compiler_options=options) if options else eqx.filter_jit(function)  # pyright: ignore[reportCallIssue]
        for how, options in _OPTIONS.items()
    }


def _apply(converted: Converted, arguments: Any) -> Any:
    return converted(*arguments)


_call = _jitted(_apply)
