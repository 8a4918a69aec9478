"""From named tensors, one at a time, to a Transformer."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import einops
import equinox as eqx
import jax
import numpy as np

from mijax.checkpoints.families import Family, Weight
from mijax.model.config import Config
from mijax.model.transformer import Transformer, init

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights, as safetensors calls them; any other is some quantisation."""
_MASKS = ("BOOL", "U8")


class Tensors(NamedTuple):
    """What a checkpoint holds: the dtype of each tensor, by safetensors' names, and a function that reads one."""

    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray]


def build(config: Config, family: Family, tensors: Tensors, dtype: Any, source: str) -> Transformer:
    """Fill a model from a checkpoint. Every tensor of it is used, or is seen to say nothing that the config does not.

    One stacked parameter is in memory beside the model at any time, the largest while there is least else, and
    tensors are read one by one, so that the weights are never held twice.

    A head that differs from the embedding to which the config ties it is used, with a `UserWarning`, as in transformers.

    Raises `ValueError` that lists every missing, unexpected, quantised, misshapen or not finite tensor.
    """
    lookup = _Lookup(family, tensors.dtypes)
    head = lookup(family.head) if config.tied_unembed and family.head else None
    buffers = {lookup(name): b for b in family.buffers for name in tensor_names(b.theirs, config)}
    _check_names(config, family, tensors, lookup, buffers, head, source)
    _check_buffers(config, tensors, {name: b for name, b in buffers.items() if name is not None}, source)
    if head is not None:
        config = _with_head(config, family, tensors, lookup, dtype, source)
    empty, table = _table(config, family, dtype)
    model, faults = empty, []
    for weight in table:
        arrays = _stacked(config, weight, empty, lambda name: tensors.read(lookup(name) or name), faults)
        if not faults:
            places = lambda m, weight=weight: [get(m, path) for path in weight.ours]
            model = eqx.tree_at(places, model, arrays, is_leaf=lambda x: x is None)
    _fail(source, faults)
    return model


def _table(config: Config, family: Family, dtype: Any) -> tuple[Transformer, list[Weight]]:
    """The model's shapes, and the weights of a family that this config has, largest first."""
    empty = jax.eval_shape(lambda key: init(config, key, dtype), jax.random.key(0))
    table = [w for w in family.weights(config) if get(empty, w.ours[0]) is not None]
    return empty, sorted(table, key=lambda w: -get(empty, w.ours[0]).size * len(w.ours))


def _check_names(
    config: Config,
    family: Family,
    tensors: Tensors,
    lookup: "_Lookup",
    buffers: Collection[str | None],
    head: str | None,
    source: str,
) -> None:
    """Names and dtypes, before anything is read."""
    _, table = _table(config, family, np.float32)
    names = [name for weight in table for name in tensor_names(weight.theirs, config)]
    faults = [f"missing {name}" for name in names if lookup(name) is None]
    weights = {lookup(name) for name in names} | {head}
    for name, stored in tensors.dtypes.items():
        if name not in weights and name not in buffers:
            faults.append(f"unexpected {name}")
        elif stored not in FLOATS and not (name in buffers and stored in _MASKS):
            faults.append(
                f"{name} is stored as {stored}, which is no floating point that is read ({', '.join(FLOATS)})"
            )
    _fail(source, faults)


def _check_buffers(config: Config, tensors: Tensors, buffers: Mapping[str, Any], source: str) -> None:
    faults = [
        f"{name} would be dropped, and is not {buffer.meaning}"
        for name, buffer in buffers.items()
        if not buffer.redundant(config, tensors.read(name))
    ]
    _fail(source, faults)


def _with_head(config: Config, family: Family, tensors: Tensors, lookup: "_Lookup", dtype: Any, source: str) -> Config:
    """The config of a checkpoint that holds a head although its config ties it: untied where the head differs."""
    embedding = next(w.theirs for w in family.weights(config) if w.ours == ("W_E",))
    head, tied_to = (tensors.read(lookup(name) or name) for name in (str(family.head), embedding))
    if np.array_equal(head.astype(dtype), tied_to.astype(dtype)):
        return config
    warnings.warn(
        f"{source}: the config ties {family.head} to {embedding} (tie_word_embeddings), but both are in the checkpoint and"
        " they differ: both are used, and the model's config says tied_unembed=False",
        stacklevel=5,
    )
    return dataclasses.replace(config, tied_unembed=False)


class _Lookup:
    """Finds a tensor by its full name, or without the prefix that bare models leave out."""

    def __init__(self, family: Family, names: Collection[str]):
        self.prefix, self.names = family.prefix, set(names)

    def __call__(self, name: str) -> str | None:
        return next((n for n in (name, name.removeprefix(self.prefix)) if n in self.names), None)


def axis_sizes(weight: Weight, config: Config) -> dict[str, int]:
    """The sizes that the weight's einops pattern needs to be told."""
    sizes = {"head": config.n_heads, "kv_head": config.n_kv_heads, "three": 3}
    return {axis: n for axis, n in sizes.items() if re.search(rf"\b{axis}\b", weight.axes)}


def tensor_names(theirs: str, config: Config) -> list[str]:
    """The tensors of a name in a family's table: one, or one per layer."""
    return [theirs.format(layer=i) for i in range(config.n_layers)] if "{layer}" in theirs else [theirs]


def get(model: Any, path: str) -> Any:
    """The parameter at a dotted path; `None` where the model has none."""
    for part in path.split("."):
        model = getattr(model, part, None)
    return model


def _stacked(config: Config, weight: Weight, empty: Transformer, read: Callable, faults: list[str]) -> list[jax.Array]:
    """Read one weight of all layers; returns one array for each of `weight.ours`."""
    slots = [get(empty, path) for path in weight.ours]
    hosts = [_aligned(slot.shape, slot.dtype) for slot in slots]
    stacked = "{layer}" in weight.theirs
    sizes = axis_sizes(weight, config)
    for i, name in enumerate(tensor_names(weight.theirs, config)):
        tensor = read(name)
        try:
            arranged = einops.rearrange(tensor, weight.axes, **sizes)
        except einops.EinopsError:
            arranged = tensor
        arranged = arranged if len(slots) > 1 else arranged[None]
        expected = (len(slots), *(slots[0].shape[1:] if stacked else slots[0].shape))
        if arranged.shape != expected:
            faults.append(f"{name} has shape {tensor.shape}, which does not give {weight.ours[0]} its {expected[1:]}")
            continue
        for host, part in zip(hosts, arranged):
            target = host[i] if stacked else host
            with np.errstate(over="ignore"):  # told below
                target[...] = part
            if not np.isfinite(target.astype(np.float32) if target.dtype.itemsize < 4 else target).all():
                faults.append(f"{name} has values that are not finite in {target.dtype}")
    # Waited for, because what is not taken as it is is held until it is copied.
    return jax.block_until_ready(jax.device_put(hosts)) if not faults else []


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX's CPU backend takes as it is: at a multiple of 64 bytes (it copies any other)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _fail(source: str, faults: list[str]) -> None:
    if not faults:
        return
    shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
    raise ValueError(f"{source} does not hold the weights that its config asks for: {shown}")
