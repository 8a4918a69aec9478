"""Edits, what is done at a site: small pytrees whose arrays can be vmapped and differentiated."""

import abc
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mijax._types import Array, ArrayLike, Float, Int
from mijax.display import ShownAsTree
from mijax.interventions.where import Where
from mijax.model.numerics import accumulator
from mijax.model.tokens import is_concrete


def _number(value: Any) -> Any:
    """An array of floats; a Python number becomes a scalar that takes the site's precision."""
    if isinstance(value, bool | int | float):
        return np.asarray(value, np.float64)  # `_fit` rounds it to the dtype of the site
    if not isinstance(value, jax.Array):
        value = np.array(value)  # a copy: the caller may fill the array anew
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"an edit's value must be floating point, given dtype {value.dtype}")
    return value


def _basis(basis: Any) -> Any:
    """Rows `[*layer, k, unit]`; `ValueError` where their values are known and they are linearly dependent."""
    basis = _number(basis)
    basis = basis[None] if basis.ndim == 1 else basis
    if basis.shape[-2] > basis.shape[-1]:
        raise ValueError(f"a basis must have rows [k, unit] with k <= unit, given shape {basis.shape}")
    if is_concrete(basis):
        orthonormal = _orthonormal(jnp.asarray(basis))
        if is_concrete(orthonormal) and np.isnan(np.asarray(orthonormal)).any():
            raise ValueError(
                f"the rows of a basis must be finite and linearly independent; this one, of shape {basis.shape}, is not"
            )
    return basis


def _orthonormal(basis: Float[Array, "*layer k unit"]) -> Float[Array, "*layer k unit"]:
    """Orthonormal rows spanning the same subspace; NaN where the rows are dependent."""
    q, r = jnp.linalg.qr(jnp.swapaxes(basis, -1, -2).astype(accumulator(basis.dtype)))
    diagonal = jnp.abs(jnp.diagonal(r, axis1=-2, axis2=-1))
    tolerance = jnp.finfo(q.dtype).eps * basis.shape[-1] * jnp.max(diagonal, axis=-1, keepdims=True)
    degenerate = jnp.any(~(diagonal > tolerance), axis=-1)
    return jnp.where(degenerate[..., None, None], jnp.nan, jnp.swapaxes(q, -1, -2))


class Edit(ShownAsTree):
    """An edit: `edit(x)` is the edited activation, and the site takes its values at the entries that `where` selects.

    The arrays named in `operands` broadcast against the site as in NumPy: an operand of lower rank has the last of
    the site's axes (a vector `[unit]` applies to all layers, prompts and positions), and one of full rank, layer
    axis included, has a value for each layer. Where an operand of lower rank would fit other axes as well
    (`[n_layers, d_model]` where a prompt has `n_layers` tokens), that is an error; `axes` names the axes that are
    meant: `Add(vectors, axes=("layer", "unit"))`. The arrays named in `bases` are `[k, unit]`, or one per layer
    `[layer, k, unit]`, per head `[head, k, unit]`, or both.

    Attributes:
        operands: the names of the fields that are operands.
        bases: the names of the fields that are bases.
        where: the entries of the site that are edited.
        axes: the names of the operands' axes; `None` for the last ones.
    """

    operands: ClassVar[tuple[str, ...]] = ()
    bases: ClassVar[tuple[str, ...]] = ()
    where: eqx.AbstractVar[Where]
    axes: eqx.AbstractVar[tuple[str, ...] | None]

    @abc.abstractmethod
    def __call__(self, x: Array, *point: Any) -> Array:
        """The edited activation, at all entries whether `where` selects them or not.

        Args:
            x: the activation inside one layer.
            point: site, layer and positions; only `Apply` is called with them.
        """


class Replace(Edit):
    """Put `value` in place of the activation: patching, ablation, freezing.

    Args:
        value: a float, or an array of floats that broadcasts against the site (see `Edit`).
        where: the entries that are edited; the whole site by default.
        axes: the names of the axes of `value`, where it could be read in two ways.

    Raises:
        TypeError: for a value that is not floating point.

    >>> Replace(0.5)(jnp.array([1.0, 3.0])).tolist()
    [0.5, 0.5]
    """

    operands: ClassVar[tuple[str, ...]] = ("value",)
    value: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`value`."""
        return _fit(self.value, x)


class Scale(Edit):
    """Multiply the activation by `factor`.

    Args:
        factor: a float, or an array of floats that broadcasts against the site (see `Edit`).
        where: the entries that are edited; the whole site by default.
        axes: the names of the axes of `factor`, where it could be read in two ways.

    Raises:
        TypeError: for a factor that is not floating point.

    >>> Scale(2.0)(jnp.array([1.0, 3.0])).tolist()
    [2.0, 6.0]
    """

    operands: ClassVar[tuple[str, ...]] = ("factor",)
    factor: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`x * factor`."""
        return x * _fit(self.factor, x)


