"""Which models of a grid to keep."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


def best(results: "xr.Dataset", over: str = "seed") -> "xr.Dataset":
    """At every point of the grid the model along `over` whose loss is lowest; masked ones (NaN) come last.

    >>> import xarray as xr
    >>> xr.Dataset({"loss": ("seed", [3.0, 1.0, 2.0])}).pipe(best).loss.item()
    1.0
    """
    return best_of(results, 1, over).isel({over: 0})


def best_of(results: "xr.Dataset", count: int, over: str = "seed") -> "xr.Dataset":
    """At every point of the grid the `count` models along `over` of the lowest losses, the lowest first.

    The paper's phase diagrams keep 9 of 10: the worst is discarded. `ValueError` for more models than there are.

    >>> import xarray as xr
    >>> xr.Dataset({"loss": ("seed", [3.0, 1.0, 2.0])}).pipe(best_of, 2).loss.values.tolist()
    [1.0, 2.0]
    """
    if not 1 <= count <= results.sizes[over]:
        raise ValueError(f"{count} of {results.sizes[over]} models along {over!r} are asked for")
    losses = results["loss"].drop_vars(over, errors="ignore").fillna(np.inf)
    order = losses.copy(data=losses.values.argsort(axis=losses.get_axis_num(over)))
    return results.isel({over: order.isel({over: slice(count)})})
