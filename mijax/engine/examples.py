"""Groups of a sweep's prompts: their edits and metrics, and why prompts may have to run together."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from mijax.engine.cells import Cells
from mijax.engine.per_example import check_takes, is_split, taken
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.places import Examples, of_examples, zips_examples
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.sites import Site
from mijax.model.tokens import Inputs


class Prompts(NamedTuple):
    """A group of a sweep's prompts, with the edits and metrics of these prompts.

    Attributes:
        examples: the numbers of the prompts among all. The last prompt is repeated where there are fewer than in
            other groups, so that one compiled program serves all groups.
        distinct: how many of `examples` are not repetitions.
        tokens: the prompts.
        cells: the cells, with the edits of these prompts.
        metrics: the metrics of these prompts, as programs.
    """

    examples: Examples
    distinct: int
    tokens: Inputs
    cells: Cells
    metrics: Mapping[str, AnyMetric]

    @property
    def first(self) -> int:
        """The number of the group's first prompt among all."""
        return int(self.examples[0])

    def of(self, tokens: Inputs) -> Inputs:
        """The prompts of the group out of another batch.

        Args:
            tokens: a batch with as many prompts as the sweep has, or with only those of the group, which is
                returned as it is.
        """
        return tokens if len(tokens.ids) == len(self.examples) else tokens_of(tokens, self.examples)


def groups(
    model: Model,
    tokens: Inputs,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    programs: Mapping[str, AnyMetric],
    together: int,
) -> Iterator[Prompts]:
    """Divide the prompts of a sweep into groups.

    Args:
        model: the model.
        tokens: all prompts.
        cells: the cells.
        metrics: the metrics by name.
        programs: the programs of the metrics for all prompts.
        together: the number of prompts in a group.

    Yields:
        The groups in the order of the prompts.
    """
    batch = len(tokens.ids)
    if together == batch:
        yield Prompts(np.arange(batch, dtype=np.int32), batch, tokens, cells, programs)
        return
    check_takes(model, tokens, metrics)
    for first in range(0, batch, together):
        examples = np.minimum(np.arange(first, first + together, dtype=np.int32), batch - 1)
        subset = tokens_of(tokens, examples)
        yield Prompts(
            examples,
            min(together, batch - first),
            subset,
            _cells_of_examples(model, cells, examples, batch),
            taken(model, subset, metrics, examples),
        )


def tokens_of(tokens: Inputs, examples: Examples) -> Inputs:
    """Take some of the prompts.

    Args:
        tokens: all prompts.
        examples: numbers of the prompts to take.

    Returns:
        These prompts in the order of `examples`, as host arrays.
    """
    return jax.tree.map(lambda a: np.asarray(a)[examples], tokens)


def why_together(cells: Cells, metrics: Mapping[str, AnyMetric]) -> str | None:
    """The reason for which the prompts of a sweep must run together.

    Args:
        cells: the cells.
        metrics: the metrics by name.

    Returns:
        The reason, for an error message; `None` where prompts can be divided.
    """
    for name, metric in metrics.items():
        if not is_split(metric):
            return f"metric {name!r} does not say that it is per example (per_example, take)"
    for site, edits in cells.edits.items():
        for edit, stacked in zip(edits, cells.stacked[site]):
            if isinstance(edit, Apply):
                return f"the edit at site {site!r} is a function, which sees the whole batch"
            if zips_examples(edit.where, stacked.where):
                return f"the edit at site {site!r} zips its batch indices with other lists"
    return None


def _cells_of_examples(model: Model, cells: Cells, examples: Examples, batch: int) -> Cells:
    """The cells for some of the `batch` examples, where prompts can be divided (`why_together` gives `None`)."""
    edits = {
        name: tuple(
            _edit_of(edit, stacked, model.sites[name], examples, batch)
            for edit, stacked in zip(site_edits, cells.stacked[name])
        )
        for name, site_edits in cells.edits.items()
    }
    return cells._replace(edits=edits)


def _edit_of(edit: Edit, stacked: Any, site: Site, examples: Examples, batch: int) -> Edit:
    """An edit with the arrays and indices that differ between examples narrowed to some of them."""
    for name in edit.operands:
        value, axis = getattr(edit, name), site.axes.index("batch") + bool(getattr(stacked, name))
        if value.shape[axis] > 1:
            edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value[(slice(None),) * axis + (examples,)])
    return eqx.tree_at(lambda e: e.where, edit, of_examples(edit.where, stacked.where, examples, batch))
