"""Ablation: what an activation does, measured by taking it away; and scaling, for dose and response."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike
from mijax.engine.axes import full_grid
from mijax.engine.cells import stack
from mijax.engine.driver import check_sweep
from mijax.engine.grid import Grid
from mijax.engine.labels import positions_told
from mijax.engine.measure import Metrics
from mijax.engine.options import Running
from mijax.forward import run
from mijax.interventions.edits import Add, Replace, Scale
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.sites import Site, site_of
from mijax.model.tokens import Inputs
from mijax.sweeps.sweep import sweep

if TYPE_CHECKING:
    import xarray as xr

Kind = Literal["zero", "mean", "pooled mean", "resample", "noise"]


@overload
def ablate(model: Model, tokens: Inputs | ArrayLike, *, site: str, over: Sequence[str] | Grid, metric: AnyMetric,
           kind: Kind = ..., reference: Inputs | ArrayLike | None = ..., draws: int = ..., scale: float = ...,
           key: Array | None = ..., **running: Unpack[Running]) -> "xr.DataArray": ...  # fmt: skip
@overload
def ablate(model: Model, tokens: Inputs | ArrayLike, *, site: str, over: Sequence[str] | Grid,
           metric: Mapping[str, AnyMetric], kind: Kind = ..., reference: Inputs | ArrayLike | None = ...,
           draws: int = ..., scale: float = ..., key: Array | None = ...,
           **running: Unpack[Running]) -> "xr.Dataset": ...  # fmt: skip
def ablate(
    model: Model,
    tokens: Inputs | ArrayLike,
    *,
    site: str,
    over: Sequence[str] | Grid,
    metric: Metrics,
    kind: Kind = "zero",
    reference: Inputs | ArrayLike | None = None,
    draws: int = 1,
    scale: float = 1.0,
    key: Array | None = None,
    **running: Unpack[Running],
) -> "xr.DataArray | xr.Dataset":
    """Take away the activations at every cell of a grid, and measure.

    `kind` says what replaces them:

    * `"zero"`: zero.
    * `"mean"`: their mean over the prompts of `reference`, position by position counted from the first real token.
    * `"pooled mean"`: their mean over all real tokens of `reference`.
    * `"resample"`: those of another prompt of `reference`, drawn with `key`; without a `reference`, no prompt gets
      its own activations (a derangement).
    * `"noise"`: normal noise added to them, `scale` times the standard deviation of each unit over the real tokens
      of `reference`.

    Args:
        model: the model.
        tokens: the prompts.
        site: name of the site.
        over: axes of the site, each taken in full, or a `mijax.grid`, as in `patch`.
        metric: a metric, or metrics by name.
        kind: what replaces the activations.
        reference: prompts whose activations are used; by default `tokens`.
        draws: the number of draws of `"resample"` and `"noise"`, which have the dimension `draw`.
        scale: standard deviations of `"noise"`.
        key: random key of `"resample"` and `"noise"`.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        What `sweep` gives, with the attribute `ablation`. Where `over` names axes, positions that a prompt lacks
        are NaN.

    Raises:
        ValueError: where a kind is impossible: without a key or a draw, with a reference of another shape or with
            fewer positions, pooled at a site of scores, resampled from a single prompt; and what `sweep` raises.
        TypeError: what `sweep` raises.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> ids = [[1, 2, 3], [4, 5, 6]]
    >>> r = mj.ablate(model, ids, site="z", over=("layer", "head"), metric=mj.metrics.logit(7), kind="mean")
    >>> r.dims
    ('layer', 'head', 'batch')
    """
    tokens = model.inputs(tokens)
    places = over if isinstance(over, Grid) else full_grid(model, tokens, site, over)
    edits: Any = {site: Replace(0.0, places)}
    if kind != "zero":
        check_sweep(model, tokens, edits, metric, running)
        _check_kind(model, kind, site_of(site, model.sites), tokens, reference, draws, key)
        edits = _from_reference(model, tokens, model.sites[site], places, kind, reference, draws, scale, key)
    result = sweep(model, tokens, edits, metric, **running)
    result = result.assign_attrs(ablation=kind)
    return result if isinstance(over, Grid) else positions_told(result, tokens)


@overload
def dose_response(model: Model, tokens: Inputs | ArrayLike, *, site: str, over: Sequence[str] | Grid,
                  factors: Iterable[float], metric: AnyMetric,
                  **running: Unpack[Running]) -> "xr.DataArray": ...  # fmt: skip
@overload
def dose_response(model: Model, tokens: Inputs | ArrayLike, *, site: str, over: Sequence[str] | Grid,
                  factors: Iterable[float], metric: Mapping[str, AnyMetric],
                  **running: Unpack[Running]) -> "xr.Dataset": ...  # fmt: skip
def dose_response(
    model: Model,
    tokens: Inputs | ArrayLike,
    *,
    site: str,
    over: Sequence[str] | Grid,
    factors: Iterable[float],
    metric: Metrics,
    **running: Unpack[Running],
) -> "xr.DataArray | xr.Dataset":
    """Scale the activations at every cell of a grid by every factor: 1 changes nothing, 0 is zero ablation.

    Args:
        model: the model.
        tokens: the prompts.
        site: name of the site.
        over: axes of the site, each taken in full, or a `mijax.grid`, as in `patch`.
        factors: the factors.
        metric: a metric, or metrics by name.
        running: `memory`, `progress`, `save` and `mesh`, as in `sweep`.

    Returns:
        What `sweep` gives, with the first dimension `factor`. Where `over` names axes, positions that a prompt
        lacks are NaN.

    Raises:
        ValueError: without factors, and what `sweep` raises.
        TypeError: what `sweep` raises.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> r = mj.dose_response(model, [[1, 2, 3]], site="mlp_out", over=("layer",), factors=(0.0, 1.0, 2.0), metric=mj.metrics.logit(7))
    >>> dict(r.sizes), bool(abs(r.sel(factor=1.0) - r.base).max() < 1e-6)
    ({'factor': 3, 'layer': 2, 'batch': 1}, True)
    """
    tokens = model.inputs(tokens)
    places = over if isinstance(over, Grid) else full_grid(model, tokens, site, over)
    doses = stack("factor", {float(f): {site: Scale(float(f), places)} for f in factors})
    result = sweep(model, tokens, doses, metric, **running)
    return result if isinstance(over, Grid) else positions_told(result, tokens)


def _check_kind(
    model: Model, kind: str, site: Site, tokens: Inputs, reference: Any, draws: int, key: Array | None
) -> None:
    """Raise `ValueError` for a kind of ablation that the reference does not allow, before it is run."""
    if kind not in Kind.__args__:
        raise ValueError(f"kind must be one of {', '.join(map(repr, Kind.__args__))}, given {kind!r}")
    if kind in ("resample", "noise") and (key is None or draws < 1):
        raise ValueError(f"ablation by {kind!r} draws: it needs a key and at least one draw, given {draws}")
    if kind in ("pooled mean", "noise") and len(_places(site)) != 1:
        raise ValueError(f"site {site.name!r} has no one position: it cannot be pooled over tokens")
    same, reference = reference is None, tokens if reference is None else model.inputs(reference)
    longest, needed = (int(np.max(np.asarray(t.lengths))) for t in (reference, tokens))
    if kind == "mean" and longest < needed:
        raise ValueError(f"the reference's prompts have at most {longest} tokens, the longest prompt {needed}")
    if kind == "resample" and reference.ids.shape[1] != tokens.ids.shape[1]:
        raise ValueError(f"the reference has {reference.ids.shape[1]} columns, the prompts {tokens.ids.shape[1]}")
    if kind == "resample" and same and len(tokens.ids) < 2:
        raise ValueError("resampling from the prompts themselves needs at least two")


def _from_reference(
    model, tokens: Inputs, site: Site, places: Grid, kind: str, reference, draws: int, scale: float, key
) -> Any:
    """The interventions of the kinds that use the activations of reference prompts."""
    same = reference is None
    reference = tokens if same else model.inputs(reference)
    name = site.name
    acts = np.asarray(run(model, reference, capture=(name,), readout=False).acts[name])
    if kind == "mean":
        return {name: Replace(jnp.asarray(_mean_by_position(acts, site, reference, tokens)), places)}
    if kind == "pooled mean":
        return {name: Replace(jnp.asarray(_over_tokens(acts, site, reference, np.mean)), places)}
    rngs = [np.random.default_rng(np.asarray(jax.random.key_data(k))) for k in jax.random.split(key, draws)]
    if kind == "noise":
        spread = np.asarray(scale * _over_tokens(acts, site, reference, np.std), acts.dtype)
        shape = site.shape(*tokens.ids.shape)
        return stack(
            "draw",
            {
                i: {name: Add(spread * rng.standard_normal(shape).astype(acts.dtype), places)}
                for i, rng in enumerate(rngs)
            },
        )
    axis, batch = site.axes.index("batch"), tokens.ids.shape[0]
    picks = [_others(rng, batch, reference.ids.shape[0], same) for rng in rngs]
    return stack("draw", {i: {name: Replace(np.take(acts, pick, axis=axis), places)} for i, pick in enumerate(picks)})


def _others(rng: np.random.Generator, batch: int, n: int, same: bool) -> np.ndarray:
    """For each prompt the number of a prompt of the reference; never its own where both are the same prompts."""
    if not same:
        return rng.integers(0, n, batch)
    order = rng.permutation(n)  # a random cycle, in which each prompt gets the next one
    return order[(np.argsort(order) + 1) % n]


def _mean_by_position(acts: np.ndarray, site: Site, reference: Inputs, tokens: Inputs) -> np.ndarray:
    """The mean over the prompts that have a position, at the columns where each prompt has it."""
    columns = np.argsort(~np.asarray(reference.mask), axis=1, kind="stable")  # the column of each position
    aligned, axis = _along_positions(acts, site, columns), site.axes.index("batch")
    present = np.arange(columns.shape[1]) < np.asarray(reference.lengths)[:, None]
    ones = np.ones([n if i == axis else 1 for i, n in enumerate(acts.shape)])
    weight = math.prod((_as_axis(present, acts.ndim, axis, place) for place in _places(site)), start=ones)
    total, count = (aligned * weight).sum(axis=axis, keepdims=True), weight.sum(axis=axis, keepdims=True)
    mean = np.repeat(total / np.maximum(count, 1), tokens.ids.shape[0], axis=axis)
    return _along_positions(mean, site, np.maximum(np.asarray(tokens.positions), 0)).astype(acts.dtype)


def _over_tokens(acts: np.ndarray, site: Site, reference: Inputs, statistic: Callable) -> np.ndarray:
    """A statistic of each layer, head and unit over the real tokens of all prompts."""
    places, first = _places(site), site.axes.index("batch")
    merged = np.moveaxis(acts, (first, places[0]), (0, 1))[np.asarray(reference.mask)]
    return np.expand_dims(statistic(merged, axis=0), (first, places[0])).astype(acts.dtype)


def _places(site: Site) -> list[int]:
    """The indices of the axes of positions among the site's axes."""
    return [site.axes.index(axis) for axis in site.position_axes]


def _as_axis(x: np.ndarray, ndim: int, batch: int, place: int) -> np.ndarray:
    """`[batch, n]` with its axes at the indices `batch` and `place` of `ndim` axes, the others of size 1."""
    shape = [1] * ndim
    shape[batch], shape[place] = x.shape
    return x.reshape(shape)


def _along_positions(x: np.ndarray, site: Site, index: np.ndarray) -> np.ndarray:
    """`x` with the entries `index`, `[batch, n]`, taken along every axis of positions."""
    for place in _places(site):
        x = np.take_along_axis(x, _as_axis(index, x.ndim, site.axes.index("batch"), place), axis=place)
    return x
