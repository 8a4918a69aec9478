"""Sweeps: a metric at every cell of a grid of edits, by `vmap` in memory-bounded batches."""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax import chunks
from mijax._types import Array, ArrayLike, Bool, Float
from mijax.interventions.edits import Interventions, as_edits
from mijax.interventions.where import Where, check_range
from mijax.model.config import Config
from mijax.model.readout import Readout
from mijax.model.sites import PER_HEAD_COPIES, SITES, sites
from mijax.model.tokens import Tokens, as_tokens
from mijax.model.transformer import Transformer
from mijax.run import check, field_lengths, run
from mijax.sweeps.grid import Grid

if TYPE_CHECKING:
    import xarray as xr

AnyMetric: TypeAlias = Callable[[Readout], Array]
Metrics: TypeAlias = AnyMetric | Mapping[str, AnyMetric]
Places: TypeAlias = tuple[tuple[str, int], ...]
Values: TypeAlias = dict[str, np.ndarray]


@overload
def sweep(model: Transformer, tokens: Tokens | ArrayLike, interventions: Interventions, metric: AnyMetric, *,
          memory: int | None = ..., progress: bool = ...) -> "xr.DataArray": ...  # fmt: skip
@overload
def sweep(model: Transformer, tokens: Tokens | ArrayLike, interventions: Interventions, metric: Mapping[str, AnyMetric],
          *, memory: int | None = ..., progress: bool = ...) -> "xr.Dataset": ...  # fmt: skip
def sweep(
    model: Transformer,
    tokens: Tokens | ArrayLike,
    interventions: Interventions,
    metric: Metrics,
    *,
    memory: int | None = None,
    progress: bool = True,
) -> Any:
    """Run every cell of a grid of edits and measure each: one compilation, one labelled result.

    `interventions` are those of `run`, where one `mijax.grid` stands in place of the `Where` of one edit
    or of several (which then move together). Values are each cell's metric, per example, with dimensions
    `grid.dims + ("batch",)`; the coordinate `base` is the metric with only the edits that are not on
    the grid. A dictionary of metrics is read from one run of each cell and gives a Dataset, whose
    coordinates are then `base.<name>`. `memory` bounds the bytes that the cells of one batch take.

    Raises what `run` raises, for all cells, before anything runs; and `ValueError` where there is not
    one grid, or where the metric is not finite on the base.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> heads = mj.grid(layer=range(2), head=range(2))
    >>> result = mj.sweep(model, [[1, 2, 3]], {"z": mj.Replace(0.0, heads)}, mj.metrics.logit(7))
    >>> dict(result.sizes)
    {'layer': 2, 'head': 2, 'batch': 1}
    """
    tokens, metrics = as_tokens(tokens), named(metric)
    grid, base, values = swept(model, tokens, interventions, metrics, memory=memory, progress=progress)
    attrs = {"sites": " ".join(interventions), **described(model)}
    return labelled(values, grid, {"base": base}, single=not isinstance(metric, Mapping), attrs=attrs)


def swept(
    model: Transformer,
    tokens: Tokens,
    interventions: Interventions,
    metrics: Mapping[str, AnyMetric],
    *,
    memory: int | None,
    progress: bool,
    changes: Callable[[Where], Bool[Array, "cell batch"]] | None = None,
) -> tuple[Grid, Values, Values]:
    """The grid, the metrics `[batch]` of the base and those `[*grid, batch]` of the cells, unlabelled.

    `changes` may tell, from the stacked cells, which of them change anything for which example: elsewhere the
    metric is the base's, and a cell that changes nothing for any example is not run.
    """
    grid, places, edits = _lift(as_edits(interventions))
    _check_cells(model.config, tokens, edits, places, grid)
    fixed = {name: tuple(e for i, e in enumerate(given) if (name, i) not in places) for name, given in edits.items()}
    base = measure(model, tokens, fixed, metrics, "base")
    changed = np.ones((grid.size, tokens.ids.shape[0]), bool) if changes is None else np.asarray(changes(grid.where))
    needed = np.flatnonzero(changed.any(axis=1))
    values = {name: np.broadcast_to(value, (grid.size, len(value))).copy() for name, value in base.items()}
    if len(needed):
        found = chunks.map_chunks(
            lambda where: _cells(model, tokens, edits, places, where, metrics),
            jax.tree.map(lambda index: index[needed], grid.where),
            chunks.chunk_size(len(needed), cell_bytes(model, tokens, edits, metrics), memory),
            label=f"sweep {', '.join(edits)}", progress=progress,
        )  # fmt: skip
        for name, value in found.items():
            values[name][needed] = np.where(changed[needed], value, values[name][needed])
    return grid, base, {name: value.reshape(*grid.shape, -1) for name, value in values.items()}


def _check_cells(config: Config, tokens: Tokens, edits: dict[str, tuple], places: Places, grid: Grid) -> None:
    """Raise what `run` would raise at any cell: all have the first one's structure, each its own indices."""
    check(config, tokens, _placed(edits, places, jax.tree.map(lambda index: index[0], grid.where)), {})
    for name in dict.fromkeys(name for name, _ in places):
        check_range(grid.flat(), name, field_lengths(config, tokens, name))


