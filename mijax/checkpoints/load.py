"""`mijax.load`: a model and its tokenizer from a bundled name, a hub id, a folder or a GGUF file."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from mijax.arguments import check_flag
from mijax.checkpoints import bundled
from mijax.checkpoints.build import buffers_in, build
from mijax.checkpoints.contents import Tensors
from mijax.checkpoints.gguf import GGUF
from mijax.checkpoints.hub import fetch
from mijax.checkpoints.lora import FILES as ADAPTER_FILES
from mijax.checkpoints.lora import merged
from mijax.checkpoints.registry import family_of
from mijax.checkpoints.shards import tensors_of
from mijax.checkpoints.table import Family
from mijax.checkpoints.tokenizer import FILES, Tokenizer
from mijax.files import check_file, optional_object, read_object
from mijax.model.config import Config
from mijax.model.parameters import parameter_dtype
from mijax.model.transformer import Transformer
from mijax.rules import shown


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    adapter: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    token: str | None = None,
    tokenizer: bool = True,
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
        adapter: a LoRA adapter in the layout of PEFT, which is merged into the weights: a folder with
            adapter_config.json and adapter_model.safetensors, or an id on the hub.
        mesh: the devices among which the parameters are divided: along the mesh's last axis heads, neurons and
            vocabulary, where their number is a multiple of its size; all else is on every device. Of a safetensors
            folder each device's part is read by itself.
        revision: a branch, tag or commit of a model on the hub.
        token: an access token of the hub, by default the one that `hf auth login` or `$HF_TOKEN` gives.
        tokenizer: whether to load the tokenizer too.

    Returns:
        The model, and its tokenizer: `None` where the folder has none, and with `tokenizer=False`.

    Raises:
        FileNotFoundError: for a missing file.
        ConnectionError: where a model is not cached and cannot be fetched.
        ValueError: for files that are corrupt, quantised (except GGUF) or of an unsupported architecture. This
            includes a tensor that would not be used, and a key of config.json that is not read and may change what
            the model computes: both are named. For an adapter that does not fit, or is of another kind than LoRA.
            For `dtype` float64 without `jax_enable_x64`.
        TypeError: for another `dtype`, for `tokenizer` that is no boolean, and `mesh` that is no mesh.

    >>> import tempfile, jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> folder = tempfile.mkdtemp() + "/mine"
    >>> kind = mj.save(model, folder)
    >>> model, tokenizer = mj.load(folder)
    >>> model.config.name, tokenizer
    ('mine', None)
    """
    dtype, tokenizer = parameter_dtype(dtype), check_flag(tokenizer, "tokenizer")
    if not (mesh is None or isinstance(mesh, Mesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, given {type(mesh).__name__}")
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
        path = _from_hub(name, revision, token, adapter is not None)
    if not path.is_dir():
        check_file(path)
        gguf = GGUF(path)
        encoder = gguf.tokenizer() if tokenizer else None  # first, to refuse an unsupported one before the slow part
        tensors = Tensors(gguf.stored, gguf.read)
        config = gguf.config
    else:
        _check_adapter(path, adapter is not None)
        config = read_object(path / "config.json")
        _described(config, str(path))  # first, to refuse an unsupported one whatever else the folder lacks
        encoder = Tokenizer.from_folder(path) if tokenizer else None
        tensors = tensors_of(path)
    where = str(path)
    family, described = _described(config, where)
    if path.is_dir():
        tensors = family.decode(tensors, config, where)
    if adapter is not None:
        folder = _adapter_folder(adapter, token)
        name, where = f"{name} with {Path(adapter).expanduser().resolve().name}", f"{where} with {folder}"
        tensors = merged(tensors, folder, family, described)
    described = dataclasses.replace(described, name=name, origin=_origin(config, described, family, tensors))
    return build(described, family, tensors, dtype, where, mesh), encoder


def _origin(config: dict, described: Config, family: Family, tensors: Tensors) -> str:
    """The family, and what of the checkpoint has no effect."""
    keys, dropped = family.ignored(config), sorted(buffers_in(described, family, tensors))
    names = f"{', '.join(dropped[:2])}{', ...' if len(dropped) > 2 else ''}"
    ignored = [f"keys {', '.join(keys)}"] if keys else []
    ignored += [f"{len(dropped)} buffers ({names})"] if dropped else []
    return f"loaded as {family.name}" + (f", without effect: {'; '.join(ignored)}" if ignored else "")


def _described(config: dict, source: str) -> tuple[Family, Config]:
    """The family and the `Config` that a config.json describes; `ValueError` where they are not supported."""
    family = family_of(config, source)
    try:
        return family, family.config(config)
    except KeyError as error:
        raise ValueError(f"{source}: config.json lacks the entry {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: config.json does not describe a model that is supported: {error}") from error


def _check_adapter(folder: Path, merging: bool) -> None:
    """Refuse a folder with an adapter, unless one is to be merged."""
    if not os.path.lexists(folder / "adapter_config.json"):
        return
    if not os.path.lexists(folder / "config.json"):
        base = shown(
            optional_object(folder / "adapter_config.json").get("base_model_name_or_path")
            or "the model it was trained on"
        )
        raise ValueError(f"{folder} holds an adapter alone: give mijax.load {base}, with this as adapter=")
    if not merging:
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json) beside the model: give it as adapter= too, to merge it into"
            " the weights, or remove it to load the model without"
        )


def _adapter_folder(adapter: str | os.PathLike[str], token: str | None) -> Path:
    """The folder of an adapter, fetched where it is none here."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path
    if isinstance(adapter, os.PathLike) or path.is_absolute() or str(adapter).startswith(("./", "../", "~")):
        raise FileNotFoundError(f"no such folder: {path}")
    return fetch(str(adapter), ADAPTER_FILES, "*/*", None, token)


# stages of a fetch: patterns of files to fetch, and to leave out; the config is checked after the first stage
_HUB_FILES = (
    (["config.json", "adapter_config.json"], "*/*"),
    (["model*.safetensors", "model.safetensors.index.json", *(f for f in FILES if "/" not in f)], "*/*"),
    ([f for f in FILES if "/" in f], None),
)


def _from_hub(name: str, revision: str | None, token: str | None, merging: bool) -> Path:
    """The folder of a model in the cache of `huggingface_hub`, to which missing files are fetched."""
    config_only, *rest = _HUB_FILES
    folder = fetch(name, *config_only, revision, token)
    _check_adapter(folder, merging)
    _described(read_object(folder / "config.json"), name)
    for patterns in rest:
        folder = fetch(name, *patterns, revision, token)
    return folder
