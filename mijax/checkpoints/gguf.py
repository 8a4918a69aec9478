"""GGUF files: dequantised tensors, config and tokenizer, told as a Hugging Face checkpoint would."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mijax.checkpoints import gguf_metadata
from mijax.checkpoints.gguf_file import read_header
from mijax.checkpoints.gguf_tokenizer import read_tokenizer
from mijax.checkpoints.tokenizer import Tokenizer

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.attn_norm": "input_layernorm",
    "blk.attn_q": "self_attn.q_proj",
    "blk.attn_k": "self_attn.k_proj",
    "blk.attn_v": "self_attn.v_proj",
    "blk.attn_output": "self_attn.o_proj",
    "blk.ffn_norm": "post_attention_layernorm",
    "blk.ffn_gate": "mlp.gate_proj",
    "blk.ffn_up": "mlp.up_proj",
    "blk.ffn_down": "mlp.down_proj",
}
_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


class GGUF:
    """An open GGUF file of the Llama family; tensors are dequantised one at a time.

    `config` holds the contents of the `config.json` that the model came from, as far as mijax reads it.

    Raises `ValueError` for a file that is not GGUF, is truncated or corrupt, holds another architecture, or has tensors
    or metadata that cannot be followed.
    """

    def __init__(self, path: Path):
        """Read the file's header."""
        self.path = path
        self.fields, tensors = read_header(path)
        values = gguf_metadata.checked(self.fields, path)
        if any(tensor.name == "rope_freqs.weight" for tensor in tensors):
            raise ValueError(f"{path}: rotary scaling by a table (rope_freqs.weight) is not supported yet")
        unknown = [tensor.name for tensor in tensors if _hf_name(tensor.name) is None]
        if unknown:
            raise ValueError(f"{path}: unexpected {', unexpected '.join(unknown)}")
        self._tensors = {name: tensor for tensor in tensors if (name := _hf_name(tensor.name))}
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        ids = {f"{name}_token_id": self.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        self.config: dict[str, Any] = gguf_metadata.config(values, shapes, path) | ids

    @property
    def names(self) -> list[str]:
        """The tensors, by their Hugging Face names."""
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, with the rows of q and k in Hugging Face's order."""
        values = self._tensors[name].read(self.path)
        heads = _ROTATED.get(name.split(".")[-2])
        if heads is None:
            return values
        if values.shape[0] % (2 * self.config[heads]):
            raise ValueError(f"{self.path}: {name} has {len(values)} rows for {self.config[heads]} heads of even size")
        return _unpermuted(values, self.config[heads])

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors in the file's order."""
        return ((name, self.read(name)) for name in self.names)

    def tokenizer(self) -> Tokenizer:
        """Rebuild the tokenizer, a byte-level BPE, from the tokens and merges in the file.

        Raises `ValueError` for another kind of tokenizer, an unknown way of splitting words, or metadata of it that
        cannot be followed.
        """
        return read_tokenizer(self.fields, self.config["vocab_size"], self.path)

    def write_config(self, path: Path) -> None:
        """Write `config.json`."""
        path.write_text(json.dumps(self.config, indent=2), encoding="utf-8")


def _hf_name(name: str) -> str | None:
    """A tensor's Hugging Face name; `None` for one that a Llama has not."""
    match = re.fullmatch(r"(?:(blk)\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", name)
    block, layer, part, kind = match.groups() if match else (None, None, "", "")
    theirs = _TENSORS.get(f"{block}.{part}" if block else part)
    if theirs is None:
        return None
    return f"model.layers.{layer}.{theirs}.{kind}" if block else f"{theirs}.{kind}"


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves that rotary positions pair; put them one after the other."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
