"""GGUF files of tiny transformers models, written as llama.cpp's convert_hf_to_gguf.py writes them.

Where transformers reads GGUF files of a family itself (the sizes that its reader leaves at their defaults are those here), `tests/parity/test_gguf.py` checks that its reader finds the model of the
file again: this module and our reader are then held against a third reading.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import safetensors.numpy


class Case(NamedTuple):
    """A family of `families.py`, llama.cpp's name of it, the arguments of its config, and whether transformers reads its files."""

    family: str
    arch: str
    arguments: dict[str, Any]
    read_by_transformers: bool = True


_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 48,
    "num_attention_heads": 4,
}
_LLAMA = _SIZES | {"intermediate_size": 40, "num_key_value_heads": 2}
_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
_MOE = _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CASES = {
    "llama": Case("llama", "LLAMA", _LLAMA | _THETA | {"head_dim": 10, "tie_word_embeddings": False}),
    "llama with linear scaling": Case("llama", "LLAMA", _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}, False),
    "llama 3.1": Case("llama", "LLAMA", _LLAMA | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}, "head_dim": 16}, False),
    "mixtral": Case("mixtral", "LLAMA", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, False),
    "smollm3": Case("smollm3", "SMOLLM3", _LLAMA | _THETA | _SPECIAL | {"num_hidden_layers": 5}, False),
    "qwen2": Case("qwen2", "QWEN2", _LLAMA | _THETA),
    "qwen2_moe": Case("qwen2_moe", "QWEN2MOE", _MOE | {"shared_expert_intermediate_size": 5632, "moe_intermediate_size": 1408}),
    "qwen3": Case("qwen3", "QWEN3", _LLAMA | _THETA | {"head_dim": 128}),
    "qwen3_moe": Case("qwen3_moe", "QWEN3MOE", _MOE | {"head_dim": 128, "norm_topk_prob": True, "moe_intermediate_size": 768}),
    "olmo2": Case("olmo2", "OLMO2", _LLAMA | _THETA | _SPECIAL, False),
    "olmoe": Case("olmoe", "OLMOE", _LLAMA | _SPECIAL | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20}, False),
    "gemma2": Case("gemma2", "GEMMA2", _LLAMA | {"head_dim": 256, "sliding_window": 3}),
    "gemma2, other scales": Case("gemma2", "GEMMA2", _LLAMA | {"head_dim": 10, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, False),
    "gemma3": Case("gemma3_text", "GEMMA3", _LLAMA | {"head_dim": 256, "num_hidden_layers": 7, "sliding_window": 3}),
    "gemma3, its context stretched": Case("gemma3_text", "GEMMA3", _LLAMA | {"head_dim": 256, "num_hidden_layers": 7, "sliding_window": 3, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}}, False),
    "phi2": Case("phi", "PHI2", _LLAMA | {"num_key_value_heads": 4, "head_dim": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}}, False),
    "phi3": Case("phi3", "PHI3", _LLAMA | _SPECIAL | {"original_max_position_embeddings": 48, "sliding_window": 5}, False),
    "gptneox": Case("gpt_neox", "GPTNEOX", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.34}}, False),
    "gptneox, one after the other": Case("gpt_neox", "GPTNEOX", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"use_parallel_residual": False, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}}, False),
    "gpt2": Case("gpt2", "GPT2", {"vocab_size": 50257, "n_positions": 1024, "n_embd": 24, "n_layer": 2, "n_head": 3}),
    "bloom": Case("bloom", "BLOOM", {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    "falcon 7b": Case("falcon", "FALCON", _SIZES | {"new_decoder_architecture": False, "multi_query": True}),
    "gpt_oss": Case("gpt_oss", "GPT_OSS", _LLAMA | {"num_hidden_layers": 3, "head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12, "truncate": False}}, False),
    "gpt_oss without YaRN": Case("gpt_oss", "GPT_OSS", _LLAMA | {"head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, False),
    "qwen3 with YaRN": Case("qwen3", "QWEN3", _LLAMA | {"head_dim": 10, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12}}, False),
    "falcon 40b": Case("falcon", "FALCON", _SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}, False),
}  # fmt: skip


def make(case: Case):
    """A fresh torch model, of which every parameter matters."""
    import torch
    import transformers

    from tests.reference.families import REFERENCES

    torch.manual_seed(0)
    config = getattr(transformers, REFERENCES[case.family].config)(
        **{k: v for k, v in case.arguments.items() if v is not None}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write(case: Case, theirs, folder: Path, quantised: str | None = None) -> Path:
    """Write the file of a model, its experts `quantised`; `folder` gets its Hugging Face form too."""
    theirs.save_pretrained(folder)
    arch = gguf.MODEL_ARCH[case.arch]
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _metadata(writer, case, theirs.config)
    names = gguf.get_tensor_name_map(arch, theirs.config.num_hidden_layers)
    tensors = _stacked(safetensors.numpy.load_file(folder / "model.safetensors"))
    tensors = _gpt_oss(tensors) if case.arch == "GPT_OSS" else tensors
    for name, tensor in tensors.items():
        spellings = [name, f"transformer.{name}", name.removeprefix("transformer.")]
        new = next(n for s in spellings if (n := names.get_name(s, try_suffixes=(".weight", ".bias"))))
        values = np.ascontiguousarray(_converted(case, name, tensor.astype(np.float32), theirs.config))
        if quantised and new.endswith("_exps.weight"):
            kind = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, values)
    if (
        (theirs.config.rope_parameters or {}).get("rope_type") == "llama3"
        if hasattr(theirs.config, "rope_parameters")
        else False
    ):
        writer.add_tensor("rope_freqs.weight", _llama3_table(theirs.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(tensors):
    """One tensor for each map of all experts."""
    stacked: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = re.match(r"(.*\.experts\.)(\d+)\.(.*)", name)
        if match:
            stacked.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            stacked[name] = tensor
    return {name: np.stack([t[i] for i in sorted(t)]) if isinstance(t, dict) else t for name, t in stacked.items()}


def _gpt_oss(tensors):
    """As `modify_tensors` of GptOssModel: gates and linear branches apart, the maps of experts transposed."""
    converted = {}
    for name, x in tensors.items():
        if "gate_up_proj" in name:
            new, x = (
                (name.replace("_bias", ".bias"), x) if name.endswith("_bias") else (f"{name}.weight", x.swapaxes(1, 2))
            )
            for i, part in enumerate(("gate_proj", "up_proj")):
                converted[new.replace("gate_up_proj", part)] = x[:, i::2]
        elif name.endswith("down_proj"):
            converted[f"{name}.weight"] = x.swapaxes(1, 2)
        else:
            converted[name.replace("down_proj_bias", "down_proj.bias")] = x
    return {f"{name}.weight" if name.endswith("sinks") else name: x for name, x in converted.items()}


def _metadata(writer, case, c):
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(getattr(c, "max_position_embeddings", None) or 2048)
    writer.add_embedding_length(c.hidden_size)
    writer.add_vocab_size(c.vocab_size)
    writer.add_head_count(c.num_attention_heads)
    neurons = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(case.family, "intermediate_size")
    writer.add_feed_forward_length(getattr(c, neurons, None) or 4 * c.hidden_size)
    layer_norm = [getattr(c, key) for key in ("layer_norm_eps", "layer_norm_epsilon") if hasattr(c, key)]
    if layer_norm:
        writer.add_layer_norm_eps(layer_norm[0])
    else:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if case.family == "falcon":
        writer.add_head_count_kv(c.num_kv_heads if c.new_decoder_architecture else 1)
    elif getattr(c, "num_key_value_heads", None):
        writer.add_head_count_kv(c.num_key_value_heads)
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if "head_dim" in case.arguments:
        writer.add_key_length(d_head)
        writer.add_value_length(d_head)
    rope = getattr(c, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope and case.family != "gemma3_text":
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(d_head * rope.get("partial_rotary_factor", 1.0)))
    elif rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if case.family in ("gemma2", "gemma3_text", "phi3", "gpt_oss"):
        writer.add_sliding_window(c.sliding_window)
    if case.family == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    experts = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    if case.family == "gpt_oss" or getattr(c, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(getattr(c, "moe_intermediate_size", None) or c.intermediate_size)
    if getattr(c, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if case.family == "gpt_neox":
        writer.add_parallel_residual(c.use_parallel_residual)


def _converted(case, name, x, c):
    """A tensor as convert_hf_to_gguf.py changes it (the methods `modify_tensors` of its classes)."""
    x = x.squeeze()
    heads = c.num_attention_heads
    if case.arch in ("LLAMA", "SMOLLM3") and re.search(r"[qk]_proj\.(weight|bias)$", name):
        n = heads if "q_proj" in name else c.num_key_value_heads
        return x.reshape(n, 2, x.shape[0] // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if case.arch.startswith("GEMMA") and name.endswith("norm.weight"):
        return x + 1
    if case.arch == "GPT2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return x.transpose(1, 0)
    if case.arch in ("GPTNEOX", "BLOOM") and re.search(r"query_key_value\.(weight|bias)$", name):
        qkv = x.reshape(heads, 3, c.hidden_size // heads, *x.shape[1:])
        return np.concatenate([qkv[:, i].reshape(-1, *x.shape[1:]) for i in range(3)])
    if case.arch == "FALCON" and "query_key_value" in name:
        n_kv = c.num_kv_heads if c.new_decoder_architecture else 1
        qkv = x.reshape(n_kv, heads // n_kv + 2, c.hidden_size // heads, c.hidden_size)
        q, k, v = qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]]
        return np.concatenate([part.reshape(-1, c.hidden_size) for part in (q, k, v)])
    return x


def _llama3_table(c):
    """The factors of the frequencies, as `generate_extra_tensors` of LlamaModel computes them."""
    rope, dim = c.rope_parameters, c.head_dim
    freqs = 1.0 / (rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim))
    factor, low, high, old = (
        rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for freq in freqs:
        wavelength = 2 * np.pi / freq
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
