"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from mijax.checkpoints.llama_layout import KEYS, with_windows

QWEN2 = with_windows("qwen2", "Qwen2", keys=KEYS, fixed={"attn_bias": "qkv"})
