"""A matplotlib figure that a notebook shows without pyplot.

This module imports matplotlib at its top, so that the class can be pickled; it is imported inside functions only.
"""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure with a PNG representation: IPython shows a plain `Figure` as text unless an inline backend is active."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()
