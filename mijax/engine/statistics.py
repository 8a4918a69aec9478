"""From the metrics of single prompts to effects and their uncertainty."""

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Float
from mijax.arguments import whole_number
from mijax.engine.labels import has_positions, mean_over_prompts
from mijax.engine.names import GRID, METRIC, QUANTITY

if TYPE_CHECKING:
    import xarray as xr


@overload
def normalise(result: "xr.DataArray") -> "xr.DataArray": ...
@overload
def normalise(result: "xr.Dataset") -> "xr.Dataset": ...
def normalise(result: "xr.DataArray | xr.Dataset") -> "xr.DataArray | xr.Dataset":
    """The effect as a share of the whole difference: (result - base) / (source - base), of means over the batch.

    Take the base off before any other arithmetic (a sum over heads, a difference of two results): nothing tells from the sum that it
    has several bases in it. Means are as they should be.

    0 is no effect, 1 that of the whole source. A prompt that lacks a cell's position (coordinate `has_position`) is left
    out of that cell's means. A cell that is NaN for any other prompt is NaN, as is one whose position no prompt has.

    Args:
        result: a result of `mijax.patch`, with the dimension `batch` and the coordinates `base` and `source`.

    Returns:
        The same dimensions without `batch`.

    Raises:
        ValueError: where there is no source, where base and source coincide, where the metric is not finite on one
            of them, and for a result without its dimension `batch`.

    >>> import xarray as xr
    >>> coords = {"base": ("batch", [0.0, 2.0]), "source": ("batch", [4.0, 6.0])}
    >>> float(normalise(xr.DataArray([[2.0, 4.0]], coords, ("layer", "batch"))).item())
    0.5
    """
    return _each(result, _normalised)


def _normalised(result: Any) -> Any:
    """`normalise` of a single metric."""
    effect, scale = _effect_and_scale(result)
    share = mean_over_prompts(effect) / mean_over_prompts(scale)
    return share.rename(result.name).assign_attrs(result.attrs)


