"""GGUF files: dequantised tensors, config and tokenizer, told as a Hugging Face checkpoint would."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from mijax.checkpoints.tokenizer import Tokenizer

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_byte_level = lambda use_regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
_PRE_TOKENIZERS = {
    "gpt-2": lambda: _byte_level(True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), _byte_level(False)]
    ),
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types


class GGUF:
    """An open GGUF file of the Llama family; tensors are dequantised one at a time.

    Raises `ValueError` for a file that is not GGUF, is truncated, or holds another architecture.
    """

    def __init__(self, path: Path):
        """Map the file and read its header."""
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {_hf_name(t.name): t for t in reader.tensors}
        except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable GGUF file (truncated or corrupt?): {error}") from error
        if self.fields.get("general.architecture") != "llama":
            raise ValueError(
                f"{path}: unsupported GGUF architecture {self.fields.get('general.architecture')!r}; supported is llama"
            )
        if "rope_freqs.weight" in self._tensors:
            raise ValueError(f"{path}: rotary scaling by a table (rope_freqs.weight) is not supported yet")

    @property
    def names(self) -> list[str]:
        """The tensors, by their Hugging Face names."""
        return list(self._tensors)

    @property
    def config(self) -> dict[str, Any]:
        """The contents of the `config.json` that the model came from, as far as mijax reads it."""
        get = lambda key, *default: self.fields.get(f"llama.{key}", *default)
        heads, d_model = get("attention.head_count"), get("embedding_length")
        scaling = get("rope.scaling.type", None)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": get("block_count"),
            "hidden_size": d_model,
            "intermediate_size": get("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": get("attention.key_length", d_model // heads),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": float(np.float32(get("attention.layer_norm_rms_epsilon")).astype(str)),
            "rope_theta": get("rope.freq_base", 10_000.0),
            "rope_scaling": None
            if scaling in (None, "none")
            else {"rope_type": scaling, "factor": get("rope.scaling.factor")},
            "vocab_size": self._tensors["model.embed_tokens.weight"].shape[1].item(),
            "hidden_act": "silu",
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self.fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.fields.get("tokenizer.ggml.eos_token_id"),
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, with the rows of q and k in Hugging Face's order."""
        import gguf

        tensor = self._tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return values if heads is None else _unpermuted(values, self.config[heads])

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors in the file's order."""
        return ((name, self.read(name)) for name in self.names)

    def tokenizer(self) -> Tokenizer:
        """Rebuild the tokenizer, a byte-level BPE, from the tokens and merges in the file.

        Raises `ValueError` for another kind of tokenizer, or an unknown way of splitting words.
        """
        get = lambda key, *default: self.fields.get(f"tokenizer.ggml.{key}", *default)
        if get("model") != "gpt2" or get("pre", "gpt-2") not in _PRE_TOKENIZERS:
            known = ", ".join(_PRE_TOKENIZERS)
            raise ValueError(
                f"{self.path}: unsupported tokenizer {get('model')!r} with splitting {get('pre')!r}; supported is"
                f" byte-level BPE ('gpt2') split as {known}. mijax.load(path, tokenizer=False) loads the weights alone"
            )
        tokens, kinds = get("tokens"), get("token_type")
        merges = [tuple(merge.split(" ")) for merge in get("merges")]
        backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, fuse_unk=False))
        backend.pre_tokenizer = _PRE_TOKENIZERS[get("pre", "gpt-2")]()
        backend.decoder = decoders.ByteLevel()
        special = [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == _CONTROL]
        backend.add_special_tokens(special)
        backend.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == _USER_DEFINED])
        if get("add_bos_token", False):
            bos = get("bos_token_id")
            backend.post_processor = processors.TemplateProcessing(
                f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
            )
        named = {f"{n}_token": get(f"{n}_token_id") for n in ("bos", "eos")}
        template = self.fields.get("tokenizer.chat_template")
        return Tokenizer(backend, template, {name: tokens[i] for name, i in named.items() if i is not None})

    def write_config(self, path: Path) -> None:
        """Write `config.json`."""
        path.write_text(json.dumps(self.config, indent=2))


def _hf_name(name: str) -> str:
    if not name.startswith("blk."):
        return _TENSORS.get(name, name)
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_TENSORS.get(part, part)}.{kind}"


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves that rotary positions pair; put them one after the other."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
