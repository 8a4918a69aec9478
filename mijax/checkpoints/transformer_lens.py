"""Models as TransformerLens's `HookedTransformer` has them: its `state_dict()` and its config."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mijax._types import ArrayLike
from mijax.checkpoints.build import build
from mijax.checkpoints.contents import Stored, Tensors
from mijax.checkpoints.keys import ACTIVATIONS, Harmless, Key
from mijax.checkpoints.keys import only as harmless_only
from mijax.checkpoints.table import Buffer, Family, Weight
from mijax.checkpoints.tensors import get, named_parts, stored
from mijax.model.config import Config
from mijax.model.norm import Norm
from mijax.model.parameters import parameter_dtype
from mijax.model.rotary import Rotary, frequencies
from mijax.model.transformer import Transformer, check_parameters
from mijax.rules import COUNT, FLAG, NULL, POSITIVE, array, either, only, shown

_KEYS = {
    **{name: Key((name,)) for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_vocab")},
    "d_mlp": Key(("d_mlp",), None),
    "act_fn": Key(("activation",), None, ACTIVATIONS),
    "eps": Key(("norm_eps",), 1e-5),
    "parallel_attn_mlp": Key(("parallel",), False),
    "n_key_value_heads": Key(("n_kv_heads",), None),
    "attention_dir": Key(("causal",), True, {"causal": True, "bidirectional": False}),
}
_NORMS = {None: "none", "LN": "layer", "LNPre": "layer", "RMS": "rms", "RMSPre": "rms"}  # "Pre": without parameters
_CAP = either(only(-1, -1.0), POSITIVE)  # -1: none
_READ = {
    "d_vocab_out": either(only(-1), COUNT),
    "normalization_type": only(*_NORMS),
    "positional_embedding_type": only("standard", "rotary", "alibi"),
    "rotary_dim": either(COUNT, NULL),
    "rotary_base": POSITIVE,
    "attn_scale": either(only(-1, -1.0), POSITIVE),
    "window_size": either(COUNT, NULL),
    "attn_types": either(array(only("local", "global")), NULL),
    "attn_scores_soft_cap": _CAP,
    "output_logits_soft_cap": _CAP,
    **dict.fromkeys(
        ("attn_only", "gated_mlp", "use_attn_scale", "use_local_attn", "use_qk_norm", "post_embedding_ln", "final_rms",
         "use_normalization_before_and_after"), FLAG,
    ),
}  # fmt: skip
_ANY_VALUE = """
    model_name use_attn_result use_split_qkv_input use_hook_mlp_in use_attn_in ungroup_grouped_query_attention original_architecture
    from_checkpoint checkpoint_index checkpoint_label_type checkpoint_value tokenizer_name init_mode device n_devices seed
    initializer_range init_weights n_params use_hook_tokens default_prepend_bos dtype tokenizer_prepends_bos trust_remote_code
    decoder_start_token_id tie_word_embeddings relative_attention_max_distance relative_attention_num_buckets experts_per_token
    NTK_by_parts_low_freq_factor NTK_by_parts_high_freq_factor NTK_by_parts_factor NTK_original_ctx_len
