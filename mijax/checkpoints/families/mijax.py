"""mijax's own format, which expresses any `Config`: tensors have the names and axes of the parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mijax.checkpoints.keys import HARMLESS
from mijax.checkpoints.table import Family, Weight
from mijax.model.config import Config
from mijax.model.rotary import Rotary, RotaryScaling
from mijax.model.routing import Experts
from mijax.model.transformer import init

_FIELDS = frozenset(field.name for field in dataclasses.fields(Config)) - {"origin"}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    del fields
    read: dict[str, Any] = {key: value for key, value in c.items() if key in _FIELDS}
    if isinstance(read.get("experts"), Mapping):
        read["experts"] = Experts(**read["experts"])
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
    return Rotary(**{**value, "scaling": RotaryScaling(**scaling) if isinstance(scaling, Mapping) else scaling})


def _weights(config: Config) -> list[Weight]:
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
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
