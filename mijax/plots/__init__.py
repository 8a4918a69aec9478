"""Results to figures; nothing below imports this room."""

from mijax.plots.heatmaps import save_heatmaps, save_page

__all__ = ["save_heatmaps", "save_page"]
