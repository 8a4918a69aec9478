"""GGUF files: dequantised tensors, config and tokenizer, in the form of a Hugging Face checkpoint."""

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

# from GGUF's names of modules (of a block: without its number) to Hugging Face's
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
# the tensors that llama.cpp permutes, and the config's number of their heads
_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


class GGUF:
    """A GGUF file of the Llama family, of which the header is read; tensors are read and dequantised one at a time.

    Args:
        path: the file.

    Attributes:
        path: the file.
        fields: its metadata, by key.
        config: the contents of the `config.json` that the model came from, as far as mijax reads it.

    Raises:
        ValueError: for a file that is not GGUF, is truncated or corrupt, holds another architecture, or has
            tensors or metadata that are not supported.
    """

    def __init__(self, path: Path):
        self.path = path
        self.fields: dict[str, Any]
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
        """The Hugging Face names of the tensors, in the file's order."""
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: its Hugging Face name.

        Returns:
            The tensor, dequantised to float32, with the rows of q and k in Hugging Face's order.

        Raises:
            ValueError: where the rows of q or k do not divide into heads of an even size.
        """
        values = self._tensors[name].read(self.path)
        heads = _ROTATED.get(name.split(".")[-2])
        if heads is None:
            return values
        if values.shape[0] % (2 * self.config[heads]):
            raise ValueError(f"{self.path}: {name} has {len(values)} rows for {self.config[heads]} heads of even size")
        return _unpermuted(values, self.config[heads])

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Read all tensors, one at a time.

        Returns:
            An iterator over names and tensors, in the file's order.
        """
        return ((name, self.read(name)) for name in self.names)

    def tokenizer(self) -> Tokenizer:
        """Rebuild the tokenizer, a byte-level BPE, from the tokens and merges in the file.

        Returns:
            The tokenizer.

        Raises:
            ValueError: for another kind of tokenizer, an unknown way of splitting text into words, or metadata of
                the tokenizer that is not supported.
        """
        return read_tokenizer(self.fields, self.config["vocab_size"], self.path)

    def write_config(self, path: Path) -> None:
        """Write `config` as JSON.

        Args:
            path: the file to write.
        """
        path.write_text(json.dumps(self.config, indent=2), encoding="utf-8")


def _hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; `None` for one that no Llama has."""
    match = re.fullmatch(r"(?:(blk)\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", name)
    block, layer, part, kind = match.groups() if match else (None, None, "", "")
    module = _TENSORS.get(f"{block}.{part}" if block else part)
    if module is None:
        return None
    return f"model.layers.{layer}.{module}.{kind}" if block else f"{module}.{kind}"


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the two halves of each head that rotary positions pair one after the other; llama.cpp interleaves them."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
