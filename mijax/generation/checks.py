"""Checks of the arguments of `generate`, before anything is computed."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array
from mijax.arguments import check_key, whole_number, with_known_values
from mijax.interventions.capturing import Captures
from mijax.interventions.checks import selected_columns
from mijax.interventions.edits import Apply, Edits
from mijax.interventions.functions import convert_edits, has_functions
from mijax.model.model import LayeredModel
from mijax.model.sites import Site
from mijax.model.tokens import Tokens, is_concrete


def check_acts(text: Tokens, edits: Edits, captures: Captures) -> None:
    """Check that every edit acts where something is sampled or captured.

    Args:
        text: the finished text.
        edits: edits by site.
        captures: what to keep by site.

    Raises:
        ValueError: for a position counted from the end, and for an edit that acts on the last new token alone where
            nothing is captured.
    """
    for site, site_edits in edits.items():
        for edit in site_edits:
            for field, index in edit.where.positions.items():
                if not is_concrete(index):
                    continue
                if (np.asarray(index) < 0).any():
                    raise ValueError(
                        f"{field}={np.asarray(index).tolist()} at site {site!r} counts from the end of a text that is not there yet:"
                        " name tokens from 0, or by a mask: mijax.prompt_tokens(tokens, n) the prompt's, mijax.new_tokens(tokens, n) the"
                        " generated ones, mijax.current_tokens(tokens, n) those that the next token is read from"
                    )
            for field in ("pos", "query") if not captures and is_concrete(text.mask) else ():
                columns = selected_columns(edit.where, field, np.asarray(text.mask))
                if columns is not None and not columns[:, :-1].any():
                    raise ValueError(
                        f"{type(edit).__name__} at site {site!r} acts on the last new token alone, from which nothing is read or kept"
                    )


def check_settings(
    model: LayeredModel, tokens: Tokens, edits: Edits, count: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any,
    stop_ids: list[int], key: Array | None, captures: Captures,
) -> None:  # fmt: skip
    """Check the settings of `generate`.

    Args:
        model: the model.
        tokens: the prompts.
        edits: edits by site.
        count: the number of new tokens.
        temperature, top_k, top_p, min_p: as in `generate`.
        stop_ids: the stop tokens.
        key: as in `generate`.
        captures: what to keep by site.

    Raises:
        ValueError: with every setting that is out of its range or contradicts another one: a bidirectional model, a
            text longer than the context, sampling without a key, cuts at temperature 0.
        TypeError: for a setting that is no number, or a key that is none.
    """
    faults = []
    if key is not None:
        check_key(key)
    if top_k is not None:
        whole_number("top_k", top_k, None)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not (is_concrete(value) and np.ndim(value) == 0 and np.isreal(value)):
            raise TypeError(f"{name} must be one number that is known before anything is compiled, given {value!r}")
    if not model.causal:
        faults.append("a bidirectional model cannot generate")
    n_logits = model.output_like(tokens).n_logits
    if n_logits != model.d_vocab:
        faults.append(f"a model with {n_logits} logits for {model.d_vocab} tokens cannot generate")
    if count < 1:
        faults.append(f"max_new_tokens must be at least 1, given {count}")
    if top_k is not None and top_k < 1:
        faults.append(f"top_k must be at least 1, given {top_k}")
    excess = (
        tokens.ids.shape[1] + count - bool(not captures) - model.n_ctx
    )  # without captures the last token is not run
    if excess > 0:
        faults.append(
            f"prompts of {tokens.ids.shape[1]} tokens and {count} new ones exceed the context of {model.n_ctx} by {excess}"
        )
    sampled = not is_concrete(temperature) or bool(np.any(np.asarray(temperature) != 0))
    if is_concrete(temperature) and not (np.ndim(temperature) == 0 and 0 <= float(np.asarray(temperature)) < np.inf):
        faults.append(f"temperature must be one number, at least 0, given {temperature}")
    if sampled and key is None:
        faults.append("sampling (temperature above 0) needs a key")
    if not sampled and any(cut is not None for cut in (top_k, top_p, min_p)):
        faults.append("top_k, top_p and min_p cut a distribution, which temperature 0 does not draw from")
    faults += [f"{n} must be in {r}, given {v}" for n, v, ok, r in (
        ("top_p", top_p, lambda p: 0 < p <= 1, "(0, 1]"), ("min_p", min_p, lambda p: 0 <= p <= 1, "[0, 1]"),
    ) if v is not None and not ok(v)]  # fmt: skip
    faults += [
        f"stop token {t} is outside the vocabulary of {model.d_vocab}" for t in stop_ids if not 0 <= t < model.d_vocab
    ]
    if faults:
        raise ValueError("; ".join(faults))


def stop_tokens(stop: Any) -> list[int]:
    """Convert the argument `stop` of `generate`.

    Args:
        stop: one token id, or a sequence of them.

    Returns:
        The ids.

    Raises:
        TypeError: for anything else.
    """
    ids = stop if isinstance(stop, list | tuple | set | frozenset) or np.ndim(stop) else [stop]
    return [whole_number("a stop token", token) for token in ids]


def check_mixing(model: LayeredModel, edits: Edits, batch: int, pos: int) -> None:
    """Check that each function among edits gives for a token alone what it gives for it in the whole text.

    Functions are called on random activations; but not one with side effects, such as `jax.debug.callback`, which must
    happen in the run alone.

    Args:
        model: the model whose sites are edited.
        edits: the edits by site.
        batch: the number of prompts.
        pos: the number of positions of the finished text.

    Raises:
        ValueError: for a function that mixes positions, or reads what stands in a certain column.
    """
    if not has_functions(edits):
        return
    with jax.ensure_compile_time_eval():
        whole, alone = (convert_edits(model, edits, batch, n, pos, ()) for n in (pos, 1))
        for name, site_edits in whole.items():
            for edit, of_one in zip(site_edits, alone[name]):
                if isinstance(edit, Apply) and _mixes(model, edit, of_one, model.sites[name], batch, pos):
                    raise ValueError(
                        f"the callable edit at site {name!r} mixes positions, or reads a certain column of x: generation calls it with one"
                        " new token at a time; it can tell tokens apart by `positions`"
                    )


def _mixes(model: LayeredModel, edit: Apply, of_one: Any, site: Site, batch: int, pos: int) -> bool:
    """Whether a converted function gives another result for some column alone, in some layer."""
    if edit.function.program.jaxpr.effects:
        return False
    rng, axis = np.random.default_rng(0), site.inner_axes.index(site.position_axes[0])
    whole, alone = (with_known_values(e.function, rng) for e in (edit, of_one))
    x = jnp.asarray(rng.normal(size=site.shape(batch, pos)[site.has_layer :]), model.dtype)
    layers = jnp.arange(model.n_layers, dtype=jnp.int32) if site.has_layer else None
    together, apart = _by_both(whole, alone, x, layers, site.name, axis)
    together, apart = np.asarray(together), np.asarray(apart)
    size = np.nanmax(np.abs(together), initial=0.0, where=np.isfinite(together))
    return not np.allclose(together, apart, rtol=1e-3, atol=1e-4 * size, equal_nan=True)


@eqx.filter_jit
def _by_both(whole: Any, alone: Any, x: Array, layers: Array | None, site: str, axis: int) -> tuple[Array, Array]:
    """A function's results in all layers for all columns together, and for each column alone."""
    n = x.shape[axis]
    positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (x.shape[0], n))

    def in_layer(layer: Array | None) -> tuple[Array, Array]:
        column = lambda i: jax.lax.dynamic_slice_in_dim(x, i, 1, axis)
        of_column = lambda i: alone(column(i), site, layer, jax.lax.dynamic_slice_in_dim(positions, i, 1, 1))
        columns = jax.lax.map(of_column, jnp.arange(n, dtype=jnp.int32))
        return whole(x, site, layer, positions), jnp.moveaxis(jnp.squeeze(columns, axis + 1), 0, axis)

    return in_layer(None) if layers is None else jax.lax.map(in_layer, layers)
