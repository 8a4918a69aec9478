"""Effects over a grid as heat maps."""

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax.plots import layout

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Panels = Mapping[str, Mapping[str, "xr.DataArray"]]
"""Rows of panels by title: `{row title: {panel title: effects of two dimensions}}`."""

COLOURS = "RdBu"
"""The colour map, of matplotlib and of plotly: red negative, white zero, blue positive."""
_MOST_TICKS = 16
_LONGEST_LEVEL_LABEL = 5
"""Characters; longer labels on the horizontal axis (words, tokens) are slanted."""


def heatmaps(
    panels: Panels, *, title: str = "", limit: float | None = None, label: str = "normalised effect"
) -> "Figure":
    """Draw rows of heat maps on one colour scale, symmetric about zero.

    The first dimension of each panel runs upwards, the second to the right, both with the labels of their coordinates.
    The first one is named where it is not that of the panel to the left.
    NaN cells stay blank.

    Args:
        panels: `{row title: {panel title: effects}}`, each an array of two dimensions; rows may differ in length.
        title: of the figure.
        limit: the value of the strongest colour; by default the largest finite magnitude in all panels.
        label: what the colours are.

    Returns:
        A figure with the axes of the panels, row by row, and of the colour bar last.

    Raises:
        TypeError: for panels of another form, and a limit that is no number.
        ValueError: for no panels, a panel that does not have two dimensions or has no cells, or a limit that is not
            positive and finite.

    >>> import numpy as np, xarray as xr, mijax as mj
    >>> effects = xr.DataArray(np.array([[0.1, -0.4], [0.8, 0.0]]), dims=("layer", "head"))
    >>> figure = mj.plots.heatmaps({"denoising": {"z": effects}})
    >>> figure.axes[0].get_title(), figure.axes[0].images[0].get_clim()
    ('z', (-0.8, 0.8))
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = colour_limit(panels, limit)
    colours = ScalarMappable(Normalize(-limit, limit), matplotlib.colormaps[COLOURS])
    figure, axes = layout.subplots(len(panels), layout.n_columns(panels), (3.1, 3.9), (1.2, 0.6))
    for row, (row_title, row_panels) in zip(axes, panels.items()):
        names = vertical_names(row_panels)
        for axis, name, effects in layout.fill(row, row_panels):
            axis.imshow(effects.values, origin="lower", aspect="auto", cmap=colours.cmap, norm=colours.norm)
            _label(axis, effects)
            axis.set(title=name, ylabel=next(names) or "")
        layout.label_row(row[0], row_title, -0.32)
    figure.suptitle(title, wrap=True)
    figure.colorbar(colours, ax=axes, shrink=0.6, label=label, extend="both")
    return figure


def _label(axis: Any, effects: "xr.DataArray") -> None:
    """Write labels on at most 16 ticks of each axis, and the name of the horizontal one."""
    y, x = effects.dims
    for set_ticks, dim in ((axis.set_xticks, x), (axis.set_yticks, y)):
        labels = tick_labels(effects, dim)
        step = -(-len(labels) // _MOST_TICKS)
        set_ticks(range(0, len(labels), step), labels[::step])
    axis.set_xlabel(dim_name(effects, x))
    if max(map(len, tick_labels(effects, x))) > _LONGEST_LEVEL_LABEL:
        axis.tick_params(axis="x", labelrotation=40)
        for tick in axis.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")


def colour_limit(panels: Panels, limit: float | None) -> float:
    """Check the panels, and choose the value of the strongest colour.

    Args:
        panels: `{row title: {panel title: effects}}`, as `heatmaps` takes it.
        limit: the value; `None` for the largest finite magnitude in all panels, or 1 where there is none or it is 0.

    Returns:
        The value, in the effects' unit.

    Raises:
        TypeError: for panels of another form, and a limit that is no number.
        ValueError: for no panels, a panel that does not have two dimensions or has no cells, or a limit that is not
            positive and finite.
    """
    layout.check_panels(panels, "{row title: {panel title: effects}}, each a DataArray", layout.is_labelled)
    layout.n_columns(panels)
    for row_title, row in panels.items():
        for name, effects in row.items():
            if effects.ndim != 2 or not effects.size:
                raise ValueError(
                    f"panel {name!r} of row {row_title!r} has the dimensions {dict(effects.sizes)}; expected two, not empty"
                )
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, Real):
            raise TypeError(f"limit must be a number, the value of the strongest colour, given {limit!r}")
        if not 0 < limit < math.inf:
            raise ValueError(f"limit={limit}: expected a positive number, the value of the strongest colour")
        return float(limit)
    magnitudes = [
        np.abs(effects.values[np.isfinite(effects.values)]) for row in panels.values() for effects in row.values()
    ]
    return max(float(values.max(initial=0)) for values in magnitudes) or 1.0


def vertical_names(row: Mapping[str, "xr.DataArray"]) -> Iterator[str | None]:
    """Choose where a row of panels names its vertical dimension.

    Args:
        row: the effects of its panels.

    Yields:
        The name for each panel, `None` where it is that of the panel to the left.
    """
    left = None
    for effects in row.values():
        yield None if effects.dims[0] == left else str(effects.dims[0])
        left = effects.dims[0]


def tick_labels(effects: "xr.DataArray", dim: Any) -> list[str]:
    """Write the labels of a dimension's coordinate as text.

    Args:
        effects: the effects of a panel.
        dim: the name of one of their dimensions.

    Returns:
        A text for each entry along the dimension: its label, or its index where the dimension has no coordinate.
    """
    return [str(label) for label in effects[dim].values]


def dim_name(effects: "xr.DataArray", dim: Any) -> str:
    """Choose the name that a figure gives to a dimension.

    Args:
        effects: the effects of a panel.
        dim: the name of one of their dimensions.

    Returns:
        The dimension's name, or "role" for positions (`pos`) whose labels are text.
    """
    return "role" if dim == "pos" and effects[dim].dtype.kind in "US" else str(dim)
