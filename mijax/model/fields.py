"""Checks of the fields of configs: types and ranges, of values written by hand and of values read from files."""

import dataclasses
import math
import numbers
from typing import Any, Literal, TypeAlias, get_args, get_origin

import numpy as np

from mijax.rules import shown

FieldValue: TypeAlias = Any
"""The value of one field of a config: of the type that the field has."""

# Zero is allowed where it stands for a value derived from other fields.
_POSITIVE = {"d_model", "n_heads", "d_vocab", "n_ctx", "base", "embed_scale"}
_POSITIVE |= {"factor", "low_freq", "high_freq", "original_n_ctx", "attention_factor", "n", "top_k"}
_NOT_NEGATIVE = {
    "n_layers",
    "d_head",
    "n_kv_heads",
    "d_mlp",
    "dim",
    "norm_eps",
    "attn_scale",
    "scores_cap",
    "logits_cap",
    "shared",
    "d_vocab_out",
}
_LARGEST_INTEGER = 2**31 - 1  # token ids and positions are int32
# what differs by layer is a tuple, and four times the width is a size too
_AT_MOST = {"n_layers": 10_000, "d_model": 2**28}


def check_field(owner: type, name: str, value: Any, label: str = "") -> FieldValue:
    """Check the value of one field of a config, and convert it to the field's Python type.

    Args:
        owner: `Config`, or the class of one of its values.
        name: the field's name.
        value: the value to check.
        label: what messages call the field; by default `name`.

    Returns:
        The value as the Python type of the field (a NumPy integer as `int`, ...).

    Raises:
        ValueError: for a wrong type, or a value out of range.

    >>> from mijax.model.config import Config
    >>> check_field(Config, "norm_eps", -1.0, "rms_norm_eps")
    Traceback (most recent call last):
    ValueError: rms_norm_eps=-1.0 must not be negative
    """
    label = label or name
    field_type: Any = next(field.type for field in dataclasses.fields(owner) if field.name == name)
    if get_origin(field_type) is Literal:
        if value not in get_args(field_type):
            raise ValueError(f"{label}={shown(value)} is none of {', '.join(map(repr, get_args(field_type)))}")
        return value
    if field_type not in _TYPES:
        if not isinstance(value, field_type):
            raise ValueError(f"{label}={shown(value)} must be {field_type}")
        return value
    accepted, noun = _TYPES[field_type]
    if not isinstance(value, accepted) or (field_type is not bool and isinstance(value, bool)):
        raise ValueError(f"{label}={shown(value)} must be {noun}, given {type(value).__name__}")
    if field_type is float and not _is_finite(value):
        raise ValueError(f"{label}={shown(value)} must be finite")
    if field_type is float and value and not _SMALLEST <= abs(float(value)) <= _LARGEST:
        raise ValueError(
            f"{label}={value!r} is outside float32, which would make it {'0' if abs(value) < 1 else 'infinite'}"
        )
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{label}={value!r} must be positive")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{label}={value!r} must not be negative")
    if field_type is int and value > (most := _AT_MOST.get(name, _LARGEST_INTEGER)):
        raise ValueError(f"{label}={shown(value)} must be at most {most}")
    return field_type(value)


_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_TYPES: dict[type, tuple[Any, str]] = {
    bool: ((bool, np.bool_), "a boolean"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def check_fields(owner: Any, *others: str) -> dict[str, str]:
    """Convert every field to its Python type in place.

    Args:
        owner: the config.
        *others: fields that are checked elsewhere.

    Returns:
        Messages for the fields that are invalid, by name.
    """
    faults = {}
    for field in dataclasses.fields(owner):
        if field.name in others:
            continue
        try:
            object.__setattr__(owner, field.name, check_field(type(owner), field.name, getattr(owner, field.name)))
        except ValueError as error:
            faults[field.name] = str(error)
    return faults
