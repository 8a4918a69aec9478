"""Results to figures; nothing below imports this room."""

from mijax.plots.heatmaps import save_heatmaps
from mijax.plots.scatter import save_scatter

__all__ = ["save_heatmaps", "save_scatter"]
