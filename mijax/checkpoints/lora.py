"""LoRA adapters in the layout of PEFT, merged into the tensors of the checkpoint that they were trained on.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685; Kalajdzievski 2023, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, for `use_rslora`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from mijax.checkpoints.contents import Lookup, Tensors
from mijax.checkpoints.json_files import read_object
from mijax.checkpoints.table import Family
from mijax.checkpoints.tensors import FLOATS
from mijax.model.config import Config

CONFIG, WEIGHTS = FILES = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter."""
_START = "base_model.model."
_LOW_RANK = re.compile(r"(.*)\.lora_(?:(A|B)\.weight|embedding_(A|B))$")
_WHOLE = re.compile(r"(.*?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)$")
_READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "ensure_weight_tying",
    "init_lora_weights",
)
_ONLY_TRAINING = (  # what is chosen by these keys stands in the names and shapes of the tensors
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "lora_dropout", "fan_in_fan_out",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "lora_ga_config", "qalora_group_size", "runtime_config",
)  # fmt: skip
_UNCHANGED_BASE = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # other ways to start an adapter change the base weights


def merged(tensors: Tensors, folder: Path, family: Family, config: Config) -> Tensors:
    """The tensors of a checkpoint with an adapter merged into them, each when it is read.

    A map's weight becomes `W + alpha / r * B @ A`, with `r` the rank and `alpha / sqrt(r)` where the adapter has
    `use_rslora`, in float32 or the weight's own precision if that is higher. Biases and whole modules that were
    trained beside the low-rank maps replace those of the checkpoint.

    Args:
        tensors: the checkpoint.
        folder: the adapter's folder.
        family: the checkpoint's family.
        config: the checkpoint's config.

    Returns:
        The tensors.

    Raises:
        FileNotFoundError: where the adapter lacks a file.
        ValueError: for another kind of adapter, a key of its config that changes what it computes and is not
            supported, a tensor that fits none of the checkpoint, and an adapter that changes an embedding to which
            the unembedding is tied without saying that it changes both.
    """
    settings = _settings(folder)
    lookup = Lookup(family.prefix, {**tensors.dtypes, str(family.head): ""})  # which a tied checkpoint may lack
    low_rank, replaced = _by_target(folder, lambda name: lookup(name) or lookup(family.prefix + name))
    absent = low_rank.keys() - tensors.dtypes.keys() - replaced.keys()
    if absent:
        raise ValueError(f"{folder} changes {', '.join(sorted(absent))}, which the checkpoint does not hold")
    embedding = next(lookup(w.theirs) for w in family.weights(config) if w.ours == ("W_E",))
    changed = low_rank.keys() | replaced.keys()
    says_both = family.head in changed or settings.get("ensure_weight_tying")
    if config.tied_unembed and embedding in changed and not says_both:
        raise ValueError(
            f"{folder} changes {embedding}, to which the unembedding is tied, and does not say whether it changes both"
            " (ensure_weight_tying): save the merged model with PEFT's merge_and_unload"
        )

    def read(name: str) -> np.ndarray:
        tensor = _read(folder, replaced[name]) if name in replaced else tensors.read(name)
        if name not in low_rank:
            return tensor
        tensor = tensor.astype(np.float64 if tensor.dtype == np.float64 else np.float32)
        a, b = (_read(folder, low_rank[name][half]).astype(tensor.dtype) for half in "AB")
        with np.errstate(all="ignore"):  # what is not finite is reported by `build`
            change = b @ a if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] else np.zeros(0)
        is_embedding = ".lora_embedding_" in low_rank[name]["A"]
        if is_embedding or (family.inputs_first and name != family.head):
            change = change.T
        if change.shape != tensor.shape:
            raise ValueError(
                f"{folder / WEIGHTS}: the low-rank maps of {name} have shapes {a.shape} and {b.shape}, which do not"
                f" give its shape {tensor.shape}"
            )
        return tensor + tensor.dtype.type(_scale(settings, low_rank[name]["A"], a.shape[0], folder)) * change

    dtypes = {name: "F32" if name in low_rank else dtype for name, dtype in tensors.dtypes.items()}
    return Tensors(dtypes | dict.fromkeys(replaced, "F32"), read)


