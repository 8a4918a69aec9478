"""Constants of nested jaxprs, hoisted to the outermost jaxpr, where they can become arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from mijax.programs.key import apply


def has_inner_constants(jaxpr: Any) -> bool:
    """Tell whether some nested jaxpr that `evaluate` can run holds arrays as constants.

    Args:
        jaxpr: the outermost jaxpr.

    Returns:
        Whether one does.
    """
    return any(_opens(eqn) for eqn in jaxpr.eqns)


def evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr, so that a trace of the evaluation has the constants of nested jaxprs as constants of its own.

    Nested jaxprs that hold constants are evaluated here equation by equation; all other equations are bound
    unchanged.

    Args:
        jaxpr: the jaxpr.
        constants: values of its `constvars`.
        arguments: values of its `invars`.

    Returns:
        The values of its `outvars`.
    """
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments)))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else values[atom]
    for eqn in jaxpr.eqns:
        if _opens(eqn):
            results = _OPENED[eqn.primitive.name](eqn.params, [read(v) for v in eqn.invars])
        else:
            results = apply(eqn, [values[v] for v in eqn.invars if not isinstance(v, jex.Literal)])
        values |= dict(zip(eqn.outvars, results))
    return [read(v) for v in jaxpr.outvars]


def _opens(eqn: Any) -> bool:
    """Whether `evaluate` runs the nested jaxprs of an equation: it can, and they hold constants."""
    if eqn.primitive.name not in _OPENED:
        return False
    inner = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple) else (value,))]
    jaxprs = [part for part in inner if isinstance(part, jex.Jaxpr | jex.ClosedJaxpr)]
    return any(getattr(j, "consts", ()) or has_inner_constants(getattr(j, "jaxpr", j)) for j in jaxprs)


def _run(inner: Any) -> Callable[..., list[Any]]:
    constants = inner.consts if isinstance(inner, jex.ClosedJaxpr) else ()
    return lambda *arguments: evaluate(getattr(inner, "jaxpr", inner), constants, arguments)


def _scan(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    if "num_carry" in params:
        n, m = params["num_consts"], params["num_consts"] + params["num_carry"]
    else:  # from jax 0.12 on
        constants, carry, _ = params["ft_in"].unpack()
        n, m = len(constants), len(constants) + len(carry)
    run = _run(params["jaxpr"])

    def body(carry, x):
        results = run(*inputs[:n], *carry, *x)
        return results[: m - n], results[m - n :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, results = jax.lax.scan(body, inputs[n:m], inputs[m:], **options)
    return [*carry, *results]


def _while(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    condition, body = _run(params["cond_jaxpr"]), _run(params["body_jaxpr"])
    return jax.lax.while_loop(lambda x: condition(*inputs[:n], *x)[0], lambda x: body(*inputs[n:m], *x), inputs[m:])


def _checkpoint(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    options = {name: params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(_run(params["jaxpr"]), **options)(*inputs)


_OPENED: dict[str, Callable[[dict[str, Any], list[Any]], list[Any]]] = {
    "jit": lambda params, inputs: _run(params["jaxpr"])(*inputs),
    "cond": lambda params, inputs: jax.lax.switch(inputs[0], [_run(b) for b in params["branches"]], *inputs[1:]),
    "scan": _scan,
    "while": _while,
    "checkpoint": _checkpoint,
}
