"""Fills a `Transformer` from named tensors, which are read one at a time."""

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import einops
import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

from mijax.checkpoints.contents import Lookup, Tensors
from mijax.checkpoints.sharded import sharded
from mijax.checkpoints.table import Buffer, Family, Weight
from mijax.checkpoints.tensors import (
    FLOATS,
    aligned,
    axis_sizes,
    get,
    named_parts,
    put,
    stored_shape,
    tensor_names,
)
from mijax.model.config import Config
from mijax.model.transformer import Transformer, parameter_shapes

_MASKS = ("BOOL", "U8")  # further dtypes that buffers may have
_SHOWN = 8  # how many faults a message lists


def build(
    config: Config, family: Family, tensors: Tensors, dtype: Any, source: str, mesh: Mesh | None = None
) -> Transformer:
    """Build a model from the tensors of a checkpoint.

    Every tensor of the checkpoint is used, or is checked to hold only what the config says as well.

    Tensors are read one by one, and stacked parameters are built in order of decreasing size. At any time, one
    stacked parameter is in memory beside the model, the largest while the model is still empty: the weights are
    never in memory twice.

    An unembedding that differs from the embedding to which the config ties it is used, with a `UserWarning`, as in
    transformers.

    Args:
        config: the model's config.
        family: the architecture's table of names and axes.
        tensors: the checkpoint.
        dtype: of the model's parameters.
        source: the name of the checkpoint in error messages.
        mesh: the devices among which the parameters are divided; see `mijax.checkpoints.sharded`.

    Returns:
        The model. Its config has `tied_unembed=False` where the checkpoint holds an unembedding of different
        values.

    Raises:
        ValueError: listing every tensor that is missing, unexpected, quantised, of the wrong shape or not finite,
            or that is a buffer which contradicts the config.
    """
    lookup = Lookup(family.prefix, tensors.stored)
    head = lookup(family.head) if config.tied_unembed and family.head else None
    untied = config if head is None else dataclasses.replace(config, tied_unembed=False)
    _check_stored(untied, family, tensors, lookup, source)
    _check_buffers(config, tensors, buffers_in(config, family, tensors), source)
    if head is not None:
        config = _with_head(config, family, tensors, lookup, dtype, source)
    shapes, table = _table(config, family, dtype)
    model, faults = shapes, []
    for weight in table:
        if mesh is None:
            arrays = _stacked(config, weight, shapes, lambda name: tensors.read(lookup(name) or name), faults)
        else:
            arrays = sharded(config, weight, shapes, tensors, lambda name: lookup(name) or name, mesh, faults)
        if not faults:
            places = lambda m, weight=weight: [operator.attrgetter(path)(m) for path in weight.ours]
            model = eqx.tree_at(places, model, arrays, is_leaf=lambda x: x is None)
    _fail(source, faults)
    return model


def buffers_in(config: Config, family: Family, tensors: Tensors) -> dict[str, Buffer]:
    """The tensors of a checkpoint that hold no parameters, by name.

    Args:
        config: the model's config.
        family: the architecture's table of names.
        tensors: the checkpoint.
    """
    lookup = Lookup(family.prefix, tensors.stored)
    named = ((lookup(name), buffer) for buffer in family.buffers for name in tensor_names(buffer, config))
    return {name: buffer for name, buffer in named if name is not None}


def _table(config: Config, family: Family, dtype: Any) -> tuple[Transformer, list[Weight]]:
    """The model as `jax.ShapeDtypeStruct`s, and those weights of the family that this config has, largest first."""
    shapes = parameter_shapes(config, dtype)
    table = [w for w in family.weights(config) if get(shapes, w.ours[0]) is not None]
    return shapes, sorted(table, key=lambda w: -get(shapes, w.ours[0]).size * len(w.ours))  # pyright: ignore[reportOptionalMemberAccess]


