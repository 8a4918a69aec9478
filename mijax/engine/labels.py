"""Labelled results: xarray objects with named dimensions, and the prompts' tokens beside their positions."""

from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mijax.engine.axes import POSITIONS
from mijax.engine.driver import Swept
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
            coords[which if single else f"{which}.{name}"] = ("batch", value)
    attrs = {**attrs, **done.attrs}
    arrays = {
        name: xr.DataArray(
            value.reshape(*shape, -1), coords, (*labels, "batch"), name=name, attrs={**attrs, "metric": name}
        )
        for name, value in done.values.items()
    }
    return next(iter(arrays.values())) if single else xr.Dataset(arrays, attrs=attrs)


@overload
def positions_told(result: "xr.DataArray", tokens: Inputs) -> "xr.DataArray": ...
@overload
def positions_told(result: "xr.Dataset", tokens: Inputs) -> "xr.Dataset": ...
def positions_told(result: "xr.DataArray | xr.Dataset", tokens: Inputs) -> "xr.DataArray | xr.Dataset":
    """The result with NaN at positions that a prompt lacks, and with the tokens along axes of positions.

    Args:
        result: a DataArray or Dataset.
        tokens: its prompts.

    Returns:
        The result, with the coordinates `token` (along `pos`), `query_token` and `key_token` where the prompts have
        strings.
    """
    import xarray as xr

    lengths = np.asarray(tokens.lengths)
    for axis in POSITIONS:
        if axis in result.dims:
            if (lengths < result.sizes[axis]).any():
                result = result.where(result[axis] < xr.DataArray(lengths, dims="batch"))
            if tokens.strings is not None:
                rows = [
                    [s for s, real in zip(row, mask) if real]
                    for row, mask in zip(tokens.strings, np.asarray(tokens.mask))
                ]
                table = np.asarray([row + [""] * (result.sizes[axis] - len(row)) for row in rows])
                name = "token" if axis == "pos" else f"{axis}_token"
                result = result.assign_coords({name: (("batch", axis), table)})
    return result
