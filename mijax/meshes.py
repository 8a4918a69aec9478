"""Arrays on meshes of explicit axis type (the default of `jax.make_mesh`), where every product would have to say how it is sharded.

mijax leaves that to the compiler: a pure function runs with these axes as automatic ones and gives results that are explicitly
sharded along the batch; a driver moves what it is given to the same devices' automatic mesh.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def automatic(tree: Any) -> Any:
    """The tree with every array on an explicit mesh, and every such mesh, on the automatic one of the same devices."""
    return jax.tree.map(_moved, tree, is_leaf=lambda x: isinstance(x, Mesh))


def with_automatic_axes(function: Callable, *arguments: Any, like: Any, out_axes: Callable[[Any], Any]) -> Any:
    """`function(*arguments)`; where arrays of the arguments have explicit axes, these are automatic inside.

    `out_axes(b)` gives the result's partition specs, with `b` for the axis of examples: that of the first axis of `like`.
    """
    mesh = next((jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arguments) if _is_explicit(x)), None)
    if mesh is None:
        return function(*arguments)
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    spec = jax.typeof(like).sharding.spec if isinstance(like, jax.Array) else ()
    inside = lambda arrays: function(*eqx.combine(arrays, rest))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(inside, out_sharding=out_axes(spec[0] if spec else None))(arrays)


def _is_explicit(x: Any) -> bool:
    return isinstance(x, jax.Array) and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _moved(x: Any) -> Any:
    if isinstance(x, Mesh):
        return Mesh(x.devices, x.axis_names)
    if _is_explicit(x) and isinstance(x.sharding, NamedSharding):
        return jax.device_put(x, NamedSharding(_moved(x.sharding.mesh), x.sharding.spec))
    return x


def batch_spec(axes: tuple[str, ...], batch: Any) -> PartitionSpec:
    """The partition of an array with these axes whose examples are along `batch`."""
    return PartitionSpec(*(batch if axis == "batch" else None for axis in axes))
