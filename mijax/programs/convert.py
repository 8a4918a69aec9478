"""Conversion of a user's function to a program: traced at every call of a driver, compiled where the program is new.

A compiled program keeps the values that a Python function read when it was traced: outer variables, lists,
attributes. JAX looks a compiled program up by the function's identity, and so would use outdated values. Here the
function is traced at each call. The result of the trace (`Program`) is compared by its structure, and every array
that the function reaches is an argument of the program. So the values are those of the call, and nothing is
compiled where only arrays changed.

JAX's caches are not affected: functions that the user jitted, and bodies of `scan` at module level, keep their old
values.
"""

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mijax._types import Array
from mijax.programs.hoist import evaluate, has_inner_constants
from mijax.programs.key import RULES, Key, digest, key_of, without_numbers

T = TypeVar("T")

Shapes: TypeAlias = Any
"""The shapes and dtypes of a result: a pytree of `jax.ShapeDtypeStruct`, of the result's structure."""

REPEATS = 8
"""At so many programs of one function that differ in Python numbers only, a warning says that each is compiled."""

_interned: "weakref.WeakValueDictionary[Key, Program]" = weakref.WeakValueDictionary()
_variants: dict[int, set[int]] = {}
_without_kept: set[int] = set()
"""Hashes of the keys of programs whose trace outlives the call without a leaked tracer.

(Hashes only, here and in `_variants`: a key may keep objects of a user's function alive.)
"""


