"""The structure of a program as a value: equal for programs that compute the same from the same inputs."""

import dataclasses
import enum
import hashlib
import importlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

LIBRARIES = ("jax", "jaxlib", "numpy", "mijax", "equinox", "optax")
"""Packages whose functions and classes are identified by name: the package's version decides what a name means."""

Key = Any
"""Nested tuples of hashable values."""


class UnknownError(TypeError):
    """Raised for a part of a program that is known only by its identity in this process."""


class ById:
    """A hashable wrapper of an object that equals only wrappers of the same object.

    Args:
        value: the object.
    """

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and other.value is self.value


def key_of(jaxpr: Any, constants: Sequence[Any] = ()) -> Key:
    """Write the structure of a jaxpr as a hashable value: variables are numbered, nested jaxprs are included.

    The text of a jaxpr cannot serve as a key: it leaves out the constants of nested jaxprs, and prints functions as
    addresses. A `ClosedJaxpr` hashes by identity. Objects that cannot be compared, such as callbacks, enter by
    identity.

    Args:
        jaxpr: the jaxpr.
        constants: the constants of a nested jaxpr, which enter by value.

    Returns:
        The key; jaxprs of equal keys compute the same from the same inputs.
    """
    numbers: dict[Any, int] = {}
    number = lambda v: numbers.setdefault(v, len(numbers))
    atom = lambda a: _literal(a) if isinstance(a, jex.Literal) else numbers[a]
    variables = lambda of: tuple((number(v), v.aval) for v in of)
    inputs = variables((*jaxpr.constvars, *jaxpr.invars))
    equations = tuple(
        (eqn.primitive, tuple(map(atom, eqn.invars)), _context(eqn), _params(eqn), variables(eqn.outvars))
        for eqn in jaxpr.eqns
    )
    return inputs, equations, tuple(map(atom, jaxpr.outvars)), tuple(map(_value, constants))


def digest(key: Key) -> str:
    """Compute a checksum of a key that is the same in every process.

    Args:
        key: nested tuples of hashable values.

    Returns:
        A hexadecimal SHA-256 digest.

    Raises:
        UnknownError: where a part of the key is known only by its identity in this process.

    >>> digest(("a", 1)) == digest(("a", 1)), digest(("a", 1)) == digest(("a", 2))
    (True, False)
    """
    return hashlib.sha256(text_of(key).encode()).hexdigest()


def without_numbers(key: Key) -> Key:
    """Leave every literal number out of a key.

    Args:
        key: nested tuples, as `key_of` returns them.

    Returns:
        The key without numbers: equal for programs that differ in Python numbers only.

    >>> without_numbers(("mul", ("literal", "float", 2.0), "x"))
    ('mul', ('number',), 'x')
    """
    if isinstance(key, tuple):
        return ("number",) if key[:1] == ("literal",) else tuple(map(without_numbers, key))
    return key


def apply(eqn: Any, arguments: Sequence[Any]) -> list[Any]:
    """Evaluate one equation of a jaxpr.

    Args:
        eqn: the equation.
        arguments: the values of those of its inputs that are variables (not literals).

    Returns:
        The values of its outputs.
    """
    inputs = dict(zip((v for v in eqn.invars if not isinstance(v, jex.Literal)), arguments))
    alone = jex.Jaxpr(
        [], list(inputs), eqn.outvars, [eqn], eqn.effects, jex.DebugInfo("apply", eqn.primitive.name, None, None)
    )
    return jax.core.eval_jaxpr(alone, (), *inputs.values())


_CONTEXT = ("threefry_partitionable", "compute_type", "cur_abstract_mesh", "xla_metadata")
"""The settings under which an equation was traced, of those that its context records, which are part of its key."""

_open_rules: list[Key] = []
"""The functions with custom derivatives whose rules are being read."""


def _literal(literal: Any) -> Key:
    value = literal.val
    return "literal", type(value).__name__, literal.aval, np.asarray(value).tobytes()


def _context(eqn: Any) -> Key:
    return tuple(_param(getattr(eqn.ctx, name, None)) for name in _CONTEXT)


