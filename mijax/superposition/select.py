"""Which models of a grid to keep."""

from typing import TYPE_CHECKING

import numpy as np

from mijax.arguments import whole_number

if TYPE_CHECKING:
    import xarray as xr


def best(results: "xr.Dataset", over: str = "seed") -> "xr.Dataset":
    """At every point of the grid, the model along `over` whose loss is lowest; masked models (NaN) come last.

    Args:
        results: what `train` returns; it holds `loss`.
        over: the dimension along which models are compared.

    Returns:
        The results of these models, without the dimension `over`.

    Raises:
        ValueError: for an `over` that the loss does not have.

    >>> import xarray as xr
    >>> xr.Dataset({"loss": ("seed", [3.0, 1.0, 2.0])}).pipe(best).loss.item()
    1.0
    """
    return best_of(results, 1, over).isel({over: 0})


def best_of(results: "xr.Dataset", count: int, over: str = "seed") -> "xr.Dataset":
    """At every point of the grid, the `count` models along `over` with the lowest losses, the lowest first.

    The phase diagrams of Elhage et al. 2022 keep 9 of 10 models: the worst is discarded. Masked models (NaN) come
    last.

    Args:
        results: what `train` returns; it holds `loss`.
        count: number of models to keep.
        over: the dimension along which models are compared.

    Returns:
        The results of these models, `count` along `over`.

    Raises:
        TypeError: for a count that is not whole.
        ValueError: for a count below 1, or above the number of models, and for an `over` that the loss does not have.

    >>> import xarray as xr
    >>> xr.Dataset({"loss": ("seed", [3.0, 1.0, 2.0])}).pipe(best_of, 2).loss.values.tolist()
    [1.0, 2.0]
    """
    whole_number("count", count, least=1)
    if over not in results["loss"].dims:
        raise ValueError(
            f"models are compared along a dimension of the loss, {', '.join(map(str, results['loss'].dims))}: given {over!r}"
        )
    if count > results.sizes[over]:
        raise ValueError(f"{count} of {results.sizes[over]} models along {over!r} are asked for")
    losses = results["loss"].drop_vars(over, errors="ignore").fillna(np.inf)
    order = losses.copy(data=losses.values.argsort(axis=losses.get_axis_num(over)))
    return results.isel({over: order.isel({over: slice(count)})})
