"""Rewriting weights without changing what a model computes: pure functions from model to model.

Each function leaves every log-probability unchanged (to rounding; the activations that it rewrites do change). It
raises `ValueError` for a model to which it does not apply or whose parameters are not those of its config (a stack of
models, say: `jax.vmap` the function over it), and `TypeError` for what is no transformer. The purpose is to make
weights comparable between layers: see Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and
TransformerLens.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from mijax._types import Array, ArrayLike
from mijax.model.config import Config
from mijax.model.norm import Norm
from mijax.model.numerics import einsum
from mijax.model.orthogonal import orthogonal
from mijax.model.transformer import Transformer


def fold_norms(model: Transformer) -> Transformer:
    """Move the weight and bias of every norm into the matrices that read it; these norms keep ones and zeros.

    The unembedding is untied, and the matrices get biases where the norms had them. Norms of what attention and MLP
    write (`norm_at="both"`) are left as they are.

    Args:
        model: a model with norms before attention and MLP.

    Returns:
        The rewritten model, with a config that describes it.

    Raises:
        ValueError: for a model without norms there, and for norms with biases before a shared MLP with a gate.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.processing.fold_norms(model).config.tied_unembed
    False
    """
    _check(model, "fold_norms")
    attn, ln1, ln2 = model.blocks.attn, model.blocks.ln1, model.blocks.ln2
    if ln1 is None:
        raise ValueError("fold_norms does not apply: the model has no norms before attention and MLP")
    model, ln2 = _untied(model), ln1 if model.config.shared_norm else ln2
    qkv = [(getattr(attn, f"W_{n}"), getattr(attn, f"b_{n}")) for n in "QKV"]
    spec = "ld,ldhe->lhe"
    folded = {f"attn.{k}_{n}": v for n, (W, b) in zip("QKV", qkv) for k, v in zip("Wb", _fold(ln1, W, b, spec))}
    if ln2 is not None:
        if ln2.bias is not None and _get(model.blocks, "experts.W_shared_gate") is not None:
            raise ValueError("fold_norms does not apply: the gate of the shared MLP has no bias for that of the norm")
        for W_path, axes in _reads(model).items():
            b_path, layers = _bias_of(W_path), _layers(model.config, W_path)
            read = jax.tree.map(lambda a, layers=layers: a[jnp.asarray(layers, jnp.int32)], ln2)
            W, b = _fold(
                read, _get(model.blocks, W_path), _get(model.blocks, b_path), f"ld,{axes}->{axes.replace('d', '')}"
            )
            folded |= {W_path: W, b_path: b}
        for part in _MLPS:  # an MLP has all of its biases, or none
            W_out, b_out = _get(model.blocks, f"{part}.W_out"), _get(model.blocks, f"{part}.b_out")
            if W_out is not None and b_out is None and folded[f"{part}.b_in"] is not None:
                folded[f"{part}.b_out"] = jnp.zeros_like(W_out[..., 0, :])
    norms = {"ln1": _plain(ln1)} | ({} if model.blocks.ln2 is None else {"ln2": _plain(model.blocks.ln2)})
    new: dict[str, Any] = {f"blocks.{path}": value for path, value in (folded | norms).items()}
    if model.ln_final is not None:
        W_U, b_U = _fold(model.ln_final, jnp.swapaxes(model.unembedding, 0, 1), model.b_U, "d,dv->v")
        new |= {"W_U": jnp.swapaxes(W_U, 0, 1), "b_U": b_U, "ln_final": _plain(model.ln_final)}
    return _described(_replace(model, new))


def centre_writes(model: Transformer) -> Transformer:
    """Give all weights and biases that write to the residual stream mean zero over its dimensions.

    Every LayerNorm subtracts that mean in any case; RMSNorm does not, nor does a model without norms. The
    unembedding is untied.

    Args:
        model: a model whose stream is read through LayerNorms only.

    Returns:
        The rewritten model.

    Raises:
        ValueError: for a model with RMSNorm or without norms, and with norms at other places than before what reads.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> bool(abs(mj.processing.centre_writes(model).W_E.mean(axis=1)).max() < 1e-6)
    True
    """
    _check(model, "centre_writes")
    if model.config.norm != "layer":
        raise ValueError(
            f"centre_writes needs LayerNorm, which ignores the stream's mean; this model has norm={model.config.norm!r}"
        )
    if not _reads_centred(model.config):
        raise ValueError("centre_writes needs norms before attention, MLP and unembedding, and no others")
    model = _untied(model)
    writes = ["W_E", "W_pos", *_LAYERS_WRITE]
    weights = {path: _get(model, path) for path in writes}
    return _replace(
        model, {path: x - jnp.mean(x, axis=-1, keepdims=True) for path, x in weights.items() if x is not None}
    )


def centre_unembedding(model: Transformer) -> Transformer:
    """Subtract from the unembedding its mean over the vocabulary.

    All logits of a position shift by the same number, which softmax ignores. The unembedding is untied.

    Args:
        model: a transformer without `logits_cap`.

    Returns:
        The rewritten model.

    Raises:
        ValueError: for a model with `logits_cap`, which changes differences between logits when all shift.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> bool(abs(mj.processing.centre_unembedding(model).W_U.mean(axis=0)).max() < 1e-6)
    True
    """
    _check(model, "centre_unembedding")
    if model.config.logits_cap:
        raise ValueError(f"centre_unembedding does not apply to capped logits (logits_cap={model.config.logits_cap})")
    model = _untied(model)
    W_U, b_U = model.unembedding, model.b_U
    centred = {"W_U": W_U - jnp.mean(W_U, axis=0, keepdims=True)}
    return _replace(model, centred | ({} if b_U is None else {"b_U": b_U - jnp.mean(b_U)}))


def fold_value_biases(model: Transformer) -> Transformer:
    """Move the biases of the values into the bias of attention's output, since a pattern's row sums to one.

    Args:
        model: a model whose values have biases.

    Returns:
        The rewritten model, with `b_V` of zeros.

    Raises:
        ValueError: for a model without biases of values, and with attention sinks, with which rows sum to less.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> bool(mj.processing.fold_value_biases(model).blocks.attn.b_V.any())
    False
    """
    _check(model, "fold_value_biases")
    attn, config = model.blocks.attn, model.config
    if attn.b_V is None:
        raise ValueError("fold_value_biases does not apply: the values have no biases")
    if config.sinks:
        raise ValueError(
            "fold_value_biases does not apply: with attention sinks, a pattern's row sums to less than one"
        )
    by_head = jnp.repeat(attn.b_V, config.n_heads // config.n_kv_heads, axis=1)
    shift = einsum("lhe,lhed->ld", by_head, attn.W_O).astype(attn.b_V.dtype)
    b_O = shift if attn.b_O is None else attn.b_O + shift
    return _described(_replace(model, {"blocks.attn.b_V": jnp.zeros_like(attn.b_V), "blocks.attn.b_O": b_O}))


def simplify(model: Transformer) -> Transformer:
    """Apply `fold_norms`, `centre_writes`, `fold_value_biases` and `centre_unembedding`, those that apply to the model.

    Args:
        model: any transformer.

    Returns:
        The rewritten model, with a config that describes it.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.processing.simplify(model).config.tied_unembed
    False
    """
    _check(model, "simplify")
    if model.blocks.ln1 is not None:
        model = fold_norms(model)
    if model.config.norm == "layer" and _reads_centred(model.config):
        model = centre_writes(model)
    if model.blocks.attn.b_V is not None and not model.config.sinks:
        model = fold_value_biases(model)
    return model if model.config.logits_cap else centre_unembedding(model)


def rotate_qk(model: Transformer, rotation: ArrayLike) -> Transformer:
    """Rotate queries and keys together: all query heads of a group with their key head.

    Rotary positions rotate the same space, and the two rotations do not commute: this does not apply there.

    Args:
        model: a model without rotary positions, and without norms of queries and keys.
        rotation: `[layer, kv_head, d_head, d_head]`, orthogonal matrices; a permutation may be integers or booleans.

    Returns:
        The rewritten model; inside a trace, NaN where the matrices are not orthogonal.

    Raises:
        TypeError: for matrices that are not real numbers.
        ValueError: for a model with rotary positions or norms of queries and keys, and for matrices of another shape or that are not orthogonal.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> flip = jnp.broadcast_to(jnp.eye(4)[::-1], (1, 2, 4, 4))
    >>> rotated = mj.processing.rotate_qk(model, flip)
    >>> bool((rotated.blocks.attn.W_Q == model.blocks.attn.W_Q[..., ::-1]).all())
    True
    """
    _check(model, "rotate_qk")
    if model.config.rotates:
        raise ValueError("rotate_qk does not apply to rotary positions, which turn queries and keys themselves")
    if model.config.qk_norm != "none":
        raise ValueError("rotate_qk does not apply to norms of queries and keys, which have weights for each dimension")
    rotation = _head_rotation(model, rotation)
    attn, group = model.blocks.attn, model.config.n_heads // model.config.n_kv_heads
    for_q = jnp.repeat(rotation, group, axis=1)
    weights = {
        "W_Q": (attn.W_Q, for_q),
        "b_Q": (attn.b_Q, for_q),
        "W_K": (attn.W_K, rotation),
        "b_K": (attn.b_K, rotation),
    }
    return _replace(model, {f"blocks.attn.{n}": _turn(x, r) for n, (x, r) in weights.items() if x is not None})


def rotate_ov(model: Transformer, rotation: ArrayLike) -> Transformer:
    """Rotate values together with the output matrices that read them.

    Args:
        model: any transformer.
        rotation: `[layer, kv_head, d_head, d_head]`, orthogonal matrices; a permutation may be integers or booleans.

    Returns:
        The rewritten model; inside a trace, NaN where the matrices are not orthogonal.

    Raises:
        TypeError: for matrices that are not real numbers.
        ValueError: for matrices of another shape, or that are not orthogonal.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> flip = jnp.broadcast_to(jnp.eye(4)[::-1], (1, 2, 4, 4))
    >>> rotated = mj.processing.rotate_ov(model, flip)
    >>> bool((rotated.blocks.attn.W_V == model.blocks.attn.W_V[..., ::-1]).all())
    True
    """
    _check(model, "rotate_ov")
    rotation = _head_rotation(model, rotation)
    attn, group = model.blocks.attn, model.config.n_heads // model.config.n_kv_heads
    W_O = einsum("lhed,lhef->lhfd", attn.W_O, jnp.repeat(rotation, group, axis=1)).astype(attn.W_O.dtype)
    values = {"W_V": attn.W_V, "b_V": attn.b_V}
    return _replace(
        model,
        {f"blocks.attn.{n}": _turn(x, rotation) for n, x in values.items() if x is not None} | {"blocks.attn.W_O": W_O},
    )


def rotate_stream(model: Transformer, rotation: ArrayLike) -> Transformer:
    """Rotate the residual stream of a model without norms: all matrices that write to it and that read it.

    Args:
        model: a model without norms.
        rotation: `[d_model, d_model]`, an orthogonal matrix; a permutation may be integers or booleans.

    Returns:
        The rewritten model; inside a trace, NaN where the matrix is not orthogonal.

    Raises:
        TypeError: for a matrix that is not of real numbers.
        ValueError: for a model with norms, which fix a basis of the stream, and for a matrix of another shape or that
            is not orthogonal.

    >>> import jax, mijax as mj
    >>> config = mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16, norm="none")
    >>> model = mj.init(config, jax.random.key(0))
    >>> rotated = mj.processing.rotate_stream(model, jnp.eye(8)[::-1])
    >>> bool((rotated.W_E == model.W_E[:, ::-1]).all())
    True
    """
    _check(model, "rotate_stream")
    if model.config.norm != "none":
        raise ValueError(
            f"rotate_stream needs a model without norms, which have a basis of their own; this one has norm={model.config.norm!r}"
        )
    rotation = orthogonal(rotation, (model.config.d_model,) * 2, model.dtype, model.W_E.dtype)
    writes = ["W_E", "W_pos", "W_U", *_LAYERS_WRITE]
    rotated = {path: _dot("...d,de->...e", _get(model, path), rotation) for path in writes}
    reads = {f"blocks.attn.W_{name}": "ldhk" for name in "QKV"}
    reads |= {f"blocks.{path}": axes for path, axes in _reads(model).items()}
    rotated |= {
        path: _dot(f"{axes},de->{axes.replace('d', 'e')}", _get(model, path), rotation) for path, axes in reads.items()
    }
    return _replace(model, {path: x for path, x in rotated.items() if x is not None})


_MLPS = ("mlp", "experts", "experts.shared")
_LAYERS_WRITE = [
    *("blocks.attn.W_O", "blocks.attn.b_O"),
    *(f"blocks.{part}.{name}" for part in _MLPS for name in ("W_out", "b_out")),
]
"""The parameters that write to the stream; not all models have all."""


def _reads(model: Transformer) -> dict[str, str]:
    """The matrices of MLPs and experts that read the stream, by path in the blocks: their axes, of which `d` is the stream's."""
    reads = {"mlp.W_in": "ldm", "mlp.W_gate": "ldm", "experts.W_in": "lndm", "experts.W_gate": "lndm"}
    reads |= {"experts.W_router": "ldn", "experts.W_shared_gate": "ld"}
    reads |= {"experts.shared.W_in": "ldm", "experts.shared.W_gate": "ldm"}
    return {path: axes for path, axes in reads.items() if _get(model.blocks, path) is not None}


