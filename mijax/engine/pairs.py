"""Two batches of prompts that differ in some tokens: the activations of one run put into the other, without labels."""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array, Bool, Int
from mijax.engine.cells import cells_of
from mijax.engine.driver import Start, Swept, kept_run, swept
from mijax.engine.examples import Prompts
from mijax.engine.grid import Grid
from mijax.engine.measure import compiled_for
from mijax.engine.options import Options
from mijax.interventions.checks import check
from mijax.interventions.edits import Replace
from mijax.interventions.selecting import known_axes, selection
from mijax.interventions.where import Where
from mijax.meshes import automatic
from mijax.metrics import AnyMetric
from mijax.model.model import LayeredModel, Model
from mijax.model.sites import Site
from mijax.model.tap import Point
from mijax.model.tokens import Inputs
from mijax.programs.now import JitNow

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
    """Run the base, the source, and every cell, in which the activations of `site` are those of the source run.

    Args:
        model: the model.
        base: the prompts of the base run and of the cells.
        source: the prompts of the source run, of the same shape and padding (`check_pair`).
        site: name of the site.
        places: the grid of places.
        metrics: the metrics by name.
        options: how the sweep is run.

    Returns:
        The metrics of the base, of the source and of every cell.

    Raises:
        ValueError: what `swept` raises, and where a metric is not finite on the source.
        TypeError: what `swept` raises.
    """
    source = automatic(source)
    check(model, source, {}, {})

    def begin(model: Model, prompts: Prompts) -> Start:
        tokens = prompts.tokens
        # One program runs both, so that they agree to the bit where their tokens do (`_first_change`).
        kept = lambda tokens, what: kept_run(model, tokens, {}, prompts.metrics, (site,), prompts.first, what)
        at_source, source_acts = kept(prompts.of(source), "source")[:2]  # its states are freed here
        at_base, base_acts, base_states = kept(tokens, "base")
        edits = eqx.tree_at(lambda edits: edits[site][0].value, prompts.cells.edits, source_acts[site])
        runs = {"base": at_base, "source": at_source}
        if not isinstance(model, LayeredModel):  # every cell is run whole
            return Start(prompts.cells._replace(edits=edits), runs, base_states)
        first = _first_change.compiled(compiled_for(model, tokens))(
            model, model.sites[site], tokens, edits[site][0].where, base_acts[site], source_acts[site]
        )
        return Start(prompts.cells._replace(edits=edits), runs, base_states, np.asarray(first))

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
    """The first column of each example whose activations depend on a token that differs.

    It is the number of columns where no token differs.
    """
    differs = (np.asarray(base.ids) != np.asarray(source.ids)) & np.asarray(base.mask)
    first = np.argmax(differs, axis=1) if causal else np.zeros(len(differs), np.int64)
    return np.where(differs.any(axis=1), first, differs.shape[1]).astype(np.int32)


@JitNow
def _first_change(
    model: LayeredModel, site: Site, tokens: Inputs, cells: Where, base: Array, source: Array
) -> Int[Array, "cell batch"]:
    """The first column of each example at which a cell puts in anything but the base run's value.

    It is the number of columns where the cell changes nothing. The two runs agree bit by bit before the first token
    that differs, and the effect of a cell there is then exactly zero, and not a rounding error.
    """
    frame, differs = model.frame(tokens), base != source
    if site.layers is not None and site.has_layer:  # what the other layers have is NaN, which equals nothing
        has_site = np.isin(np.arange(len(differs)), site.layers)
        differs &= has_site.reshape(-1, *(1,) * (differs.ndim - 1))
    if site.has_vectors and not cells.narrows("unit"):
        differs = jnp.any(differs, axis=-1, keepdims=True)
    layers = differs if site.has_layer else differs[None]
    tokens_at = (0, site.inner_axes.index(site.position_axes[0]))  # the axis of examples and the axis of their tokens

    def changed_in_layer(where: Where, index: Int[Array, ""]) -> Bool[Array, "batch pos"]:
        changes = layers[index]
        known = known_axes(Point(site, index if site.has_layer else None, frame), changes.shape)
        changed = selection(where, site.inner_axes, known) & changes
        return jnp.any(changed, axis=tuple(i for i in range(changed.ndim) if i not in tokens_at))

    def first_of_cell(where: Where) -> Int[Array, " batch"]:
        named_layers = where.layers(len(layers))
        # Cells of nearly all grids are in one layer; other layers are then not compared.
        one_layer = named_layers is not None and named_layers.size == 1
        layers_checked = named_layers if one_layer else jnp.arange(len(layers), dtype=jnp.int32)
        changed = jnp.any(jax.vmap(lambda index: changed_in_layer(where, index))(layers_checked), axis=0)
        first = jnp.argmax(changed, axis=1).astype(jnp.int32) if model.causal else jnp.zeros(len(changed), jnp.int32)
        return jnp.where(jnp.any(changed, axis=1), first, changed.shape[1])

    return jax.lax.map(first_of_cell, cells)


def check_pair(clean: Inputs, corrupted: Inputs) -> None:
    """Check that two batches have the same shape and padding.

    Args:
        clean: the clean prompts.
        corrupted: the corrupted prompts.

    Raises:
        ValueError: where they differ in shape, or for the first example that is padded otherwise.
    """
    if clean.ids.shape != corrupted.ids.shape:
        raise ValueError(f"clean and corrupted must have one shape, given {clean.ids.shape} and {corrupted.ids.shape}")
    differ = np.argwhere(np.asarray(clean.mask) != np.asarray(corrupted.mask))
    if len(differ):
        example = int(differ[0][0])
        real_columns = [np.flatnonzero(np.asarray(tokens.mask)[example]) for tokens in (clean, corrupted)]
        text = " and ".join(
            f"{len(columns)} from column {columns[0] if len(columns) else 0}" for columns in real_columns
        )
        raise ValueError(f"clean and corrupted prompts must be padded alike: example {example} has tokens {text}")
