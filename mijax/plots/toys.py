"""Toy models: their weights, phase diagrams, curves against settings, and directions in a plane."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mijax.files import atomic
from mijax.superposition import geometry

Curve = tuple[Any, Any]
"""What stands along x, and along y."""


def _figure(rows: int, columns: int, width: float = 2.6, height: float = 2.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _written(figure: Any, path: str | os.PathLike, title: str) -> None:
    figure.suptitle(title)
    with atomic(path) as scratch:
        figure.savefig(scratch, dpi=120)


def save_models(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike, *, title: str = "", columns: int = 5
) -> None:
    """Draw each model `{title: (W, b)}`: `W^T W` beside the bias, red negative and blue positive, up to +-1.2, and its features.

    A feature's bar is as long as its direction, |W_i|, and coloured as in Elhage et al. 2022: dark where it has a dimension of its
    own, yellow where others share it (`mijax.superposition.geometry.represented`, 1 and more).
    """
    from matplotlib import colormaps

    rows = -(-len(models) // columns)
    figure, axes = _figure(rows, min(columns, len(models)), 3.1)
    for axis in axes.ravel()[len(models) :]:
        axis.set_axis_off()
    for axis, (name, (w, b)) in zip(axes.ravel(), models.items()):
        gap = np.full((len(b), 1), np.nan)
        both = np.concatenate([w.T @ w, gap, np.asarray(b)[:, None]], axis=1)
        axis.imshow(both, cmap="RdBu", vmin=-1.2, vmax=1.2)
        axis.set(title=name, xticks=[], yticks=[])
        bars = axis.inset_axes((1.03, 0.0, 0.25, 1.0))
        norm, shared = geometry.represented(w)
        bars.barh(np.arange(len(b)), norm, height=1.0, color=colormaps["viridis"](np.clip(shared, 0, 1)))
        bars.set(xlim=(0, 1.3), ylim=(len(b) - 0.5, -0.5), xticks=[], yticks=[])
    _written(figure, path, title)


def save_phases(
    panels: Mapping[str, Mapping[str, tuple[Mapping[str, np.ndarray], np.ndarray]]],
    path: str | os.PathLike,
    *,
    title: str = "",
) -> None:
    """Draw rows of phase diagrams `{row: {title: (axes, role)}}`, roles 0 ignored, 1 sharing, 2 dedicated, over log axes; -1, unknown, is black."""
    from matplotlib.colors import ListedColormap

    columns = max(len(row) for row in panels.values())
    figure, axes = _figure(len(panels), columns, 2.5, 2.7)
    for row, (row_title, own) in zip(axes, panels.items()):
        for axis in row[len(own) :]:
            axis.set_axis_off()
        for axis, (name, (along, roles)) in zip(row, own.items()):
            y, x = along
            axis.pcolormesh(
                along[x],
                along[y],
                roles,
                cmap=ListedColormap(["black", "0.93", "#d62728", "#1f77b4"]),
                vmin=-1,
                vmax=2,
                shading="nearest",
                rasterized=True,
            )
            axis.set(
                title=name, xscale="log", yscale="log", xlabel=x, ylabel=f"{row_title}\n{y}" if axis is row[0] else ""
            )
            axis.invert_xaxis()
    _written(figure, path, f"{title} (white, red, blue)")


def save_curves(
    panels: Mapping[str, Mapping[str, Curve]], path: str | os.PathLike, *, title: str = "", xlabel: str = "", ylabel: str = "",
    lines: Mapping[str, float] | None = None, dots: bool = False, xscale: str = "linear", yscale: str = "linear",
) -> None:  # fmt: skip
    """Draw curves, or dots, `{panel: {label: (x, y)}}`, with `lines` across at values that theory names."""
    figure, axes = _figure(1, len(panels), 4.6, 3.6)
    for axis, (name, curves) in zip(axes[0], panels.items()):
        for label, value in (lines or {}).items():
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
        for label, (x, y) in curves.items():
            axis.plot(x, y, "." if dots else "-", markersize=4, alpha=0.6 if dots else 1.0, label=label)
        axis.set(title=name, xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
        if xscale == "log":
            _readable(axis)
        if 1 < len(curves) <= 12:
            axis.legend(fontsize=7)
    _written(figure, path, title)


def _readable(axis: Any) -> None:
    """Plain numbers at 1, 2, 5 of each decade, where there are at most two decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_xlim()
    if high / low < 300:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def save_directions(
    models: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    *,
    title: str = "",
    columns: int = 5,
    groups: Sequence[int] | None = None,
) -> None:
    """Draw the columns of each `W [2, feature]` as lines from the origin; features of one of `groups` have one colour."""
    rows = -(-len(models) // columns)
    figure, axes = _figure(rows, min(columns, len(models)), 2.2, 2.2)
    for axis in axes.ravel()[len(models) :]:
        axis.set_axis_off()
    for axis, (name, w) in zip(axes.ravel(), models.items()):
        for i, (x, y) in enumerate(np.asarray(w).T):
            axis.plot([0, x], [0, y], marker="o", markevery=[1], color=f"C{i if groups is None else groups[i]}")
        axis.set(title=name, xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[], aspect="equal")
    _written(figure, path, title)
