"""Parameters that are divided among devices as they are read: no host holds more than one device's part of one at a time.

Along the last axis of a mesh, attention is divided by heads, MLPs by neurons, embedding and unembedding by the vocabulary
(Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053). What is no multiple of the axis' size is on every device.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mijax.checkpoints.contents import Tensors
from mijax.checkpoints.table import ALONE, Weight
from mijax.checkpoints.tensors import aligned, axis_sizes, get, named_parts, put, stored_shape
from mijax.model.config import Config
from mijax.model.transformer import Transformer

# of each parameter the axis that is divided, counted from the last
_DIVIDED = {
    "W_Q": -2, "W_K": -2, "W_V": -2, "W_O": -3, "b_Q": -2, "b_K": -2, "b_V": -2, "sinks": -1,
    "W_in": -1, "W_gate": -1, "b_in": -1, "b_gate": -1, "W_out": -2, "W_E": -2, "W_U": -2, "b_U": -1,
}  # fmt: skip


class _Reading(NamedTuple):
    """One weight of all layers, and where it is read from."""

    config: Config
    weight: Weight
    shapes: Transformer
    tensors: Tensors
    lookup: Callable[[str], str]
    faults: list[str]


def sharded(
    config: Config,
    weight: Weight,
    shapes: Transformer,
    tensors: Tensors,
    lookup: Callable[[str], str],
    mesh: Mesh,
    faults: list[str],
) -> list[jax.Array]:
    """Read one weight of all layers.

    Args:
        config: the model's config.
        weight: the entry of a family's table.
        shapes: the model as `jax.ShapeDtypeStruct`s.
        tensors: the checkpoint.
        lookup: the name of a tensor in the checkpoint.
        mesh: the devices.
        faults: gets messages about what is wrong.

    Returns:
        One sharded array for each of `weight.ours`.
    """
    reading, arrays = _Reading(config, weight, shapes, tensors, lookup, faults), []
    for number, path in enumerate(weight.ours):
        whole: Any = get(shapes, path)
        sharding = _sharding(path, whole.shape, mesh)
        devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(whole.shape).items():
            ranges = tuple(s.indices(n)[:2] for s, n in zip(index or (), whole.shape))
            devices.setdefault(ranges, []).append(device)
        parts = []
        for ranges, holders in devices.items():
            block = _block(reading, number, tuple(slice(*r) for r in ranges))
            parts += jax.block_until_ready([jax.device_put(block, device) for device in holders])
        arrays.append(jax.make_array_from_single_device_arrays(whole.shape, sharding, parts))
    return arrays


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How a parameter is divided."""
    axis, size = mesh.axis_names[-1], mesh.devices.shape[-1]
    dim = _DIVIDED.get(path.rpartition(".")[2])
    if dim is None or shape[dim] % size:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*(axis if i == len(shape) + dim else None for i in range(len(shape)))))


def _block(reading: _Reading, number: int, index: tuple[slice, ...]) -> np.ndarray:
    """The part at `index` of the parameter `weight.ours[number]`."""
    config, weight, shapes, tensors, lookup, faults = reading
    expected, shape = stored_shape(weight, config, shapes)
    inner = index[len(index) - len(shape) :]
    theirs, sizes = _their_part(config, weight, inner, shape, expected)
    host = aligned(tuple(s.stop - s.start for s in index), get(shapes, weight.ours[number]).dtype)  # pyright: ignore[reportOptionalMemberAccess]
    for name, at in named_parts(weight, config):
        if theirs is None or tensors.part is None:
            tensor, of_axes, cut = tensors.read(lookup(name)), axis_sizes(weight, config), inner
        else:
            tensor, of_axes, cut = tensors.part(lookup(name), theirs), sizes, tuple(slice(None) for _ in inner)
        arranged = einops.rearrange(tensor, weight.axes, **of_axes)
        put(host[at], weight.convert.read(arranged, config)[number][cut], name, faults)
    return host


def _their_part(
    config: Config, weight: Weight, inner: tuple[slice, ...], shape: tuple[int, ...], expected: tuple[int, ...]
) -> tuple[tuple[slice, ...] | None, dict[str, int]]:
    """The part of the checkpoint's tensor, and the sizes of its axes for einops; `None` where it cannot be cut out.

    It can where the tensor is one parameter, and the divided axis is the outermost of those that share an axis of it.
    """
    divided = [i for i, (s, n) in enumerate(zip(inner, shape)) if s.stop - s.start != n]
    if weight.convert is not ALONE or len(divided) != 1:
        return None, {}
    left, right = (side.strip() for side in weight.axes.split("->"))
    name, sizes = right.split()[divided[0]], axis_sizes(weight, config)
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", left)]
    place = next((i for i, group in enumerate(groups) if group[0] == name), None)
    if place is None:
        return None, {}
    start, stop, n = inner[divided[0]].start, inner[divided[0]].stop, shape[divided[0]]
    width = expected[place] // n
    theirs = tuple(slice(start * width, stop * width) if i == place else slice(0, m) for i, m in enumerate(expected))
    return theirs, {axis: stop - start if axis == name else size for axis, size in sizes.items()}
