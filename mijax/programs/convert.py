"""Conversion of a user's function: called afresh at every call of a driver, compiled anew only where it computes something else.

A compiled program keeps what a Python function read when it was traced: outer variables, lists, attributes. JAX looks a
program up by the function's identity, and so would go on with yesterday's numbers. Here the function is traced at each
call. What it computes (`Program`) is compared by its structure, and every array that it reaches is an argument. So
its numbers are those of the call, and nothing is compiled where nothing but arrays changed.

What JAX itself caches is beyond this: functions that the user jitted, and bodies of `scan` at module level.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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

REPEATS = 8
"""From so many programs of one function on that differ in a Python number only, a warning says that each is compiled."""

_interned: "weakref.WeakValueDictionary[Key, Program]" = weakref.WeakValueDictionary()
_variants: dict[int, set[int]] = {}
_without_kept: set[int] = set()
"""Hashes of keys: a key itself may hold what a user's function does."""


class Program:
    """What a function computes, without its numbers: one object for each structure, so that it is compared by identity."""

    def __init__(self, name: str, closed: Any, structure: Any, key: Key):
        own = closed.jaxpr
        about = jex.DebugInfo("program", name, None, None)
        # What it closes over is passed like any input: from jax 0.12 on a jaxpr holds the values of its constants.
        self.jaxpr = jex.Jaxpr([], [*own.constvars, *own.invars], own.outvars, own.eqns, own.effects, about)
        self.name, self.structure, self.key = name, structure, key

    def __call__(self, arrays: Sequence[Array | np.ndarray]) -> Any:
        """The function's result for the arrays that it closes over and those that it is given."""
        inputs = [self._as_traced(variable.aval, x) for variable, x in zip(self.jaxpr.invars, arrays, strict=True)]
        return jax.tree.unflatten(self.structure, jax.core.eval_jaxpr(self.jaxpr, (), *inputs))

    def _as_traced(self, aval: Any, x: Any) -> Any:
        if (aval.shape, aval.dtype) != (jnp.shape(x), jnp.result_type(x)):
            raise AssertionError(f"{self.name} was traced for {aval}, called with {jax.typeof(x)}")
        wanting = tuple(aval.manual_axis_type.varying - _axes_of(x))
        return jax.lax.pcast(x, wanting, to="varying") if wanting else x

    def digest(self) -> str:
        """A checksum that is the same in every process.

        Raises `TypeError` for a program that holds what no checksum can tell, a callback for instance.
        """
        try:
            return digest(self.key)
        except TypeError as error:
            raise TypeError(
                f"{self.name} holds a Python function that no checksum can tell ({error}), so that a saved folder could not be"
                " compared with it: leave `save=` out, or write it in JAX"
            ) from error

    def __repr__(self):
        return f"Program({self.name})"


class Converted(eqx.Module):
    """A function as its program and the arrays that it reaches: `leaves`, those of its own pytree, and `constants`, all others."""

    leaves: list[Any]
    constants: list[Any]
    program: Program = eqx.field(static=True)

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives for `arguments` of the shapes that it was converted for."""
        return self.program([*self.constants, *self.leaves, *_arrays(arguments)])

    @property
    def out(self) -> Any:
        """The shapes and dtypes of the result."""
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.program.jaxpr.outvars]  # pyright: ignore[reportAttributeAccessIssue]
        return jax.tree.unflatten(self.program.structure, shapes)


def convert(function: Callable, *arguments: Any, name: str | None = None) -> Converted:
    """Trace `function` as it is now, for `arguments`, of which arrays and `jax.ShapeDtypeStruct`s are inputs and the rest is fixed.

    A function that is a pytree (an Equinox module, `jax.tree_util.Partial`) has its arrays as inputs. Every other array that
    it reaches, tracers of the caller's transformations included, becomes a constant of the result. Python numbers are part of
    the program.

    Raises `TypeError` where the function keeps a tracer beyond its call, and whatever it raises itself.

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

    def fresh(
        leaves: list[Array], inputs: list[Array]
    ) -> list[Any]:  # JAX finds a trace again by the function's identity
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
    if any(_is_kept(trace, closed) for trace in traces):
        raise TypeError(
            f"{name} keeps an array beyond its call (in a list, an attribute, a cache, the rule of a custom derivative), where it is"
            " no array but a tracer of JAX: activations are kept by capture=, in mijax.run and mijax.generate; other arrays for"
            " later calls are made before the first"
        )
    if has_inner_constants(closed.jaxpr):
        inner = closed
        closed = jax.make_jaxpr(lambda *flat: evaluate(inner.jaxpr, inner.consts, flat))(*leaves, *inputs)
    return Converted(list(leaves), [_on_device(c) for c in closed.consts], _intern(name, closed, structure))