class Add(Edit):
    """Add `vector` to the activation: steering.

    Args:
        vector: a float, or an array of floats that broadcasts against the site (see `Edit`).
        where: the entries that are edited; the whole site by default.
        axes: the names of the axes of `vector`, where it could be read in two ways.

    Raises:
        TypeError: for a vector that is not floating point.

    >>> Add([1.0, 0.0])(jnp.array([1.0, 3.0])).tolist()
    [2.0, 3.0]
    """

    operands: ClassVar[tuple[str, ...]] = ("vector",)
    vector: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`x + vector`."""
        return x + _fit(self.vector, x)


class Project(Edit):
    """Project the span of `basis` out of the activation.

    The result is NaN where the rows turn out to be linearly dependent only inside a trace.

    Args:
        basis: `[unit]`, `[k, unit]`, or one per layer `[layer, k, unit]`, per head `[head, k, unit]`, or both. The
            rows need not be orthonormal.
        where: the entries that are edited; the whole site by default.
        axes: not needed, as there are no operands.

    Raises:
        TypeError: for a basis that is not floating point.
        ValueError: for rows that are linearly dependent or not finite, or more rows than units.

    >>> Project([0.0, 2.0])(jnp.array([[1.0, 3.0]])).tolist()
    [[1.0, 0.0]]
    """

    bases: ClassVar[tuple[str, ...]] = ("basis",)
    basis: Any = eqx.field(converter=_basis)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`x` without its part in the subspace."""
        return x - _onto(self.basis, x)


class Interchange(Edit):
    """Replace the part of the activation in the span of `basis` by that of `value`.

    The interchange intervention of distributed alignment search (Geiger et al. 2024). The gradient with respect to
    `basis` is that of the subspace.

    Args:
        value: a float, or an array of floats that broadcasts against the site (see `Edit`).
        basis: `[unit]`, `[k, unit]`, or one per layer, per head or both, as for `Project`.
        where: the entries that are edited; the whole site by default.
        axes: the names of the axes of `value`, where it could be read in two ways.

    Raises:
        TypeError: for a value or a basis that is not floating point.
        ValueError: for rows that are linearly dependent or not finite, or more rows than units.

    >>> Interchange([5.0, 7.0], [0.0, 2.0])(jnp.array([[1.0, 3.0]])).tolist()
    [[1.0, 7.0]]
    """

    operands: ClassVar[tuple[str, ...]] = ("value",)
    bases: ClassVar[tuple[str, ...]] = ("basis",)
    value: Any = eqx.field(converter=_number)
    basis: Any = eqx.field(converter=_basis)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`x` with the subspace's part exchanged."""
        return x + _onto(self.basis, _fit(self.value, x) - x)


