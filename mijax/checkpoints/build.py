"""From named tensors, one at a time, to a Transformer."""

import re
from collections.abc import Callable, Collection
from typing import Any

import einops
import equinox as eqx
import jax
import numpy as np

from mijax.checkpoints.families import Family, Weight
from mijax.model.config import Config
from mijax.model.transformer import Transformer, init


def build(
    config: Config,
    family: Family,
    names: Collection[str],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    source: str,
) -> Transformer:
    """Fill a model from a checkpoint that holds the tensors `names`, each of which `read` gives.

    One stacked parameter is in memory beside the model at any time, the largest while there is least else, and `read`
    gives one tensor, so that the weights are never held twice.

    Raises `ValueError` that lists every missing, unexpected, misshapen or not finite tensor.
    """
    empty = jax.eval_shape(lambda key: init(config, key, dtype), jax.random.key(0))
    table = [w for w in family.weights(config) if get(empty, w.ours[0]) is not None]
    table.sort(key=lambda w: -get(empty, w.ours[0]).size * len(w.ours))
    lookup = _Lookup(family, names)
    faults = [f"missing {name}" for weight in table for name in tensor_names(weight, config) if lookup(name) is None]
    expected = {lookup(name) for weight in table for name in tensor_names(weight, config)}
    tied = {"lm_head.weight"} if config.tied_unembed else set()
    unexpected = [n for n in names if n not in expected | tied and not n.endswith(family.ignored)]
    faults += [f"unexpected {name}" for name in unexpected]
    if faults:
        _fail(source, faults)
    model = empty
    for weight in table:
        arrays = _stacked(config, weight, empty, lambda name: read(lookup(name) or name), faults)
        if not faults:
            places = lambda m, weight=weight: [get(m, path) for path in weight.ours]
            model = eqx.tree_at(places, model, arrays, is_leaf=lambda x: x is None)
    if faults:
        _fail(source, faults)
    return model


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


def tensor_names(weight: Weight, config: Config) -> list[str]:
    """The tensors that hold a weight: one, or one per layer."""
    return (
        [weight.theirs.format(layer=i) for i in range(config.n_layers)]
        if "{layer}" in weight.theirs
        else [weight.theirs]
    )


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
    for i, name in enumerate(tensor_names(weight, config)):
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
            target[...] = part
            if not np.isfinite(target.astype(np.float32) if target.dtype.itemsize < 4 else target).all():
                faults.append(f"{name} has values that are not finite")
    # Waited for, because what is not taken as it is is held until it is copied.
    return jax.block_until_ready(jax.device_put(hosts)) if not faults else []


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX's CPU backend takes as it is: at a multiple of 64 bytes (it copies any other)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _fail(source: str, faults: list[str]) -> None:
    shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
    raise ValueError(f"{source} does not hold the weights that its config asks for: {shown}")