class Program:
    """What a function computes, as a jaxpr whose arrays are all arguments.

    There is one object for each structure, so that programs are compared by identity.

    Args:
        name: the name of the function, for errors.
        closed: its `ClosedJaxpr`.
        structure: the tree structure of its result.
        key: the structure of the program as a value (`key.key_of`), with `structure`.
    """

    def __init__(self, name: str, closed: Any, structure: Any, key: Key):
        jaxpr = closed.jaxpr
        about = jex.DebugInfo("program", name, None, None)
        # Constants become inputs: from jax 0.12 on a jaxpr holds the values of its constants.
        self.jaxpr: jex.Jaxpr = jex.Jaxpr(
            [], [*jaxpr.constvars, *jaxpr.invars], jaxpr.outvars, jaxpr.eqns, jaxpr.effects, about
        )
        self.name: str = name
        self.structure: Any = structure
        self.key: Key = key

    def __call__(self, arrays: Sequence[Array | np.ndarray]) -> Any:
        """The function's result.

        Args:
            arrays: the constants that the function closes over, the arrays of its pytree, and those of its arguments,
                in one flat list.
        """
        inputs = [self._as_traced(variable.aval, x) for variable, x in zip(self.jaxpr.invars, arrays, strict=True)]
        return jax.tree.unflatten(self.structure, jax.core.eval_jaxpr(self.jaxpr, (), *inputs))

    def _as_traced(self, aval: Any, x: Any) -> Any:
        if (aval.shape, aval.dtype) != (jnp.shape(x), jnp.result_type(x)):
            raise AssertionError(f"{self.name} was traced for {aval}, called with {jax.typeof(x)}")
        missing = tuple(aval.manual_axis_type.varying - mesh_axes_of(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    def digest(self) -> str:
        """A checksum that is the same in every process.

        Raises:
            TypeError: for a program with a part that is known only by its identity in this process, such as a
                callback.
        """
        try:
            return digest(self.key)
        except TypeError as error:
            raise TypeError(
                f"{self.name} holds a Python function that no checksum can tell ({error}), so that a saved folder could not be"
                " compared with it: leave `save=` out, or write it in JAX"
            ) from error

    def __repr__(self) -> str:
        return f"Program({self.name})"


class Converted(eqx.Module):
    """A function as its program and the arrays that it reaches.

    Attributes:
        leaves: the arrays of the function's own pytree.
        constants: all other arrays that it reaches.
        program: what it computes.
    """

    leaves: list[Any]
    constants: list[Any]
    program: Program = eqx.field(static=True)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result.

        Args:
            arguments: pytrees of the structure, shapes and dtypes for which the function was converted.
        """
        return self.program([*self.constants, *self.leaves, *_arrays(arguments)])

    @property
    def out(self) -> Shapes:
        """The shapes and dtypes of the result."""
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.program.jaxpr.outvars]  # pyright: ignore[reportAttributeAccessIssue]
        return jax.tree.unflatten(self.program.structure, shapes)


def convert(function: Callable, *arguments: Any, name: str | None = None) -> Converted:
    """Trace `function` with the values that it reads at this call.

    A function that is a pytree (an Equinox module, `jax.tree_util.Partial`) has its arrays as inputs. Every other
    array that it reaches, tracers of the caller's transformations included, becomes a constant of the result.
    Python numbers are part of the program.

    Args:
        function: the function.
        arguments: what it is called with. Arrays and `jax.ShapeDtypeStruct`s are inputs; all else is part of the
            program.
        name: its name in errors; by default that of the function.

    Returns:
        The function as its program and the arrays that it reaches.

    Raises:
        TypeError: where the function keeps a tracer beyond its call.
        Exception: whatever the function itself raises.

    >>> scale = 2.0
    >>> function = lambda x: scale * x
    >>> before = convert(function, jnp.ones(3))
    >>> scale = 3.0
    >>> after = convert(function, jnp.ones(3))
    >>> before(jnp.ones(3)).tolist(), after(jnp.ones(3)).tolist(), before.program is after.program
    ([2.0, 2.0, 2.0], [3.0, 3.0, 3.0], False)
    """
    name = name_of(function) if name is None else name
    dynamic, static = eqx.partition(function, is_array)
    leaves, treedef = jax.tree.flatten(dynamic)
    shapes, form = jax.tree.flatten(arguments)
    fixed = [None if _is_input(leaf) else leaf for leaf in shapes]
    structure: Any = None
    traces: list[weakref.ref] = []

    # A new function for each call: JAX caches traces by the function's identity.
    def fresh(leaves: list[Array], inputs: list[Array]) -> list[Any]:
        nonlocal structure
        traces.extend(
            weakref.ref(x._trace) for x in jax.tree.leaves((leaves, inputs))[:1] if isinstance(x, jax.core.Tracer)
        )
        values = iter(inputs)
        filled = jax.tree.unflatten(form, [next(values) if leaf is None else leaf for leaf in fixed])
        result = eqx.combine(jax.tree.unflatten(treedef, leaves), static)(*filled)
        flat, structure = jax.tree.flatten(result)
        return flat

    inputs = [leaf for leaf in shapes if _is_input(leaf)]
    closed = jax.make_jaxpr(fresh)(leaves, inputs)
    traced = closed.jaxpr
    key = functools.cache(lambda: key_of(traced))  # where it is needed: it reads the values of inner arrays
    if any(_is_kept(trace, traced, key) for trace in traces):
        raise TypeError(
            f"{name} keeps an array beyond its call (in a list, an attribute, a cache, the rule of a custom derivative), where it is"
            " no array but a tracer of JAX: activations are kept by capture=, in mijax.run and mijax.generate; other arrays for"
            " later calls are made before the first"
        )
    if has_inner_constants(traced):
        inner = closed
        closed = jax.make_jaxpr(lambda *flat: evaluate(inner.jaxpr, inner.consts, flat))(*leaves, *inputs)
    whole = key() if closed.jaxpr is traced else key_of(closed.jaxpr)
    return Converted(list(leaves), [_on_device(c) for c in closed.consts], _intern(name, closed, (structure, whole)))


def name_of(function: Any) -> str:
    """Name a function, for error messages.

    Args:
        function: any callable.

    Returns:
        Its `__name__`, or the name of its class.

    >>> name_of(len), name_of(jax.tree_util.Partial(len))
    ('len', 'Partial')
    """
    return getattr(function, "__name__", None) or type(function).__name__


def _is_kept(trace: weakref.ref, jaxpr: Any, key: Callable[[], Key]) -> bool:
    """Whether a tracer of a finished trace is still referred to from outside."""
    if trace() is None or (_has_rules(jaxpr) and hash(key()) in _without_kept):
        return False
    gc.collect()
    alive = trace()
    if alive is None or any(isinstance(holder, jax.core.Tracer) for holder in gc.get_referrers(alive)):
        return alive is not None
    _without_kept.add(hash(key()))
    return False


def _has_rules(jaxpr: Any) -> bool:
    """Whether some equation has a custom derivative: its rule refers to the trace in which it was made."""
    return any(
        eqn.primitive.name in RULES or any(map(_has_rules, jex.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns
    )


def _intern(name: str, closed: Any, key: Key) -> Program:
    """The program, one for equal keys: the structure of its result, and that of its jaxpr."""
    program = _interned.get(key)
    if program is None:
        program = _interned[key] = Program(name, closed, key[0], key)
        _tell_repeats(name, key)
    return program


def _tell_repeats(name: str, key: Key) -> None:
    variants = _variants.setdefault(hash((name, without_numbers(key))), set())
    variants.add(hash(key))
    if len(variants) == REPEATS:
        warnings.warn(
            f"{name} was compiled {REPEATS} times, each time with other Python numbers: where it reads arrays in their place"
            " (jax.numpy.asarray(number)), new numbers compile nothing",
            stacklevel=2,
        )


def is_array(x: Any) -> bool:
    """Tell whether a leaf of a function's pytree is an input: arrays are, Python numbers are part of the program.

    Args:
        x: the leaf.

    Returns:
        Whether it is an array or a scalar of JAX or NumPy.

    >>> is_array(np.zeros(2)), is_array(2.0)
    (True, False)
    """
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_input(x: Any) -> bool:
    return is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _arrays(tree: Any) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def _on_device(constant: Any) -> Array:
    return constant if isinstance(constant, jax.Array) else jnp.asarray(constant)


def for_mesh_axes(convert: Callable[[dict[str, Any]], T], beside: Any) -> T:
    """Convert functions for inputs that vary over the right mesh axes inside `shard_map`.

    Outside of `shard_map` inputs vary over no mesh axis. Inside, they vary over the axes over which the arrays of
    `beside` vary, and over those over which the arrays vary that the functions close over. The latter are known
    after a first conversion, for inputs that vary over all axes.

    Args:
        convert: called with the keywords of `jax.ShapeDtypeStruct` that say over which mesh axes an input varies;
            returns a pytree of converted functions.
        beside: a pytree of the arrays from which the inputs are computed.

    Returns:
        The result of `convert`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return convert({})
    keywords = lambda axes: {"sharding": NamedSharding(mesh, PartitionSpec()), "manual_axis_type": _varying(axes)}
    widest = convert(keywords(frozenset(mesh.manual_axes)))
    return convert(keywords(frozenset().union(*map(mesh_axes_of, jax.tree.leaves((beside, widest))))))


def shape_of(x: T) -> T | jax.ShapeDtypeStruct:
    """Describe an array by its shape, its dtype, and the mesh axes over which it varies.

    Args:
        x: the array, or any other value.

    Returns:
        The `jax.ShapeDtypeStruct` of an array; any other value unchanged.

    >>> shape_of(np.zeros((2, 3), np.float32)), shape_of("text")
    (ShapeDtypeStruct(shape=(2, 3), dtype=float32), 'text')
    """
    if not isinstance(x, jax.Array | np.ndarray):
        return x
    varies = (
        {"sharding": jax.typeof(x).sharding, "manual_axis_type": jax.typeof(x).manual_axis_type}
        if mesh_axes_of(x)
        else {}
    )
    # A host array has the dtype that JAX will give it.
    dtype = x.dtype if isinstance(x, jax.Array) else jax.dtypes.canonicalize_dtype(x.dtype)
    return jax.ShapeDtypeStruct(x.shape, dtype, **varies)


def mesh_axes_of(x: Any) -> frozenset[str]:
    """The mesh axes over which an array varies, inside `shard_map`.

    Args:
        x: any value.

    Returns:
        The names of the axes; none for anything but a JAX array.
    """
    return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()


def _varying(axes: frozenset[str]) -> Any:
    return type(jax.typeof(np.float32(0)).manual_axis_type)(varying=axes)
