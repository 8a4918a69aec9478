"""Qwen3: Llama with norms of queries and keys."""

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import BIASES, Key

KEYS = llama_layout.KEYS | {"head_dim": Key(("d_head",), 128), "attention_bias": Key(("attn_bias",), False, BIASES)}
QWEN3 = llama_layout.with_windows("qwen3", "Qwen3", keys=KEYS, fixed={"qk_norm": "head"})
