"""What is done at a site: small pytrees whose arrays can be vmapped and differentiated."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mijax._types import Array, ArrayLike, Float, Int
from mijax.interventions.operands import basis_in_full, check_basis, check_operand, in_full
from mijax.interventions.where import Where
from mijax.model.numerics import accumulator
from mijax.model.sites import Site
from mijax.model.tokens import is_concrete


def _number(value: Any) -> Any:
    """An array of floats; Python numbers are taken at the site's precision."""
    if isinstance(value, bool | int | float):
        return np.asarray(value, np.float64)  # JAX rounds it to what the site has
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"an edit's value must be floating point, given dtype {value.dtype}")
    return value


def _basis(basis: Any) -> Any:
    """Rows `[*layer, k, unit]`; raises where they are known to be dependent."""
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


class Edit(eqx.Module):
    """An edit: `edit(x)` is what the site becomes, and only what `where` selects becomes it.

    The arrays named in `operands` broadcast against the site as in NumPy: one of lower rank stands for the last of the
    site's axes (a vector `[unit]` for all layers, prompts and positions), one of full rank, layer axis included, gives
    each layer its own. Where an operand of lower rank would fit other axes as well (`[n_layers, d_model]` where a prompt has
    `n_layers` tokens), that is an error; `axes` says which ones are meant: `Add(vectors, axes=("layer", "unit"))`. Those named
    in `bases` are `[k, unit]`, or one per layer `[layer, k, unit]`, per head `[head, k, unit]`, or both.
    """

    operands: ClassVar[tuple[str, ...]] = ()
    bases: ClassVar[tuple[str, ...]] = ()
    where: eqx.AbstractVar[Where]
    axes: eqx.AbstractVar[tuple[str, ...] | None]

    @abc.abstractmethod
    def __call__(self, x: Array, *point: Any) -> Array:
        """The edited activation, everywhere; `point` (site, layer, positions) is given to functions alone."""


class Replace(Edit):
    """Put `value` in place of the activation: patching, ablation, freezing.

    >>> Replace(0.5)(jnp.array([1.0, 3.0])).tolist()
    [0.5, 0.5]
    """

    operands = ("value",)
    value: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x, *point):
        """`value`."""
        return _fit(self.value, x)


class Scale(Edit):
    """Multiply the activation by `factor`.

    >>> Scale(2.0)(jnp.array([1.0, 3.0])).tolist()
    [2.0, 6.0]
    """

    operands = ("factor",)
    factor: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x, *point):
        """`x * factor`."""
        return x * _fit(self.factor, x)


class Add(Edit):
    """Add `vector` to the activation: steering.

    >>> Add([1.0, 0.0])(jnp.array([1.0, 3.0])).tolist()
    [2.0, 3.0]
    """

    operands = ("vector",)
    vector: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x, *point):
        """`x + vector`."""
        return x + _fit(self.vector, x)


class Project(Edit):
    """Project the span of `basis` (`[unit]`, `[k, unit]`, or one per layer, per head or both) out of the activation.

    The rows need not be orthonormal. Raises `ValueError` where they are linearly dependent; where that is known only
    inside a trace, the result is NaN.

    >>> Project([0.0, 2.0])(jnp.array([[1.0, 3.0]])).tolist()
    [[1.0, 0.0]]
    """

    bases = ("basis",)
    basis: Any = eqx.field(converter=_basis)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x, *point):
        """`x` without its part in the subspace."""
        return x - _onto(self.basis, x)


class Interchange(Edit):
    """Replace the part of the activation in the span of `basis` by that of `value`.

    The interchange intervention of distributed alignment search (Geiger et al. 2024). The gradient
    with respect to `basis` is that of the subspace.

    >>> Interchange([5.0, 7.0], [0.0, 2.0])(jnp.array([[1.0, 3.0]])).tolist()
    [[1.0, 7.0]]
    """

    operands = ("value",)
    bases = ("basis",)
    value: Any = eqx.field(converter=_number)
    basis: Any = eqx.field(converter=_basis)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x, *point):
        """`x` with the subspace's part exchanged."""
        return x + _onto(self.basis, _fit(self.value, x) - x)


class Mix(Edit):
    """Mix the activation with `value`: all its own at `gate` 0, all `value` at 1.

    The derivative with respect to the gate, at 0, is attribution patching's estimate of `Replace`.

    >>> Mix(0.5, [5.0, 7.0])(jnp.array([1.0, 3.0])).tolist()
    [3.0, 5.0]
    """

    operands = ("gate", "value")
    gate: Any = eqx.field(converter=_number)
    value: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, kw_only=True)

    def __call__(self, x, *point):
        """`(1 - gate) * x + gate * value`, exact at both ends, whatever stands at the other."""
        return _mix(_fit(self.gate, x), x, _fit(self.value, x))