def measure(
    model: Transformer, tokens: Tokens, edits: Any, metrics: Mapping[str, AnyMetric], what: str
) -> dict[str, np.ndarray]:
    """The metrics of one run; `ValueError` where one is not finite, or is not one number per example."""
    values = jax.tree.map(np.asarray, _measured(model, tokens, edits, metrics))
    for name, value in values.items():
        if not np.isfinite(value).all():
            example = int(np.argmin(np.isfinite(value)))
            raise ValueError(
                f"metric {name!r} is {value[example]} on the {what} run of example {example}: a position or an answer out"
                " of range, or a model that overflows"
            )
    return values


@eqx.filter_jit
def _measured(model, tokens, edits, metrics):
    readout = run(model, tokens, edits).readout
    return {name: _per_example(name, metric(readout), readout) for name, metric in metrics.items()}


@eqx.filter_jit
def _cells(model, tokens, edits, places, where, metrics):
    """The metrics `[cell, batch]` of a batch of cells."""
    cell = lambda where: _measured(model, tokens, _placed(edits, places, where), metrics)
    return jax.vmap(cell)(where)


def _per_example(name: str, value: Any, readout: Readout) -> Float[Array, " batch"]:
    batch = readout.final.shape[0]
    if jnp.shape(value) != (batch,):
        raise ValueError(f"metric {name!r} must give one number per example, [{batch}], given shape {jnp.shape(value)}")
    return value.astype(jnp.float32)


def named(metric: Metrics) -> dict[str, AnyMetric]:
    """Metrics by name: a single one by its own."""
    if isinstance(metric, Mapping):
        return dict(metric)
    return {getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__: metric}


def _lift(edits: dict[str, tuple]) -> tuple[Grid, Places, dict[str, tuple]]:
    """Take the grid out of the edits; `places` says of which edits it is the `where`."""
    grids, places, bare = {}, [], {}
    for name, given in edits.items():
        for i, edit in enumerate(given):
            if isinstance(getattr(edit, "where", None), Grid):
                grids[id(edit.where)] = edit.where
                places.append((name, i))
        bare[name] = tuple(
            eqx.tree_at(lambda e: e.where, e, Where()) if (name, i) in places else e for i, e in enumerate(given)
        )
    if len(grids) != 1:
        raise ValueError(
            f"a sweep needs one mijax.grid as the where of its edits (the same one in several), given {len(grids)}"
        )
    return next(iter(grids.values())), tuple(places), bare


def _placed(edits: dict[str, tuple], places: Places, where: Where) -> dict[str, tuple]:
    place = lambda edit: eqx.tree_at(lambda e: e.where, edit, where)
    return {
        name: tuple(place(e) if (name, i) in places else e for i, e in enumerate(given))
        for name, given in edits.items()
    }


def cell_bytes(model: Transformer, tokens: Tokens, edits: Mapping[str, Any], metrics: Mapping[str, AnyMetric]) -> int:
    """The bytes that one cell takes: every activation of one layer at once, and what the metrics compute.

    An upper bound where XLA frees and fuses; measured against the compiled program in the tests.
    """
    table = sites(model, tokens)
    depth = lambda name: model.config.n_layers if SITES[name].has_layer else 1
    inside = sum(
        i.bytes // max(1, depth(name)) for name, i in table.items() if name not in PER_HEAD_COPIES or name in edits
    )
    readout = eqx.filter_eval_shape(lambda: run(model, tokens).readout)
    program = eqx.filter_make_jaxpr(lambda r: [metric(r) for metric in metrics.values()])(readout)[0]
    sizes = [v.aval.size * v.aval.dtype.itemsize for eqn in program.jaxpr.eqns for v in eqn.outvars]
    return inside + sum(sizes)


def labelled(
    values: dict[str, np.ndarray], grid: Grid, runs: dict[str, dict[str, np.ndarray]], *, single: bool, attrs: dict
) -> Any:
    """A DataArray (one metric) or Dataset (several): cells, examples, the base and source metrics beside."""
    import xarray as xr

    coords: dict[str, Any] = {dim: (dim, np.asarray(labels)) for dim, labels in grid.labels.items()}
    coords["batch"] = ("batch", np.arange(next(iter(values.values())).shape[-1]))
    for which, metrics in runs.items():
        for name, value in metrics.items():
            coords[which if single else f"{which}.{name}"] = ("batch", value)
    dims = (*grid.dims, "batch")
    arrays = {
        name: xr.DataArray(value, coords, dims, name=name, attrs={**attrs, "metric": name})
        for name, value in values.items()
    }
    return next(iter(arrays.values())) if single else xr.Dataset(arrays, attrs=attrs)


def described(model: Transformer) -> dict[str, str]:
    """What a saved result must say of the model, and of the software that made it."""
    return {
        "model": model.config.name or "unnamed",
        "mijax": importlib.metadata.version("mijax"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
