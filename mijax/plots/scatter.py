"""Estimates against what they estimate."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mijax.files import atomic

if TYPE_CHECKING:
    import xarray as xr

Pairs = Mapping[str, Mapping[str, tuple["xr.DataArray", "xr.DataArray"]]]
"""Rows of panels by title: `{row title: {panel title: (exact, estimate)}}`, of one shape."""


def save_scatter(
    pairs: Pairs, path: str | os.PathLike, *, title: str = "", notes: Mapping[Any, str] | None = None
) -> None:
    """Draw estimates over exact effects, a dot for each cell coloured by its layer, to an image file.

    The line is where both are the same. `notes` are written into panels, by (row title, panel title).
    """
    import matplotlib
    from matplotlib.figure import Figure

    n_columns = max(len(row) for row in pairs.values())
    figure = Figure(figsize=(3.0 * n_columns + 1.0, 3.1 * len(pairs) + 0.6), layout="constrained")
    axes = figure.subplots(len(pairs), n_columns, squeeze=False)
    dots: Any = None
    last = max(int(exact.layer.max()) for row in pairs.values() for exact, _ in row.values())
    for row, (row_title, panels) in zip(axes, pairs.items()):
        for axis in row[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, (exact, estimate)) in zip(row, panels.items()):
            estimate = estimate.transpose(*exact.dims)
            layer = exact.layer.broadcast_like(exact).transpose(*exact.dims)
            both = np.concatenate([exact.values.ravel(), estimate.values.ravel()])
            ends = np.nanmin(both), np.nanmax(both)
            axis.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0)
            dots = axis.scatter(
                exact.values.ravel(), estimate.values.ravel(), c=layer.values.ravel(), s=9, vmin=0, vmax=last,
                cmap=matplotlib.colormaps["viridis"], linewidths=0,
            )  # fmt: skip
            margin = 0.05 * (ends[1] - ends[0] or 1.0)
            axis.set(title=name, xlabel="exact effect", ylabel="estimate" if axis is row[0] else "")
            axis.set(xlim=(ends[0] - margin, ends[1] + margin), ylim=(ends[0] - margin, ends[1] + margin))
            note = (notes or {}).get((row_title, name))
            if note:
                axis.text(0.04, 0.96, note, transform=axis.transAxes, va="top", fontsize=8)
        row[0].annotate(
            row_title, (-0.42, 0.5), xycoords="axes fraction", rotation=90, ha="center", va="center", weight="bold"
        )
    figure.suptitle(title)
    figure.colorbar(dots, ax=axes, shrink=0.6, label="layer")
    with atomic(path) as scratch:
        figure.savefig(scratch, dpi=120)
