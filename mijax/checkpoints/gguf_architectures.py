"""The architectures of GGUF files: what llama.cpp's converter did to each, and the `config.json` that it came from.

The names of tensors are those of the `gguf` package. What a file does not say, because llama.cpp has it in its code, is
as there (llama-model.cpp; convert_hf_to_gguf.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Get = Callable[..., Any]
"""A key of the file's metadata, without the architecture's name: `get(key, default=None)`."""
Shapes = Mapping[str, tuple[int, ...]]


class Architecture(NamedTuple):
    """One architecture that llama.cpp names.

    Attributes:
        names: its table of tensors in the `gguf` package, a member of `gguf.MODEL_ARCH`.
        model_type: the family of its `config.json`.
        config: from the metadata, and the shapes of the tensors by their names in the file, to the entries of the
            `config.json` beside those that all have.
        undo: from a tensor's Hugging Face name, the tensor and the `config.json` to the tensor as it was before it
            was converted.
        reads: the keys that `config` reads beside those of every architecture.
        epsilon: the key of the norms' epsilon.
        rotates: `"all"` dimensions of a head, a `"part"` of them or `"none"`.
        requires: the keys without which llama.cpp refuses a file of this architecture, beside those of every one.
        parts: from a tensor's Hugging Face name to the names, as it were there, of the tensors that it was split into, which
            `undo` gets stacked.
        shape: from a tensor's Hugging Face name and the shape of what `undo` gets to that of what it gives.
    """

    names: str
    model_type: str
    config: Callable[[Get, Shapes], dict[str, Any]]
    undo: Callable[[str, np.ndarray, Mapping[str, Any]], np.ndarray] = lambda name, x, c: x
    reads: tuple[str, ...] = ()
    epsilon: str = "attention.layer_norm_rms_epsilon"
    rotates: str = "all"
    requires: tuple[str, ...] = ()
    parts: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda name, shape: shape


# --- what the converter did


def _unpermuted(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """Queries and keys whose rotary pairs lie side by side: the two halves of each head one after the other."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return x
    if x.shape[0] % (2 * c[heads]):
        raise ValueError(f"{name} has {len(x)} rows for {c[heads]} heads of even size")
    return x.reshape(c[heads], x.shape[0] // c[heads] // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _less_one(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """Weights of norms, to which one was added."""
    return x - 1 if name.endswith("norm.weight") else x


def _transposed(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """Matrices of GPT-2's layers, which it has as `[inputs, outputs]`."""
    return x.T if x.ndim == 2 and ".h." in name else x


def _transposed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if ".h." in name else shape


def _interleaved(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """Queries, keys and values one after the other: side by side in each head."""
    if "query_key_value" not in name:
        return x
    return np.stack(np.split(x.reshape(3 * c["num_attention_heads"], -1, *x.shape[1:]), 3), axis=1).reshape(x.shape)


def _grouped(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """Falcon's queries, keys and values one after the other: a group's queries, its key and its value."""
    if "query_key_value" not in name:
        return x
    heads, kv_heads = c["num_attention_heads"], c["num_kv_heads"]
    q, k, v = np.split(x.reshape(heads + 2 * kv_heads, -1, *x.shape[1:]), [heads, heads + kv_heads])
    groups = [q.reshape(kv_heads, -1, *q.shape[1:]), k[:, None], v[:, None]]
    return np.concatenate(groups, axis=1).reshape(x.shape)


def _with_gate(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """The gate of the shared MLP, which lost its axis of one output."""
    return x.reshape(1, -1) if "shared_expert_gate" in name else x


def _shape_with_gate(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if "shared_expert_gate" in name and len(shape) == 1 else shape


def _fused(name: str, x: np.ndarray, c: Mapping[str, Any]) -> np.ndarray:
    """GPT-OSS's gates and linear branches `[2, expert, ...]`: side by side; and its experts' maps as `[inputs, outputs]`."""
    if "gate_up_proj" in name:
        x = np.moveaxis(x, 0, 2)  # [expert, neuron, two, ...]
        x = x.reshape(x.shape[0], 2 * x.shape[1], *x.shape[3:])
    return x.swapaxes(-1, -2) if name.endswith(("gate_up_proj", "down_proj")) else x


def _fused_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if "gate_up_proj" in name and len(shape) >= 3:
        shape = (shape[1], 2 * shape[2], *shape[3:])
    turned = name.endswith(("gate_up_proj", "down_proj")) and len(shape) >= 2
    return shape[:-2] + shape[-2:][::-1] if turned else shape


def _gpt_oss_parts(name: str) -> tuple[str, ...]:
    """Gates and linear branches apart; weights and biases of experts under the names of a layer's."""
    head, _, last = name.rpartition(".")
    if last.endswith("_proj") or last.endswith("_proj_bias"):
        kind = "bias" if last.endswith("_bias") else "weight"
        maps = ("gate_proj", "up_proj") if last.startswith("gate_up") else ("down_proj",)
        return tuple(f"{head}.{part}.{kind}" for part in maps)
    return (f"{name}.weight",) if last == "sinks" else (name,)


# --- the entries of config.json


def _gated(get: Get, shapes: Shapes) -> dict[str, Any]:
    """What all descendants of Llama have."""
    return {
        "intermediate_size": get("feed_forward_length"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": head_size(get),
        "rms_norm_eps": decimal(get("attention.layer_norm_rms_epsilon")),
    }


def head_size(get: Get) -> int:
    """The size of a head.

    Args:
        get: reads the metadata.
    """
    return get("attention.key_length", get("embedding_length") // get("attention.head_count"))


def decimal(x: float) -> float:
    """The shortest decimal number that rounds to a float32: 1e-05 for 9.999999747378752e-06.

    Args:
        x: the number.
    """
    with np.errstate(over="ignore"):  # infinity, which `Config` refuses
        return float(np.float32(x).astype(str))


def _llama(get: Get, shapes: Shapes) -> dict[str, Any]:
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    experts = {"model_type": "mixtral", "num_local_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")}  # fmt: skip
    return _gated(get, shapes) | {"hidden_act": "silu"} | (experts if get("expert_count", 0) else biases)


def _without_head_size(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {key: value for key, value in _gated(get, shapes).items() if key != "head_dim"}


def _qwen3(get: Get, shapes: Shapes) -> dict[str, Any]:
    return _gated(get, shapes) | {"attention_bias": "blk.0.attn_q.bias" in shapes}


def _moe(get: Get, normalise: bool) -> dict[str, Any]:
    return {
        "num_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count"), "norm_topk_prob": normalise,
        "moe_intermediate_size": get("expert_feed_forward_length"), "intermediate_size": get("feed_forward_length"),
    }  # fmt: skip


def _qwen2_moe(get: Get, shapes: Shapes) -> dict[str, Any]:
    shared = get("expert_shared_feed_forward_length", shapes.get("blk.0.ffn_up_shexp.weight", (0,))[0])
    return _without_head_size(get, shapes) | _moe(get, False) | {"shared_expert_intermediate_size": shared}


def _olmoe(get: Get, shapes: Shapes) -> dict[str, Any]:
    experts = {key: value for key, value in _moe(get, False).items() if key != "moe_intermediate_size"}
    return _without_head_size(get, shapes) | experts


def _gemma(get: Get, shapes: Shapes, largest: int) -> dict[str, Any]:
    """Gemma's scale is that of a head's size, but in the largest model."""
    d_head = get("embedding_length") // get("attention.head_count") if get("block_count") == largest else head_size(get)
    return _gated(get, shapes) | {
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": d_head,
        "sliding_window": get("attention.sliding_window", 4096),
    }  # fmt: skip


def _gemma2(get: Get, shapes: Shapes) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": decimal(get("attn_logit_softcapping", 50.0)), "final_logit_softcapping": decimal(get("final_logit_softcapping", 30.0))}  # fmt: skip
    return _gemma(get, shapes, 46) | caps


def _gemma3(get: Get, shapes: Shapes) -> dict[str, Any]:
    cap = get("final_logit_softcapping", 0.0)
    return _gemma(get, shapes, 62) | {
        "rope_theta": decimal(get("rope.freq_base", 1e6)), "rope_local_base_freq": 10_000.0,
        "final_logit_softcapping": decimal(cap) if cap else None,
    }  # fmt: skip


def _phi3(get: Get, shapes: Shapes) -> dict[str, Any]:
    part = get("rope.dimension_count", head_size(get)) / head_size(get)
    window = get("attention.sliding_window", 0) or None
    return _without_head_size(get, shapes) | {"partial_rotary_factor": part, "sliding_window": window}


def _phi2(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {
        "intermediate_size": get("feed_forward_length"), "hidden_act": "gelu_new",
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "layer_norm_eps": decimal(get("attention.layer_norm_epsilon")),
        "partial_rotary_factor": get("rope.dimension_count", head_size(get)) / head_size(get),
    }  # fmt: skip


def _gpt_neox(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {
        "intermediate_size": get("feed_forward_length"), "hidden_act": "gelu",
        "layer_norm_eps": decimal(get("attention.layer_norm_epsilon")), "use_parallel_residual": get("use_parallel_residual", True),
        "rotary_pct": get("rope.dimension_count", head_size(get)) / head_size(get),
    }  # fmt: skip


def _gpt2(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {"n_inner": get("feed_forward_length"), "layer_norm_epsilon": decimal(get("attention.layer_norm_epsilon"))}


def _bloom(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {"layer_norm_epsilon": decimal(get("attention.layer_norm_epsilon")), "seq_length": get("context_length"), "max_position_embeddings": None}  # fmt: skip


def _falcon(get: Get, shapes: Shapes) -> dict[str, Any]:
    heads, kv_heads = get("attention.head_count"), get("attention.head_count_kv", 1)
    two = "blk.0.attn_norm_2.weight" in shapes
    return {
        "ffn_hidden_size": get("feed_forward_length"), "layer_norm_epsilon": decimal(get("attention.layer_norm_epsilon")),
        "new_decoder_architecture": two or kv_heads not in (1, heads), "num_ln_in_parallel_attn": 2 if two else None,
        "multi_query": kv_heads == 1, "num_kv_heads": kv_heads, "parallel_attn": True, "bias": False, "activation": "gelu",
    }  # fmt: skip


def yarn(get: Get) -> dict[str, Any]:
    """The entries of rotary positions that are scaled by YaRN.

    Args:
        get: reads the metadata.
    """
    original = get("rope.scaling.original_context_length", get("context_length"))
    return {"rope_type": "yarn", "factor": decimal(get("rope.scaling.factor", 1.0)), "original_max_position_embeddings": original}  # fmt: skip


def _gpt_oss(get: Get, shapes: Shapes) -> dict[str, Any]:
    kind = get("rope.scaling.type", "none" if get("rope.scaling.factor") is None else "linear")
    yarns = {
        "yarn": yarn(get) | {"truncate": False},
        "none": {"rope_type": "default"},
    }  # said, since the family's default is YaRN
    scaling = {"rope_scaling": yarns[kind]} if kind in yarns else {}
    return _gated(get, shapes) | scaling | {
        "intermediate_size": get("expert_feed_forward_length"), "attention_bias": "blk.0.attn_q.bias" in shapes,
        "num_local_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count"),
        "sliding_window": get("attention.sliding_window"),
    }  # fmt: skip


_EXPERTS = ("expert_count", "expert_used_count")
_MOE = (*_EXPERTS, "expert_feed_forward_length")
_LAYER_NORM = "attention.layer_norm_epsilon"
_WINDOW, _CAPS = ("attention.sliding_window",), ("attn_logit_softcapping", "final_logit_softcapping")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LLAMA", "llama", _llama, _unpermuted, _EXPERTS),
    "smollm3": Architecture("SMOLLM3", "smollm3", _without_head_size, _unpermuted),
    "qwen2": Architecture("QWEN2", "qwen2", _without_head_size),
    "qwen2moe": Architecture("QWEN2MOE", "qwen2_moe", _qwen2_moe, _with_gate, (*_MOE, "expert_shared_feed_forward_length"), shape=_shape_with_gate),
    "qwen3": Architecture("QWEN3", "qwen3", _qwen3),
    "qwen3moe": Architecture("QWEN3MOE", "qwen3_moe", lambda get, shapes: _qwen3(get, shapes) | _moe(get, True), reads=_MOE),
    "olmo2": Architecture("OLMO2", "olmo2", _without_head_size),
    "olmoe": Architecture("OLMOE", "olmoe", _olmoe, reads=_EXPERTS),
    "gemma2": Architecture("GEMMA2", "gemma2", _gemma2, _less_one, (*_WINDOW, *_CAPS)),
    "gemma3": Architecture("GEMMA3", "gemma3_text", _gemma3, _less_one, (*_WINDOW, "final_logit_softcapping")),
    "phi2": Architecture("PHI2", "phi", _phi2, epsilon=_LAYER_NORM, rotates="part"),
    "phi3": Architecture("PHI3", "phi3", _phi3, reads=_WINDOW, rotates="part"),
    "gptneox": Architecture("GPTNEOX", "gpt_neox", _gpt_neox, _interleaved, ("use_parallel_residual",), _LAYER_NORM, "part"),
    "gpt2": Architecture("GPT2", "gpt2", _gpt2, _transposed, (), _LAYER_NORM, "none", shape=_transposed_shape),
    "bloom": Architecture("BLOOM", "bloom", _bloom, _interleaved, ("attention.max_alibi_bias",), _LAYER_NORM, "none"),
    "falcon": Architecture("FALCON", "falcon", _falcon, _grouped, (), _LAYER_NORM),
    "gpt-oss": Architecture("GPT_OSS", "gpt_oss", _gpt_oss, _fused, (*_MOE, *_WINDOW), requires=(*_MOE, *_WINDOW), parts=_gpt_oss_parts, shape=_fused_shape),
}  # fmt: skip
"""The architectures that are read, by llama.cpp's names."""
