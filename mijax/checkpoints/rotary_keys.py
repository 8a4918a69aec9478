"""The entries of a `config.json` about rotary positions."""

import math
from collections.abc import Mapping
from typing import Any

from mijax.model.fields import check_field
from mijax.model.rotary import Rotary, RotaryScaling
from mijax.rules import ANYTHING, COUNT, NOT_NEGATIVE, NULL, POSITIVE, either, faults, mapping, shown

_PLACES = {key: either(mapping(ANYTHING), NULL) for key in ("rope_parameters", "rope_scaling")}
ROTARY_KEYS = _PLACES | {
    "rope_theta": either(POSITIVE, NULL),
    "partial_rotary_factor": either(POSITIVE, NULL),
    "original_max_position_embeddings": either(COUNT, NULL),
}
"""The keys of a `config.json` that `read_rotary` reads, and what they may hold."""
_SCALINGS: dict[str, dict[str, str]] = {  # for each kind: its keys, and their fields of RotaryScaling
    "default": {},
    "dynamic": {"factor": "factor"},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq",
        "high_freq_factor": "high_freq",
        "original_max_position_embeddings": "original_n_ctx",
    },
    "yarn": {
        "factor": "factor",
        "beta_slow": "low_freq",
        "beta_fast": "high_freq",
        "original_max_position_embeddings": "original_n_ctx",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}


def read_rotary(c: Mapping[str, Any], d_head: int | None = None, theta: float = 10_000.0, share: float = 1.0) -> Rotary:
    """Rotary positions, from all places of a `config.json` that may hold them.

    transformers 5 writes all of them into `rope_parameters`. Earlier versions wrote `rope_scaling`, with
    `rope_theta` and `partial_rotary_factor` at the top level of the file. Llama and Mistral in transformers ignore
    `partial_rotary_factor` and rotate all dimensions of a head, so that a file which asks for another share does not
    say what its model was trained with.

    The scaling `dynamic` changes frequencies only for prompts longer than `max_position_embeddings`, which mijax
    refuses: up to there, it is none.

    Args:
        c: the contents of the file.
        d_head: the width of a head, where the family rotates the share `partial_rotary_factor` of it.
        theta: the base where the file gives none.
        share: the `partial_rotary_factor` where the file gives none.

    Returns:
        The rotary positions.

    Raises:
        KeyError: where a scaling needs `max_position_embeddings` and the file lacks it, or a scaling lacks one of its
            keys.
        ValueError: where two places disagree, for an unsupported kind of scaling, for a key that the kind does not
            have, for a value of wrong type or range, and where `partial_rotary_factor` is not 1 in a family that rotates
            all dimensions.

    >>> read_rotary({"rope_theta": 5000.0, "partial_rotary_factor": 1.0})
    Rotary(base=5000.0, dim=0, scaling=None)
    """
    return rotary_of(_merged(c), c, d_head, theta, share)


def rotary_of(
    rope: dict[str, Any],
    c: Mapping[str, Any],
    d_head: int | None = None,
    theta: float = 10_000.0,
    share: float = 1.0,
) -> Rotary:
    """Rotary positions, from entries by their names in `rope_parameters`: see `read_rotary`.

    Args:
        rope: the entries.
        c: the contents of the file.
        d_head: as in `read_rotary`.
        theta: as in `read_rotary`.
        share: as in `read_rotary`.

    Returns:
        The rotary positions.
    """
    rope = dict(rope)
    kind = rope.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"unsupported rotary scaling {shown(kind)}; supported are {', '.join(_SCALINGS)}")
    base = check_field(Rotary, "base", rope.pop("rope_theta", theta), "rope_theta")
    fraction = check_field(RotaryScaling, "factor", rope.pop("partial_rotary_factor", share), "partial_rotary_factor")
    if fraction != 1 and d_head is None:
        raise ValueError(
            f"partial_rotary_factor={fraction} must be 1: this family rotates all dimensions of a head, also in"
            " transformers, which ignores the key"
        )
    if kind in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    if kind == "yarn":
        rope = _with_yarn_defaults(rope)
    unread = set(rope) - set(_SCALINGS[kind])
    if unread:
        extra = ", ".join(f"{key}={shown(rope[key])}" for key in sorted(unread))
        raise ValueError(f"rotary scaling {kind!r} has no {extra}")
    values = {name: check_field(RotaryScaling, name, rope[key], key) for key, name in _SCALINGS[kind].items()}
    scaling = (
        None if kind in ("default", "dynamic") else RotaryScaling(check_field(RotaryScaling, "kind", kind), **values)
    )
    dim = 0 if d_head is None or fraction == 1 else int(d_head * fraction)
    if dim == 0 and fraction != 1:
        raise ValueError(f"partial_rotary_factor={fraction} of a head of {d_head} rotates no dimension")
    return Rotary(base, dim, scaling)


_SCALES = ("mscale", "mscale_all_dim")


def _with_yarn_defaults(rope: dict[str, Any]) -> dict[str, Any]:
    """The entries of `yarn` with those that transformers fills in."""
    rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **rope}
    wrong = faults(rope, dict.fromkeys(_SCALES, either(NOT_NEGATIVE, NULL)))
    if wrong:
        raise ValueError("; ".join(wrong))
    scales = [rope.pop(key, None) for key in _SCALES]
    factor = check_field(RotaryScaling, "factor", rope["factor"], "factor")
    grown = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
    both = all(scales)
    rope.setdefault("attention_factor", grown(scales[0]) / grown(scales[1]) if both else grown(1.0))
    return rope


def _merged(c: Mapping[str, Any]) -> dict[str, Any]:
    """The entries about rotary positions: of `rope_parameters`, of `rope_scaling` and of the file's top level."""
    top_level = {key: c[key] for key in ROTARY_KEYS.keys() - _PLACES.keys() if c.get(key) is not None}
    rope: dict[str, Any] = {}
    for place in (*_PLACES, "config.json"):
        values = top_level if place == "config.json" else c.get(place)
        for key, value in (values or {}).items():
            key = "rope_type" if key == "type" else key
            if value is None:
                continue
            if key in rope and rope[key] != value:
                raise ValueError(f"{key} is {value!r} in {place}, and {rope[key]!r} elsewhere in the file")
            rope[key] = value
    return rope


def write_rotary(rotary: Any, d_head: int | None = None) -> dict[str, Any]:
    """The entry of a `config.json` from which `read_rotary` reads rotary positions.

    Args:
        rotary: the rotary positions; anything else gives entries that are read as another config.
        d_head: the width of a head, where the family rotates a share of it; otherwise `partial_rotary_factor` is left
            out, since Llama in transformers always rotates all dimensions of a head.

    Returns:
        The entry `rope_parameters`.
    """
    return {"rope_parameters": rope_of(rotary, d_head)} if isinstance(rotary, Rotary) else {}


def rope_of(rotary: Rotary, d_head: int | None = None) -> dict[str, Any]:
    """The entries from which `rotary_of` reads rotary positions.

    Args:
        rotary: the rotary positions.
        d_head: as in `write_rotary`.

    Returns:
        The entries.
    """
    scaling = rotary.scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": rotary.base}
    if d_head is not None:
        rope["partial_rotary_factor"] = rotary.dim / d_head
    return rope | {key: getattr(scaling, name) for key, name in _SCALINGS[rope["rope_type"]].items()}