def _check_sizes(shapes: Transformer, tensors: Tensors, source: str) -> None:
    """Refuse a config whose parameters cannot be in the checkpoint, before anything is made of its sizes."""
    held = sum(math.prod(entry.shape) for entry in tensors.stored.values())
    faults = [
        f"{jax.tree_util.keystr(path).lstrip('.')} of shape {leaf.shape}, in a file of {held} numbers"
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        if math.prod(leaf.shape) > held
    ]
    _fail(source, faults)


def _check_stored(config: Config, family: Family, tensors: Tensors, lookup: Lookup, source: str) -> None:
    """Refuse a checkpoint by the names, dtypes and shapes of its tensors, before any of them is read."""
    shapes, table = _table(config, family, np.float32)
    _check_sizes(shapes, tensors, source)
    buffers, weights, faults = buffers_in(config, family, tensors), set(), []
    for weight in table:
        shape, inner = stored_shape(weight, config, shapes)
        for name in tensor_names(weight, config):
            actual = lookup(name)
            weights.add(actual)
            if actual is None:
                faults.append(f"missing {name}")
            elif tensors.stored[actual].shape != shape:
                faults.append(
                    f"{name} has shape {tensors.stored[actual].shape}, expected {shape}, which gives {weight.ours[0]} its {inner}"
                )
            if len(faults) > len(tensors.stored) + _SHOWN:  # a config that names experts without end
                _fail(source, faults)
    for name, (dtype, _) in tensors.stored.items():
        if name not in weights and name not in buffers:
            faults.append(f"unexpected {name}")
        elif dtype not in FLOATS and not (name in buffers and dtype in _MASKS):
            faults.append(f"{name} is stored as {dtype}, which is no floating point that is read ({', '.join(FLOATS)})")
    _fail(source, faults)


def _check_buffers(config: Config, tensors: Tensors, buffers: Mapping[str, Any], source: str) -> None:
    """Refuse buffers that do not repeat what the config says."""
    faults = [
        f"{name} would be dropped, and is not {buffer.meaning}"
        for name, buffer in buffers.items()
        if not buffer.redundant(config, tensors.read(name))
    ]
    _fail(source, faults)


def _with_head(config: Config, family: Family, tensors: Tensors, lookup: Lookup, dtype: Any, source: str) -> Config:
    """The config of a checkpoint that holds an unembedding although its config ties it: untied where the two differ."""
    embedding_name = next(w.theirs for w in family.weights(config) if w.ours == ("W_E",))
    head, embedding = (tensors.read(lookup(name) or name) for name in (str(family.head), embedding_name))
    if np.array_equal(head.astype(dtype), embedding.astype(dtype)):
        return config
    warnings.warn(
        f"{source}: the config ties {family.head} to {embedding_name} (tie_word_embeddings), but both are in the checkpoint and"
        " they differ: both are used, and the model's config says tied_unembed=False",
        stacklevel=4,
    )
    return dataclasses.replace(config, tied_unembed=False)


def _stacked(config: Config, weight: Weight, shapes: Transformer, read: Callable, faults: list[str]) -> list[jax.Array]:
    """Read one weight of all layers; returns one array for each of `weight.ours`, and appends to `faults`."""
    slots: list[Any] = [get(shapes, path) for path in weight.ours]
    hosts = [aligned(slot.shape, slot.dtype) for slot in slots]
    for name, index in named_parts(weight, config):
        arranged = einops.rearrange(read(name), weight.axes, **axis_sizes(weight, config))
        for host, part in zip(hosts, weight.convert.read(arranged, config)):
            put(host[index], part, name, faults)
    # Blocks, because JAX keeps a host array that it has to copy in memory until the copy is done.
    return jax.block_until_ready(jax.device_put(hosts)) if not faults else []


def _fail(source: str, faults: list[str]) -> None:
    """Raise one `ValueError` that shows the first eight faults; do nothing where there are none."""
    if not faults:
        return
    summary = "; ".join(faults[:_SHOWN]) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
    raise ValueError(f"{source} does not hold the weights that its config asks for: {summary}")
