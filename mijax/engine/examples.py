"""Some of a sweep's prompts: the edits and metrics that are theirs, and what stands against taking them apart."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from mijax.engine.cells import Cells
from mijax.engine.measure import is_split, taken
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.places import Examples, of_examples, zips_examples
from mijax.metrics import AnyMetric
from mijax.model.model import Model
from mijax.model.sites import Site
from mijax.model.tokens import Inputs


class Prompts(NamedTuple):
    """Some of a sweep's prompts, with the edits and metrics that are theirs.

    `examples` are their numbers among all; the last one is repeated where there are fewer than in other groups, so that one
    compiled program serves all groups. `distinct` of them are no repetition.
    """

    examples: Examples
    distinct: int
    tokens: Inputs
    cells: Cells
    metrics: Mapping[str, AnyMetric]

    @property
    def first(self) -> int:
        """The number of the first one among all."""
        return int(self.examples[0])

    def of(self, tokens: Inputs) -> Inputs:
        """The same prompts of another batch; of one as large as this, all."""
        return tokens if len(tokens.ids) == len(self.examples) else tokens_of(tokens, self.examples)


def groups(
    model: Model,
    tokens: Inputs,
    cells: Cells,
    metrics: Mapping[str, AnyMetric],
    programs: Mapping[str, AnyMetric],
    together: int,
) -> Iterator[Prompts]:
    """All prompts, so many `together`; `programs` are the metrics' for all at once."""
    batch = len(tokens.ids)
    if together == batch:
        yield Prompts(np.arange(batch, dtype=np.int32), batch, tokens, cells, programs)
        return
    for first in range(0, batch, together):
        examples = np.minimum(np.arange(first, first + together, dtype=np.int32), batch - 1)
        some = tokens_of(tokens, examples)
        yield Prompts(
            examples,
            min(together, batch - first),
            some,
            cells_of_examples(model, cells, examples, batch),
            taken(model, some, metrics, examples),
        )


def tokens_of(tokens: Inputs, examples: Examples) -> Inputs:
    """Some of the prompts."""
    return jax.tree.map(lambda a: np.asarray(a)[examples], tokens)


def why_together(cells: Cells, metrics: Mapping[str, AnyMetric]) -> str | None:
    """Why the prompts of a sweep must run together; `None` where they need not."""
    for name, metric in metrics.items():
        if not is_split(metric):
            return f"metric {name!r} does not say that it is per example (per_example, take)"
    for site, several in cells.edits.items():
        for edit, stacked in zip(several, cells.stacked[site]):
            if isinstance(edit, Apply):
                return f"the edit at site {site!r} is a function, which sees the whole batch"
            if zips_examples(edit.where, stacked.where):
                return f"the edit at site {site!r} zips its batch indices with other lists"
    return None


def cells_of_examples(model: Model, cells: Cells, examples: Examples, batch: int) -> Cells:
    """The cells of some of the `batch` examples; `why_together` must be `None`."""
    edits = {
        name: tuple(
            _edit_of(edit, stacked, model.sites[name], examples, batch)
            for edit, stacked in zip(several, cells.stacked[name])
        )
        for name, several in cells.edits.items()
    }
    return cells._replace(edits=edits)


def _edit_of(edit: Edit, stacked: Any, site: Site, examples: Examples, batch: int) -> Edit:
    """An edit with what differs between examples narrowed to some of them."""
    for name in edit.operands:
        value, axis = getattr(edit, name), site.axes.index("batch") + bool(getattr(stacked, name))
        if value.shape[axis] > 1:
            edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, value[(slice(None),) * axis + (examples,)])
    return eqx.tree_at(lambda e: e.where, edit, of_examples(edit.where, stacked.where, examples, batch))
