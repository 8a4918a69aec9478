"""Ablation: what an activation does, measured by taking it away; and scaling, for dose and response."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, ArrayLike, Bool, Int
from mijax.arguments import check_key, whole_number
from mijax.engine.axes import full_grid
from mijax.engine.cells import stack
from mijax.engine.driver import check_sweep
from mijax.engine.grid import Grid
from mijax.engine.labels import with_positions
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
_USED = {
    "zero": (),
    "mean": ("reference",),
    "pooled mean": ("reference",),
    "resample": ("reference", "key", "draws"),
    "noise": ("reference", "key", "draws", "scale"),
}
"""The arguments that each kind uses."""


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
    * `"resample"`: those of another prompt of `reference`, drawn with `key`, position by position counted from the
      first real token; of a prompt with at least as many tokens. Without a `reference`, no prompt gets its own
      activations, and where all have equal length, each gives its activations to one other.
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
        ValueError: where a kind is impossible: without a key or a draw, with a reference whose prompts are shorter,
            pooled at a site of scores, resampled from a single prompt; for an argument that the kind does not use;
            and what `sweep` raises.
        TypeError: for a key or a number of draws that is none, and what `sweep` raises.

    >>> import mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> ids = [[1, 2, 3], [4, 5, 6]]
    >>> r = mj.ablate(model, ids, site="z", over=("layer", "head"), metric=mj.metrics.logit(7), kind="mean")
    >>> r.dims
    ('layer', 'head', 'batch')
    """
    tokens = model.inputs(tokens)
    _check_arguments(kind, reference, draws, scale, key)
    places = over if isinstance(over, Grid) else full_grid(model, tokens, site, over)
    edits: Any = {site: Replace(0.0, places)}
    if kind != "zero":
        check_sweep(model, tokens, edits, metric, running)
        _check_kind(model, kind, site_of(site, model.sites), tokens, reference)
        edits = _from_reference(model, tokens, model.sites[site], places, kind, reference, draws, scale, key)
    result = sweep(model, tokens, edits, metric, **running)
    result = result.assign_attrs(ablation=kind)
    return result if isinstance(over, Grid) else with_positions(result, tokens)


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
    return result if isinstance(over, Grid) else with_positions(result, tokens)


def _check_arguments(kind: str, reference: Any, draws: int, scale: float, key: Array | None) -> None:
    """Raise `ValueError` for arguments that a kind needs or does not use, `TypeError` for those of another type."""
    if kind not in Kind.__args__:
        raise ValueError(f"kind must be one of {', '.join(map(repr, Kind.__args__))}, given {kind!r}")
    whole_number("draws", draws, 1)
    changed = {"reference": reference is not None, "key": key is not None, "draws": draws != 1, "scale": scale != 1}
    unused = [name for name, is_given in changed.items() if is_given and name not in _USED[kind]]
    if unused:
        raise ValueError(f"ablation of kind {kind!r} does not use {' and '.join(unused)}")
    if "key" in _USED[kind] and key is None:
        raise ValueError(f"ablation by {kind!r} draws: it needs a key, jax.random.key(0) say")
    if key is not None:
        check_key(key)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= scale < math.inf:
        raise ValueError(f"scale must be a number of standard deviations, given {scale!r}")


def _check_kind(model: Model, kind: str, site: Site, tokens: Inputs, reference: Any) -> None:
    """Raise `ValueError` for a kind of ablation that the reference does not allow, before it is run."""
    if kind in ("pooled mean", "noise") and len(_places(site)) != 1:
        raise ValueError(f"site {site.name!r} has no one position: it cannot be pooled over tokens")
    same, reference = reference is None, tokens if reference is None else model.inputs(reference)
    longest, needed = (int(np.max(np.asarray(t.lengths))) for t in (reference, tokens))
    if kind == "mean" and longest < needed:
        raise ValueError(f"the reference's prompts have at most {longest} tokens, the longest prompt {needed}")
    if kind == "resample":
        lacking = np.flatnonzero(~_donors(tokens, reference, same).any(axis=1))
        if len(lacking):
            length = int(np.asarray(tokens.lengths)[lacking[0]])
            raise ValueError(
                f"prompt {lacking[0]} has {length} tokens, and no {'other prompt' if same else 'prompt of the reference'} as many: it can"
                " get activations at all of its positions from none"
            )


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
    by_position = _along_positions(acts, site, _columns(reference))
    take = lambda pick: _to_columns(np.take(by_position, pick, axis=site.axes.index("batch")), site, tokens)
    picks = [_others(rng, _donors(tokens, reference, same), same) for rng in rngs]
    return stack("draw", {i: {name: Replace(take(pick), places)} for i, pick in enumerate(picks)})


def _donors(tokens: Inputs, reference: Inputs, same: bool) -> Bool[np.ndarray, "prompt reference"]:
    """Which prompts of the reference can give each prompt activations: those as long, and never itself."""
    longer = np.asarray(reference.lengths)[None, :] >= np.asarray(tokens.lengths)[:, None]
    return longer & ~np.eye(*longer.shape, dtype=bool) if same else longer


def _others(rng: np.random.Generator, donors: Bool[np.ndarray, "prompt reference"], same: bool) -> np.ndarray:
    """For each prompt the number of a prompt of the reference, one of its donors."""
    if same and donors.sum() == len(donors) * (len(donors) - 1):  # all are as long as one another
        order = rng.permutation(len(donors))  # a random cycle, in which each prompt gets the next one
        return order[(np.argsort(order) + 1) % len(donors)]
    return np.array([rng.choice(np.flatnonzero(row)) for row in donors])


def _mean_by_position(acts: np.ndarray, site: Site, reference: Inputs, tokens: Inputs) -> np.ndarray:
    """The mean over the prompts that have a position, at the columns where each prompt has it."""
    aligned, axis = _along_positions(acts, site, _columns(reference)), site.axes.index("batch")
    present = np.arange(reference.ids.shape[1]) < np.asarray(reference.lengths)[:, None]
    ones = np.ones([n if i == axis else 1 for i, n in enumerate(acts.shape)])
    weight = math.prod((_as_axis(present, acts.ndim, axis, place) for place in _places(site)), start=ones)
    total = np.where(weight > 0, aligned, 0.0).sum(axis=axis, keepdims=True)  # padding may hold NaN
    mean = np.repeat(total / np.maximum(weight.sum(axis=axis, keepdims=True), 1), tokens.ids.shape[0], axis=axis)
    return _to_columns(mean, site, tokens).astype(acts.dtype)


def _columns(reference: Inputs) -> Int[np.ndarray, "batch pos"]:
    """The column of each position of each prompt, and then those of padding."""
    return np.argsort(~np.asarray(reference.mask), axis=1, kind="stable")


def _to_columns(x: np.ndarray, site: Site, tokens: Inputs) -> np.ndarray:
    """Activations by position, moved to the columns where each prompt has the position."""
    return _along_positions(x, site, np.maximum(np.asarray(tokens.positions), 0))


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
