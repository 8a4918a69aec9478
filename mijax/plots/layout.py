"""Figures of panels: how many axes there are, how large they are, and which panel each holds."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = TypeVar("Panel")
Inches = tuple[float, float]
"""Width and height."""


def subplots(n_rows: int, n_columns: int, panel: Inches, margin: Inches = (0.6, 0.6)) -> tuple["Figure", np.ndarray]:
    """A figure and its axes `[n_rows, n_columns]`.

    Args:
        n_rows: of panels.
        n_columns: of panels.
        panel: the size of one panel.
        margin: what the figure is larger than its panels.
    """
    from mijax.plots.notebook import NotebookFigure

    size = panel[0] * n_columns + margin[0], panel[1] * n_rows + margin[1]
    figure = NotebookFigure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def gallery(n_panels: int, columns: int, panel: Inches) -> tuple["Figure", np.ndarray]:
    """A figure and its axes in reading order `[rows * columns]`, with at most `columns` panels in a row.

    Raises:
        ValueError: for no panels, or no columns.
    """
    if n_panels < 1:
        raise ValueError("no panels to draw")
    if columns < 1:
        raise ValueError(f"columns={columns}: expected at least 1")
    figure, axes = subplots(-(-n_panels // columns), min(columns, n_panels), panel)
    return figure, axes.ravel()


def n_columns(rows: Mapping[str, Mapping[str, Any]]) -> int:
    """The number of panels in the longest row.

    Raises:
        ValueError: for no panels.
    """
    longest = max(map(len, rows.values()), default=0)
    if not longest:
        raise ValueError("no panels to draw")
    return longest


def fill(axes: np.ndarray, panels: Mapping[str, Panel]) -> Iterator[tuple[Any, str, Panel]]:
    """Pair axes with panels, `(axes, panel title, panel)`; axes without a panel are switched off."""
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, panel) in zip(axes, panels.items()):
        yield axis, title, panel


def label_row(axis: Any, title: str, offset: float) -> None:
    """Write a row's title left of its first panel, at `offset` panel widths from the panel's left edge."""
    axis.annotate(title, (offset, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center", weight="bold")