class Mix(Edit):
    """Mix the activation with `value`: the activation unchanged at `gate` 0, `value` at 1.

    The derivative with respect to the gate, at 0, is attribution patching's estimate of the effect of `Replace`.

    Args:
        gate: a float, or an array of floats that broadcasts against the site (see `Edit`).
        value: likewise, what the activation is mixed with.
        where: the entries that are edited; the whole site by default.
        axes: the names of the axes of both operands, where they could be read in two ways.

    Raises:
        TypeError: for a gate or a value that is not floating point.

    >>> Mix(0.5, [5.0, 7.0])(jnp.array([1.0, 3.0])).tolist()
    [3.0, 5.0]
    """

    operands: ClassVar[tuple[str, ...]] = ("gate", "value")
    gate: Any = eqx.field(converter=_number)
    value: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`(1 - gate) * x + gate * value`: exactly `x` at gate 0, `value` at gate 1, even if the other is infinite."""
        return _mix(_fit(self.gate, x), x, _fit(self.value, x))


@jax.custom_jvp
def _mix(gate: Array, x: Array, value: Array) -> Array:
    # 0 * inf is NaN: at gate 0 an infinite `value` (a masked score) would give NaN, at gate 1 an infinite activation.
    return jnp.where(gate == 0, x, jnp.where(gate == 1, value, (1 - gate) * x + gate * value))


def _mix_tangent(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Any]:
    gate, x, value = primals
    slopes = (value - x, 1 - gate, gate)
    terms = [t * slope for t, slope in zip(tangents, slopes) if not isinstance(t, SymbolicZero)]
    return _mix(gate, x, value), sum(terms[1:], terms[0])


_mix.defjvp(_mix_tangent, symbolic_zeros=True)


class Apply(Edit):
    """Edit the entries that `where` selects by a function of your own.

    In place of `Apply(function)` the function itself may be given. It is called anew at every call of `run` or a
    driver, so that it may read outer variables; its arrays may be vmapped and differentiated where it is an Equinox
    module or closes over them. Generation, which computes positions separately, refuses a function whose result at one
    position depends on others. What JAX itself keeps of a function that has a name of its own inside yours (decorated
    with `jax.jit`, a branch of `jax.lax.cond`, the body of a `scan`, the argument of `jax.checkpoint`) it does not read
    anew: give such functions what changes as an argument, or define them inside yours.

    Args:
        function: `function(x, site, layer, positions)` returns the edited `x`, of the same shape and dtype. `x` is
            the whole activation inside one layer, `site` the name of the site, `layer` the layer's number (traced;
            `None` at sites without layers), and `positions`, `[batch, pos]`, count real tokens.
        where: the entries that are edited; the whole site by default.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> clip = mj.Apply(lambda x, site, layer, positions: jnp.clip(x, -1, 1), mj.Where(layer=1))
    >>> mj.run(model, [[1, 2, 3]], {"resid_mid": clip}).logits.shape
    (1, 3, 11)
    """

    function: Any
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, init=False)

    def __call__(self, x: Array, *point: Any) -> Array:
        """`function(x, *point)`."""
        return self.function(x, *point)


@runtime_checkable
class Callback(Protocol):
    """A function as an edit: see `Apply`."""

    def __call__(self, x: Array, site: str, layer: Int[Array, ""] | None, positions: Int[Array, "batch pos"]) -> Array:
        """The edited `x`, of the same shape and dtype; `layer` is `None` at sites without layers."""
        ...


AnyEdit: TypeAlias = Edit | Callback
Interventions: TypeAlias = Mapping[str, AnyEdit | Sequence[AnyEdit]]
EDITS = (Replace, Scale, Add, Project, Interchange, Mix, Apply)


Edits: TypeAlias = dict[str, tuple[Edit, ...]]


def as_edits(interventions: Interventions | None) -> dict[str, tuple[Edit, ...]]:
    """Convert interventions to the edits of each site, with functions as `Apply`.

    Args:
        interventions: one edit or several for each site; `None` for no edits.

    Returns:
        The edits by site, in the order in which they act.

    Raises:
        TypeError: for interventions that are not a mapping, and for an edit that is not callable or is an instance
            of a subclass of `Edit` other than those of mijax.
    """
    if interventions is not None and not isinstance(interventions, Mapping):
        raise TypeError(f"interventions must map sites to edits, given {type(interventions).__name__}")
    as_sequence = lambda edits: edits if isinstance(edits, list | tuple) else (edits,)
    return {site: tuple(_as_edit(e, site) for e in as_sequence(edits)) for site, edits in (interventions or {}).items()}


def _as_edit(edit: Any, site: str) -> Edit:
    if not callable(edit):
        raise TypeError(f"an edit must be one of mijax's or a callable, given {edit!r} at site {site!r}")
    if not isinstance(edit, Edit):
        return Apply(edit)  # pyright: ignore[reportCallIssue]
    if type(edit) not in EDITS:
        raise TypeError(
            f"{type(edit).__name__} at site {site!r} is a subclass of mijax.Edit: give a function, or an Equinox module with"
            " __call__(x, site, layer, positions), alone or in mijax.Apply(function, Where(...))"
        )
    return edit


def _fit(value: ArrayLike, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(value), x.shape).astype(x.dtype)


def _onto(basis: ArrayLike, x: Array) -> Array:
    """The part of `x` in the span of `basis`: `[k, unit]`, or one for each head, `[head, k, unit]`."""
    # Made orthonormal here, not when the edit is built: training changes the basis of a built edit, and the result
    # must stay a projection.
    basis = _orthonormal(jnp.asarray(basis)).astype(x.dtype)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if basis.ndim == 3 and len(basis) > 1:
        return product("...hk,hku->...hu", product("...hu,hku->...hk", x, basis), basis)
    basis = basis.reshape(basis.shape[-2:])
    return product("...k,ku->...u", product("...u,ku->...k", x, basis), basis)
