"""Figures to files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mijax.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as Page

_DOTS_PER_INCH = 120


def save(figure: "Figure | Page", *paths: str | os.PathLike[str]) -> None:
    """Write a figure to files, each whole or not at all.

    Folders are made where they are missing.

    Args:
        figure: a matplotlib figure (images), or a plotly figure (pages that need no network).
        paths: the suffix chooses the format: `.png`, `.svg`, `.pdf` and the others that matplotlib writes; `.html` for
            plotly.

    Raises:
        TypeError: for a figure of another kind.
        ValueError: for a suffix that the figure's kind does not have, before anything is written.

    >>> import pathlib, tempfile, mijax as mj
    >>> figure = mj.plots.curves({"loss": {"training": ([1, 2, 3], [0.9, 0.3, 0.1])}})
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "loss.svg"
    >>> mj.plots.save(figure, path)
    >>> path.exists()
    True
    """
    kind, suffixes, write = _writer(figure)
    for path in paths:
        if Path(path).suffix.lower().removeprefix(".") not in suffixes:
            expected = " or ".join(f".{suffix}" for suffix in suffixes)
            raise ValueError(
                f"cannot write a {kind} figure to {os.fspath(path)!r}: expected a name that ends in {expected}"
            )
    for path in paths:
        with atomic(path) as scratch:
            write(scratch)


def _writer(figure: Any) -> tuple[str, list[str], Callable[[Path], None]]:
    """The kind of a figure, the suffixes of its files, and what writes one."""
    if _is_a(figure, "plotly.basedatatypes", "BaseFigure"):
        return "plotly", ["html"], lambda path: figure.write_html(path, include_plotlyjs=True)
    if _is_a(figure, "matplotlib.figure", "Figure"):
        suffixes = sorted(figure.canvas.get_supported_filetypes())
        return "matplotlib", suffixes, lambda path: figure.savefig(path, dpi=_DOTS_PER_INCH)
    raise TypeError(f"expected a figure of matplotlib or plotly, given {type(figure).__name__}")


def _is_a(figure: Any, module: str, name: str) -> bool:
    """Whether `figure` is an instance of a class; its module is not imported, since that of an instance is loaded."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(figure, getattr(loaded, name))
