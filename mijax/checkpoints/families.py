"""Tables of architectures: the config entries and tensors of Hugging Face checkpoints, and their names in mijax."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mijax.checkpoints.keys import (
    ACTIVATIONS,
    HARMLESS,
    ROTARY_KEYS,
    Harmless,
    Key,
    architectures,
    check_keys,
    only,
    read_fields,
    read_rotary,
    same_as,
    write_fields,
    write_rotary,
)
from mijax.model.config import Config, RotaryScaling
from mijax.model.position import frequencies
from mijax.model.transformer import init


class Weight(NamedTuple):
    """The tensor of a checkpoint that holds a parameter, and how its axes are arranged there.

    Attributes:
        ours: dotted paths into `Transformer`; several where the checkpoint's tensor fuses several parameters.
        theirs: the tensor's name in the checkpoint, with `{layer}` for parameters of the blocks.
        axes: an einops pattern from the checkpoint's arrangement to mijax's; from right to left it gives the
            inverse. Where the tensor is fused, mijax's side begins with an axis over `ours`.
    """

    ours: tuple[str, ...]
    theirs: str
    axes: str


class Buffer(NamedTuple):
    """A tensor that checkpoints may hold beside parameters: dropped after a check that it repeats the config.

    Attributes:
        theirs: the tensor's name in the checkpoint, with `{layer}` where there is one per layer.
        redundant: whether a tensor repeats what a config says.
        meaning: what the tensor must be, for error messages.
    """

    theirs: str
    redundant: Callable[[Config, np.ndarray], bool]
    meaning: str


class Family(NamedTuple):
    """One architecture, a `model_type` of `config.json`: how its config is read and written, and where its weights are.

    Attributes:
        config: from the contents of a `config.json` to a `Config`.
        write: from a `Config` to the entries of a `config.json`, which are `None` where transformers would refuse
            them; or `None` where another family writes the same. Where `config` reads them back as another `Config`, the family cannot express the given one.
        keys: the keys that `config` reads.
        harmless: the other keys that `config` accepts, and at which values.
        prefix: the start of tensors' names, which checkpoints of the bare model leave out.
        weights: the table of parameters for a `Config`, which may list some that the config does not have.
        buffers: tensors that are checked and dropped.
        head: the tensor of the unembedding, which a checkpoint may hold although the config ties it to the
            embedding.
    """

    config: Callable[[Mapping[str, Any]], Config]
    write: Callable[[Config], dict[str, Any] | None] | None
    keys: frozenset[str]
    harmless: Mapping[str, Harmless]
    prefix: str
    weights: Callable[[Config], list[Weight]]
    buffers: tuple[Buffer, ...] = ()
    head: str | None = None


def _vector(ours: str, theirs: str) -> list[Weight]:
    """Weight and bias of a LayerNorm."""
    return [
        Weight((f"{ours}.weight",), f"{theirs}.weight", "d -> d"),
        Weight((f"{ours}.bias",), f"{theirs}.bias", "d -> d"),
    ]


_GPT2_KEYS = {
    "n_layer": Key(("n_layers",)),
    "n_embd": Key(("d_model",)),
    "n_head": Key(("n_heads",)),
    "vocab_size": Key(("d_vocab",)),
    "n_positions": Key(("n_ctx",)),
    "n_inner": Key(("d_mlp",), None),
    "layer_norm_epsilon": Key(("norm_eps",), 1e-5),
    "activation_function": Key(("activation",), "gelu_new", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), True),
}
_GPT2_HARMLESS = {
    **HARMLESS,
    "architectures": architectures("GPT2LMHeadModel", "GPT2Model"),
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "reorder_and_upcast_attn": only(False),
    # alternative names of keys, which transformers accepts
    "n_ctx": same_as("n_positions"),
    "max_position_embeddings": same_as("n_positions"),
    "hidden_size": same_as("n_embd"),
    "num_attention_heads": same_as("n_head"),
    "num_hidden_layers": same_as("n_layer"),
}


def _gpt2_config(c: Mapping[str, Any]) -> Config:
    check_keys(c, "gpt2", frozenset(_GPT2_KEYS), _GPT2_HARMLESS)
    return Config(positions="learned", norm="layer", **read_fields(c, _GPT2_KEYS))


def _gpt2_write(c: Config) -> dict[str, Any]:
    return {"architectures": ["GPT2LMHeadModel"], **write_fields(c, _GPT2_KEYS)}


def _gpt2_weights(config: Config) -> list[Weight]:
    h = "transformer.h.{layer}."
    qkv = ("blocks.attn.{}_Q", "blocks.attn.{}_K", "blocks.attn.{}_V")
    return [
        Weight(("W_E",), "transformer.wte.weight", "vocab d -> vocab d"),
        Weight(("W_pos",), "transformer.wpe.weight", "ctx d -> ctx d"),
        *_vector("blocks.ln1", h + "ln_1"),
        Weight(tuple(n.format("W") for n in qkv), h + "attn.c_attn.weight", "d (three head e) -> three d head e"),
        Weight(tuple(n.format("b") for n in qkv), h + "attn.c_attn.bias", "(three head e) -> three head e"),
        Weight(("blocks.attn.W_O",), h + "attn.c_proj.weight", "(head e) d -> head e d"),
        Weight(("blocks.attn.b_O",), h + "attn.c_proj.bias", "d -> d"),
        *_vector("blocks.ln2", h + "ln_2"),
        Weight(("blocks.mlp.W_in",), h + "mlp.c_fc.weight", "d m -> d m"),
        Weight(("blocks.mlp.b_in",), h + "mlp.c_fc.bias", "m -> m"),
        Weight(("blocks.mlp.W_out",), h + "mlp.c_proj.weight", "m d -> m d"),
        Weight(("blocks.mlp.b_out",), h + "mlp.c_proj.bias", "d -> d"),
        *_vector("ln_final", "transformer.ln_f"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


_MISTRAL_KEYS = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "intermediate_size": Key(("d_mlp",)),
    "num_attention_heads": Key(("n_heads",)),
    "num_key_value_heads": Key(("n_kv_heads",)),
    "head_dim": Key(("d_head",), None),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "rms_norm_eps": Key(("norm_eps",), 1e-6),
    "hidden_act": Key(("activation",), "silu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), False),
}
_LLAMA_KEYS = _MISTRAL_KEYS | {
    "num_key_value_heads": Key(("n_kv_heads",), None),
    "attention_bias": Key(("qkv_bias", "attn_out_bias"), False),
    "mlp_bias": Key(("mlp_bias",), False),
}
_LLAMA_HARMLESS = {
    **HARMLESS,
    "architectures": architectures(
        "LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM", "MistralForCausalLM", "MistralModel"
    ),
    "pretraining_tp": only(1, None),
    "rope_interleaved": only(False),
    "sliding_window": only(None),
}
_MISTRAL_HARMLESS = _LLAMA_HARMLESS | {
    "attention_bias": only(False),
    "mlp_bias": only(False),
    # a sliding window at least as long as the context has no effect
    "sliding_window": lambda value, c: value is None or (type(value) is int and value >= c["max_position_embeddings"]),
}


def _llama_config(c: Mapping[str, Any]) -> Config:
    check_keys(c, "llama", frozenset(_LLAMA_KEYS) | ROTARY_KEYS, _LLAMA_HARMLESS)
    return _rotary_rms_gated(c, read_fields(c, _LLAMA_KEYS))


def _mistral_config(c: Mapping[str, Any]) -> Config:
    c = {"sliding_window": 4096, **c}  # transformers' default
    check_keys(c, "mistral", frozenset(_MISTRAL_KEYS) | ROTARY_KEYS, _MISTRAL_HARMLESS)
    return _rotary_rms_gated(c, read_fields(c, _MISTRAL_KEYS) | dict.fromkeys(_BIASES, False))


_BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias")


def _rotary_rms_gated(c: Mapping[str, Any], fields: dict[str, Any]) -> Config:
    """A `Config` of Llama's structure: rotary positions, RMSNorm and gated MLPs."""
    return Config(positions="rotary", norm="rms", mlp="gated", **fields, **read_rotary(c))


