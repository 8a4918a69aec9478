"""`mijax.load`: a name, a hub id, a folder or a GGUF file, to a model and its tokenizer."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mijax.checkpoints import bundled
from mijax.checkpoints.build import Tensors, build
from mijax.checkpoints.families import Family, family_of
from mijax.checkpoints.gguf import GGUF
from mijax.checkpoints.json_files import read_object
from mijax.checkpoints.tokenizer import FILES, Tokenizer
from mijax.model.config import Config
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
    can be fetched, `ValueError` for files that are corrupt, quantised (but for GGUF) or of an unsupported architecture. That
    includes a tensor that would not be used, and a key of config.json that is not read and may change what the model
    computes: both are named. A `UserWarning` says where a head differs from the embedding to which the config ties it (the
    head is used), and where the kept conversion of the bundled model had changed (it is made again).
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
        text = gguf.tokenizer() if tokenizer else None  # first: one that is not supported is no matter of minutes
        tensors = Tensors(dict.fromkeys(gguf.names, "F32"), gguf.read)
        return _build(gguf.config, tensors, dtype, name, str(path)), text
    config = _read_json(path / "config.json")
    _check_adapter(path)
    text = Tokenizer.from_folder(path) if tokenizer else None
    return _build(config, _safetensors(path), dtype, name, str(path)), text


def _build(config: dict, tensors: Tensors, dtype: Any, name: str, source: str) -> Transformer:
    family, ours = _described(config, source)
    return build(dataclasses.replace(ours, name=name), family, tensors, dtype, source)


def _described(config: dict, source: str) -> tuple[Family, Config]:
    """What a config.json describes; `ValueError` where that is nothing that mijax runs."""
    family = family_of(config, source)
    try:
        return family, family.config(config)
    except KeyError as error:
        raise ValueError(f"{source}: config.json lacks the entry {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: config.json does not describe a model that is supported: {error}") from error


def _check_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which mijax does not apply: merge it into the weights,"
            " or remove it to load the model without"
        )


def _safetensors(folder: Path) -> Tensors:
    """A folder's tensors. (For each that is read the file is mapped anew: what was read of a map counts as this
    process's memory until it is closed.)"""
    import safetensors

    where, dtypes = {}, {}
    shards, placed = _shards(folder)
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    if where.setdefault(name, shard) != shard:
                        raise ValueError(f"{folder} holds {name} twice: in {where[name]} and in {shard}")
                    dtypes[name] = file.get_slice(name).get_dtype()
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{folder / shard} is not a readable safetensors file (truncated?): {error}") from error
    off = [name for name in sorted({**where, **placed}) if placed and where.get(name) != placed.get(name)]
    if off:
        shown = ", ".join(
            f"{n} (in {where.get(n, 'no file')}, by the index in {placed.get(n, 'none')})" for n in off[:8]
        )
        raise ValueError(f"{folder}: the index of shards does not fit them: {shown}")

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(folder / where[name], framework="numpy") as file:
            return file.get_tensor(name)

    return Tensors(dtypes, read)


def _shards(folder: Path) -> tuple[Sequence[str], Mapping[str, str]]:
    """The names of the files of weights, and in which of them the index, if there is one, places each tensor."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return [single.name], {}
        present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} holds no model.safetensors, nor an index of shards; it holds {present}")
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, Mapping) or not all(isinstance(shard, str) for shard in placed.values()):
        raise ValueError(f"{index} must hold a weight_map from names of tensors to names of files")
    shards = sorted(set(placed.values()))
    if single.exists() and single.name not in shards:
        raise ValueError(f"{folder} holds both {single.name} and an index of other files; remove one of the two")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
    return shards, placed


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    return read_object(path)


_HUB_FILES = (  # patterns of what is fetched, and of what is not, in this order: the config is checked before the rest
    (["config.json", "adapter_config.json"], "*/*"),
    (["model*.safetensors", "model.safetensors.index.json", *(f for f in FILES if "/" not in f)], "*/*"),
    ([f for f in FILES if "/" in f], None),
)


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder where `huggingface_hub` keeps a model, of which what is not there yet is fetched."""
    config_only, *rest = _HUB_FILES
    folder = _fetch(name, revision, *config_only)
    _check_adapter(folder)
    _described(_read_json(folder / "config.json"), name)
    for patterns in rest:
        folder = _fetch(name, revision, *patterns)
    return folder


def _fetch(name: str, revision: str | None, allowed: list[str], ignored: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored)
        )
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is neither a path, nor a known name ({', '.join(bundled.MODELS)}), nor a hub id"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the Hugging Face hub has no model {name!r} that you may read") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the Hugging Face hub has no revision {revision!r} of {name!r}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{name!r} is not cached and the Hugging Face hub cannot be reached. Connect once, or copy the model's"
            " folder (config.json, *.safetensors, tokenizer.json) here and give mijax.load its path"
        ) from error
