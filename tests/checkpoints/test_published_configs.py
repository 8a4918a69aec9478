"""Configs as published models have them, in the spelling of their time: what of the architecture must come out."""

import pytest

import mijax as mj
from mijax.checkpoints.registry import FAMILIES
from tests.situations import refused

PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 512,
    "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
    "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
BLOOM = {
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom",
    "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pretraining_tp": 1, "seq_length": 2048,
    "skip_bias_add": True, "skip_bias_add_qkv": False, "unk_token_id": 0, "use_cache": False, "vocab_size": 250880,
}  # fmt: skip
GPT_NEO = {
    "activation_function": "gelu_new", "attention_dropout": 0, "embed_dropout": 0, "resid_dropout": 0, "model_type": "gpt_neo", "hidden_size": 768,
    "attention_types": [[["global", "local"], 6]], "attention_layers": ["global", "local"] * 6, "intermediate_size": None, "num_heads": 12,
    "layer_norm_epsilon": 1e-05, "max_position_embeddings": 2048, "num_layers": 12, "vocab_size": 50257, "window_size": 256,
    "gradient_checkpointing": False, "summary_type": "cls_index", "initializer_range": 0.02, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
QWEN = {
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3 = {
    "attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
PHI = {
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 51200,
}  # fmt: skip

PUBLISHED = {
    "Pythia-70m": (PYTHIA, {"n_layers": 6, "d_model": 512, "positions": mj.Rotary(dim=16), "parallel": True, "shared_norm": False, "attn_bias": "qkvo"}),
    "BLOOM-560m": (BLOOM, {"n_layers": 24, "d_model": 1024, "n_heads": 16, "d_mlp": 4096, "n_ctx": 2048, "positions": "alibi", "embed_norm": True}),
    "GPT-Neo-125m": (GPT_NEO, {"window": (0, 256) * 6, "attn_scale": 1.0, "attn_bias": "o", "tied_unembed": True}),
    "Qwen2.5-0.5B": (QWEN, {"window": 0, "attn_bias": "qkv", "n_kv_heads": 2, "d_head": 64, "positions": mj.Rotary(1e6, 64)}),
    "Qwen2.5 as transformers writes one without windows": (QWEN | {"sliding_window": 0}, {"window": 0}),
    "Gemma-3-1b": (GEMMA3, {
        "window": tuple(0 if layer % 6 == 5 else 512 for layer in range(26)), "embed_scale": 1152**0.5, "attn_scale": 1 / 16, "scores_cap": 0.0,
        "positions": tuple(mj.Rotary(1e6 if layer % 6 == 5 else 1e4, 256) for layer in range(26)), "qk_norm": "head", "norm_at": "both",
    }),
    # the share that transformers' classes have stands where the file gives none, whatever else it says of positions
    "Pythia with a scaling and no share": (
        {k: v for k, v in PYTHIA.items() if k != "rotary_pct"} | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"positions": mj.Rotary(dim=16, scaling=mj.RotaryScaling("linear", 2.0))},
    ),
    "Phi-2 with a base and no share": (
        {k: v for k, v in PHI.items() if k not in ("partial_rotary_factor", "rope_theta")} | {"rope_parameters": {"rope_theta": 500.0}},
        {"positions": mj.Rotary(500.0, dim=40)},
    ),
    "Phi-2": (PHI, {"positions": mj.Rotary(dim=32), "parallel": True, "shared_norm": True, "unembed_bias": True, "tied_unembed": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    contents, expected = PUBLISHED[name]
    config = FAMILIES[contents["model_type"]].config(contents)
    assert {field: getattr(config, field) for field in expected} == expected


FAULTS = {
    "two names that disagree": (BLOOM | {"hidden_size": 512}, "n_embed=1024"),
    "layers that disagree": (GPT_NEO | {"attention_layers": ["local", "global"] * 6}, "is not what attention_types says"),
    "kinds of no known name": (GPT_NEO | {"attention_layers": None, "attention_types": [[["sparse"], 12]]}, "'local' and 'global' for each of 12 layers"),
    "too few kinds": (GPT_NEO | {"attention_layers": None, "attention_types": [[["global", "local"], 5]]}, "are of 10 layers, num_layers is 12"),
    "rotary bases twice": (GEMMA3 | {"rope_parameters": {"sliding_attention": {}, "full_attention": {}}}, "beside rope_parameters"),
    "one of two rotary bases": (GEMMA3 | {"rope_parameters": {"full_attention": {}}}, "must hold the entries"),
    "norms of queries": (PHI | {"qk_layernorm": True}, "unsupported phi config: qk_layernorm=True"),
    "an attention that looks ahead": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "a cap that transformers ignores": (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "a window of no size": (QWEN | {"use_sliding_window": True, "sliding_window": 0}, "must be a positive integer"),
    "a window that is no boolean": (QWEN | {"use_sliding_window": "false"}, "must be true or false"),
    "a share of no dimension": (PYTHIA | {"rotary_pct": 0.3}, "must be even"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_told(name, as_a_user):
    contents, message = FAULTS[name]
    with refused(ValueError, message):
        FAMILIES[contents["model_type"]].config(contents)
