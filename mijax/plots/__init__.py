"""Results to figures; nothing below imports this room."""

from mijax.plots.heatmaps import save_heatmaps
from mijax.plots.scatter import save_scatter
from mijax.plots.toys import save_curves, save_directions, save_models, save_phases

__all__ = ["save_curves", "save_directions", "save_heatmaps", "save_models", "save_phases", "save_scatter"]
