"""Checks of the arguments of `generate`, before anything is computed."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mijax._types import Array
from mijax.arguments import check_key, whole_number
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
    """Check that the result of each function among edits at one position does not depend on other positions.

    Each function is called on random activations, and again with all positions but the first, or all but the last,
    drawn anew; but not one with side effects, such as `jax.debug.callback`, which must happen in the run alone.

    Args:
        model: the model whose sites are edited.
        edits: the edits by site.
        batch: the number of prompts.
        pos: the number of their positions.

    Raises:
        ValueError: for a function that mixes positions.
    """
    if not has_functions(edits):
        return
    pos = max(2, pos)
    with jax.ensure_compile_time_eval():
        for name, site_edits in convert_edits(model, edits, batch, pos, pos, ()).items():
            for edit in site_edits:
                if isinstance(edit, Apply) and _mixes(model, edit, model.sites[name], batch, pos):
                    raise ValueError(
                        f"the callable edit at site {name!r} mixes positions, which generation computes one at a time"
                    )


def _mixes(model: LayeredModel, edit: Apply, site: Site, batch: int, pos: int) -> bool:
    """Whether a converted function mixes positions in some layer."""
    if edit.function.program.jaxpr.effects:
        return False
    rng, axis = np.random.default_rng(0), site.inner_axes.index(site.position_axes[0])
    random = lambda shape, dtype: jnp.asarray(rng.normal(size=shape), dtype)
    known = lambda a: a if is_concrete(a) else random(a.shape, a.dtype)  # an outer transformation's array
    function = jax.tree.map(lambda a: known(a) if eqx.is_array(a) else a, edit.function)
    shape = site.shape(batch, pos)[site.has_layer :]
    x, others = random(shape, model.dtype), random(shape, model.dtype)
    positions = jnp.broadcast_to(jnp.arange(pos, dtype=jnp.int32), (batch, pos))
    at = lambda x, i: np.asarray(jnp.take(x, i, axis=axis))
    for layer in range(model.n_layers) if site.has_layer else [None]:
        number = None if layer is None else jnp.int32(layer)
        call = lambda x, number=number: _called(function, x, site.name, number, positions)
        result = call(x)
        for i in (0, pos - 1):
            is_at = (jnp.arange(pos) == i).reshape(-1, *(1,) * (len(shape) - axis - 1))
            if not np.array_equal(at(call(jnp.where(is_at, x, others)), i), at(result, i), equal_nan=True):
                return True
    return False


@eqx.filter_jit
def _called(function: Any, *arguments: Any) -> Array:
    return function(*arguments)
