"""`mijax.load`: a model and its tokenizer from a bundled name, a hub id, a folder or a GGUF file."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mijax.arguments import check_flag
from mijax.checkpoints import bundled
from mijax.checkpoints.build import Tensors, build
from mijax.checkpoints.gguf import GGUF
from mijax.checkpoints.json_files import read_object
from mijax.checkpoints.registry import family_of
from mijax.checkpoints.table import Family
from mijax.checkpoints.tokenizer import FILES, Tokenizer
from mijax.model.config import Config
from mijax.model.parameters import parameter_dtype
from mijax.model.transformer import Transformer


def load(
    source: str | os.PathLike[str], *, dtype: Any = jnp.float32, revision: str | None = None, tokenizer: bool = True
) -> tuple[Transformer, Tokenizer | None]:
    """Load a pretrained model and its tokenizer.

    Files that are fetched are cached: hub models in the cache of `huggingface_hub`, the bundled model under
    `$MIJAX_CACHE` (default `~/.cache/mijax`).

    A `UserWarning` is given where the unembedding differs from the embedding to which the config ties it (the
    unembedding is used), and where the cached conversion of the bundled model has changed (it is made again).

    Args:
        source: `"smollm2-135m-instruct"`, which always means the same bytes; a local path to a Hugging Face folder
            (config.json with safetensors) or to a GGUF file; or an id on the Hugging Face hub (`"gpt2"`,
            `"owner/name"`).
        dtype: of the parameters: float64, float32, float16 or bfloat16.
        revision: a branch, tag or commit of a model on the hub.
        tokenizer: whether to load the tokenizer too.

    Returns:
        The model, and its tokenizer: `None` where the folder has none, and with `tokenizer=False`.

    Raises:
        FileNotFoundError: for a missing file.
        ConnectionError: where a model is not cached and cannot be fetched.
        ValueError: for files that are corrupt, quantised (except GGUF) or of an unsupported architecture. This
            includes a tensor that would not be used, and a key of config.json that is not read and may change what
            the model computes: both are named. For `dtype` float64 without `jax_enable_x64`.
        TypeError: for another `dtype`, and for `tokenizer` that is no boolean.

    >>> import tempfile, jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> folder = tempfile.mkdtemp() + "/mine"
    >>> kind = mj.save(model, folder)
    >>> model, tokenizer = mj.load(folder)
    >>> model.config.name, tokenizer
    ('mine', None)
    """
    dtype, tokenizer = parameter_dtype(dtype), check_flag(tokenizer, "tokenizer")
    name = str(source)
    path = Path(source).expanduser()
    if not name:
        raise ValueError("expected a name, a path or a hub id, given an empty string")
    if isinstance(source, str) and name in bundled.MODELS:  # even where the current folder holds a file of that name
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
        encoder = gguf.tokenizer() if tokenizer else None  # first, to refuse an unsupported one before the slow part
        tensors = Tensors(dict.fromkeys(gguf.names, "F32"), gguf.read)
        return _build(gguf.config, tensors, dtype, name, str(path)), encoder
    config = _read_json(path / "config.json")
    _check_adapter(path)
    _described(config, str(path))  # first, to refuse an unsupported one whatever else the folder lacks
    encoder = Tokenizer.from_folder(path) if tokenizer else None
    return _build(config, _safetensors(path), dtype, name, str(path)), encoder


def _build(config: dict, tensors: Tensors, dtype: Any, name: str, source: str) -> Transformer:
    """The model of a checkpoint, whose config gets the name `name`."""
    family, model_config = _described(config, source)
    return build(dataclasses.replace(model_config, name=name), family, tensors, dtype, source)


def _described(config: dict, source: str) -> tuple[Family, Config]:
    """The family and the `Config` that a config.json describes; `ValueError` where they are not supported."""
    family = family_of(config, source)
    try:
        return family, family.config(config)
    except KeyError as error:
        raise ValueError(f"{source}: config.json lacks the entry {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: config.json does not describe a model that is supported: {error}") from error


def _check_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which mijax does not apply: merge it into the weights,"
            " or remove it to load the model without"
        )


def _safetensors(folder: Path) -> Tensors:
    """A folder's tensors.

    Each read opens the file anew: pages of a memory map that were read count as memory of this process until the
    map is closed.
    """
    import safetensors

    shard_of, dtypes = {}, {}
    shards, weight_map = _shards(folder)
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118
                    if shard_of.setdefault(name, shard) != shard:
                        raise ValueError(f"{folder} holds {name} twice: in {shard_of[name]} and in {shard}")
                    dtypes[name] = file.get_slice(name).get_dtype()
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{folder / shard} is not a readable safetensors file (truncated?): {error}") from error
    misplaced = [
        name for name in sorted({**shard_of, **weight_map}) if weight_map and shard_of.get(name) != weight_map.get(name)
    ]
    if misplaced:
        summary = ", ".join(
            f"{n} (in {shard_of.get(n, 'no file')}, by the index in {weight_map.get(n, 'none')})" for n in misplaced[:8]
        )
        raise ValueError(f"{folder}: the index of shards does not fit them: {summary}")

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(folder / shard_of[name], framework="numpy") as file:
            return file.get_tensor(name)

    return Tensors(dtypes, read)


def _shards(folder: Path) -> tuple[Sequence[str], Mapping[str, str]]:
    """The names of the safetensors files, and the index's map from tensors to files (empty without an index)."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return [single.name], {}
        contents = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} holds no model.safetensors, nor an index of shards; it holds {contents}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} must hold a weight_map from names of tensors to names of files")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]
    if outside:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    if single.exists() and single.name not in shards:
        raise ValueError(f"{folder} holds both {single.name} and an index of other files; remove one of the two")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(missing)} that its index names")
    return shards, weight_map


def _read_json(path: Path) -> dict:
    """The object in a JSON file that must exist."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    return read_object(path)


# stages of a fetch: patterns of files to fetch, and to leave out; the config is checked after the first stage
_HUB_FILES = (
    (["config.json", "adapter_config.json"], "*/*"),
    (["model*.safetensors", "model.safetensors.index.json", *(f for f in FILES if "/" not in f)], "*/*"),
    ([f for f in FILES if "/" in f], None),
)


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a model in the cache of `huggingface_hub`, to which missing files are fetched."""
    config_only, *rest = _HUB_FILES
    folder = _fetch(name, revision, *config_only)
    _check_adapter(folder)
    _described(_read_json(folder / "config.json"), name)
    for patterns in rest:
        folder = _fetch(name, revision, *patterns)
    return folder


def _fetch(name: str, revision: str | None, allowed: list[str], ignored: str | None) -> Path:
    """Fetch the files of a model that match the patterns, where they are not cached; returns the model's folder."""
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
