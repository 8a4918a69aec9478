"""Effects over a grid as heat maps: a file by matplotlib, an interactive page by plotly."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax.files import atomic

if TYPE_CHECKING:
    import xarray as xr

Panels = Mapping[str, Mapping[str, "xr.DataArray"]]
"""Rows of panels by title: `{row title: {panel title: effects of two dimensions}}`."""

_BLUE_WHITE_RED = "RdBu"


def save_heatmaps(
    panels: Panels,
    *paths: str | os.PathLike,
    title: str = "",
    limit: float | None = None,
    label: str = "normalised effect",
) -> None:
    """Draw rows of heat maps on one colour scale, symmetric about zero, to files: images, or `.html`.

    A page shows values on hovering and needs no network. The first dimension of each panel runs upwards, the second to the
    right. `limit` is the value of the strongest colour, by default the largest magnitude; `label` says what the colours are.
    """
    limit = _limit(panels, limit)
    for path in paths:
        draw = _page if str(path).endswith(".html") else _image
        draw(panels, path, title, limit, label)


def _image(panels: Panels, path: str | os.PathLike, title: str, limit: float, label: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    n_columns = max(len(row) for row in panels.values())
    figure = Figure(figsize=(3.1 * n_columns + 1.2, 3.9 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), n_columns, squeeze=False)
    image: Any = None
    for row, (row_title, row_panels) in zip(axes, panels.items()):
        for axis in row[len(row_panels) :]:
            axis.set_axis_off()
        for axis, (panel_title, effects) in zip(row, row_panels.items()):
            y, x = effects.dims
            image = axis.imshow(
                effects.values,
                origin="lower",
                aspect="auto",
                cmap=matplotlib.colormaps[_BLUE_WHITE_RED],
                vmin=-limit,
                vmax=limit,
            )
            axis.set(title=panel_title, xlabel=_name(effects, x), ylabel=y if axis is row[0] else "")
            for ticks, dim in ((axis.set_xticks, x), (axis.set_yticks, y)):
                labels = _ticks(effects, dim)
                step = -(-len(labels) // 16)
                ticks(range(0, len(labels), step), labels[::step])
            if max(map(len, _ticks(effects, x))) > 5:  # words, or tokens
                axis.tick_params(axis="x", labelrotation=40)
                for tick in axis.get_xticklabels():
                    tick.set(ha="right", rotation_mode="anchor")
        row[0].annotate(
            row_title, (-0.32, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center", weight="bold"
        )
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, shrink=0.6, label=label, extend="both")
    with atomic(path) as scratch:
        figure.savefig(scratch, dpi=120)


def _page(panels: Panels, path: str | os.PathLike, title: str, limit: float, label: str) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    n_columns = max(len(row) for row in panels.values())
    titles = [f"{row}: {name}" for row, own in panels.items() for name in own]
    figure = make_subplots(
        len(panels), n_columns, subplot_titles=titles, horizontal_spacing=0.05, vertical_spacing=0.12
    )
    for i, row in enumerate(panels.values()):
        for j, effects in enumerate(row.values()):
            y, x = effects.dims
            hover = f"{y} %{{y}}<br>{_name(effects, x)} %{{x}}<br>effect %{{z:.4f}}<extra></extra>"
            heatmap: Any = go.Heatmap(
                z=effects.values, x=_ticks(effects, x), y=_ticks(effects, y), coloraxis="coloraxis", hovertemplate=hover
            )
            figure.add_trace(heatmap, i + 1, j + 1)
            figure.update_xaxes(title_text=_name(effects, x), type="category", row=i + 1, col=j + 1)
            figure.update_yaxes(title_text=y if j == 0 else None, type="category", row=i + 1, col=j + 1)
    figure.update_layout(
        title=title,
        height=480 * len(panels),
        coloraxis={"colorscale": _BLUE_WHITE_RED, "cmin": -limit, "cmax": limit, "colorbar": {"title": label}},
    )
    with atomic(path) as scratch:
        figure.write_html(scratch, include_plotlyjs=True)


def _limit(panels: Panels, limit: float | None) -> float:
    if limit is not None:
        return limit
    largest = [np.nanmax(np.abs(effects.values)) for row in panels.values() for effects in row.values()]
    return float(max(largest)) or 1.0


def _ticks(effects: "xr.DataArray", dim: Any) -> list[str]:
    return [str(label) for label in effects[dim].values]


def _name(effects: "xr.DataArray", dim: Any) -> str:
    return "role" if dim == "pos" and effects[dim].dtype.kind in "US" else str(dim)