@overload
def bootstrap(result: "xr.DataArray", *, level: float = ..., draws: int = ..., seed: int = ...) -> "xr.DataArray": ...
@overload
def bootstrap(result: "xr.Dataset", *, level: float = ..., draws: int = ..., seed: int = ...) -> "xr.Dataset": ...
def bootstrap(
    result: "xr.DataArray | xr.Dataset", *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> "xr.DataArray | xr.Dataset":
    """Percentile intervals of the mean effect, over prompts drawn with replacement (Efron 1979).

    Arithmetic with results is for effects: a difference of two results is `(a - a.base) - (b - b.base)`, a sum over heads
    `(a - a.base).sum("head")`, since nothing tells from `a - b` how often the base is in it. The effect here is `normalise(result)`; or, where there is no source (as `sweep` and `ablate` give it), the mean of
    result - base; or, of effects (`result - result.base`, or those that `mediate` and `trace` give), the mean of the
    values. Prompts are taken as independent: where several share a template, the interval says nothing about
    other templates. Prompts that lack a cell's position (coordinate `has_position`) are left out of that cell. A cell
    that fewer than two prompts have, or that is not finite for one that has it, has no interval: NaN. Where base and source nearly coincide, so that their difference has either sign
    among the draws, the interval is as wide as that makes it.

    Args:
        result: a result with the dimension `batch` and the coordinate `base`, and perhaps `source`.
        level: the probability that an interval covers.
        draws: the number of draws.
        seed: seed of NumPy's random generator.

    Returns:
        The dimension `bound` (`low`, `high`) in place of `batch`. The attribute `interval_of` says which effect it
        is.

    Raises:
        TypeError: for a `level` that is no number, and `draws` or a `seed` that are not whole.
        ValueError: for fewer than two prompts, for a result without its dimension `batch`, where base and source
            coincide, where the metric is not finite on one of them, and for a `level` outside (0, 1), no draws or a
            negative seed.

    >>> import xarray as xr
    >>> coords = {"base": ("batch", [0.0, 0.0]), "source": ("batch", [4.0, 4.0])}
    >>> bootstrap(xr.DataArray([[1.0, 3.0]], coords, ("layer", "batch"))).values.tolist()
    [[0.25], [0.75]]
    """
    if isinstance(level, bool) or not isinstance(level, Real):
        raise TypeError(f"level must be a probability, such as 0.95, given {level!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be a probability between 0 and 1, both excluded, such as 0.95, given {level!r}")
    whole_number("draws", draws, least=1)
    whole_number("seed", seed)
    return _each(result, lambda metric: _bounds(metric, float(level), draws, seed))


@overload
def sign_flips(result: "xr.DataArray", *, clusters: Any = ..., draws: int = ..., seed: int = ...) -> "xr.Dataset": ...
@overload
def sign_flips(result: "xr.Dataset", *, clusters: Any = ..., draws: int = ..., seed: int = ...) -> "xr.Dataset": ...
def sign_flips(result: Any, *, clusters: Any = None, draws: int = 10_000, seed: int = 0) -> "xr.Dataset":
    """Which cells have an effect other than zero: p-values corrected for looking at the whole grid.

    The effects of each prompt (result - base, or the values themselves, as in `bootstrap`, which says what to do before arithmetic), or of each cluster of prompts, keep or change their sign at random,
    the whole grid of a cluster jointly. A cell's `p` is how often the largest |t| of the grid then reaches the
    cell's own (Nichols and Holmes 2002; the observed signs count as one of the draws). The test rests on effects
    that are symmetric about zero if there are none, and on independent clusters. Prompts that lack a cell's position
    (coordinate `has_position`) are left out of that cell; a cell that is not finite for another is NaN, and is not
    looked at.

    Args:
        result: a result with the dimension `batch` and the coordinate `base`.
        clusters: a label for each prompt; the effects of prompts with one label are averaged. By default each
            prompt is a cluster.
        draws: the number of random signs drawn for each cluster.
        seed: seed of the random key.

    Returns:
        A Dataset with `t`, the t statistic over clusters, and `p`, family-wise, of every cell. For several metrics,
        the names are `<metric>.t` and `<metric>.p`, and each metric is corrected by itself.

    Raises:
        TypeError: for `draws` or a `seed` that are not whole.
        ValueError: for fewer than six clusters, of which no p-value could be below 0.05, for clusters that are not
            a label for each prompt, for a result without its dimension `batch`, and for no draws or a negative seed.

    >>> import numpy as np, xarray as xr
    >>> effects = np.random.default_rng(0).normal([[0.0], [3.0]], 1.0, (2, 20))
    >>> result = xr.DataArray(effects, {"base": ("batch", np.zeros(20))}, ("head", "batch"))
    >>> (sign_flips(result, draws=999).p < 0.05).values.tolist()
    [False, True]
    """
    import xarray as xr

    whole_number("draws", draws, least=1)
    whole_number("seed", seed)
    if hasattr(result, "data_vars"):
        tests = [
            sign_flips(metric, clusters=clusters, draws=draws, seed=seed).rename({v: f"{name}.{v}" for v in ("t", "p")})
            for name, metric in _with_prompts(result).items()
        ]
        return xr.merge(tests, combine_attrs="override")
    _check_prompts(result)
    effect = _effect(result).transpose("batch", ...)
    count, members = _clusters(clusters, effect.sizes["batch"])
    values, present = (x.reshape(len(members), -1) for x in (effect.values, _present(effect)))
    total = lambda x: np.stack([np.where(present, x, 0.0)[members == i].sum(0) for i in range(count)])
    prompts = total(1.0)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and so is the cell
        effects = total(values) / np.maximum(prompts, 1)
    t, p = _largest_t(effects, prompts > 0, draws, seed)
    shape, dims = effect.shape[1:], effect.dims[1:]
    coords = {dim: result[dim] for dim in dims if dim in result.coords}
    attrs = {**result.attrs, "draws": draws, "clusters": count}
    return xr.Dataset({"t": (dims, t.reshape(shape)), "p": (dims, p.reshape(shape))}, coords, attrs)


def _clusters(clusters: Any, prompts: int) -> tuple[int, np.ndarray]:
    """The number of clusters, and the number of each prompt's cluster, `[batch]`."""
    labels = np.arange(prompts) if clusters is None else np.asarray(clusters)
    if labels.shape != (prompts,) or (labels.dtype.kind == "f" and np.isnan(labels).any()):
        raise ValueError(
            f"clusters must be a label for each of the {prompts} prompts, none of them NaN, given shape {labels.shape}:"
            f" {clusters!r}"
        )
    names, members = np.unique(labels, return_inverse=True)
    if len(names) < 6:
        raise ValueError(
            f"a test over prompts needs at least 6 clusters, given {len(names)}: with fewer no p-value can be below 0.05"
        )
    return len(names), members


def _largest_t(
    effects: Float[np.ndarray, "cluster cell"], present: Bool[np.ndarray, "cluster cell"], draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """t over clusters, and its p-value by the grid's largest |t| under random signs.

    `effects` are 0 where not `present`.
    """
    with jax.enable_x64(True):  # a draw of the observed signs ties with them, which float32 would break by rounding
        keys = jax.random.split(jax.random.key(seed), draws)
        largest, t = _under_signs(jnp.asarray(effects), jnp.asarray(present.sum(0, dtype=float)), keys)
    maxima, t = np.sort(np.asarray(largest)), np.asarray(t)
    reached = draws - np.searchsorted(maxima, np.abs(t) * (1 - 1e-6), side="left")
    return t, np.where(np.isnan(t), np.nan, (1 + reached) / (1 + draws))


@jax.jit
def _under_signs(effects: Float[Array, "cluster cell"], count: Float[Array, " cell"], keys: Array):
    """The grid's largest |t| under the random signs of every key, and t under the observed signs."""
    squares = jnp.sum(effects**2, axis=0)  # the same under all signs

    def t_of(total):
        mean = total / count
        deviation = jnp.maximum(squares / count - mean**2, 0.0) * count / (count - 1.0)
        return jnp.where(squares == 0, 0.0, mean / jnp.sqrt(jnp.maximum(deviation, 1e-12 * squares / count) / count))

    def largest(key):
        signs = jax.random.rademacher(key, (len(effects),), effects.dtype)
        return jnp.nanmax(jnp.abs(t_of(signs @ effects)))

    return jax.lax.map(largest, keys, batch_size=256), t_of(jnp.sum(effects, axis=0))


def _each(result: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of a DataArray, or of every variable of a Dataset that has prompts."""
    return _with_prompts(result).map(function, keep_attrs=True) if hasattr(result, "data_vars") else function(result)


def _with_prompts(result: Any) -> Any:
    """A Dataset without the variables that hold nothing of single prompts (which cells were verified, say)."""
    names = [name for name in result if "batch" in result[name].dims]
    return result[names] if names else result


def _bounds(result: Any, level: float, draws: int, seed: int) -> Any:
    """`bootstrap` of a single metric."""
    import xarray as xr

    _check_prompts(result)
    n = result.sizes["batch"]
    if n < 2:
        raise ValueError(f"a bootstrap over prompts needs at least two, given {n}")
    if not _is_metric(result) or _coordinate(result, "source") is None:
        effect, interval_of = _effect(result), "result - base" if _is_metric(result) else "the values"
        scale = xr.ones_like(effect)
    else:
        (effect, scale), interval_of = _effect_and_scale(result), "(result - base) / (source - base)"
    picks = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)  # [draw, batch] counts
    effects = effect.transpose("batch", ...)
    values, weights = (x.transpose(*effects.dims).values.reshape(n, -1) for x in (effect, scale))
    present = _present(effects).reshape(n, -1)
    known = (present.sum(axis=0) > 1) & np.isfinite(np.where(present, values, 0.0)).all(axis=0)
    total = lambda x: picks @ np.where(present & known, x, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = total(values) / total(weights)  # NaN where a draw has none of the prompts with the cell's position
    bounds = np.nanquantile(np.where(known, means, 0.0), [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    bounds = np.where(known, bounds, np.nan)
    dims = effects.dims[1:]
    coords: dict[Any, Any] = {"bound": ["low", "high"], **{d: result[d] for d in dims if d in result.coords}}
    shape = (2, *(result.sizes[d] for d in dims))
    return xr.DataArray(
        bounds.reshape(shape), coords, ("bound", *dims), name=result.name,
        attrs={**result.attrs, "level": level, "interval_of": interval_of},
    )  # fmt: skip


def _effect_and_scale(result: Any) -> tuple[Any, Any]:
    """result - base and source - base, prompt by prompt, with the result's dimensions."""
    import xarray as xr

    _check_prompts(result)
    if not _is_metric(result):
        raise ValueError(
            f"{_name(result)} holds no metric but what was computed from one (its base taken off, say): normalise the result itself"
        )
    base, source = (_run(result, which) for which in ("base", "source"))
    size = float(max(np.abs(base).max(), np.abs(source).max()))
    effect = result - base
    scale = xr.zeros_like(effect) + (source - base)
    mean = mean_over_prompts(scale)  # NaN where no prompt has the cell's position
    if (np.abs(mean) <= 1e-6 * size).any():
        raise ValueError(
            f"metric {result.name!r} is {float(base.mean()):.6g} on the base and {float(source.mean()):.6g} on the source run:"
            " they coincide (for the prompts of some cell), so that nothing can be normalised by their difference"
        )
    return effect, scale


def _is_metric(result: Any) -> bool:
    """Whether an array holds a metric, from which that of the base is to be taken off, and not effects already."""
    if QUANTITY in result.attrs:
        return result.attrs[QUANTITY] == METRIC
    base = next((name for name in result.coords if name == "base" or str(name).startswith("base.")), None)
    if base is None or QUANTITY not in result[base].attrs:
        return base is not None  # an array that mijax did not make: a metric if it has a base
    if result.name is None and "metric" in result.attrs:
        return False  # `result - result.base`: xarray drops the attribute and the name, in which the two differ
    raise ValueError(
        f"{_name(result)} has lost the attributes of a result (xarray drops them under keep_attrs=False, and to_array): whether its base"
        " is taken off already cannot be told; compute it under xarray.set_options(keep_attrs=True), or take the base off: result - result.base"
    )


def _check_one_metric(result: Any) -> None:
    """Raise `ValueError` for an array with the runs of several metrics that may hold more than one of these."""
    metrics = {str(name).removeprefix("base.") for name in result.coords if str(name).startswith("base.")}
    if len(metrics) < 2:
        return
    texts = [coord for coord in result.coords.values() if coord.dtype.kind in "OUST"]
    labels = [{str(label) for label in coord.values.ravel().tolist()} for coord in texts]
    grid = result.attrs.get(GRID)
    wider = grid is not None and len(result.dims) > 1 + len(grid.split(", "))
    combined = result.attrs.get(QUANTITY) == METRIC and "metric" not in result.attrs  # the difference of two metrics
    if wider or combined or any(len(values & metrics) > 1 for values in labels):
        raise ValueError(
            f"{_name(result)} has the runs of several metrics ({', '.join(sorted(metrics))}), and may hold more than one of them: take the"
            " Dataset, or one metric at a time (and drop_vars the others' base and source before results are combined)"
        )


def _name(result: Any) -> str:
    """The name of a result for errors."""
    return "the result" if result.name is None else repr(result.name)


def _effect(result: Any) -> Any:
    """The effects of single prompts: result - base of a metric, or the values themselves."""
    return result - _run(result, "base") if _is_metric(result) else result


def _present(effect: Any) -> Bool[np.ndarray, "..."]:
    """Which prompts have the position of which cells, of the effects' shape."""
    has = has_positions(effect)
    return np.ones(effect.shape, bool) if has is None else has.broadcast_like(effect).transpose(*effect.dims).values


def _check_prompts(result: Any) -> None:
    """Raise `ValueError` for a result that does not hold the effects of single prompts."""
    _check_one_metric(result)
    if "batch" not in result.dims:
        raise ValueError(
            f"the result has no dimension 'batch' (its dimensions are {', '.join(map(repr, result.dims)) or 'none'}), over whose prompts"
            " means are taken: select prompts by a list, isel(batch=[0]), and take no mean before"
        )


def _coordinate(result: Any, which: str) -> str | None:
    """The name of the coordinate that holds the metric on the base or the source run; `None` where there is none."""
    names = (which, f"{which}.{result.attrs.get('metric', result.name)}", f"{which}.{result.name}")
    return next((name for name in names if name in result.coords), None)


def _run(result: Any, which: str) -> Any:
    """The metric on the base or the source run, `[batch]`; `ValueError` where it is absent or not finite."""
    name = _coordinate(result, which)
    if name is None:
        raise ValueError(
            f"the result has no coordinate {which!r}, the metric on the {which} run: normalising takes both baselines, which mijax.patch"
            " gives; without a source take result - result.base, and intervals of that by mijax.bootstrap"
        )
    run = result[name].astype(np.float64).reset_coords(drop=True)
    if not np.isfinite(run).all():
        raise ValueError(f"the metric is not finite on the {which} run: {run.values}")
    return run
