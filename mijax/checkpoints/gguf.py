"""GGUF files: dequantised tensors, config and tokenizer, in the form of a Hugging Face checkpoint."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mijax.checkpoints import gguf_metadata
from mijax.checkpoints.contents import Stored
from mijax.checkpoints.gguf_architectures import ARCHITECTURES, Architecture, decimal
from mijax.checkpoints.gguf_file import Tensor, read_header
from mijax.checkpoints.gguf_tokenizer import read_tokenizer
from mijax.checkpoints.registry import FAMILIES
from mijax.checkpoints.tensors import tensor_names
from mijax.checkpoints.tokenizer import Tokenizer
from mijax.model.rotary import Rotary, RotaryScaling, frequencies


class GGUF:
    """A GGUF file, of which the header is read; tensors are read and dequantised one at a time.

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
        stored = {tensor.name: tensor for tensor in tensors}
        ids = {f"{name}_token_id": self.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        self.config: dict[str, Any] = gguf_metadata.config(values, shapes, path) | ids
        self._architecture = ARCHITECTURES[self.fields["general.architecture"]]
        if "rope_freqs.weight" in stored and self._architecture.names == "LLAMA":
            table = stored.pop("rope_freqs.weight").read(path)
            self.config["rope_scaling"] = _llama3_scaling(table, self.config, path)
        self._dequantised = functools.lru_cache(maxsize=1)(
            lambda tensor: tensor.read(path)
        )  # of experts, one after the other
        self._tensors = _by_hf_name(stored, self._architecture, self.config, path)

    @property
    def stored(self) -> dict[str, Stored]:
        """The shapes of the tensors as they were before llama.cpp converted them, by Hugging Face name, in the file's order."""
        return {name: Stored("F32", self._shape(name)) for name in self._tensors}

    def _shape(self, name: str) -> tuple[int, ...]:
        tensors, expert = self._tensors[name]
        shapes = {tensor.shape for tensor in tensors}
        if len(shapes) > 1:
            named = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in tensors)
            raise ValueError(f"{self.path}: parts of one tensor must have one shape, given {named}")
        (shape,) = shapes
        whole = (len(tensors), *shape) if len(tensors) > 1 else shape
        return self._architecture.shape(name, whole if expert is None else whole[1:])

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: its Hugging Face name.

        Returns:
            The tensor, dequantised to float32, as it was before llama.cpp converted it.

        Raises:
            ValueError: where the rows of q or k do not divide into heads of an even size, and parts differ in shape.
        """
        tensors, expert = self._tensors[name]
        values = [self._dequantised(tensor) for tensor in tensors]
        try:
            whole = values[0] if len(values) == 1 else np.stack(values)
            return self._architecture.undo(name, whole if expert is None else whole[expert], self.config)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Read all tensors, one at a time.

        Returns:
            An iterator over names and tensors, in the file's order.
        """
        return ((name, self.read(name)) for name in self._tensors)

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


def _by_hf_name(
    stored: Mapping[str, Tensor], architecture: Architecture, config: Mapping[str, Any], path: Path
) -> dict[str, tuple[list[Tensor], int | None]]:
    """The parts of tensors by their Hugging Face names, in the file's order; with the expert's number where one holds all."""
    import gguf

    family = FAMILIES[str(config["model_type"])]
    try:
        described = family.config(config)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: the metadata do not describe a model that is supported: {error}") from error
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.names], described.n_layers)
    named: dict[str, tuple[list[Tensor], int | None]] = {}
    for name in (name for weight in family.weights(described) for name in tensor_names(weight, described)):
        expert = re.search(r"\.experts\.(\d+)\.", name)
        plain = name if expert is None else name.replace(expert[0], ".experts.")
        parts = []
        for part in architecture.parts(plain):
            spellings = (part, part.removeprefix(family.prefix))  # llama.cpp has some names of the bare model only
            parts += [n for s in spellings if (n := names.get_name(s, try_suffixes=(".weight", ".bias")))][:1]
        if parts and all(part in stored for part in parts):
            named[name] = [stored[part] for part in parts], None if expert is None else int(expert[1])
    order = {name: i for i, name in enumerate(stored)}
    unexpected = order.keys() - {part.name for parts, _ in named.values() for part in parts}
    if unexpected:
        names = sorted(unexpected, key=order.__getitem__)
        more = f", and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(f"{path}: unexpected {', unexpected '.join(names[:8])}{more}")
    return dict(sorted(named.items(), key=lambda item: order[item[1][0][0].name]))


def _llama3_scaling(table: np.ndarray, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, which llama.cpp stores as a table of the factors of all frequencies."""
    factor = decimal(float(table.max(initial=0.0)))
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base, dim = float(config["rope_theta"]), int(config["head_dim"])
    fits = not config["rope_scaling"] and table.shape == (dim // 2,) and bool((table >= 1).all()) and factor < np.inf
    if fits and base >= np.finfo(np.float32).tiny:
        expected = frequencies(Rotary(base, dim, RotaryScaling("llama3", factor, 1.0, 4.0, 8192)))
        fits = np.allclose(frequencies(Rotary(base, dim)) / table, expected, rtol=1e-5)
    if not fits:
        raise ValueError(
            f"{path}: the table of rotary scaling (rope_freqs.weight) is not that of Llama 3 ({scaling}), and no other is"
            " supported"
        )
    return {"rope_type": "llama3", **scaling}
