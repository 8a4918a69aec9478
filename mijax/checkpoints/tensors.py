"""The named tensors of a checkpoint, and which of them a family's table of parameters stands for."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import einops
import jax
import numpy as np

from mijax.checkpoints.table import Buffer, Weight
from mijax.model.config import Config

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that weights may have, by their safetensors names; any other means a quantised tensor."""


def axis_sizes(weight: Weight, config: Config) -> dict[str, int]:
    """The sizes of axes that einops cannot infer from the weight's pattern.

    Args:
        weight: the entry of a family's table.
        config: the model's config.

    Returns:
        The size of each axis among `head`, `kv_head`, `e` (of a head), `two`, `three` and `expert` that occurs in `weight.axes`.
    """
    sizes = {"head": config.n_heads, "kv_head": config.n_kv_heads, "e": config.d_head, "two": 2, "three": 3,
             "expert": config.experts.n if config.experts else 0}  # fmt: skip
    return {axis: n for axis, n in sizes.items() if re.search(rf"\b{axis}\b", weight.axes)}


def stored(parameters: Sequence[np.ndarray], weight: Weight, config: Config) -> np.ndarray:
    """Parameters in the arrangement of axes that the checkpoint's tensor has.

    Args:
        parameters: one for each of `weight.ours`: of one layer, or of the model where there is one tensor for all layers.
        weight: the entry of a family's table.
        config: the model's config.

    Returns:
        The tensor, a view of `parameters` where that is possible.
    """
    theirs, arranged = (side.strip() for side in weight.axes.split("->"))
    tensor = weight.convert.write(parameters, config)
    return einops.rearrange(tensor, f"{arranged} -> {theirs}", **axis_sizes(weight, config))


def stored_shape(weight: Weight, config: Config, shapes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a checkpoint's tensor, and that of the parameter that is made of it.

    Args:
        weight: the entry of a family's table.
        config: the model's config.
        shapes: the model, with a `jax.ShapeDtypeStruct` for each parameter.

    Returns:
        The shape of each tensor; the shape of the first of `weight.ours`, of one layer (and expert) where there is one
        tensor for each.
    """
    n_stacked = sum(f"{{{axis}}}" in weight.theirs for axis in _STACKED)
    inner: list[tuple[int, ...]] = [get(shapes, path).shape[n_stacked:] for path in weight.ours]  # pyright: ignore[reportOptionalMemberAccess]
    return stored([np.broadcast_to(np.float32(0), shape) for shape in inner], weight, config).shape, inner[0]


def tensor_names(entry: Weight | Buffer, config: Config) -> Iterator[str]:
    """The names of the tensors that an entry of a family's table stands for, one after the other: there may be many.

    Args:
        entry: the entry.
        config: the model's config.

    Returns:
        The names.
    """
    return (name for name, _ in named_parts(entry, config))


_STACKED = ("layer", "expert")  # the axes of which a checkpoint may hold one tensor for each entry


def named_parts(entry: Weight | Buffer, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names of the tensors that an entry of a family's table stands for, and which part of the parameter each holds.

    Args:
        entry: the entry, with `{layer}` and `{expert}` in its name where there is one tensor for each.
        config: the model's config.

    Returns:
        Names, and indices of the parameter's leading axes.
    """
    ours = entry.ours[0] if isinstance(entry, Weight) else ""
    of_some = {"blocks.mlp.": config.mlp_layers, "blocks.experts.": config.expert_layers}
    layers = next((layers for start, layers in of_some.items() if ours.startswith(start)), range(config.n_layers))
    numbers = {"layer": layers, "expert": range(config.experts.n if config.experts else 0)}
    axes = [axis for axis in _STACKED if f"{{{axis}}}" in entry.theirs]
    for place in _product([numbers[axis] for axis in axes]):
        named = dict(zip(axes, (number for _, number in place)))
        yield entry.theirs.format(**named), tuple(i for i, _ in place)


def _product(numbers: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """All tuples of an index and a number of each sequence; `itertools.product` would make a list of each first."""
    if not numbers:
        yield ()
        return
    for entry in enumerate(numbers[0]):
        yield from ((entry, *rest) for rest in _product(numbers[1:]))


def get(model: Any, path: str) -> jax.Array | np.ndarray | jax.ShapeDtypeStruct | None:
    """The parameter at a dotted path.

    Args:
        model: a `Transformer`, or a part of one.
        path: names of attributes, separated by dots (`"blocks.attn.W_Q"`).

    Returns:
        The parameter; `None` where the model has none at that path.
    """
    for part in path.split("."):
        model = getattr(model, part, None)
    return model


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes: JAX's CPU backend uses it in place, and copies any other.

    Args:
        shape: its shape.
        dtype: its dtype.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def put(target: np.ndarray, values: np.ndarray, name: str, faults: list[str]) -> None:
    """Write values into a parameter's place, in its dtype.

    Args:
        target: the place.
        values: the values.
        name: the name of the tensor that they come from.
        faults: gets a message where a value is not finite in the parameter's dtype.
    """
    with np.errstate(over="ignore"):  # an overflow is reported below
        target[...] = values
    if not np.isfinite(target.astype(np.float32) if target.dtype.itemsize < 4 else target).all():
        message = f"{name} has values that are not finite in {target.dtype}"
        faults.extend([] if message in faults else [message])
