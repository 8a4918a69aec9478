"""Some of a sweep's prompts: the edits and metrics that are theirs, and what stands against taking them apart."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from mijax._types import Int
from mijax.interventions.edits import Apply, Edit
from mijax.interventions.where import Where
from mijax.metrics import AnyMetric
from mijax.model.tokens import Tokens
from mijax.model.transformer import Transformer
from mijax.sweeps.cells import Cells
from mijax.sweeps.measure import is_split, taken

Examples = Int[np.ndarray, " k"]


class Prompts(NamedTuple):
    """Some of a sweep's prompts, with the edits and metrics that are theirs.

    `examples` are their numbers among all; the last one is repeated where there are fewer than in other groups, so that one
    compiled program serves all groups. `distinct` of them are no repetition.
    """

    examples: Examples
    distinct: int
    tokens: Tokens
    cells: Cells
    metrics: Mapping[str, AnyMetric]

    @property
    def first(self) -> int:
        """The number of the first one among all."""
        return int(self.examples[0])

    def of(self, tokens: Tokens) -> Tokens:
        """The same prompts of another batch; of one as large as this, all."""
        return tokens if len(tokens.ids) == len(self.examples) else tokens_of(tokens, self.examples)


def groups(
    model: Transformer,
    tokens: Tokens,
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


def tokens_of(tokens: Tokens, examples: Examples) -> Tokens:
    """Some of the prompts."""
    return jax.tree.map(lambda a: np.asarray(a)[examples], tokens)


def why_together(cells: Cells, metrics: Mapping[str, AnyMetric]) -> str | None:
    """Why the prompts of a sweep must run together; `None` where they need not."""
    for name, metric in metrics.items():
        if not is_split(metric):
            return f"metric {name!r} does not say that it is per example (per_example, take)"
    for site, several in cells.edits.items():
        for edit, group in zip(several, cells.group[site]):
            if isinstance(edit, Apply):
                return f"the edit at site {site!r} is a function, which sees the whole batch"
            if _is_zipped(edit.where, group.where):
                return f"the edit at site {site!r} zips its batch indices with other lists"
    return None


def _is_zipped(where: Where, group: Any) -> bool:
    """Whether indices of examples go with lists on other axes, entry by entry."""
    lists = {
        field
        for field, index in where.given.items()
        if index.dtype != bool and index.ndim > (getattr(group, field) >= 0) and index.shape[-1] > 1
    }
    return "batch" in lists and len(lists) > 1


def cells_of_examples(model: Transformer, cells: Cells, examples: Examples, batch: int) -> Cells:
    """The cells of some of the `batch` examples; `why_together` must be `None`."""
    edits = {
        site: tuple(
            _edit_of(edit, group, model.sites[site].axes, examples, batch)
            for edit, group in zip(several, cells.group[site])
        )
        for site, several in cells.edits.items()
    }
    return cells._replace(edits=edits)


def _edit_of(edit: Edit, group: Any, axes: tuple[str, ...], examples: Examples, batch: int) -> Edit:
    """An edit with what differs between examples narrowed to some of them; `group` marks arrays with an axis of choices in front."""
    for name in edit.operands:
        value, stacked = getattr(edit, name), getattr(group, name) >= 0
        axis = axes.index("batch") + stacked
        if value.shape[axis] > 1:
            edit = eqx.tree_at(lambda e, name=name: getattr(e, name), edit, _at(value, examples, axis))
    fields = {
        field: _index_of(np.asarray(index), field, getattr(group.where, field) >= 0, examples, batch)
        for field, index in edit.where.given.items()
    }
    return eqx.tree_at(lambda e: e.where, edit, Where(**fields))


def _index_of(index: np.ndarray, field: str, stacked: bool, examples: Examples, batch: int) -> np.ndarray:
    """An entry of `Where` for some of the examples: `batch` becomes a mask of them."""
    if field == "batch":
        if index.dtype != bool:
            several = index.reshape(*index.shape[:stacked], -1, 1)
            index = (several % batch == np.arange(batch)).any(axis=-2)
        return index[..., examples]
    return _at(index, examples, int(stacked)) if index.ndim - stacked == 2 else index


def _at(array: Any, examples: Examples, axis: int) -> Any:
    return array[(slice(None),) * axis + (examples,)]