def _layers(config: Config, path: str) -> tuple[int, ...]:
    """The layers that have a parameter of `_reads`."""
    return config.mlp_layers if path.startswith("mlp.") else config.expert_layers


def _bias_of(path: str) -> str:
    head, _, name = path.rpartition("W_")
    return f"{head}b_{name}"


def _check(model: Any, function: str) -> None:
    """Refuse what is no transformer, or has other parameters than its config says: the products below would broadcast."""
    if not isinstance(model, Transformer):
        raise TypeError(f"{function} takes a Transformer, given {type(model).__name__}")
    model.check()


def _reads_centred(config: Config) -> bool:
    """Whether all that reads the stream does so through a norm, and only embeddings, attention and MLP write to it."""
    return config.norm_at == "input" and config.final_norm and not config.embed_norm


def _head_rotation(model: Transformer, rotation: ArrayLike) -> Array:
    """As `orthogonal`: a matrix for each key head of each layer."""
    c = model.config
    return orthogonal(rotation, (c.n_layers, c.n_kv_heads, c.d_head, c.d_head), model.dtype, model.W_E.dtype)


def _fold(norm: Norm, W: Array, b: Array | None, spec: str) -> tuple[Array, Array | None]:
    """A matrix that reads a norm, `[*layer, d_model, ...]`, and its bias, with the norm's weight and bias folded in.

    `spec` multiplies the norm's weight or bias with the matrix.
    """
    if norm.bias is not None:
        shift = einsum(spec, norm.bias, W).astype(W.dtype)
        b = shift if b is None else b + shift
    weights, axes = (part.split("->")[0] for part in spec.split(","))  # of the norm, and of the matrix
    shape = [n if axis in weights else 1 for axis, n in zip(axes, W.shape)]
    return W * norm.weight.reshape(shape), b


