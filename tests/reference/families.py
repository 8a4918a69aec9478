"""Tiny random models of every family of transformers that mijax reads: what is varied, and what is not.

Each family has a base of arguments of its configuration class, and for every documented field that changes the
computation the values that are tried: the first variant takes the first of each, and so on, so that every value occurs.
"""

from typing import Any, NamedTuple


class Reference(NamedTuple):
    """A family's configuration class, the arguments of all variants, and the values that differ between variants."""

    config: str
    base: dict[str, Any]
    varied: dict[str, list[Any]]
    not_varied: str = ""  # fields that change the computation, and why they have one value here


_SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 48}
_LLAMA = _SIZES | {"num_attention_heads": 4, "intermediate_size": 40}
_ACTS = ["silu", "gelu", "relu", "gelu_pytorch_tanh"]
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12}
_ROPES = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 12},
    _YARN,
    _YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
    {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
]  # fmt: skip
_PARTS = [
    {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0, "partial_rotary_factor": 1.0},
    {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.34},
]
_TYPES = [["sliding_attention", "full_attention", "sliding_attention"], ["full_attention"] * 3, None]
_KV, _TIED, _EPS = [2, 4, 1], [True, False], [1e-6, 0.1]

REFERENCES = {
    "gpt2": Reference(
        "GPT2Config", {"vocab_size": 61, "n_positions": 48, "n_embd": 24, "n_layer": 3},
        {"n_head": [3, 4], "n_inner": [None, 30], "activation_function": ["gelu_new", "relu", "silu"], "layer_norm_epsilon": [1e-5, 0.1],
         "tie_word_embeddings": _TIED},
        "scale_attn_weights, scale_attn_by_inverse_layer_idx: refused by name",
    ),
    "llama": Reference(
        "LlamaConfig", _LLAMA,
        {"num_key_value_heads": _KV, "head_dim": [10, 6, 8], "attention_bias": _TIED, "mlp_bias": [False, True], "hidden_act": _ACTS,
         "rope_parameters": _ROPES, "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
    ),
    "mistral": Reference(
        "MistralConfig", _LLAMA,
        {"num_key_value_heads": _KV, "head_dim": [10, 6], "sliding_window": [3, None, 5], "hidden_act": _ACTS, "rope_parameters": _ROPES[:2],
         "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
    ),
    "gpt_neox": Reference(
        "GPTNeoXConfig", _LLAMA,
        {"use_parallel_residual": _TIED, "attention_bias": [True, False, True], "rope_parameters": _PARTS, "hidden_act": ["gelu", "relu", "gelu_new"],
         "layer_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
    ),
    "gptj": Reference(
        "GPTJConfig", {"vocab_size": 61, "n_positions": 48, "n_embd": 24, "n_layer": 3},
        {"n_head": [3, 2], "rotary_dim": [4, 8, 2], "n_inner": [None, 30], "activation_function": ["gelu_new", "relu"], "layer_norm_epsilon": [1e-5, 0.1],
         "tie_word_embeddings": [False, True]},
    ),
    "gpt_neo": Reference(
        "GPTNeoConfig", {"vocab_size": 61, "hidden_size": 24, "max_position_embeddings": 48},
        {"num_layers": [4, 2], "attention_types": [[[["global", "local"], 2]], [[["local"], 1], [["global"], 1]]], "num_heads": [3, 4],
         "window_size": [3, 5], "intermediate_size": [None, 30], "activation_function": ["gelu_new", "relu"], "layer_norm_epsilon": [1e-5, 0.1],
         "tie_word_embeddings": _TIED},
    ),
    "opt": Reference(
        "OPTConfig", _SIZES | {"ffn_dim": 40, "dropout": 0.0},
        {"num_attention_heads": [3, 4], "do_layer_norm_before": [True, False, True], "_remove_final_layer_norm": [False, False, True],
         "word_embed_proj_dim": [24, 16, 16, 30],
         "enable_bias": [True, True, False], "activation_function": ["relu", "gelu"], "tie_word_embeddings": [True, True, False]},
        "layer_norm_elementwise_affine: refused by name",
    ),
    "bloom": Reference(
        "BloomConfig", {"vocab_size": 61, "hidden_size": 24, "n_layer": 3},
        {"n_head": [4, 3, 6], "layer_norm_epsilon": [1e-5, 0.1], "tie_word_embeddings": _TIED},
        "apply_residual_connection_post_layernorm, slow_but_exact: refused by name",
    ),
    "falcon": Reference(
        "FalconConfig", _SIZES | {"num_attention_heads": 4},
        {"new_decoder_architecture": [False, True, True, False, False], "multi_query": [True, True, False, False, True],
         "parallel_attn": [True, True, True, False, False], "num_kv_heads": [None, 2, 4, None, None], "num_ln_in_parallel_attn": [None, None, 1, None, None],
         "bias": _TIED, "ffn_hidden_size": [None, 40], "activation": ["gelu", "relu"], "rope_parameters": _ROPES[:2], "layer_norm_epsilon": [1e-5, 0.1],
         "tie_word_embeddings": [True, False, True]},
        "alibi: refused by name (transformers rounds its biases to bfloat16)",
    ),
    "qwen2": Reference(
        "Qwen2Config", _LLAMA,
        {"num_key_value_heads": _KV, "use_sliding_window": [True, False, True], "sliding_window": [3, 3, 5], "max_window_layers": [1, 2, 3],
         "layer_types": [None, None, _TYPES[0]], "hidden_act": _ACTS, "rope_parameters": _ROPES[:2], "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
    ),
    "qwen3": Reference(
        "Qwen3Config", _LLAMA,
        {"num_key_value_heads": _KV, "head_dim": [10, 6], "attention_bias": [False, True], "use_sliding_window": [True, False, True], "sliding_window": [3, 3, 5],
         "max_window_layers": [1, 2, 3], "hidden_act": _ACTS, "rope_parameters": _ROPES[:2], "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
    ),
    "gemma2": Reference(
        "Gemma2Config", _LLAMA,
        {"num_key_value_heads": _KV, "head_dim": [10, 6], "attention_bias": [False, True], "sliding_window": [3, 5], "layer_types": [None, _TYPES[1], _TYPES[0]],
         "query_pre_attn_scalar": [7, 16], "attn_logit_softcapping": [2.0, None, 5.0], "final_logit_softcapping": [3.0, 5.0, None],
         "hidden_activation": ["gelu_pytorch_tanh", "silu"], "rope_parameters": _ROPES[:2], "rms_norm_eps": _EPS, "tie_word_embeddings": _TIED},
    ),
    "gemma3_text": Reference(
        "Gemma3TextConfig", _LLAMA,
        {"num_key_value_heads": _KV, "head_dim": [10, 6], "attention_bias": [False, True], "sliding_window": [3, 5], "layer_types": [_TYPES[0], None, _TYPES[0]],
         "query_pre_attn_scalar": [7, 16], "final_logit_softcapping": [None, 3.0],
         "hidden_activation": ["gelu_pytorch_tanh", "silu"], "rms_norm_eps": _EPS, "tie_word_embeddings": _TIED,
         "rope_parameters": [{"sliding_attention": _ROPES[0], "full_attention": _ROPES[1]}, {"sliding_attention": _ROPES[0], "full_attention": _ROPES[3]}]},
        "attn_logit_softcapping (which transformers ignores), use_bidirectional_attention: refused by name",
    ),
    "phi": Reference(
        "PhiConfig", _LLAMA,
        {"num_key_value_heads": _KV, "rope_parameters": _PARTS, "hidden_act": ["gelu_new", "relu"], "layer_norm_eps": _EPS},
        "qk_layernorm: refused by name; tie_word_embeddings: transformers ties the bias-less part only",
    ),
    "phi3": Reference(
        "Phi3Config", _LLAMA | {"original_max_position_embeddings": 48, "pad_token_id": 0},
        {"num_key_value_heads": _KV, "sliding_window": [None, 3], "rope_parameters": [_PARTS[0], _PARTS[2]], "hidden_act": _ACTS, "rms_norm_eps": _EPS,
         "tie_word_embeddings": [False, True]},
        "rope_type longrope: refused by name; of the others, transformers takes the default only",
    ),
    "olmo2": Reference(
        "Olmo2Config", _LLAMA,
        {"num_key_value_heads": _KV, "attention_bias": [False, True], "rope_parameters": _ROPES[:2], "hidden_act": _ACTS, "rms_norm_eps": _EPS,
         "tie_word_embeddings": [False, True]},
    ),
    "mixtral": Reference(
        "MixtralConfig", _LLAMA,
        {"num_key_value_heads": _KV, "head_dim": [10, None], "num_local_experts": [4, 3], "num_experts_per_tok": [2, 3, 1], "sliding_window": [None, 3],
         "hidden_act": _ACTS, "rope_parameters": _ROPES[:2], "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
    ),
    "qwen3_moe": Reference(
        "Qwen3MoeConfig", _LLAMA | {"moe_intermediate_size": 20},
        {"num_key_value_heads": _KV, "head_dim": [10, 6], "num_experts": [4, 5], "num_experts_per_tok": [2, 3], "norm_topk_prob": [True, False],
         "attention_bias": [False, True], "use_sliding_window": [False, True], "sliding_window": [None, 3], "hidden_act": _ACTS, "rope_parameters": _ROPES[:2],
         "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True], "decoder_sparse_step": [1, 2, 1], "mlp_only_layers": [None, None, [1], [0]]},
    ),
    "qwen2_moe": Reference(
        "Qwen2MoeConfig", _LLAMA | {"moe_intermediate_size": 20},
        {"num_key_value_heads": _KV, "num_experts": [4, 5], "num_experts_per_tok": [2, 3], "norm_topk_prob": [True, False],
         "shared_expert_intermediate_size": [28, 12], "qkv_bias": [True, False], "use_sliding_window": [True, False], "sliding_window": [3, None, 5],
         "max_window_layers": [1, 28], "layer_types": [None, None, _TYPES[0]], "hidden_act": _ACTS, "rope_parameters": _ROPES[:2], "rms_norm_eps": _EPS,
         "tie_word_embeddings": [False, True], "decoder_sparse_step": [1, 2, 1], "mlp_only_layers": [None, None, [0, 2], [2]]},
    ),
    "olmoe": Reference(
        "OlmoeConfig", _LLAMA | {"intermediate_size": 20},
        {"num_key_value_heads": _KV, "num_experts": [4, 5], "num_experts_per_tok": [2, 3], "norm_topk_prob": [False, True], "attention_bias": [False, True],
         "hidden_act": _ACTS, "rope_parameters": _ROPES[:2], "rms_norm_eps": _EPS, "tie_word_embeddings": [False, True]},
        "clip_qkv: refused by name",
    ),
    "gpt_oss": Reference(
        "GptOssConfig", _LLAMA | {"intermediate_size": 20},
        {"num_key_value_heads": _KV, "head_dim": [10, 6], "num_local_experts": [4, 5], "num_experts_per_tok": [2, 3], "attention_bias": _TIED,
         "sliding_window": [3, 5], "layer_types": [None, _TYPES[0]], "rope_parameters": [_YARN | {"truncate": False}, _ROPES[0]], "rms_norm_eps": _EPS,
         "tie_word_embeddings": [False, True]},
        "swiglu_alpha, swiglu_limit: refused by name",
    ),
    "smollm3": Reference(
        "SmolLM3Config", _LLAMA | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {"num_key_value_heads": _KV, "no_rope_layers": [[1, 0, 1], [1, 1, 1], None], "no_rope_layer_interval": [4, 4, 2], "use_sliding_window": [False, True],
         "sliding_window": [None, 3], "attention_bias": [False, True], "mlp_bias": [False, True], "hidden_act": _ACTS, "rope_parameters": _ROPES[:2],
         "rms_norm_eps": _EPS, "tie_word_embeddings": _TIED},
    ),
}  # fmt: skip


def variants(family: str) -> list[dict[str, Any]]:
    """The arguments of each variant of a family."""
    base, varied = REFERENCES[family].base, REFERENCES[family].varied
    count = max(map(len, varied.values()))
    return [base | {key: values[i % len(values)] for key, values in varied.items()} for i in range(count)]


CASES = [(family, i) for family in REFERENCES for i in range(len(variants(family)))]


def make(family: str, variant: int):
    """A fresh torch model, of which every parameter matters."""
    import torch
    import transformers

    torch.manual_seed(variant)
    config = getattr(transformers, REFERENCES[family].config)(**variants(family)[variant])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()
