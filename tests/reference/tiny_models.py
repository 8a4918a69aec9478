"""Tiny random models of Hugging Face transformers, over several head layouts: no download.

`python -m tests.reference.tiny_models` (extra `parity`) writes each as a checkpoint with its outputs into
tests/reference/stored/, which the tests without torch read; the parity tests run them live.
"""

from pathlib import Path

import numpy as np

STORED = Path(__file__).parent / "stored"
_gpt2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 24, "n_layer": 3}
_llama = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 24,
}
_llama3_rope = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
}  # fmt: skip

# name: (configuration class, its arguments); a new layout joins by a line
MODELS = {
    "gpt2": ("GPT2Config", _gpt2 | {"n_head": 3}),
    "gpt2_relu_wide": ("GPT2Config", _gpt2 | {"n_head": 4, "n_inner": 30, "activation_function": "relu", "tie_word_embeddings": False}),
    "llama_mha": ("LlamaConfig", _llama | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_gqa": ("LlamaConfig", _llama | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}),
    "llama_mqa_biases": ("LlamaConfig", _llama | {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("LlamaConfig", _llama | {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": _llama3_rope}),
    "mistral": ("MistralConfig", _llama | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None, "hidden_act": "gelu"}),
}  # fmt: skip
PADDINGS = ("none", "left", "right")


def inputs(padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `[batch, pos]` of three prompts, of 9, 5 and 7 tokens where they are padded."""
    ids = np.random.default_rng(0).integers(0, 61, (3, 9))
    mask = np.ones((3, 9), np.int64)
    for row, length in enumerate((9, 5, 7)):
        if padding == "left":
            mask[row, : 9 - length] = 0
        elif padding == "right":
            mask[row, length:] = 0
    return ids, mask


def make(name: str):
    """A fresh torch model, of which every parameter matters."""
    import torch
    import transformers

    kind, arguments = MODELS[name]
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**arguments), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def outputs(model, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Logits `[batch, pos, vocab]` and streams `[layer, batch, pos, d]`: the embedding, after each layer but the
    last, and after the final norm."""
    import torch

    with torch.no_grad():
        positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=positions,
            output_hidden_states=True,
        )
    return {"logits": out.logits.numpy(), "hidden": torch.stack(out.hidden_states).numpy()}


if __name__ == "__main__":
    for name in MODELS:
        model = make(name)
        model.save_pretrained(STORED / name)
        (STORED / name / "generation_config.json").unlink(missing_ok=True)
        saved = {f"{key}_{p}": value for p in PADDINGS for key, value in outputs(model, *inputs(p)).items()}
        np.savez_compressed(STORED / name / "outputs.npz", **saved)