def _llama_write(c: Config) -> dict[str, Any] | None:
    if c.d_model % c.n_heads:  # transformers refuses such a file, also where it gives head_dim
        return None
    return {"architectures": ["LlamaForCausalLM"], **write_fields(c, _LLAMA_KEYS), **write_rotary(c)}


def _llama_weights(config: Config) -> list[Weight]:
    h = "model.layers.{layer}."
    attn, mlp = h + "self_attn.", h + "mlp."
    weights = [
        Weight(("W_E",), "model.embed_tokens.weight", "vocab d -> vocab d"),
        Weight(("blocks.ln1.weight",), h + "input_layernorm.weight", "d -> d"),
        Weight(("blocks.attn.W_O",), attn + "o_proj.weight", "d (head e) -> head e d"),
        Weight(("blocks.attn.b_O",), attn + "o_proj.bias", "d -> d"),
        Weight(("blocks.ln2.weight",), h + "post_attention_layernorm.weight", "d -> d"),
        Weight(("ln_final.weight",), "model.norm.weight", "d -> d"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]
    for ours, theirs, count in (("Q", "q_proj", "head"), ("K", "k_proj", "kv_head"), ("V", "v_proj", "kv_head")):
        weights += [
            Weight((f"blocks.attn.W_{ours}",), f"{attn}{theirs}.weight", f"({count} e) d -> d {count} e"),
            Weight((f"blocks.attn.b_{ours}",), f"{attn}{theirs}.bias", f"({count} e) -> {count} e"),
        ]
    for ours, theirs in (("in", "up_proj"), ("gate", "gate_proj"), ("out", "down_proj")):
        weights += [
            Weight((f"blocks.mlp.W_{ours}",), f"{mlp}{theirs}.weight", "o i -> i o"),
            Weight((f"blocks.mlp.b_{ours}",), f"{mlp}{theirs}.bias", "o -> o"),
        ]
    return weights


def _own_config(c: Mapping[str, Any]) -> Config:
    check_keys(c, "mijax", _OWN_KEYS, _OWN_HARMLESS)
    scaling = c.get("rotary_scaling")
    fields: dict[str, Any] = {key: value for key, value in c.items() if key in _OWN_KEYS}
    fields["rotary_scaling"] = RotaryScaling(**scaling) if isinstance(scaling, Mapping) else scaling
    return Config(**fields)


_OWN_KEYS = frozenset(field.name for field in dataclasses.fields(Config))
_OWN_HARMLESS = {key: HARMLESS[key] for key in ("model_type", "dtype")}


def _own_weights(config: Config) -> list[Weight]:
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    paths = [jax.tree_util.keystr(place).lstrip(".") for place, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return [Weight((path,), path, "... -> ...") for path in paths]


def _is_causal_mask(config: Config, x: np.ndarray) -> bool:
    """Whether it is a lower triangle of ones over the whole context, as in every layer of GPT-2's checkpoints."""
    return x.shape == (1, 1, config.n_ctx, config.n_ctx) and np.array_equal(x[0, 0], np.tri(config.n_ctx))


def _is_masking_score(_: Config, x: np.ndarray) -> bool:
    """Whether it is the score of masked keys, far below any other: -10000, which bfloat16 rounds to -9984."""
    return x.shape == () and float(x) <= -9_000


def _is_of_config(config: Config, x: np.ndarray) -> bool:
    """Whether it holds the rotary frequencies of the config, rounded to float32 and then to the buffer's dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    expected = frequencies(config)
    precision = jnp.finfo(x.dtype)
    tolerance = 2e-6 * expected + float(precision.eps) * expected + float(precision.smallest_subnormal)
    return x.shape == expected.shape and bool((np.abs(x.astype(np.float64) - expected) <= tolerance).all())


_GPT2_BUFFERS = (
    Buffer("transformer.h.{layer}.attn.bias", _is_causal_mask, "the causal mask of the whole context"),
    Buffer("transformer.h.{layer}.attn.masked_bias", _is_masking_score, "one number of at most -9000"),
)
_ROTARY_BUFFERS = tuple(
    Buffer(name, _is_of_config, "the rotary frequencies that the config gives")
    for name in ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
)
_llama = partial(Family, prefix="model.", weights=_llama_weights, buffers=_ROTARY_BUFFERS, head="lm_head.weight")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        _gpt2_config, _gpt2_write, frozenset(_GPT2_KEYS), _GPT2_HARMLESS,
        "transformer.", _gpt2_weights, _GPT2_BUFFERS, "lm_head.weight",
    ),
    "llama": _llama(_llama_config, _llama_write, frozenset(_LLAMA_KEYS) | ROTARY_KEYS, _LLAMA_HARMLESS),
    "mistral": _llama(_mistral_config, None, frozenset(_MISTRAL_KEYS) | ROTARY_KEYS, _MISTRAL_HARMLESS),
    # expresses any Config; tensors have the names and axes of the parameters
    "mijax": Family(_own_config, dataclasses.asdict, _OWN_KEYS, _OWN_HARMLESS, "", _own_weights),
}  # fmt: skip
"""The families by their `model_type`. `mijax.save` takes the first that expresses a model, so `mijax` comes last."""


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family that a config's `model_type` names.

    Args:
        config: the contents of a `config.json`.
        source: the name of the checkpoint in the error message.

    Returns:
        The family.

    Raises:
        ValueError: where `model_type` is missing or not supported.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{source}: unsupported model_type {kind!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
