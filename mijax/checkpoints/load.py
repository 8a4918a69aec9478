"""`mijax.load`: a name, a hub id, a folder or a GGUF file, to a model and its tokenizer."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mijax.checkpoints import bundled
from mijax.checkpoints.build import build
from mijax.checkpoints.families import family_of
from mijax.checkpoints.gguf import GGUF
from mijax.checkpoints.tokenizer import Tokenizer
from mijax.model.transformer import Transformer


def load(
    source: str | os.PathLike, *, dtype: Any = jnp.float32, revision: str | None = None, tokenizer: bool = True
) -> tuple[Transformer, Tokenizer | None]:
    """Load a pretrained model and its tokenizer (`None` where the folder holds none).

    `source` is `"smollm2-135m-instruct"`, which always means the same bytes; a local path to a
    Hugging Face folder (config.json with safetensors) or to a GGUF file; or an id on the Hugging Face
    hub (`"gpt2"`, `"owner/name"`), of which `revision` picks a branch, tag or commit. `dtype` is that of
    the parameters. With `tokenizer=False` the second value is `None`.

    What is fetched is cached: hub models where `huggingface_hub` keeps them, the bundled model under
    `$MIJAX_CACHE` (default `~/.cache/mijax`).

    Raises `FileNotFoundError` for a missing file, `ConnectionError` where nothing is cached and nothing
    can be fetched, `ValueError` for files that are corrupt or of an unsupported architecture.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating point, given {dtype}")
    name = str(source)
    path = Path(source).expanduser()
    if not name:
        raise ValueError("expected a name, a path or a hub id, given an empty string")
    if isinstance(source, str) and name in bundled.MODELS:  # whatever stands in the current folder
        path = bundled.fetch(name)
    elif path.exists():
        name = path.resolve().stem if path.is_file() else path.resolve().name
    elif (
        isinstance(source, os.PathLike)
        or path.is_absolute()
        or name.startswith(("./", "../", "~"))
        or path.suffix == ".gguf"
    ):
        raise FileNotFoundError(f"no such file or folder: {path}")
    else:
        path = _from_hub(name, revision)
    if path.is_file():
        gguf = GGUF(path)
        model = _build(gguf.config, gguf.names, gguf.read, dtype, name, str(path))
        return model, gguf.tokenizer() if tokenizer else None
    names, read = _safetensors(path)
    model = _build(_read_json(path / "config.json"), names, read, dtype, name, str(path))
    return model, Tokenizer.from_folder(path) if tokenizer else None


def _build(config: dict, names: list[str], read: Callable, dtype: Any, name: str, source: str) -> Transformer:
    import dataclasses

    family = family_of(config, source)
    try:
        ours = family.config(config)
    except KeyError as error:
        raise ValueError(f"{source}: config.json lacks the entry {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: config.json does not describe a model: {error}") from error
    return build(dataclasses.replace(ours, name=name), family, names, read, dtype, source)


def _safetensors(folder: Path) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """The names of a folder's tensors, and a function that reads one. (Each time the file is mapped anew: what
    was read of a map counts as this process's memory until it is closed.)"""
    import safetensors

    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
    elif single.exists():
        shards = [single.name]
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} holds no model.safetensors, nor an index of shards; it holds {found}")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
    where = {}
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="numpy") as file:
                where |= dict.fromkeys(file.keys(), folder / shard)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{folder / shard} is not a readable safetensors file (truncated?): {error}") from error

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(where[name], framework="numpy") as file:
            return file.get_tensor(name)

    return list(where), read


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        read = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} must hold an object, given {type(read).__name__}")
    return read


def _from_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*.json", "*.jinja"]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
        )
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is neither a path, nor a known name ({', '.join(bundled.MODELS)}), nor a hub id"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the Hugging Face hub has no model {name!r} that you may read") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{name!r} is not cached and the Hugging Face hub cannot be reached. Connect once, or copy the model's"
            " folder (config.json, *.safetensors, tokenizer.json) here and give mijax.load its path"
        ) from error
