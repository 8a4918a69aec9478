"""What Hugging Face checkpoints call things: one table per family, from their names to ours."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mijax.model.config import Config, RotaryScaling


class Weight(NamedTuple):
    """Where an array of ours stands in a checkpoint, and how its axes are arranged there.

    `ours` are paths into `Transformer` (several where theirs is fused; `axes` then begins with an axis
    that holds them). `theirs` has `{layer}` for arrays of the blocks. `axes` is an einops pattern
    from their arrangement to ours, and read backwards from ours to theirs.
    """

    ours: tuple[str, ...]
    theirs: str
    axes: str


class Family(NamedTuple):
    """One architecture of `config.json`: how to read and write its config, and where its weights are.

    What `write` gives for a config need not be read back as the same one: then the family does not express it.
    """

    config: Callable[[Mapping[str, Any]], Config]
    write: Callable[[Config], dict[str, Any]] | None  # None where another family writes the same
    prefix: str  # left out by checkpoints of the bare model
    weights: Callable[[Config], list[Weight]]
    ignored: tuple[str, ...]  # endings of names of buffers that hold no parameters


def _vector(ours: str, theirs: str) -> list[Weight]:
    return [
        Weight((f"{ours}.weight",), f"{theirs}.weight", "d -> d"),
        Weight((f"{ours}.bias",), f"{theirs}.bias", "d -> d"),
    ]


def _gpt2_config(c: Mapping[str, Any]) -> Config:
    _require(c, "gpt2", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
             add_cross_attention=False)  # fmt: skip
    return Config(
        n_layers=c["n_layer"],
        d_model=c["n_embd"],
        n_heads=c["n_head"],
        d_vocab=c["vocab_size"],
        n_ctx=c["n_positions"],
        d_mlp=c.get("n_inner") or 4 * c["n_embd"],
        positions="learned",
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=_activation(c.get("activation_function", "gelu_new"), "gpt2"),
        tied_unembed=c.get("tie_word_embeddings", True),
    )


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


def _llama_config(c: Mapping[str, Any]) -> Config:
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if c.get("sliding_window") and c["model_type"] == "mistral":
        raise ValueError(
            f"sliding_window={c['sliding_window']} is not supported yet; Mistral models without a window are"
        )
    return Config(
        n_layers=c["num_hidden_layers"],
        d_model=c["hidden_size"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        d_head=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        d_vocab=c["vocab_size"],
        n_ctx=c["max_position_embeddings"],
        d_mlp=c["intermediate_size"],
        positions="rotary",
        rotary_base=float(rope.get("rope_theta") or c.get("rope_theta", 10_000.0)),
        rotary_scaling=_rotary_scaling(rope),
        norm="rms",
        norm_eps=c.get("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=_activation(c.get("hidden_act", "silu"), c["model_type"]),
        qkv_bias=c.get("attention_bias", False),
        attn_out_bias=c.get("attention_bias", False),
        mlp_bias=c.get("mlp_bias", False),
        tied_unembed=c.get("tie_word_embeddings", False),
    )


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


def _activation(name: str, family: str) -> Any:
    known = {
        "relu": "relu",
        "gelu": "gelu",
        "gelu_new": "gelu_new",
        "gelu_pytorch_tanh": "gelu_new",
        "silu": "silu",
        "swish": "silu",
    }
    if name not in known:
        raise ValueError(f"unsupported activation {name!r} in a {family} config; supported are {', '.join(known)}")
    return known[name]


def _rotary_scaling(rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RotaryScaling("llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
                             int(rope["original_max_position_embeddings"]))  # fmt: skip
    raise ValueError(f"unsupported rotary scaling {kind!r}; supported are default, linear and llama3")


def _require(config: Mapping[str, Any], family: str, **needed: Any) -> None:
    off = [f"{key}={config[key]!r}" for key, value in needed.items() if config.get(key, value) != value]
    if off:
        raise ValueError(f"unsupported {family} config: {', '.join(off)}")


def _gpt2_write(c: Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": c.n_layers,
        "n_embd": c.d_model,
        "n_head": c.n_heads,
        "vocab_size": c.d_vocab,
        "n_positions": c.n_ctx,
        "n_inner": c.d_mlp,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": c.activation,
        "tie_word_embeddings": c.tied_unembed,
    }


def _llama_write(c: Config) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary_base}
    if c.rotary_scaling is not None:
        scaling = c.rotary_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq,
                "high_freq_factor": scaling.high_freq,
                "original_max_position_embeddings": scaling.original_n_ctx,
            }
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": c.n_layers,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.d_head,
        "vocab_size": c.d_vocab,
        "max_position_embeddings": c.n_ctx,
        "rope_parameters": rope,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": c.activation,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied_unembed,
    }


def _own_config(c: Mapping[str, Any]) -> Config:
    fields = {field.name for field in dataclasses.fields(Config)}
    scaling = c.get("rotary_scaling")
    known: dict[str, Any] = {key: value for key, value in c.items() if key in fields}
    known["rotary_scaling"] = None if scaling is None else RotaryScaling(**scaling)
    return Config(**known)


def _own_weights(config: Config) -> list[Weight]:
    import jax

    from mijax.model.transformer import init

    empty = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    paths = [jax.tree_util.keystr(place).lstrip(".") for place, _ in jax.tree_util.tree_leaves_with_path(empty)]
    return [Weight((path,), path, "... -> ...") for path in paths]


_llama = lambda write: Family(_llama_config, write, "model.", _llama_weights, ("rotary_emb.inv_freq",))

FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2_config, _gpt2_write, "transformer.", _gpt2_weights, (".attn.bias", ".attn.masked_bias")),
    "llama": _llama(_llama_write),
    "mistral": _llama(None),
    "mijax": Family(
        _own_config, lambda config: dataclasses.asdict(config), "", _own_weights, ()
    ),  # any Config, arrays as they are
}


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family that `model_type` names; `ValueError` where there is none."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{source}: unsupported model_type {kind!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
