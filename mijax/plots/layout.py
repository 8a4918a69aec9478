"""Figures of panels: how many axes there are, how large they are, and which panel each holds."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = TypeVar("Panel")
Inches = tuple[float, float]
"""Width and height."""


def subplots(n_rows: int, n_columns: int, panel: Inches, margin: Inches = (0.6, 0.6)) -> tuple["Figure", np.ndarray]:
    """Make a figure with rows and columns of panels.

    Args:
        n_rows: the number of rows.
        n_columns: the number of columns.
        panel: the width and height of one panel, in inches.
        margin: by how much the figure is wider and higher than its panels, in inches.

    Returns:
        The figure, and its axes `[n_rows, n_columns]`.
    """
    from mijax.plots.notebook import NotebookFigure

    size = panel[0] * n_columns + margin[0], panel[1] * n_rows + margin[1]
    figure = NotebookFigure(figsize=size, layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def gallery(n_panels: int, columns: int, panel: Inches) -> tuple["Figure", np.ndarray]:
    """Make a figure of panels in reading order.

    Args:
        n_panels: the number of panels.
        columns: how many panels stand in a row at most.
        panel: the width and height of one panel, in inches.

    Returns:
        The figure, and its axes `[n]` in reading order; `n` is above `n_panels` where the last row is not full.

    Raises:
        ValueError: for no panels, or no columns.
    """
    if n_panels < 1:
        raise ValueError("no panels to draw")
    if columns < 1:
        raise ValueError(f"columns={columns}: expected at least 1")
    figure, axes = subplots(-(-n_panels // columns), min(columns, n_panels), panel)
    return figure, axes.ravel()


def check_panels(panels: Any, form: str, is_panel: Callable[[Any], bool], levels: int = 2) -> None:
    """Check that panels are mappings by title, of the form that a function draws.

    Args:
        panels: what is to be drawn, `{row title: {panel title: panel}}`; or, of one level, `{panel title: panel}`.
        form: the form, for the message.
        is_panel: whether a panel is what can be drawn.
        levels: the number of levels.

    Raises:
        TypeError: for anything else.

    >>> check_panels({"row": {"panel": 1.0}}, "{row title: {panel title: number}}", lambda x: isinstance(x, float))
    """
    if not isinstance(panels, Mapping):
        raise TypeError(f"panels are given as {form}, given {type(panels).__name__}")
    for title, panel in panels.items():
        if levels > 1:
            check_panels(panel, form, is_panel, levels - 1)
        elif not is_panel(panel):
            raise TypeError(
                f"panels are given as {form}; {title!r} is a {type(panel).__name__} that cannot be drawn so"
            )


def is_labelled(panel: Any) -> bool:
    """Whether a panel is an xarray DataArray.

    Args:
        panel: the panel.

    Returns:
        Whether it is.
    """
    return hasattr(panel, "dims") and hasattr(panel, "values") and not isinstance(panel, Mapping)


def is_pair(panel: Any) -> bool:
    """Whether a panel is a pair, of exact effects and estimates, say.

    Args:
        panel: the panel.

    Returns:
        Whether it is a tuple or a list of two.
    """
    return isinstance(panel, tuple | list) and len(panel) == 2


def n_columns(rows: Mapping[str, Mapping[str, Any]]) -> int:
    """Count the panels of the longest row.

    Args:
        rows: `{row title: {panel title: panel}}`.

    Returns:
        The number of panels, at least 1.

    Raises:
        ValueError: for no panels.
    """
    longest = max(map(len, rows.values()), default=0)
    if not longest:
        raise ValueError("no panels to draw")
    return longest


def fill(axes: np.ndarray, panels: Mapping[str, Panel]) -> Iterator[tuple[Any, str, Panel]]:
    """Pair axes with panels, and switch off the axes that are left over.

    Args:
        axes: `[n]`, at least as many axes as there are panels.
        panels: the panels by title.

    Yields:
        `(axes, panel title, panel)`, in the order of the panels.
    """
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, panel) in zip(axes, panels.items()):
        yield axis, title, panel


def label_row(axis: Any, title: str, offset: float) -> None:
    """Write the title of a row beside its first panel, upwards.

    Args:
        axis: the axes of the row's first panel.
        title: the title.
        offset: where the title stands, in panel widths from the panel's left edge; negative to the left of it.
    """
    axis.annotate(title, (offset, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center", weight="bold")
