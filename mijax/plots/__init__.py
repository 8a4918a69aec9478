"""Results as figures, which a notebook shows and `save` writes to files.

matplotlib and plotly are imported when the first figure is made, and pyplot never.
"""

from mijax.plots.effects import Panels, heatmaps
from mijax.plots.estimates import scatter
from mijax.plots.files import save
from mijax.plots.page import heatmap_page
from mijax.plots.toys import curves, directions, models, phases

__all__ = ["Panels", "curves", "directions", "heatmap_page", "heatmaps", "models", "phases", "save", "scatter"]
