"""What is done at a site: small pytrees whose arrays can be vmapped and differentiated."""

import abc
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Float, Int
from mijax.interventions.where import Where
from mijax.model.numerics import accumulator
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

    The arrays named in `operands` broadcast against the site. One that has the site's full rank,
    layer axis included, gives each layer its own; one of lower rank is the same for all layers. Those
    named in `bases` are `[k, unit]`, or `[layer, k, unit]`.
    """

    operands: ClassVar[tuple[str, ...]] = ()
    bases: ClassVar[tuple[str, ...]] = ()
    where: eqx.AbstractVar[Where]

    @abc.abstractmethod
    def __call__(self, x: Array) -> Array:
        """The edited activation, everywhere."""


class Replace(Edit):
    """Put `value` in place of the activation: patching, ablation, freezing.

    >>> Replace(0.5)(jnp.array([1.0, 3.0])).tolist()
    [0.5, 0.5]
    """

    operands = ("value",)
    value: Any = eqx.field(converter=_number)
    where: Any = eqx.field(default_factory=Where)

    def __call__(self, x):
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

    def __call__(self, x):
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

    def __call__(self, x):
        """`x + vector`."""
        return x + _fit(self.vector, x)


class Project(Edit):
    """Project the span of `basis` (`[unit]`, `[k, unit]` or `[layer, k, unit]`) out of the activation.

    The rows need not be orthonormal. Raises `ValueError` where they are linearly dependent; where that is known only
    inside a trace, the result is NaN.

    >>> Project([0.0, 2.0])(jnp.array([[1.0, 3.0]])).tolist()
    [[1.0, 0.0]]
    """

    bases = ("basis",)
    basis: Any = eqx.field(converter=_basis)
    where: Any = eqx.field(default_factory=Where)

    def __call__(self, x):
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

    def __call__(self, x):
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

    def __call__(self, x):
        """`(1 - gate) * x + gate * value`, exact at both ends."""
        gate = _fit(self.gate, x)
        return (1 - gate) * x + gate * _fit(self.value, x)


@runtime_checkable
class Callback(Protocol):
    """Any function may be an edit; to vmap over its numbers, make it an Equinox module.

    A plain function that is built anew for each call compiles anew for each call, and what it closes over may not
    vary over the devices of a `shard_map` (a module's arrays may). One that mixes positions says so by an attribute
    `mixes_positions = True`: what computes positions apart, as generation does, then refuses it.
    """

    def __call__(self, x: Array, site: str, layer: Int[Array, ""] | None, positions: Int[Array, "batch pos"]) -> Array:
        """Return the edited `x`, of the same shape; `layer` is `None` at sites without layers."""
        ...


AnyEdit: TypeAlias = Edit | Callback
Interventions: TypeAlias = Mapping[str, AnyEdit | Sequence[AnyEdit]]


def as_edits(interventions: Interventions | None) -> dict[str, tuple[AnyEdit, ...]]:
    """Edits by site, each site's in the order in which they act."""
    if interventions is not None and not isinstance(interventions, Mapping):
        raise TypeError(f"interventions must map sites to edits, given {type(interventions).__name__}")
    edits = {}
    for site, given in (interventions or {}).items():
        edits[site] = tuple(given) if isinstance(given, list | tuple) else (given,)
        for edit in edits[site]:
            if not callable(edit):
                raise TypeError(f"an edit must be one of mijax's or a callable, given {edit!r} at site {site!r}")
            if not all(eqx.is_array(leaf) or isinstance(leaf, Hashable) for leaf in jax.tree.leaves(edit)):
                raise TypeError(f"the callable edit at site {site!r} must be hashable, or better an Equinox module")
    return edits


def by_layer(edit: AnyEdit, rank: int) -> Any:
    """A pytree like `edit`: True at arrays that hold one entry per layer of a site of full rank `rank`."""
    spec = jax.tree.map(lambda leaf: False, edit)
    if isinstance(edit, Edit):
        for name in edit.operands:
            if jnp.ndim(getattr(edit, name)) == rank:
                spec = eqx.tree_at(lambda e, name=name: getattr(e, name), spec, True)
        for name in edit.bases:
            if jnp.ndim(getattr(edit, name)) == 3:
                spec = eqx.tree_at(lambda e, name=name: getattr(e, name), spec, True)
    return spec


def check_shapes(edit: Edit, site: str, axes: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raise `ValueError` where an operand does not broadcast to the site's shape."""
    expected = f"the shape of site {site!r}, {' '.join(axes)} = {shape}"
    for name in edit.operands:
        given = jnp.shape(getattr(edit, name))
        fits = len(given) <= len(shape) and all(g in (1, n) for g, n in zip(given[::-1], shape[::-1]))
        if not fits:
            raise ValueError(
                f"{type(edit).__name__}'s {name} has shape {given}, which does not broadcast to {expected}"
            )
    for name in edit.bases:
        given = jnp.shape(getattr(edit, name))
        if axes[-1] not in ("d_model", "d_head", "d_mlp"):
            raise ValueError(f"{type(edit).__name__} needs a site of vectors; the last axis of {expected} is not one")
        layers = (shape[0],) if axes[0] == "layer" else ()
        if given[-1] != shape[-1] or given[:-2] not in ((), layers):
            raise ValueError(
                f"{type(edit).__name__}'s {name} has shape {given}, expected [k, {shape[-1]}] (or one per layer) for {expected}"
            )


def _fit(value: ArrayLike, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(value), x.shape).astype(x.dtype)


def _onto(basis: ArrayLike, x: Array) -> Array:
    # Here, not when the edit is built: a basis in training is updated in place, and must stay a projection.
    basis = _orthonormal(jnp.asarray(basis)).astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST
    return jnp.matmul(jnp.matmul(x, basis.T, precision=precision), basis, precision=precision)
