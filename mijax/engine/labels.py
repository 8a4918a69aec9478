"""Labelled results: xarray objects with named dimensions, and the prompts' tokens beside their positions."""

import functools
import operator
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mijax.engine.axes import POSITIONS
from mijax.engine.driver import Swept
from mijax.engine.names import GRID, HAS_POSITION, METRIC, QUANTITY, RUN, TOKENS
from mijax.model.tokens import Inputs

if TYPE_CHECKING:
    import xarray as xr


def labelled(done: Swept, *, single: bool, attrs: dict[str, Any]) -> "xr.DataArray | xr.Dataset":
    """The metrics of a sweep as an xarray object, with dimensions of the grid and `batch`.

    The metrics of the base run and of other runs (the source's) are coordinates along `batch`: `base`, or
    `base.<name>` where there are several metrics.

    Args:
        done: the sweep.
        single: whether the user gave one metric, not a dictionary of metrics.
        attrs: attributes of the result; those of the sweep (`Swept.attrs`) and the metric's name are added.

    Returns:
        A DataArray where `single`, else a Dataset with a variable per metric.
    """
    import xarray as xr

    labels, shape = done.cells.labels, done.cells.shape
    coords: dict[str, Any] = {dim: (dim, np.asarray(choices)) for dim, choices in labels.items()}
    coords["batch"] = ("batch", np.arange(next(iter(done.values.values())).shape[-1]))
    for which, metrics in done.runs.items():
        for name, value in metrics.items():
            coords[which if single else f"{which}.{name}"] = ("batch", value, {QUANTITY: RUN})
    attrs = {**attrs, **done.attrs}
    arrays = {
        name: xr.DataArray(
            value.reshape(*shape, -1),
            coords,
            (*labels, "batch"),
            name=name,
            attrs={**attrs, GRID: ", ".join(labels), "metric": name, QUANTITY: METRIC},
        )
        for name, value in done.values.items()
    }
    return next(iter(arrays.values())) if single else xr.Dataset(arrays, attrs=attrs)


@overload
def with_positions(result: "xr.DataArray", tokens: Inputs) -> "xr.DataArray": ...
@overload
def with_positions(result: "xr.Dataset", tokens: Inputs) -> "xr.Dataset": ...
def with_positions(result: "xr.DataArray | xr.Dataset", tokens: Inputs) -> "xr.DataArray | xr.Dataset":
    """The result with NaN at positions that a prompt lacks, and with the tokens along axes of positions.

    Args:
        result: a DataArray or Dataset, whose labels along axes of positions are positions.
        tokens: its prompts.

    Returns:
        The result, with the coordinates `token` (along `pos`), `query_token` and `key_token` where the prompts have
        strings; and, where they differ in length, with `has_position` (`has_query_position`, `has_key_position`),
        false where the NaN stands for a position that the prompt lacks.
    """
    import xarray as xr

    lengths = np.asarray(tokens.lengths)
    for axis in POSITIONS:
        if axis not in result.dims:
            continue
        positions, along = result[axis].values, ("batch", axis)
        if (lengths < lengths.max()).any():
            has = positions < lengths[:, None]
            result = result.where(xr.DataArray(has, dims=along)).assign_coords({HAS_POSITION[axis]: (along, has)})
        if tokens.strings is not None:
            rows = [
                [s for s, real in zip(row, mask) if real] for row, mask in zip(tokens.strings, np.asarray(tokens.mask))
            ]
            table = np.asarray([[row[p] if p < len(row) else "" for p in positions] for row in rows])
            result = result.assign_coords({TOKENS[axis]: (along, table)})
    return result


def has_positions(result: "xr.DataArray") -> "xr.DataArray | None":
    """Which prompts have the positions of which cells.

    Args:
        result: a result with the dimension `batch`.

    Returns:
        Booleans over the dimension `batch` and those of positions; `None` where every prompt has all.
    """
    marks = [result[name] for name in HAS_POSITION.values() if name in result.coords]
    marks = [mark.reset_coords(drop=True).astype(bool) for mark in marks if "batch" in mark.dims]
    return functools.reduce(operator.and_, marks) if marks else None


def mean_over_prompts(values: "xr.DataArray") -> "xr.DataArray":
    """The mean over the prompts that have a cell's position.

    NaN of any other origin, such as a run that failed, stays NaN.

    Args:
        values: one number for every cell and prompt, with the dimension `batch`.

    Returns:
        The means, without `batch`; NaN where no prompt has the position.

    >>> import xarray as xr
    >>> has = {"has_position": (("pos", "batch"), [[True, True], [True, False]])}
    >>> mean_over_prompts(xr.DataArray([[1.0, 3.0], [5.0, np.nan]], has, ("pos", "batch"))).values.tolist()
    [2.0, 5.0]
    """
    has = has_positions(values)
    if has is None:
        return values.mean("batch", skipna=False)
    count = has.sum("batch")
    return values.where(has, 0.0).sum("batch", skipna=False) / count.where(count > 0)
