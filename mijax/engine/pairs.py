"""Two batches of prompts that differ in some tokens: one run's activations put into the other's, unlabelled."""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Int
from mijax.engine.cells import cells_of
from mijax.engine.driver import Start, Swept, kept_base, swept
from mijax.engine.examples import Prompts
from mijax.engine.grid import Grid
from mijax.engine.measure import measure
from mijax.engine.options import Options
from mijax.interventions.edits import Replace
from mijax.interventions.selecting import known_axes, selection
from mijax.interventions.where import Where
from mijax.meshes import automatic
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel, Model
from mijax.model.sites import Site
from mijax.model.tap import Point
from mijax.model.tokens import Inputs
from mijax.run import check

Direction = Literal["denoise", "noise"]


def patched(
    model: Model,
    base: Inputs,
    source: Inputs,
    site: str,
    places: Grid,
    metrics: Mapping[str, AnyMetric],
    options: Options,
) -> Swept:
    """The metrics of the base, of the source and of every cell, in which `site` is what it is in the source run."""
    source = automatic(source)
    check(model, source, {}, {})

    def begin(model: Model, some: Prompts) -> Start:
        tokens = some.tokens
        at_source, value = measure(model, some.of(source), {}, some.metrics, "source", (site,), some.first)
        at_base, kept, own = kept_base(model, tokens, {}, some.metrics, (site,), some.first)
        edits = eqx.tree_at(lambda edits: edits[site][0].value, some.cells.edits, value[site])
        runs = {"base": at_base, "source": at_source}
        if not isinstance(model, LayeredModel):  # every cell is run whole
            return Start(some.cells._replace(edits=edits), runs, kept)
        differs, where = own[site] != value[site], edits[site][0].where
        first = _first_change(model, model.sites[site], tokens, where, differs)
        return Start(some.cells._replace(edits=edits), runs, kept, np.asarray(first))

    cells = cells_of({site: Replace(0.0, places)})
    return swept(
        model,
        base,
        cells,
        metrics,
        options,
        source=source,
        first=_first_difference(model.causal, base, source) if isinstance(model, LayeredModel) else None,
        begin=begin,
    )


def _first_difference(causal: bool, base: Inputs, source: Inputs) -> Int[np.ndarray, " batch"]:
    """The first column of each example of which anything depends on the token that differs; the number of columns where none does."""
    differs = (np.asarray(base.ids) != np.asarray(source.ids)) & np.asarray(base.mask)
    first = np.argmax(differs, axis=1) if causal else np.zeros(len(differs), np.int64)
    return np.where(differs.any(axis=1), first, differs.shape[1]).astype(np.int32)


@eqx.filter_jit
def _first_change(
    model: LayeredModel, site: Site, tokens: Inputs, cells: Where, differs: Bool[Array, "..."]
) -> Int[Array, "cell batch"]:
    """The first column of each example at which a cell puts in anything but what stands there; the number of columns
    where it does nowhere. Two runs agree to the bit where they must (before the first token that differs), and such a
    cell's effect is zero, not rounding."""
    frame = model.frame(tokens)
    if site.has_vectors and not cells.narrows("unit"):
        differs = jnp.any(differs, axis=-1, keepdims=True)
    layers = differs if site.has_layer else differs[None]
    tokens_at = (0, site.inner_axes.index(site.position_axes[0]))  # the axes of examples and of their tokens

    def changed_in_layer(where: Where, index: Int[Array, ""]) -> Bool[Array, "batch pos"]:
        here = layers[index]
        known = known_axes(Point(site, index if site.has_layer else None, frame), here.shape)
        changed = selection(where, site.inner_axes, known) & here
        return jnp.any(changed, axis=tuple(i for i in range(changed.ndim) if i not in tokens_at))

    def first_of_cell(where: Where) -> Int[Array, " batch"]:
        named = where.layers(len(layers))
        one_layer = named is not None and named.size == 1  # of nearly all grids' cells: the others are not looked at
        looked_at = named if one_layer else jnp.arange(len(layers), dtype=jnp.int32)
        changed = jnp.any(jax.vmap(lambda index: changed_in_layer(where, index))(looked_at), axis=0)
        first = jnp.argmax(changed, axis=1).astype(jnp.int32) if model.causal else jnp.zeros(len(changed), jnp.int32)
        return jnp.where(jnp.any(changed, axis=1), first, changed.shape[1])

    return jax.lax.map(first_of_cell, cells)


def check_pair(clean: Inputs, corrupted: Inputs) -> None:
    """Raise where two batches differ in shape or padding."""
    if clean.ids.shape != corrupted.ids.shape:
        raise ValueError(f"clean and corrupted must have one shape, given {clean.ids.shape} and {corrupted.ids.shape}")
    differ = np.argwhere(np.asarray(clean.mask) != np.asarray(corrupted.mask))
    if len(differ):
        example = int(differ[0][0])
        where = [np.flatnonzero(np.asarray(tokens.mask)[example]) for tokens in (clean, corrupted)]
        told = " and ".join(f"{len(own)} from column {own[0] if len(own) else 0}" for own in where)
        raise ValueError(f"clean and corrupted prompts must be padded alike: example {example} has tokens {told}")
