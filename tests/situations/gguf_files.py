"""Small GGUF files of a Llama, from a table of metadata that a test changes."""

import gguf
import numpy as np
from gguf import GGUFValueType as T
from tokenizers import pre_tokenizers

D_MODEL, HEADS, LAYERS = 8, 2, 2
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "he", "hello", "Ġhello", "123", "45", "<|begin|>", "<|end|>", "<|pad|>"]
BEGIN, END, PAD = (TOKENS.index(f"<|{name}|>") for name in ("begin", "end", "pad"))
FIELDS = {  # key: value and type, of an array that of its entries
    "llama.block_count": (LAYERS, T.UINT32),
    "llama.context_length": (64, T.UINT32),
    "llama.embedding_length": (D_MODEL, T.UINT32),
    "llama.feed_forward_length": (2 * D_MODEL, T.UINT32),
    "llama.attention.head_count": (HEADS, T.UINT32),
    "llama.attention.layer_norm_rms_epsilon": (1e-5, T.FLOAT32),
    "tokenizer.ggml.model": ("gpt2", T.STRING),
    "tokenizer.ggml.pre": ("llama-bpe", T.STRING),
    "tokenizer.ggml.tokens": (TOKENS, T.STRING),
    "tokenizer.ggml.token_type": ([3 if token.startswith("<|") else 1 for token in TOKENS], T.INT32),
    "tokenizer.ggml.merges": (["h e"], T.STRING),
    "tokenizer.ggml.bos_token_id": (BEGIN, T.UINT32),
    "tokenizer.ggml.eos_token_id": (END, T.UINT32),
}


def tensors():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(0, 0.2, shape).astype(np.float32)
    d = D_MODEL
    blocks = {"attn_q": (d, d), "attn_k": (d, d), "attn_v": (d, d), "attn_output": (d, d), "ffn_gate": (2 * d, d),
              "ffn_up": (2 * d, d), "ffn_down": (d, 2 * d), "attn_norm": (d,), "ffn_norm": (d,)}  # fmt: skip
    parts = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in blocks.items()}
    return {
        n: normal(*s) for n, s in {"token_embd.weight": (len(TOKENS), d), "output_norm.weight": (d,), **parts}.items()
    }


def write(path, changes=(), more=()):
    """Write FIELDS with these changes (`None` takes a key away; values of the key's own type need no type), and tensors."""
    fields = dict(FIELDS)
    for key, entry in dict(changes).items():
        if entry is None:
            del fields[key]
        else:
            fields[key] = entry if isinstance(entry, tuple) else (entry, fields[key][1])
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", ("llama",))[0])
    writer.data_alignment = fields.get("general.alignment", (writer.data_alignment,))[0]
    for key, (value, kind) in fields.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, T.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kind)
    for name, values in (tensors() | dict(more)).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