def _params(eqn: Any) -> Key:
    """An equation's parameters; the rule of a custom derivative, a function, enters by the key of what it computes."""
    hidden, derivative = RULES.get(eqn.primitive.name, ((), None))
    params = tuple((name, _param(value)) for name, value in sorted(eqn.params.items()) if name not in hidden)
    if derivative is None:
        return params
    if (eqn.primitive, params) in _open_rules:  # a rule that calls the function whose derivative it defines
        return "recursive", params
    _open_rules.append((eqn.primitive, params))
    try:
        return params, derivative(eqn, [eqn.params[name] for name in hidden])
    finally:
        _open_rules.pop()


def _param(value: Any) -> Key:
    if isinstance(value, jex.ClosedJaxpr):
        return "jaxpr", key_of(value.jaxpr, value.consts)
    if isinstance(value, jex.Jaxpr):
        return "jaxpr", key_of(value)
    if isinstance(value, tuple | list):
        return "sequence", tuple(map(_param, value))
    if isinstance(value, Mapping):
        return "mapping", tuple(sorted((str(name), _param(item)) for name, item in value.items()))
    if isinstance(value, jax.core.Tracer):
        return ById(value)
    if isinstance(value, jax.Array | np.ndarray) or hasattr(value, "__array__"):
        return _value(value)
    if isinstance(value, float):  # NaN equals nothing
        return "float", repr(value)
    if isinstance(value, types.FunctionType):
        return _function(value)
    if dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        return type(value), tuple(_param(getattr(value, field.name)) for field in dataclasses.fields(value))
    if callable(value) and not isinstance(value, type) and not _is_of_library(type(value)):
        return ById(value)  # a user's object, whose own `==` may leave out what it computes with
    try:
        hash(value)
    except TypeError:
        return ById(value)
    return value


def _function(function: types.FunctionType) -> Key:
    """A callback by its code and the variables that the code reads, since each trace makes a new function object.

    Variables that a user's function closes over may be reassigned, so that they enter by identity. Those that a
    library's wrapper around it closes over hold settings, and enter by value.
    """
    cells = function.__closure__ or ()
    if not _is_of_library(function):
        read = (function.__globals__, function.__defaults__, function.__kwdefaults__, *cells)
        return "function", function.__code__, tuple(map(ById, read))
    if not cells and "<" not in function.__qualname__:
        return function
    try:
        return "function", function.__code__, tuple(_param(cell.cell_contents) for cell in cells)
    except (ValueError, RecursionError):  # a variable that is not assigned yet, or a function that closes over itself
        return ById(function)


def _value(array: Any) -> Key:
    """An array that could not be made an argument, by its values."""
    if isinstance(array, jax.core.Tracer):
        return ById(array)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return "key", str(array.dtype), _value(jax.random.key_data(array))
    host = np.asarray(array)
    return "array", str(host.dtype), host.shape, hashlib.sha256(host.tobytes()).hexdigest()


# ---- custom derivatives: each trace makes a new Python function for a rule; its key is that of what the rule computes,
# or the name of the function that a library has written for it


def _jvp_rule(eqn: Any, rule: list[Any]) -> Key:
    return _traced_rule(eqn, rule, lambda f, x: jax.jvp(f, tuple(x), tuple(map(jnp.ones_like, x))))


def _vjp_rule(eqn: Any, rule: list[Any]) -> Key:
    def back(f, x):
        out, pull = jax.vjp(f, *x)
        return pull([jnp.ones_like(o) for o in out])

    return _traced_rule(eqn, rule, back)


RULES: dict[str, tuple[tuple[str, ...], Any]] = {
    "custom_jvp_call": (("jvp_jaxpr_fun",), _jvp_rule),
    "custom_vjp_call": (("fwd_jaxpr_thunk", "bwd", "out_trees"), _vjp_rule),
}
"""For each primitive with a custom derivative: the parameters that hold its rule, and what makes the rule's key."""


