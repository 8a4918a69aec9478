"""`mijax.save`: writes a model to a folder that `mijax.load`, and where possible transformers, can read."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mijax.checkpoints.registry import FAMILIES
from mijax.checkpoints.table import Family
from mijax.checkpoints.tensors import get, named_parts, stored
from mijax.checkpoints.tokenizer import Tokenizer
from mijax.model.config import Config
from mijax.model.parameters import PARAMETER_DTYPES
from mijax.model.tokens import is_concrete
from mijax.model.transformer import Transformer, check_parameters


def save(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, *, shard_bytes: int = 2 * 10**9
) -> str:
    """Write a model and its tokenizer into a new folder, in Hugging Face's format.

    The folder appears whole or not at all. It holds config.json, the parameters as safetensors and the tokenizer's
    files.

    Args:
        model: the model.
        path: the folder, which must not exist.
        tokenizer: the model's tokenizer, if any.
        shard_bytes: the size at which parameters are split into several files, in bytes.

    Returns:
        The `model_type` that was written. It is the Hugging Face architecture that expresses the model exactly
        (`"gpt2"`, `"llama"`), which transformers reads too; else `"mijax"`, with a `UserWarning`, since only
        `mijax.load` reads that.

    Raises:
        FileExistsError: where `path` exists, as a link to nothing too.
        TypeError: for what is no transformer, tokenizer or size.
        ValueError: for parameters that do not fit the config (`mijax.model.transformer.check_parameters`), are not
            finite, are not in memory or have a dtype that `load` does not read, and for a size that is not positive.
        OSError: where the folder cannot be written.

    >>> import tempfile, jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> folder = tempfile.mkdtemp() + "/mine"
    >>> mj.save(model, folder)
    'gpt2'
    >>> bool((mj.load(folder)[0].W_E == model.W_E).all())
    True
    """
    path = Path(path).expanduser()
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; give the path of a new folder")
    _check_arguments(model, tokenizer, shard_bytes)
    check_parameters(model)
    _check_values(model)
    kind, family, config = _expressed(model.config)
    if kind == "mijax":
        warnings.warn(
            f"no Hugging Face architecture expresses this model: {path} is in mijax's own format", stacklevel=2
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"dtype": str(model.W_E.dtype)}, indent=2))
        if tokenizer is not None:
            tokenizer.save(folder)
        _write_shards(model, family, folder, shard_bytes)
        folder.rename(path)
    return kind


def _expressed(config: Config) -> tuple[str, Family, dict[str, Any]]:
    """The first family whose config.json reads back as this config; the last one, `mijax`, expresses every config."""
    for kind, family in FAMILIES.items():
        entries = family.entries(config)
        try:
            if entries is not None and family.config(entries := {"model_type": kind, **entries}) == config:
                return kind, family, entries
        except (KeyError, ValueError):
            continue  # the family cannot read what it writes for this config
    raise AssertionError("mijax's own format holds every config")


def _tensors(model: Transformer, family: Family) -> Iterator[tuple[str, int, Any]]:
    """Each tensor's name, its size in bytes, and a function that returns it in the family's arrangement of axes."""
    for weight in family.weights(model.config):
        arrays: list[Any] = [get(model, ours) for ours in weight.ours]
        if arrays[0] is None:
            continue
        named = list(named_parts(weight, model.config))
        for name, index in named:

            def make(index=index, arrays=arrays, weight=weight):
                parts = [np.asarray(a[index]) for a in arrays]
                return np.ascontiguousarray(stored(parts, weight, model.config))

            yield name, sum(a.nbytes for a in arrays) // len(named), make


def _write_shards(model: Transformer, family: Family, folder: Path, shard_bytes: int) -> None:
    """Write the parameters, in several files with an index where they take more than `shard_bytes`."""
    from safetensors.numpy import save_file

    shards, shard_size = [[]], 0
    for name, size, make in _tensors(model, family):
        if shards[-1] and shard_size + size > shard_bytes:
            shards, shard_size = [*shards, []], 0
        shards[-1].append((name, make))
        shard_size += size
    label = lambda i: "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    for i, shard in enumerate(shards):
        save_file({name: make() for name, make in shard}, folder / label(i), metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(size for _, size, _ in _tensors(model, family))
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: label(i) for i, s in enumerate(shards) for name, _ in s},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _check_arguments(model: Any, tokenizer: Any, shard_bytes: Any) -> None:
    """Refuse arguments of another kind before anything is written."""
    if type(model) is not Transformer:  # the code of a subclass would be lost
        raise TypeError(f"save writes a mijax.Transformer, given {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer must be a mijax.Tokenizer, given {type(tokenizer).__name__}")
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int | float | np.integer | np.floating):
        raise TypeError(f"shard_bytes must be a number of bytes, given {shard_bytes!r}")
    if not shard_bytes > 0:
        raise ValueError(f"shard_bytes must be positive, given {shard_bytes!r}")


def _check_values(model: Transformer) -> None:
    """Refuse parameters that are not in memory, not finite or of a dtype that `load` does not read."""
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(key_path)
        if not is_concrete(leaf) or not isinstance(leaf, (jax.Array, np.ndarray)):
            raise ValueError(f"the model's {name} is not in memory: it is a {type(leaf).__name__}")
        if leaf.dtype.name not in PARAMETER_DTYPES:
            raise ValueError(f"the model's {name} has dtype {leaf.dtype}, expected {', '.join(PARAMETER_DTYPES)}")
        if not np.isfinite(np.asarray(leaf, np.float64 if leaf.dtype.itemsize > 4 else np.float32)).all():
            raise ValueError(f"the model's {name} has values that are not finite")