@jax.custom_jvp
def _mix(gate: Array, x: Array, value: Array) -> Array:
    # 0 * inf is NaN: a gate of 0 would let through an infinite value (a cut score), one of 1 an infinite activation.
    return jnp.where(gate == 0, x, jnp.where(gate == 1, value, (1 - gate) * x + gate * value))


def _mix_tangent(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Any]:
    gate, x, value = primals
    slopes = (value - x, 1 - gate, gate)
    moved = [t * slope for t, slope in zip(tangents, slopes) if not isinstance(t, SymbolicZero)]
    return _mix(gate, x, value), sum(moved[1:], moved[0])


_mix.defjvp(_mix_tangent, symbolic_zeros=True)


class Apply(Edit):
    """Let a function of your own edit what `where` selects: `function(x, site, layer, positions)` gives the edited `x`.

    `x` is the whole activation inside one layer, of the same shape, `layer` its number (traced; `None` at sites without
    layers), `positions` `[batch, pos]` count real tokens. In place of `Apply(function)` the function itself may stand.
    It is called afresh at every call of `run` or a driver, so that it may read outer variables; its arrays may be
    vmapped and differentiated where it is an Equinox module or closes over them. A function that mixes positions says so by an
    attribute `mixes_positions = True`: generation, which computes positions apart, then refuses it.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> clip = mj.Apply(lambda x, site, layer, positions: jnp.clip(x, -1, 1), mj.Where(layer=1))
    >>> mj.run(model, [[1, 2, 3]], {"resid_mid": clip}).logits.shape
    (1, 3, 11)
    """

    function: Any
    where: Any = eqx.field(default_factory=Where)
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None, init=False)

    def __call__(self, x, *point):
        """What the function gives."""
        return self.function(x, *point)


@runtime_checkable
class Callback(Protocol):
    """Any function may be an edit: see `Apply`."""

    def __call__(self, x: Array, site: str, layer: Int[Array, ""] | None, positions: Int[Array, "batch pos"]) -> Array:
        """Return the edited `x`, of the same shape; `layer` is `None` at sites without layers."""
        ...


AnyEdit: TypeAlias = Edit | Callback
Interventions: TypeAlias = Mapping[str, AnyEdit | Sequence[AnyEdit]]
EDITS = (Replace, Scale, Add, Project, Interchange, Mix, Apply)


def as_edits(interventions: Interventions | None) -> dict[str, tuple[Edit, ...]]:
    """Edits by site, each site's in the order in which they act; functions as `Apply`."""
    if interventions is not None and not isinstance(interventions, Mapping):
        raise TypeError(f"interventions must map sites to edits, given {type(interventions).__name__}")
    several = lambda given: given if isinstance(given, list | tuple) else (given,)
    return {site: tuple(_as_edit(e, site) for e in several(given)) for site, given in (interventions or {}).items()}


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


def canonical(edit: Edit, site: Site, stacked: Any = None) -> Edit:
    """The edit with an axis for each of the site's in its operands, and one for layers and heads in its bases.

    Where `stacked`, a pytree like the edit, marks an array, that is behind an axis of choices. What `check_shapes` refuses
    must not be given.
    """
    marked = lambda name: bool(stacked is not None and getattr(stacked, name))
    full = {name: in_full(getattr(edit, name), name, edit.axes, site, marked(name)) for name in edit.operands}
    full |= {name: basis_in_full(getattr(edit, name), site, marked(name)) for name in edit.bases}
    for name, value in full.items():
        edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value)
    return edit if edit.axes is None else dataclasses.replace(edit, axes=None)


def check_shapes(edit: Edit, site: Site, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` where an operand does not broadcast to the site's shape, or does so in two ways."""
    kind = type(edit).__name__
    for name in edit.operands:
        value = getattr(edit, name)
        if edit.axes is not None:
            value = in_full(value, name, edit.axes, site)
        check_operand(jnp.shape(value), f"{kind}'s {name}", site, shape)
    for name in edit.bases:
        check_basis(jnp.shape(getattr(edit, name)), kind if not site.has_vectors else f"{kind}'s {name}", site, shape)


def _fit(value: ArrayLike, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(value), x.shape).astype(x.dtype)


def _onto(basis: ArrayLike, x: Array) -> Array:
    """The part of `x` in the span of `basis`: [k, unit], or one for each head, [head, k, unit]."""
    # Here, not when the edit is built: a basis in training is updated in place, and must stay a projection.
    basis = _orthonormal(jnp.asarray(basis)).astype(x.dtype)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if basis.ndim == 3 and len(basis) > 1:
        return product("...hk,hku->...hu", product("...hu,hku->...hk", x, basis), basis)
    basis = basis.reshape(basis.shape[-2:])
    return product("...k,ku->...u", product("...u,ku->...k", x, basis), basis)