def _traced_rule(eqn: Any, rule: list[Any], derivative: Any) -> Key:
    """The key of an equation's derivative; the rule by identity where the derivative cannot be traced."""
    authors = [_written(part) for part in rule if hasattr(part, "transforms")]
    if authors and None not in authors:
        return "library", tuple(authors)
    inputs = [v.aval for v in eqn.invars if not isinstance(v, jex.Literal)]
    indices = [i for i, aval in enumerate(inputs) if i >= _constants(eqn) and jnp.issubdtype(aval.dtype, jnp.inexact)]

    def traced(*values):
        def function(*moved):
            arguments = list(values)
            for i, value in zip(indices, moved):
                arguments[i] = value
            return [y for y in apply(eqn, arguments) if jnp.issubdtype(y.dtype, jnp.inexact)]

        return derivative(function, [values[i] for i in indices])

    try:
        # The rule's author may have relied on JAX's default promotions.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            closed = jax.make_jaxpr(traced)(*inputs)
    except Exception:  # a rule may raise anything; a run that uses it raises it again
        return tuple(map(ById, rule))
    return key_of(closed.jaxpr, closed.consts)


_WRAPPERS = ("_flatten_fwd", "_flatten_bwd", "_flatten_jvp")
"""What JAX wraps around a rule that closes over nothing: arguments as flat lists."""


def _written(rule: Any) -> Any:
    """The function of a library that a rule is, which its name identifies; `None` where there is another, or where JAX wraps it otherwise."""
    while True:
        if hasattr(rule, "transforms"):
            if any(transform.__name__ not in _WRAPPERS for transform, *_ in rule.transforms):
                return None
            rule = rule.f
            continue
        cells = [cell.cell_contents for cell in getattr(rule, "__closure__", None) or ()]
        inner = [x for x in cells if callable(x) or hasattr(x, "transforms")]
        is_jax_s = getattr(rule, "__module__", "") in _OF_WRAPPERS and "<locals>" in rule.__qualname__
        if not (is_jax_s and len(inner) == 1):
            break
        (rule,) = inner
    try:
        _of_library(rule)
    except (UnknownError, AttributeError):
        return None
    return rule


_OF_WRAPPERS = ("jax._src.interpreters.partial_eval", "jax._src.custom_derivatives")


def _constants(eqn: Any) -> int:
    """How many of an equation's variables its function closes over; a custom rule gives no derivative for these."""
    literals = sum(isinstance(v, jex.Literal) for v in eqn.invars[: eqn.params["num_consts"]])
    return eqn.params["num_consts"] - literals


# ---- text that is the same in every process


def text_of(value: Any) -> str:
    """Write a value as text that is the same in every process.

    Args:
        value: a number, a string, an array's dtype, a function or class of a library, ..., or nested tuples, lists
            and dataclasses of these.

    Returns:
        The text.

    Raises:
        UnknownError: where a part of the value is known only by its identity in this process.

    >>> text_of((1, "a", np.float32))
    "tuple(1,'a',numpy.float32,)"
    """
    return "".join(_pieces(value))


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, ById):
        raise UnknownError(_named(value.value))
    if isinstance(value, jex.Primitive):
        yield value.name
    elif isinstance(value, bytes):
        yield value.hex()
    elif isinstance(value, enum.Enum):
        yield str(value)
    elif isinstance(value, tuple | list):
        yield f"{type(value).__name__}("
        for item in value:
            yield from (*_pieces(item), ",")
        yield ")"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _pieces(
            (type(value).__qualname__, *((f.name, getattr(value, f.name)) for f in dataclasses.fields(value)))
        )
    elif isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        yield _of_library(value)
    else:
        text = repr(value)
        if " at 0x" in text:
            raise UnknownError(_named(value))
        yield text


def _of_library(value: Any) -> str:
    """The full name of a function or class of a library, which together with the library's version identifies it."""
    module, name = str(value.__module__), value.__qualname__
    if _is_of_library(value) and "<" not in name:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part, None)
        if target is value:
            return f"{module}.{name}"
    raise UnknownError(_named(value))


def _is_of_library(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] in LIBRARIES


def _named(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__