def _plain(norm: Norm) -> Norm:
    return Norm(jnp.ones_like(norm.weight), None if norm.bias is None else jnp.zeros_like(norm.bias))


def _turn(x: Array, rotation: Array) -> Array:
    return _dot("lhe,lhef->lhf" if x.ndim == 3 else "ldhe,lhef->ldhf", x, rotation)


def _dot(spec: str, x: Array | None, rotation: Array) -> Any:
    return None if x is None else einsum(spec, x, rotation).astype(x.dtype)


def _untied(model: Transformer) -> Transformer:
    return model if model.W_U is not None else _described(_replace(model, {"W_U": model.W_E}))


def _described(model: Transformer) -> Transformer:
    """The model with a config that says which parameters it has."""
    attn, mlps = model.blocks.attn, [mlp for mlp in (model.blocks.mlp, model.blocks.experts) if mlp is not None]
    config = dataclasses.replace(
        model.config,
        tied_unembed=model.W_U is None,
        unembed_bias=model.b_U is not None,
        attn_bias="".join(letter for letter in "qkvo" if getattr(attn, f"b_{letter.upper()}") is not None),
        mlp_bias=any(mlp.b_in is not None for mlp in mlps),
        experts=model.config.experts
        and dataclasses.replace(model.config.experts, router_bias=_get(model.blocks, "experts.b_router") is not None),
    )
    return dataclasses.replace(model, config=config)


def _get(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = getattr(tree, part, None)
    return tree


def _replace(tree: Any, new: dict[str, Any]) -> Any:
    """The tree with new values at some paths; those of `None` are left out."""
    new = {path: value for path, value in new.items() if value is not None}
    return eqx.tree_at(lambda t: [_get(t, path) for path in new], tree, list(new.values()), is_leaf=lambda x: x is None)