""".split()  # noqa: SIM905  (a state dict has W_U, tied or not)
_OFF = ("scale_attn_by_inverse_layer_idx", "rotary_adjacent_pairs", "load_in_4bit", "use_NTK_by_parts_rope")
_HARMLESS: Mapping[str, Harmless] = {
    **dict.fromkeys(_ANY_VALUE, lambda value, c: True),
    **dict.fromkeys(_OFF, harmless_only(False)),
    **dict.fromkeys(("num_experts", "rotary_base_local"), harmless_only(None)),
}
_ALL_BIASES = {"attn_bias": "qkvo", "mlp_bias": True, "unembed_bias": True, "tied_unembed": False}


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    kind, flag = c.get("normalization_type", "LN"), lambda key: c.get(key, False)
    rms, both, after_embed = _NORMS[kind] == "rms", flag("use_normalization_before_and_after"), "post_embedding_ln"
    if (flag("final_rms") or both) and not rms:
        raise ValueError(
            "final_rms and use_normalization_before_and_after need a normalization_type of 'RMS' or 'RMSPre'"
        )
    if flag(after_embed) and kind != "LN":
        raise ValueError(f"{after_embed}=True needs normalization_type='LN'")
    cap = lambda key: max(0.0, c.get(key, -1.0))
    scale = c.get("attn_scale", -1.0)
    scale = 1.0 if not c.get("use_attn_scale", True) else fields["d_head"] ** 0.5 if scale == -1.0 else scale
    d_vocab_out = c.get("d_vocab_out", -1)
    return {
        "norm": _NORMS[kind], "norm_bias": kind == "LN", "norm_at": "both" if both else "input", "embed_norm": flag(after_embed),
        "positions": _positions(c, fields), "window": _window(c, fields), "qk_norm": "head" if flag("use_qk_norm") else "none",
        "mlp": "none" if flag("attn_only") else "gated" if flag("gated_mlp") else "dense", "attn_scale": 1 / scale,
        "scores_cap": cap("attn_scores_soft_cap"), "logits_cap": cap("output_logits_soft_cap"),
        "d_vocab_out": 0 if d_vocab_out == -1 else d_vocab_out,
    }  # fmt: skip


def _positions(c: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    kind, n = c.get("positional_embedding_type", "standard"), fields["n_heads"]
    if kind == "rotary":
        return Rotary(float(c.get("rotary_base", 10_000)), c.get("rotary_dim") or fields["d_head"])
    if kind == "alibi" and n & (n - 1):
        raise ValueError(f"positional_embedding_type='alibi' with n_heads={n}: slopes differ where it is no power of 2")
    return {"standard": "learned", "alibi": "alibi"}[kind]


def _window(c: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    if not c.get("use_local_attn", False):
        return 0
    kinds, window = c.get("attn_types"), c.get("window_size")
    if kinds is None or len(kinds) != fields["n_layers"]:
        raise ValueError(f"attn_types={shown(kinds)} must be 'local' or 'global' for each layer")
    return tuple(window if kind == "local" else 0 for kind in kinds)


def _write(config: Config) -> dict[str, Any] | None:
    kinds = {"learned": "standard", "alibi": "alibi"}
    rotary = config.positions if isinstance(config.positions, Rotary) else None
    kind = "rotary" if rotary else kinds.get(config.positions if isinstance(config.positions, str) else "")
    windows = config.windows
    if kind is None or (rotary and rotary.scaling) or len(set(windows) - {0}) > 1:
        return None
    entries: dict[str, Any] = {
        "normalization_type": {"none": None, "layer": "LN", "rms": "RMS"}[config.norm], "final_rms": config.norm == "rms",
        "use_normalization_before_and_after": config.norm_at == "both", "post_embedding_ln": config.embed_norm,
        "attn_only": config.mlp == "none", "gated_mlp": config.mlp == "gated", "positional_embedding_type": kind,
        "attn_scale": 1 / config.attn_scale, "use_attn_scale": True, "use_qk_norm": config.qk_norm == "head",
        "attn_scores_soft_cap": config.scores_cap or -1.0, "output_logits_soft_cap": config.logits_cap or -1.0,
        "d_vocab_out": config.d_vocab_out, "use_local_attn": bool(windows), "init_weights": False,
        "attention_dir": "causal" if config.causal else "bidirectional", "model_name": config.name or "custom",
    }  # fmt: skip
    if config.n_kv_heads == config.n_heads:
        entries["n_key_value_heads"] = None
    if config.mlp == "none":
        entries |= {"act_fn": None, "d_mlp": None}
    if rotary:
        entries |= {"rotary_dim": rotary.dim, "rotary_base": int(rotary.base) if rotary.base % 1 == 0 else rotary.base}
    if windows:
        entries |= {"window_size": max(windows), "attn_types": ["local" if window else "global" for window in windows]}
    return entries


def _weights(config: Config) -> list[Weight]:
    h = "blocks.{layer}."
    norms = [("ln_embed", "embed.ln"), ("ln_final", "ln_final")]
    norms += [(f"blocks.{name}", h + name) for name in ("ln1", "ln1_post", "ln2", "ln2_post")]
    table = [
        Weight(("W_E",), "embed.W_E", "vocab d -> vocab d"),
        Weight(("W_pos",), "pos_embed.W_pos", "pos d -> pos d"),
        *(Weight((f"{ours}.{p}",), f"{theirs}.{p[0]}", "d -> d") for ours, theirs in norms for p in ("weight", "bias")),
        Weight(("blocks.attn.W_O",), h + "attn.W_O", "head e d -> head e d"),
        Weight(("blocks.attn.b_O",), h + "attn.b_O", "d -> d"),
        Weight(("W_U",), "unembed.W_U", "d vocab -> vocab d"),
        Weight(("b_U",), "unembed.b_U", "vocab -> vocab"),
    ]
    for name, head in (("Q", "head"), ("K", "kv_head"), ("V", "kv_head")):
        mark = "_" if head == "kv_head" and config.n_kv_heads != config.n_heads else ""
        table.append(Weight((f"blocks.attn.W_{name}",), f"{h}attn.{mark}W_{name}", f"{head} d e -> d {head} e"))
        table.append(Weight((f"blocks.attn.b_{name}",), f"{h}attn.{mark}b_{name}", f"{head} e -> {head} e"))
    table += [Weight((f"blocks.attn.{x}_norm",), f"{h}attn.{x}_norm.w", "e -> 1 e") for x in "qk"]
    mlp = [(f"{kind}_{name}", axes) for name in ("in", "out", "gate") for kind, axes in (("W", "i o"), ("b", "o"))]
    return table + [Weight((f"blocks.mlp.{name}",), f"{h}mlp.{name}", f"{axes} -> {axes}") for name, axes in mlp]


def _turns(config: Config, function: Callable) -> np.ndarray:
    """The sines or cosines of all rotary angles, as TransformerLens keeps them."""
    rotary = config.rotaries[0]
    assert rotary is not None
    angles = np.arange(config.n_ctx)[:, None] * np.tile(frequencies(rotary), 2)[None]
    return function(angles).astype(np.float32)


_BUFFERS: dict[str, tuple[Callable[[Config], np.ndarray], float]] = {
    "rotary_sin": (lambda config: _turns(config, np.sin), 1e-2),  # float32 and below, of large angles
    "rotary_cos": (lambda config: _turns(config, np.cos), 1e-2),
}
_LAYER = "blocks.{layer}.attn."


def _repeats(name: str) -> Callable[[Config, np.ndarray], bool]:
    make, tolerance = _BUFFERS[name]

    def repeats(config: Config, x: np.ndarray) -> bool:
        rotary = config.rotaries[0] if config.rotates and config.n_layers else None
        return (
            rotary is not None
            and x.shape == (config.n_ctx, rotary.dim)
            and np.allclose(x, make(config), atol=tolerance)
        )

    return repeats


def _mask(config: Config, window: int) -> np.ndarray:
    mask = np.tril(np.ones((config.n_ctx, config.n_ctx), bool))  # of bidirectional models too
    return np.triu(mask, 1 - window) if window else mask


def _is_mask(config: Config, x: np.ndarray) -> bool:
    n = config.n_ctx
    return x.shape == (n, n) and any(np.array_equal(x, _mask(config, window)) for window in {0, *config.windows})


FAMILY = Family(
    "hooked_transformer",
    _weights,
    keys=_KEYS,
    fixed=_ALL_BIASES,
    further=_READ,
    read=_read,
    write=_write,
    harmless=_HARMLESS,
    buffers=(
        Buffer(f"{_LAYER}mask", _is_mask, "the mask that the config gives"),
        Buffer(f"{_LAYER}IGNORE", lambda config, x: x.ndim == 0, "a number"),
        *(Buffer(f"{_LAYER}{name}", _repeats(name), "that of the rotary positions") for name in _BUFFERS),
    ),
)


def from_transformer_lens(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, dtype: Any = jnp.float32
) -> Transformer:
    """A model from the parameters and the config of a TransformerLens `HookedTransformer`.

    In a process with PyTorch, `state` is `model.state_dict()` and `config` is `model.cfg.to_dict()`. Files with pickled
    tensors are not read; there, `numpy.savez("model.npz", **{k: v.numpy() for k, v in state.items()})` writes what
    `numpy.load("model.npz")` reads here.

    Args:
        state: the parameters by TransformerLens's names: arrays, or tensors of PyTorch on the CPU. Norms whose weights
            are folded into others (`"LNPre"`, `"RMSPre"`) get weights of one. `b_in` of gated MLPs, which TransformerLens
            adds to `post`, goes through `W_out` into `b_out`.
        config: the fields of its `HookedTransformerConfig`, `model_name` among them or not.
        dtype: of the parameters: float64, float32, float16 or bfloat16.

    Returns:
        The model, with untied unembedding and all biases, as TransformerLens has them.

    Raises:
        TypeError: for arguments of other types.
        ValueError: for a config that mijax cannot express, by the names of its fields, and parameters that are missing,
            unexpected, of the wrong shape or not finite.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> again = mj.from_transformer_lens(*mj.to_transformer_lens(model))
    >>> bool((mj.run(again, [[1, 2]]).logits == mj.run(model, [[1, 2]]).logits).all())
    True
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping (cfg.to_dict()), given {type(config).__name__}")
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping from names to arrays, given {type(state).__name__}")
    if not all(isinstance(name, str) for name in state):
        raise TypeError("the names of state must be texts")
    dtype, source = parameter_dtype(dtype), "the state dict"
    try:
        ours = FAMILY.config(config)
    except KeyError as error:
        raise ValueError(f"the TransformerLens config lacks {error}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"the TransformerLens config has a value of another kind: {error}") from error
    ours = dataclasses.replace(ours, name=str(config.get("model_name", "")))
    arrays = {_renamed(name, ours): _array(name, x) for name, x in state.items()}
    shapes = {name: shape for name, shape in _supplied(ours, config).items() if name not in arrays}
    arrays |= {name: np.broadcast_to(np.float32(name.endswith(".w")), shape) for name, shape in shapes.items()}
    kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
    if ours.positions == "alibi":  # TransformerLens has the parameter, and does not read it
        arrays.pop("pos_embed.W_pos", None)
    if ours.mlp == "gated":
        arrays = _with_late_biases(arrays, ours)
    stored = {name: Stored(kinds.get(x.dtype.name, x.dtype.name), x.shape) for name, x in arrays.items()}
    return build(ours, FAMILY, Tensors(stored, arrays.__getitem__), dtype, source)


def _with_late_biases(arrays: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The arrays with `b_in` of gated MLPs in `b_out`: TransformerLens adds it after the product with the gate."""
    arrays = dict(arrays)
    for name in [f"blocks.{layer}.mlp." for layer in range(config.n_layers)]:
        b_in, W_out, b_out = (arrays.get(f"{name}{part}") for part in ("b_in", "W_out", "b_out"))
        sizes = [x is not None and x.shape for x in (b_in, W_out, b_out)]
        if sizes == [(config.d_mlp,), (config.d_mlp, config.d_model), (config.d_model,)]:  # `build` names all others
            assert b_in is not None and W_out is not None and b_out is not None
            exact = [x.astype(np.float64) for x in (b_out, b_in, W_out)]
            arrays |= {f"{name}b_in": np.zeros_like(b_in), f"{name}b_out": exact[0] + exact[1] @ exact[2]}
    return arrays


def _array(name: str, x: Any) -> np.ndarray:
    try:
        return np.asarray(x.detach() if hasattr(x, "detach") else x)
    except TypeError as error:
        raise TypeError(f"{name} is no array of a dtype that NumPy has: {error}") from error


def _renamed(name: str, config: Config) -> str:
    """TransformerLens marks keys and values by `_` where the config counts their heads, even if they are as many."""
    return name.replace("attn._", "attn.") if config.n_kv_heads == config.n_heads else name


def _supplied(config: Config, c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters of mijax that TransformerLens lacks, by their names there, with shapes."""
    layers, supplied = range(config.n_layers), {}
    if config.mlp == "gated":
        supplied |= {f"blocks.{i}.mlp.b_gate": (config.d_mlp,) for i in layers}
    if str(c.get("normalization_type", "")).endswith("Pre"):
        names = [f"blocks.{i}.{norm}.w" for i in layers for norm in ("ln1", "ln2")[: 1 + (config.mlp != "none")]]
        supplied |= dict.fromkeys([*names, "ln_final.w"], (config.d_model,))
    return supplied


def to_transformer_lens(model: Transformer) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parameters and the config of the TransformerLens `HookedTransformer` that computes what a model computes.

    There, `HookedTransformer(HookedTransformerConfig.from_dict(config))` takes them by `load_state_dict(state)`, as
    tensors of PyTorch. Biases that the model lacks are zeros, the unembedding is untied.

    Args:
        model: the model.

    Returns:
        Arrays by TransformerLens's names (`numpy.savez` writes them), and entries for a JSON file.

    Raises:
        TypeError: for what is no transformer.
        ValueError: for a model that TransformerLens cannot express, and parameters that do not fit the config.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> state, config = mj.to_transformer_lens(model)
    >>> state["blocks.0.attn.W_Q"].shape, config["normalization_type"]
    ((2, 8, 4), 'LN')
    """
    if type(model) is not Transformer:
        raise TypeError(f"to_transformer_lens takes a mijax.Transformer, given {type(model).__name__}")
    check_parameters(model)
    model = _with_all_biases(model)
    config = model.config
    entries = FAMILY.entries(config)
    try:
        again = None if entries is None else FAMILY.config(entries)
    except ValueError as error:
        raise ValueError(f"TransformerLens has no model like this: {error}") from error
    if again is not None and math.isclose(again.attn_scale, config.attn_scale):  # rounded, as a quotient
        again = dataclasses.replace(again, attn_scale=config.attn_scale)
    if entries is None or again != config:
        raise ValueError(f"TransformerLens has no model like this: {config.differences()}")
    state: dict[str, np.ndarray] = {}
    for weight in FAMILY.weights(config):
        array: Any = get(model, weight.ours[0])
        if array is None:
            continue
        for name, index in named_parts(weight, config):
            state[name] = np.ascontiguousarray(stored([np.asarray(array[index])], weight, config))
    late = ("mlp.b_gate", "mlp.b_in") if config.mlp == "gated" else ()
    used = [name for name in state if name.endswith(late) and np.any(state[name])]
    if used:
        raise ValueError(f"TransformerLens has no model like this: {', '.join(used)} must be zero beside a gate")
    state = {name: x for name, x in state.items() if not name.endswith("mlp.b_gate")}
    return state | _buffers(config), entries


def _with_all_biases(model: Transformer) -> Transformer:
    """The model with zeros for the biases that it lacks, an unembedding of its own, and the factor of `W_E` in it."""
    config = dataclasses.replace(model.config, **_ALL_BIASES, norm_bias=True, embed_scale=1.0)
    zeros = lambda x, like: jnp.zeros(like, model.W_E.dtype) if x is None else x
    c, attn, mlp = config, model.blocks.attn, model.blocks.mlp
    biases = {"b_Q": (c.n_layers, c.n_heads, c.d_head), "b_O": (c.n_layers, c.d_model)}
    biases |= dict.fromkeys(("b_K", "b_V"), (c.n_layers, c.n_kv_heads, c.d_head))
    attn = dataclasses.replace(attn, **{name: zeros(getattr(attn, name), shape) for name, shape in biases.items()})
    if mlp is not None and c.experts is None:
        widths = {"b_in": c.d_mlp, "b_out": c.d_model} | ({"b_gate": c.d_mlp} if c.mlp == "gated" else {})
        mlp = dataclasses.replace(
            mlp, **{name: zeros(getattr(mlp, name), (c.n_layers, n)) for name, n in widths.items()}
        )

    def norm(params: Norm | None) -> Norm | None:
        if params is None or c.norm != "layer":
            return params
        return Norm(params.weight, zeros(params.bias, params.weight.shape))

    blocks = dataclasses.replace(
        model.blocks,
        attn=attn,
        mlp=mlp,
        **{name: norm(getattr(model.blocks, name)) for name in ("ln1", "ln2", "ln1_post", "ln2_post")},
    )
    return dataclasses.replace(
        model,
        W_E=model.W_E * jnp.asarray(model.config.embed_scale, model.W_E.dtype),
        W_U=model.unembedding,
        b_U=zeros(model.b_U, (c.d_vocab_out,)),
        ln_embed=norm(model.ln_embed),
        ln_final=norm(model.ln_final),
        blocks=blocks,
        config=config,
    )


def _buffers(config: Config) -> dict[str, np.ndarray]:
    """What a state dict holds beside parameters."""
    empty = {"pos_embed.W_pos": np.zeros((config.n_ctx, config.d_model), np.float32)}
    buffers: dict[str, np.ndarray] = empty if config.positions == "alibi" else {}
    for layer, window in enumerate(config.windows or (0,) * config.n_layers):
        start = _LAYER.format(layer=layer)
        buffers[f"{start}mask"] = _mask(config, window)
        buffers[f"{start}IGNORE"] = np.float32(-np.inf)  # pyright: ignore[reportArgumentType]
        if config.rotates:
            buffers |= {f"{start}{name}": make(config) for name, (make, _) in _BUFFERS.items()}
    return buffers
