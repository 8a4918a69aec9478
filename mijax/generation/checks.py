"""Checks of the arguments of `generate`, before anything is computed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mijax._types import Array
from mijax.interventions.capturing import Captures
from mijax.interventions.edits import Apply, Edits
from mijax.model.model import LayeredModel
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
                rows = np.asarray(index).reshape(1, -1) if np.ndim(index) < 2 else np.asarray(index)
                is_last = is_concrete(text.mask) and (rows >= np.asarray(text.lengths)[:, None] - 1).all()
                if field != "key" and is_last and not captures:
                    raise ValueError(
                        f"{type(edit).__name__} at site {site!r} acts on the last new token alone, from which nothing is read or kept"
                    )


def check_settings(
    model: LayeredModel, tokens: Tokens, edits: Edits, count: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any,
    stop_ids: Sequence[int], key: Array | None, captures: Captures,
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
            text longer than the context, sampling without a key, cuts at temperature 0, an edit that mixes
            positions.
    """
    faults = []
    if not model.causal:
        faults.append("a bidirectional model cannot generate")
    if count < 1:
        faults.append(f"max_new_tokens must be at least 1, given {count}")
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
    if top_k is not None and top_k < 1:
        faults.append(f"top_k must be at least 1, given {top_k}")
    faults += [f"{n} must be in {r}, given {v}" for n, v, ok, r in (
        ("top_p", top_p, lambda p: 0 < p <= 1, "(0, 1]"), ("min_p", min_p, lambda p: 0 <= p <= 1, "[0, 1]"),
    ) if v is not None and not ok(v)]  # fmt: skip
    faults += [
        f"stop token {t} is outside the vocabulary of {model.d_vocab}" for t in stop_ids if not 0 <= t < model.d_vocab
    ]
    for site, site_edits in edits.items():
        if any(isinstance(e, Apply) and getattr(e.function, "mixes_positions", False) for e in site_edits):
            faults.append(
                f"the callable edit at site {site!r} mixes positions, which generation computes one at a time"
            )
    if faults:
        raise ValueError("; ".join(faults))