def _settings(folder: Path) -> dict[str, Any]:
    """The config of the adapter, checked."""
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is no adapter")
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}. An adapter_model.bin is a pickle, which can run any code when it is read:"
            " save it anew with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    settings = read_object(folder / CONFIG)
    faults = [] if settings.get("peft_type") == "LORA" else [f"peft_type={settings.get('peft_type')!r} (only 'LORA')"]
    if settings.get("init_lora_weights", True) not in _UNCHANGED_BASE:
        faults.append(f"init_lora_weights={settings['init_lora_weights']!r}, which changes the base weights")
    for key, value in settings.items():
        if key not in _READ and key not in _ONLY_TRAINING and value:  # null, false and empty say that there is none
            faults.append(f"{key}={value!r}")
    for key in ("r", "lora_alpha"):
        if type(settings.get(key)) not in (int, float) or not settings[key] > 0:
            faults.append(f"{key}={settings.get(key)!r}, which must be a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        if not _are_patterns(settings.get(key) or {}):
            faults.append(f"{key}={settings[key]!r}, which must map patterns of names to positive numbers")
    if faults:
        raise ValueError(f"{folder / CONFIG} describes an adapter that is not supported: {', '.join(faults)}")
    return settings


def _are_patterns(patterns: Any) -> bool:
    """Whether a value maps regular expressions to positive numbers."""
    if not isinstance(patterns, Mapping):
        return False
    try:
        return all(re.compile(key) and type(value) in (int, float) and value > 0 for key, value in patterns.items())
    except re.error:
        return False


def _by_target(folder: Path, target: Callable[[str], str | None]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The names of the adapter's tensors, by the tensor of the checkpoint that they change.

    Args:
        folder: the adapter's folder.
        target: the name in the checkpoint of a tensor's full name; `None` where it holds none.

    Returns:
        Of each weight that gets a low-rank change the names of the halves `"A"` and `"B"`; and the names of the
        tensors that are put in the place of one of the checkpoint.
    """
    low_rank: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    faults = []
    for name, dtype in _stored(folder).items():
        inner = name.removeprefix(_START)
        half, whole = _LOW_RANK.match(inner), _WHOLE.match(inner)
        full = f"{half[1]}.weight" if half else f"{whole[1]}.{whole[2]}" if whole else inner
        changed = target(full)
        if dtype not in FLOATS:
            faults.append(f"{name} is stored as {dtype}, which is no floating point that is read ({', '.join(FLOATS)})")
        elif changed is None:
            faults.append(f"{name} fits no tensor of the checkpoint")
        elif half:
            low_rank.setdefault(changed, {})[half[2] or half[3]] = name
        else:
            replaced[changed] = name
    faults += [f"{next(iter(pair.values()))} lacks its other half" for pair in low_rank.values() if len(pair) != 2]
    if faults:
        raise ValueError(f"{folder / WEIGHTS} does not fit the checkpoint: {'; '.join(faults[:8])}")
    return low_rank, replaced


def _stored(folder: Path) -> dict[str, str]:
    """The dtypes of the adapter's tensors."""
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is not a readable safetensors file (truncated?): {error}") from error


def _read(folder: Path, name: str) -> np.ndarray:
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        return file.get_tensor(name)


def _scale(settings: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """The factor of a low-rank product, whose half A is the tensor `name`."""
    module = _LOW_RANK.sub(r"\1", name.removeprefix(_START))

    def setting(key: str, patterns: str) -> int | float:
        matching = (v for k, v in (settings.get(patterns) or {}).items() if re.match(rf"(.*\.)?({k})$", module))
        return next(matching, settings[key])

    if rank != setting("r", "rank_pattern"):
        raise ValueError(
            f"{folder}: the low-rank maps of {module} have rank {rank}, and {CONFIG} says {setting('r', 'rank_pattern')}"
        )
    return setting("lora_alpha", "alpha_pattern") / (rank**0.5 if settings.get("use_rslora") else rank)
