"""Checks that the parameters of a model are those of its config."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mijax.model.config import Config

PARAMETER_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""The names of the dtypes that the parameters of a loaded, saved or initialised model may have."""

_ANNOUNCED_BY = {  # the field of `Config` that says whether a model has the parameter; all others are always there
    "W_pos": "positions",
    "W_U": "tied_unembed",
    "b_U": "unembed_bias",
    "b_Q": "attn_bias",
    "b_K": "attn_bias",
    "b_V": "attn_bias",
    "b_O": "attn_bias",
    "q_norm": "qk_norm",
    "k_norm": "qk_norm",
    "sinks": "sinks",
    "W_router": "experts",
    "b_router": "experts",
    "W_shared_gate": "experts",
    "W_in": "mlp",
    "W_out": "mlp",
    "W_gate": "mlp",
    "b_in": "mlp_bias",
    "b_out": "mlp_bias",
    "b_gate": "mlp_bias",
    "ln_embed.weight": "embed_norm",
    "ln_embed.bias": "embed_norm",
    "ln_final.weight": "final_norm",
    "ln1.weight": "norm_at",
    "ln2.weight": "norm_at",
    "ln1_post.weight": "norm_at",
    "ln2_post.weight": "norm_at",
    "bias": "norm_bias",
}
_TOGETHER = {
    "mlp_bias": "; the biases of an MLP come together: give zeros for those that it lacks",
}


def parameter_dtype(dtype: Any) -> jnp.dtype:
    """Check a dtype that parameters are to have.

    Args:
        dtype: what `jax.numpy.dtype` takes, except `None`.

    Returns:
        The dtype.

    Raises:
        TypeError: for what is none of `PARAMETER_DTYPES`.
        ValueError: for float64 while JAX makes float32 of it.

    >>> parameter_dtype("bfloat16")
    dtype(bfloat16)
    """
    try:
        name = None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in PARAMETER_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(PARAMETER_DTYPES)}, given {name or repr(dtype)}")
    if name == "float64" and jax.dtypes.canonicalize_dtype(name) != name:
        raise ValueError('dtype float64 needs jax.config.update("jax_enable_x64", True): JAX makes float32 of it')
    return jnp.dtype(name)


def check_fit(model: Any, empty: Callable[[Config], Any]) -> None:
    """Check that a model has the parameters of its config: see `mijax.model.transformer.check_parameters`.

    Args:
        model: a pytree with a static field `config`.
        empty: makes, from a config, the same pytree with `jax.ShapeDtypeStruct` for arrays.

    Raises:
        ValueError: that lists every mismatch, or says that the model is a stack of models.
    """
    leaves, structure = jax.tree.flatten(model)
    _check(structure, tuple((getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves), empty)


@functools.lru_cache(maxsize=256)
def _check(
    structure: Any, avals: tuple[tuple[tuple[int, ...] | None, Any], ...], empty: Callable[[Config], Any]
) -> None:
    """Compare shapes and dtypes (`avals`) with the config that `structure` holds; `ValueError` for mismatches."""
    indexed = jax.tree.unflatten(structure, range(len(avals)))
    present = {_path(key_path): avals[i] for key_path, i in jax.tree_util.tree_leaves_with_path(indexed)}
    expected = _shapes(indexed.config, empty)
    faults = [_unannounced(path, indexed.config) for path in present if path not in expected]
    faults += [_missing(path, indexed.config) for path in expected if path not in present]
    shapes = {path: shape for path, (shape, _) in present.items() if path in expected}
    stacks = {shape[0] if shape and shape[1:] == expected[path] else None for path, shape in shapes.items()}
    if len(stacks) == 1 and None not in stacks:
        (n,) = stacks
        raise ValueError(f"all parameters have a leading axis of {n}: vmap over the model, which is {n} models stacked")
    faults += [f"{p} has shape {s}, expected {expected[p]}" for p, s in shapes.items() if s != expected[p]]
    faults += _dtype_faults({path: dtype for path, (_, dtype) in present.items()})
    if faults:
        raise ValueError(f"the model's parameters do not fit its config: {'; '.join(faults)}")


def _dtype_faults(dtypes: dict[str, Any]) -> list[str]:
    faults = [
        f"{path} has dtype {dtype}, expected floating point"
        for path, dtype in dtypes.items()
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating)
    ]
    if faults or len(set(dtypes.values())) < 2:
        return faults
    ((common, _),) = collections.Counter(dtypes.values()).most_common(1)
    others = [f"{path} has dtype {dtype}" for path, dtype in dtypes.items() if dtype != common]
    return [f"parameters must be of one dtype: most have {common}, {', '.join(others)}"]


@functools.lru_cache(maxsize=256)
def _shapes(config: Config, empty: Callable[[Config], Any]) -> dict[str, tuple[int, ...]]:
    return {_path(key_path): leaf.shape for key_path, leaf in jax.tree_util.tree_leaves_with_path(empty(config))}


def _path(key_path: Any) -> str:
    return jax.tree_util.keystr(key_path).lstrip(".")


def _field(path: str, config: Config) -> str | None:
    """The field that says whether a model has the parameter."""
    name, parent = path.rpartition(".")[2], ".".join(path.split(".")[-2:])
    field = _ANNOUNCED_BY.get(parent, _ANNOUNCED_BY.get(name))
    return "norm" if field in ("norm_at", "final_norm", "norm_bias") and config.norm == "none" else field


def _unannounced(path: str, config: Config) -> str:
    field = _field(path, config)
    if field is None:
        return f"{path} is there, which no config announces"
    value: Any = getattr(config, field)
    remedy = f" (set {field}={not value}{_TOGETHER.get(field, '')})" if isinstance(value, bool) else ""
    if field == "attn_bias":
        remedy = f" (set attn_bias={str(value) + path[-1].lower()!r})"
    return f"{path} is there, which {field}={value!r} does not announce{remedy}"


def _missing(path: str, config: Config) -> str:
    field = _field(path, config)
    return f"{path} is missing" + (f", which {field}={getattr(config, field)!r} announces" if field else "")
