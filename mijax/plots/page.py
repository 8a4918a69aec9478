"""Effects over a grid as an interactive figure, for an offline page."""

from typing import TYPE_CHECKING, Any

from mijax.plots.effects import COLOURS, Panels, colour_limit, dim_name, tick_labels, vertical_names
from mijax.plots.layout import n_columns

if TYPE_CHECKING:
    import xarray as xr
    from plotly.graph_objects import Figure


def heatmap_page(
    panels: Panels, *, title: str = "", limit: float | None = None, label: str = "normalised effect"
) -> "Figure":
    """Draw what `heatmaps` draws as an interactive figure, which shows values on hovering.

    Args:
        panels: `{row title: {panel title: effects}}`, each an array of two dimensions; rows may differ in length.
        title: of the figure.
        limit: the value of the strongest colour; by default the largest finite magnitude in all panels.
        label: what the colours are.

    Returns:
        A plotly figure; `save` writes it as a page that needs no network.

    Raises:
        TypeError: for panels of another form, and a limit that is no number.
        ValueError: for no panels, a panel that does not have two dimensions or has no cells, or a limit that is not
            positive and finite.

    >>> import numpy as np, xarray as xr, mijax as mj
    >>> effects = xr.DataArray(np.array([[0.1, -0.4], [0.8, 0.0]]), dims=("layer", "head"))
    >>> figure = mj.plots.heatmap_page({"denoising": {"z": effects}}, limit=1.0)
    >>> figure.layout.annotations[0].text, figure.data[0].z.shape, figure.layout.coloraxis.cmin
    ('denoising: z', (2, 2), -1.0)
    """
    limit = colour_limit(panels, limit)
    figure = _subplots(panels)
    for i, row in enumerate(panels.values(), start=1):
        for j, (effects, name) in enumerate(zip(row.values(), vertical_names(row)), start=1):
            x = effects.dims[1]
            figure.add_trace(_trace(effects), i, j)
            figure.update_xaxes(title_text=dim_name(effects, x), type="category", row=i, col=j)
            figure.update_yaxes(title_text=name, type="category", row=i, col=j)
    figure.update_layout(
        title=title,
        height=480 * len(panels),
        coloraxis={"colorscale": COLOURS, "cmin": -limit, "cmax": limit, "colorbar": {"title": label}},
    )
    return figure


def _subplots(panels: Panels) -> "Figure":
    """An empty figure with one titled subplot per panel, and none where a row is shorter than others."""
    from plotly.subplots import make_subplots

    columns = n_columns(panels)
    specs = [[{}] * len(row) + [None] * (columns - len(row)) for row in panels.values()]
    titles = [f"{row_title}: {name}" for row_title, row in panels.items() for name in row]
    return make_subplots(
        len(panels),
        columns,
        specs=specs,
        subplot_titles=titles,
        horizontal_spacing=min(0.05, 0.5 / columns),  # plotly refuses gaps that leave no width to the panels
        vertical_spacing=min(0.12, 0.5 / len(panels)),
    )


def _categories(effects: "xr.DataArray", dim: Any) -> list[str]:
    """The labels of a dimension, with their numbers where some are equal: plotly would draw these as one."""
    labels = tick_labels(effects, dim)
    return labels if len(set(labels)) == len(labels) else [f"{i} {label}" for i, label in enumerate(labels)]


def _trace(effects: "xr.DataArray") -> Any:
    import plotly.graph_objects as go

    y, x = effects.dims
    return go.Heatmap(
        z=effects.values,
        x=_categories(effects, x),
        y=_categories(effects, y),
        coloraxis="coloraxis",
        hovertemplate=f"{y} %{{y}}<br>{dim_name(effects, x)} %{{x}}<br>effect %{{z:.4f}}<extra></extra>",
    )
