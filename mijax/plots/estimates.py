"""Estimated effects against exact effects."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax.plots import layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Pairs = Mapping[str, Mapping[str, tuple["xr.DataArray", "xr.DataArray"]]]
"""Rows of panels by title: `{row title: {panel title: (exact, estimate)}}`, of one shape."""


def scatter(pairs: Pairs, *, title: str = "", notes: Mapping[tuple[str, str], str] | None = None) -> "Figure":
    """Draw estimates over exact effects, a dot for each cell coloured by its layer.

    The line is where both are equal.

    Args:
        pairs: `{row title: {panel title: (exact, estimate)}}`. Both have the same dimensions with the same labels, in
            any order, and `layer` is one of the dimensions or a coordinate. A dimension that has labels in only one
            of them is taken in its order.
        title: of the figure.
        notes: `{(row title, panel title): text}`, written into the panels.

    Returns:
        A figure with the axes of the panels, row by row, and of the colour bar last.

    Raises:
        TypeError: for panels of another form.
        ValueError: for no panels, effects without layers, or an estimate whose dimensions or labels are not those of
            the exact effects.

    >>> import numpy as np, xarray as xr, mijax as mj
    >>> exact = xr.DataArray(np.array([[0.1, -0.4], [0.8, 0.0]]), dims=("layer", "head"))
    >>> figure = mj.plots.scatter({"AtP": {"z": (exact, 0.9 * exact)}}, notes={("AtP", "z"): "r 1.00"})
    >>> figure.axes[0].collections[0].get_array().tolist()  # each dot's layer
    [0.0, 0.0, 1.0, 1.0]
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layout.check_panels(
        pairs,
        "{row title: {panel title: (exact, estimate)}}, DataArrays",
        lambda pair: layout.is_pair(pair) and all(map(layout.is_labelled, pair)),
    )
    columns = layout.n_columns(pairs)
    pairs = {
        row_title: {name: _aligned(f"panel {name!r} of row {row_title!r}", *pair) for name, pair in row.items()}
        for row_title, row in pairs.items()
    }
    last = max(int(exact["layer"].max()) for row in pairs.values() for exact, _ in row.values())
    colours = ScalarMappable(Normalize(0, last), colormaps["viridis"])
    figure, axes = layout.subplots(len(pairs), columns, (3.0, 3.1), (1.0, 0.6))
    for row, (row_title, panels) in zip(axes, pairs.items()):
        for axis, name, (exact, estimate) in layout.fill(row, panels):
            _draw(axis, exact, estimate, colours)
            axis.set(title=name, xlabel="exact effect", ylabel="estimate" if axis is row[0] else "")
            note = (notes or {}).get((row_title, name))
            if note:
                axis.text(0.04, 0.96, note, transform=axis.transAxes, va="top", fontsize=8)
        layout.label_row(row[0], row_title, -0.42)
    figure.suptitle(title, wrap=True)
    figure.colorbar(colours, ax=axes, shrink=0.6, label="layer")
    return figure


def _aligned(panel: str, exact: "xr.DataArray", estimate: "xr.DataArray") -> tuple["xr.DataArray", "xr.DataArray"]:
    """The exact effects and the estimates of the same cells in the same order, checked."""
    if dict(exact.sizes) != dict(estimate.sizes):
        raise ValueError(f"{panel}: exact effects of {dict(exact.sizes)}, estimates of {dict(estimate.sizes)}")
    if not {"layer"} & {*exact.dims, *exact.coords}:
        raise ValueError(f"{panel} has no layers, which colour the dots: {dict(exact.sizes)}")
    estimate = estimate.transpose(*exact.dims)
    for dim in exact.dims:
        if dim not in exact.indexes or dim not in estimate.indexes or exact.indexes[dim].equals(estimate.indexes[dim]):
            continue
        labels, others = exact.indexes[dim], estimate.indexes[dim]
        if not (labels.is_unique and others.is_unique and set(labels) == set(others)):
            raise ValueError(
                f"{panel}: along {dim!r} exact effects have the labels {labels.tolist()}, estimates {others.tolist()}: the same,"
                " each once, are expected"
            )
        estimate = estimate.isel({dim: others.get_indexer(labels)})
    for name in {*exact.coords} & {*estimate.coords} - {*exact.dims}:
        labels, others = exact[name], estimate[name]
        if labels.dtype.kind == "f" or {*labels.dims} != {*others.dims}:  # metrics of runs, which are no labels
            continue
        if labels.ndim and not np.array_equal(labels.values, others.transpose(*labels.dims).values):
            raise ValueError(
                f"{panel}: exact effects and estimates have different labels {name!r}: the same are expected"
            )
    return exact, estimate


def _draw(axis: Any, exact: "xr.DataArray", estimate: "xr.DataArray", colours: Any) -> None:
    """Draw the dots and the line of one panel, over the range of both."""
    layer = exact["layer"].broadcast_like(exact).transpose(*exact.dims)
    x, y = exact.values.ravel(), estimate.values.ravel()
    axis.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0)
    axis.scatter(x, y, c=layer.values.ravel(), s=9, cmap=colours.cmap, norm=colours.norm, linewidths=0)
    values = np.concatenate([x, y])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    margin = 0.05 * (high - low or 1.0)
    axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