def name_of(function: Any) -> str:
    """What a function is called, in errors."""
    return getattr(function, "__name__", None) or type(function).__name__


def _is_kept(trace: weakref.ref, closed: Any) -> bool:
    """Whether somebody holds a value of a trace that is over."""
    if trace() is None or (_has_rules(closed.jaxpr) and hash(key_of(closed.jaxpr)) in _without_kept):
        return False
    gc.collect()
    alive = trace()
    if alive is None or any(isinstance(holder, jax.core.Tracer) for holder in gc.get_referrers(alive)):
        return alive is not None
    _without_kept.add(hash(key_of(closed.jaxpr)))
    return False


def _has_rules(jaxpr: Any) -> bool:
    """Whether custom derivatives are among its equations: their rules hold the trace that they were made in."""
    return any(
        eqn.primitive.name in RULES or any(map(_has_rules, jex.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns
    )


def _intern(name: str, closed: Any, structure: Any) -> Program:
    key = (structure, key_of(closed.jaxpr))
    program = _interned.get(key)
    if program is None:
        program = _interned[key] = Program(name, closed, structure, key)
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
    """Whether a leaf of a function is one of its inputs: arrays are, Python numbers are part of the program."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_input(x: Any) -> bool:
    return is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _arrays(tree: Any) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def _on_device(constant: Any) -> Array:
    return constant if isinstance(constant, jax.Array) else jnp.asarray(constant)


def for_mesh_axes(convert: Callable[[dict[str, Any]], T], beside: Any) -> T:
    """`convert(keywords)` with the keywords of `jax.ShapeDtypeStruct` that say over which mesh axes an input varies.

    Outside of `shard_map` there are none. Inside, inputs vary over the axes that the arrays of `beside` do, or those that
    the functions close over: these are known once they are traced, for inputs that vary over all axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return convert({})
    keywords = lambda axes: {"sharding": NamedSharding(mesh, PartitionSpec()), "manual_axis_type": _varying(axes)}
    widest = convert(keywords(frozenset(mesh.manual_axes)))
    return convert(keywords(frozenset().union(*map(_axes_of, jax.tree.leaves((beside, widest))))))


def shape_of(x: Any) -> Any:
    """The shape and dtype of an array, and over which mesh axes it varies; anything else is what it is."""
    if not isinstance(x, jax.Array | np.ndarray):
        return x
    varies = (
        {"sharding": jax.typeof(x).sharding, "manual_axis_type": jax.typeof(x).manual_axis_type} if _axes_of(x) else {}
    )
    dtype = x.dtype if isinstance(x, jax.Array) else jax.dtypes.canonicalize_dtype(x.dtype)  # as JAX takes host arrays
    return jax.ShapeDtypeStruct(x.shape, dtype, **varies)


def _axes_of(x: Any) -> frozenset[str]:
    """The mesh axes that an array varies over, inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()


def _varying(axes: frozenset[str]) -> Any:
    return type(jax.typeof(np.float32(0)).manual_axis_type)(varying=axes)
