"""The names of dimensions, coordinates and metrics in a result, and the labels along a dimension."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mijax.engine.axes import POSITIONS

TOKENS = {axis: "token" if axis == "pos" else f"{axis}_token" for axis in POSITIONS}
"""The coordinate of the prompts' tokens along each axis of positions."""
HAS_POSITION = {axis: "has_position" if axis == "pos" else f"has_{axis}_position" for axis in POSITIONS}
"""The coordinate that tells, along each axis of positions, which of them a prompt has."""
QUANTITY = "quantity"
"""The attribute that tells what an array holds: the `METRIC` itself, an `EFFECT`, or, in a coordinate, that of a `RUN`.

xarray drops an attribute in which two operands differ, so that `result - result.base` has none."""
GRID = "grid"
"""The attribute that names the dimensions of a result beside `batch`."""
METRIC, EFFECT, RUN = "metric", "effect", "metric of a run"
_RUNS = ("base", "source")
_TAKEN = {"batch", "cell", "bound", *_RUNS, *TOKENS.values(), *HAS_POSITION.values()}
"""Names of dimensions and coordinates that results have of themselves."""


def check_metric_names(metric: Any, dims: Iterable[str]) -> None:
    """Check that no metric is named like a dimension or a coordinate of the result, which it would replace.

    Args:
        metric: metrics by name; or one metric, which has no name among the result's.
        dims: the dimensions of the grid.

    Raises:
        ValueError: for such a name.

    >>> check_metric_names({"loss": None}, ["layer"])
    """
    names = list(metric) if isinstance(metric, Mapping) else []
    taken = _TAKEN | set(dims) | {f"{run}.{name}" for run in _RUNS for name in names}
    for name in names:
        if name in taken:
            raise ValueError(
                f"metric {name!r} has the name of a dimension or coordinate of the result ({', '.join(sorted(taken))}):"
                " give it another name"
            )


def check_labels(dim: str, labels: Sequence[Any]) -> None:
    """Check the name and the labels of a dimension that a user names.

    Args:
        dim: the name.
        labels: the labels, which become a coordinate.

    Raises:
        TypeError: for a name that is no string, and for labels with several entries each, such as tuples.
        ValueError: for a name that results use for something else, and for labels that are equal as coordinates.

    >>> check_labels("factor", [0.0, 0.5])
    """
    if not isinstance(dim, str):
        raise TypeError(f"a dimension is named by a string, given {dim!r}")
    if dim in _TAKEN:
        raise ValueError(
            f"a dimension cannot be named {dim!r}, which results use for something else ({', '.join(sorted(_TAKEN))})"
        )
    for label in labels:
        if isinstance(label, tuple | list | set | frozenset) or np.ndim(label):
            raise TypeError(
                f"the labels of dimension {dim!r} must be strings or numbers, given {label!r}: write it as text"
            )
    first: dict[Any, Any] = {}
    for label, in_result in zip(labels, np.asarray(labels).tolist()):
        if in_result in first:
            raise ValueError(
                f"the labels {first[in_result]!r} and {label!r} of dimension {dim!r} are both {in_result!r} in the result:"
                " give every choice a label to itself"
            )
        first[in_result] = label
