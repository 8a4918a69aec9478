"""mijax's own format, which expresses any `Config`: tensors have the names and axes of the parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from mijax.checkpoints.keys import HARMLESS
from mijax.checkpoints.table import Family, Weight
from mijax.model.config import Config
from mijax.model.rotary import Rotary, RotaryScaling
from mijax.model.routing import Experts
from mijax.model.transformer import parameter_shapes
from mijax.rules import ANYTHING

T = TypeVar("T")
_FIELDS = {
    field.name: ANYTHING for field in dataclasses.fields(Config) if field.name != "origin"
}  # which `Config` checks


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    del fields
    read: dict[str, Any] = {key: value for key, value in c.items() if key in _FIELDS}
    if isinstance(read.get("experts"), Mapping):
        read["experts"] = _value(Experts, read["experts"], "experts")
    positions = c.get("positions")
    if isinstance(positions, list | tuple):
        return read | {"positions": tuple(map(_rotary, positions)), **_tuples(read)}
    return read | ({} if positions is None else {"positions": _rotary(positions)}) | _tuples(read)


def _tuples(read: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(read[name]) for name in ("window", "dense_layers") if isinstance(read.get(name), list)}


def _rotary(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    scaling = value.get("scaling")
    if isinstance(scaling, Mapping):
        value = {**value, "scaling": _value(RotaryScaling, scaling, "scaling")}
    return _value(Rotary, value, "positions")


def _value(kind: type[T], entries: Mapping[str, Any], key: str) -> T:
    """A value of a config from its entries; `ValueError` for entries that it does not have."""
    unknown = entries.keys() - {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown:
        raise ValueError(f"{key} has no {', '.join(map(repr, sorted(unknown)))}")
    return kind(**entries)


def _weights(config: Config) -> list[Weight]:
    shapes = parameter_shapes(config)
    paths = [jax.tree_util.keystr(place).lstrip(".") for place, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return [Weight((path,), path, "... -> ...") for path in paths]


MIJAX = Family(
    "mijax",
    _weights,
    further=_FIELDS,
    read=_read,
    write=lambda config: {key: value for key, value in dataclasses.asdict(config).items() if key in _FIELDS},
    harmless={key: HARMLESS[key] for key in ("model_type", "dtype")},
)
