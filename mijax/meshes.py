"""Arrays on meshes of explicit axis type (the default of `jax.make_mesh`), where products must state their sharding.

mijax leaves the sharding of products to the compiler: a pure function runs with explicit axes as automatic ones and
gives results that are explicitly sharded along the batch; a driver moves its inputs to the automatic mesh of the
same devices.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")


def automatic(tree: T) -> T:
    """Move arrays from meshes with explicit axes to meshes of the same devices with automatic axes.

    Args:
        tree: a pytree of arrays and meshes.

    Returns:
        The tree, with every mesh replaced by the automatic one; arrays without explicit axes are unchanged.
    """
    return jax.tree.map(_moved, tree, is_leaf=lambda x: isinstance(x, Mesh))


def with_automatic_axes(function: Callable[..., T], *arguments: Any, like: Any, out_axes: Callable[[Any], Any]) -> T:
    """Call a function, with the explicit axes of the arguments' mesh as automatic axes inside.

    Where no argument has explicit axes, the function is called directly.

    Args:
        function: the function.
        arguments: pytrees of its arguments.
        like: the array whose first axis is the axis of examples, and tells how the examples are sharded.
        out_axes: `out_axes(b)` returns the partition specs of the result, `b` being the mesh axis of the examples,
            `None` where they are not sharded.

    Returns:
        The result of `function(*arguments)`, sharded as `out_axes` says where an argument has explicit axes.
    """
    mesh = next((jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arguments) if _is_explicit(x)), None)
    if mesh is None:
        return function(*arguments)
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    spec = jax.typeof(like).sharding.spec if isinstance(like, jax.Array) else ()
    inside = lambda arrays: function(*eqx.combine(arrays, rest))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(inside, out_sharding=out_axes(spec[0] if spec else None))(arrays)  # pyright: ignore[reportReturnType]


def _is_explicit(x: Any) -> bool:
    return isinstance(x, jax.Array) and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _moved(x: Any) -> Any:
    if isinstance(x, Mesh):
        return Mesh(x.devices, x.axis_names)
    if _is_explicit(x) and isinstance(x.sharding, NamedSharding):
        return jax.device_put(x, NamedSharding(_moved(x.sharding.mesh), x.sharding.spec))
    return x


def batch_spec(axes: tuple[str, ...], batch: Any) -> PartitionSpec:
    """Make the partition spec of an array that is sharded along its axis of examples.

    Args:
        axes: the names of the array's axes.
        batch: the mesh axis along which the axis `batch` is sharded; `None` for none.

    Returns:
        The spec, with `batch` at the axis `batch` and `None` at the other axes.

    >>> tuple(batch_spec(("layer", "batch", "pos"), "data"))
    (None, 'data', None)
    """
    return PartitionSpec(*(batch if axis == "batch" else None for axis in axes))
