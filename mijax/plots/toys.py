"""Toy models: their weights, phase diagrams, curves against settings, and directions in a plane."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax.plots import layout
from mijax.superposition import geometry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Any, Any]
"""Values along x, and along y."""
Diagram = tuple[Mapping[str, np.ndarray], np.ndarray]
"""Two axes `{name: values}`, y before x, and the role of each cell `[y, x]`."""

_ROLE_COLOURS = ["black", "0.93", "#d62728", "#1f77b4"]
"""Of unknown, ignored, sharing and dedicated."""


def models(models: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "", columns: int = 5) -> "Figure":
    """Draw the weights of toy models, `W^T W` beside the bias, and the lengths of their features' directions.

    Weights are red where negative and blue where positive, up to +-1.2. A feature's bar is as long as its direction,
    |W_i|, and coloured as in Elhage et al. 2022: dark where the feature has a dimension to itself, yellow where others
    share it (`mijax.superposition.geometry.represented`, 1 and more).

    Args:
        models: `{panel title: (W [hidden, feature], b [feature])}`.
        title: of the figure.
        columns: how many panels stand in a row.

    Returns:
        A figure with the axes of the panels; the bars are in axes inset into each.

    Raises:
        TypeError: for models of another form.
        ValueError: for no models, no columns, or a `W` and `b` of other shapes.

    >>> import numpy as np, mijax as mj
    >>> figure = mj.plots.models({"pair": (np.array([[1.0, -1.0]]), np.zeros(2))})
    >>> figure.axes[0].images[0].get_array().tolist()  # W^T W, a gap, and b
    [[1.0, -1.0, None, 0.0], [-1.0, 1.0, None, 0.0]]
    """
    from matplotlib import colormaps

    layout.check_panels(models, "{panel title: (W [hidden, feature], b [feature])}", layout.is_pair, levels=1)
    for name, (w, b) in models.items():
        if np.ndim(w) != 2 or np.shape(b) != np.shape(w)[1:]:
            raise ValueError(
                f"panel {name!r} has W of shape {np.shape(w)} and b of {np.shape(b)}; expected [hidden, feature], [feature]"
            )
    figure, axes = layout.gallery(len(models), columns, (3.1, 2.6))
    for axis, name, (w, b) in layout.fill(axes, models):
        w, b = np.asarray(w), np.asarray(b)
        gap = np.full((len(b), 1), np.nan)
        axis.imshow(np.concatenate([w.T @ w, gap, b[:, None]], axis=1), cmap="RdBu", vmin=-1.2, vmax=1.2)
        axis.set(title=name, xticks=[], yticks=[])
        bars = axis.inset_axes((1.03, 0.0, 0.25, 1.0))
        norm, shared = geometry.represented(w)
        bars.barh(np.arange(len(b)), norm, height=1.0, color=colormaps["viridis"](np.clip(shared, 0, 1)))
        bars.set(xlim=(0, 1.3), ylim=(len(b) - 0.5, -0.5), xticks=[], yticks=[])
    figure.suptitle(title, wrap=True)
    return figure


def phases(panels: Mapping[str, Mapping[str, Diagram]], *, title: str = "") -> "Figure":
    """Draw rows of phase diagrams: what becomes of a feature, over two logarithmic axes.

    Args:
        panels: `{row title: {panel title: (axes, role)}}`: two axes `{name: values}`, y before x, and roles `[y, x]` as
            `mijax.superposition.geometry.role` numbers them: 0 ignored (white), 1 sharing (red), 2 dedicated (blue),
            -1 unknown (black).
        title: of the figure; "(white, red, blue)" is added.

    Returns:
        A figure with the axes of the panels, row by row; x runs from large to small.

    Raises:
        TypeError: for panels of another form.
        ValueError: for no panels.

    >>> import numpy as np, mijax as mj
    >>> axes = {"importance": np.array([0.1, 1.0, 10.0]), "density": np.array([1.0, 0.1])}
    >>> figure = mj.plots.phases({"n=2, m=1": {"theory": (axes, np.array([[0, 0], [2, 1], [2, 1]]))}})
    >>> figure.axes[0].get_xlabel(), figure.axes[0].collections[0].get_array().shape
    ('density', (3, 2))
    """
    from matplotlib.colors import ListedColormap

    layout.check_panels(
        panels,
        "{row title: {panel title: ({y name: values, x name: values}, roles [y, x])}}",
        lambda panel: layout.is_pair(panel) and isinstance(panel[0], Mapping) and len(panel[0]) == 2,
    )
    colours = ListedColormap(_ROLE_COLOURS)
    limits = {"vmin": geometry.UNKNOWN, "vmax": geometry.DEDICATED}
    figure, axes = layout.subplots(len(panels), layout.n_columns(panels), (2.5, 2.7))
    for row, (row_title, row_panels) in zip(axes, panels.items()):
        for axis, name, (along, roles) in layout.fill(row, row_panels):
            y, x = along
            axis.pcolormesh(along[x], along[y], roles, cmap=colours, shading="nearest", rasterized=True, **limits)
            axis.set(title=name, xscale="log", yscale="log", xlabel=x)
            axis.set_ylabel(f"{row_title}\n{y}" if axis is row[0] else "")
            axis.invert_xaxis()
    figure.suptitle(f"{title} (white, red, blue)".strip(), wrap=True)
    return figure


def curves(
    panels: Mapping[str, Mapping[str, Curve]], *, title: str = "", xlabel: str = "", ylabel: str = "",
    lines: Mapping[str, float] | None = None, dots: bool = False, xscale: str = "linear", yscale: str = "linear",
) -> "Figure":  # fmt: skip
    """Draw panels of curves, or of dots, side by side.

    A panel of 2 to 12 curves has a legend.

    Args:
        panels: `{panel title: {label: (x, y)}}`.
        title: of the figure.
        xlabel: of every panel.
        ylabel: of every panel.
        lines: `{label: y}`, horizontal lines across every panel, at values that theory gives, say.
        dots: draw points that are not joined.
        xscale: matplotlib's name of a scale: "linear", "log", ...
        yscale: as `xscale`.

    Returns:
        A figure with the axes of the panels.

    Raises:
        TypeError: for panels of another form.
        ValueError: for no panels.

    >>> import mijax as mj
    >>> panels = {"loss": {"training": ([1, 10, 100], [0.9, 0.3, 0.1])}}
    >>> figure = mj.plots.curves(panels, xscale="log", lines={"chance": 1.0})
    >>> [line.get_label() for line in figure.axes[0].lines][1:], figure.axes[0].texts[0].get_text()
    (['training'], 'chance')
    """
    layout.check_panels(panels, "{panel title: {label: (x, y)}}", layout.is_pair)
    figure, axes = layout.subplots(1, layout.n_columns({"": panels}), (4.6, 3.6))
    for axis, name, panel in layout.fill(axes[0], panels):
        for label, value in (lines or {}).items():
            _draw_line(axis, label, value)
        for label, (x, y) in panel.items():
            axis.plot(x, y, "." if dots else "-", markersize=4, alpha=0.6 if dots else 1.0, label=label)
        axis.set(title=name, xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
        if xscale == "log":
            _simplify_ticks(axis)
        if 1 < len(panel) <= 12:
            axis.legend(fontsize=7)
    figure.suptitle(title, wrap=True)
    return figure


def _draw_line(axis: Any, label: str, value: float) -> None:
    """A horizontal line with its label at the right edge."""
    axis.axhline(value, color="0.75", linewidth=1, zorder=0)
    axis.annotate(
        label,
        (1.0, value),
        xycoords=("axes fraction", "data"),
        fontsize=7,
        va="center",
        ha="left",
        color="0.4",
        xytext=(3, 0),
        textcoords="offset points",
    )


def _simplify_ticks(axis: Any) -> None:
    """Plain numbers at 1, 2, 5 of each decade, where there are at most two decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_xlim()
    if high / low < 300:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def directions(
    models: Mapping[str, np.ndarray], *, title: str = "", columns: int = 5, groups: Sequence[int] | None = None
) -> "Figure":
    """Draw features in a plane: the columns of each `W` as lines from the origin.

    Args:
        models: `{panel title: W [2, feature]}`.
        title: of the figure.
        columns: how many panels stand in a row.
        groups: `[feature]`, numbers; features of one number have one colour. By default each feature has a colour to
            itself.

    Returns:
        A figure with the axes of the panels, which reach from -1.5 to 1.5.

    Raises:
        TypeError: for models of another form.
        ValueError: for no models, no columns, a `W` that is not `[2, feature]`, or too few groups.

    >>> import numpy as np, mijax as mj
    >>> figure = mj.plots.directions({"pair": np.array([[1.0, -1.0], [0.0, 0.0]])}, groups=[0, 0])
    >>> [line.get_xdata().tolist() for line in figure.axes[0].lines]
    [[0.0, 1.0], [0.0, -1.0]]
    """
    layout.check_panels(models, "{panel title: W [2, feature]}", lambda w: np.asarray(w).dtype.kind in "fiu", levels=1)
    figure, axes = layout.gallery(len(models), columns, (2.2, 2.2))
    for axis, name, w in layout.fill(axes, models):
        w = np.asarray(w)
        if w.ndim != 2 or len(w) != 2:
            raise ValueError(f"panel {name!r} has W of shape {w.shape}; expected [2, feature]")
        colours = range(w.shape[1]) if groups is None else groups
        if len(colours) < w.shape[1]:
            raise ValueError(f"panel {name!r} has {w.shape[1]} features, and groups={groups!r} colours {len(colours)}")
        for (x, y), colour in zip(w.T.tolist(), colours):
            axis.plot([0, x], [0, y], marker="o", markevery=[1], color=f"C{colour}")
        axis.set(title=name, xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[], aspect="equal")
    figure.suptitle(title, wrap=True)
    return figure
