"""LoRA adapters in the layout of PEFT, merged into the tensors of the checkpoint that they were trained on.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685; Kalajdzievski 2023, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732, for `use_rslora`.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mijax.checkpoints.contents import Lookup, Stored, Tensors
from mijax.checkpoints.shards import tensors_in
from mijax.checkpoints.table import Family
from mijax.checkpoints.tensors import FLOATS
from mijax.files import read_object
from mijax.model.config import Config
from mijax.rules import FLAG, NULL, POSITIVE, Rule, either, faults, mapping, only, shown

CONFIG, WEIGHTS = FILES = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter."""
_START = "base_model.model."
_LOW_RANK = re.compile(r"(.*)\.lora_(?:(A|B)\.weight|embedding_(A|B))$")
_WHOLE = re.compile(r"(.*?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(weight|bias)$")
_PATTERNS = either(
    mapping(POSITIVE)._replace(expected="an object that maps patterns of names to positive numbers"), NULL
)
_RULES = {
    "peft_type": only("LORA"),
    "r": POSITIVE,
    "lora_alpha": POSITIVE,
    "rank_pattern": _PATTERNS,
    "alpha_pattern": _PATTERNS,
    "use_rslora": either(FLAG, NULL),
    "ensure_weight_tying": either(FLAG, NULL),
    "init_lora_weights": Rule(
        "a start that leaves the base weights as they are (true, false, 'gaussian', 'eva', 'orthogonal')",
        only(True, False, "gaussian", "eva", "orthogonal").accepts,
    ),
}
_ONLY_TRAINING = (  # what is chosen by these keys stands in the names and shapes of the tensors
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "lora_dropout", "fan_in_fan_out",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "lora_ga_config", "qalora_group_size", "runtime_config",
)  # fmt: skip


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
    adapter = tensors_in(folder / WEIGHTS)
    lookup = Lookup(family.prefix, {*tensors.stored, str(family.head)})  # which a tied checkpoint may lack
    low_rank, replaced = _by_target(adapter, folder, lambda name: lookup(name) or lookup(family.prefix + name))
    absent = low_rank.keys() - tensors.stored.keys() - replaced.keys()
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

    stored = {**tensors.stored, **{name: adapter.stored[theirs] for name, theirs in replaced.items()}}
    changes = {
        name: _Change(
            halves["A"],
            halves["B"],
            ".lora_embedding_" in halves["A"] or (family.inputs_first and name != family.head),
            _scale(settings, halves["A"], adapter.stored[halves["A"]].shape, folder),
        )
        for name, halves in low_rank.items()
    }
    _check_shapes(changes, stored, adapter, folder)

    def read(name: str) -> np.ndarray:
        tensor = adapter.read(replaced[name]) if name in replaced else tensors.read(name)
        if name not in changes:
            return tensor
        tensor = tensor.astype(np.float64 if tensor.dtype == np.float64 else np.float32)
        a, b = (adapter.read(half).astype(tensor.dtype) for half in changes[name][:2])
        with np.errstate(all="ignore"):  # what is not finite is reported by `build`
            change = tensor.dtype.type(changes[name].scale) * (b @ a)
            return tensor + (change.T if changes[name].transposed else change)

    return Tensors(stored, read)


class _Change(NamedTuple):
    """A low-rank change of a tensor: the names of its halves, whether their product is transposed, and its factor."""

    a: str
    b: str
    transposed: bool
    scale: float


def _check_shapes(changes: Mapping[str, _Change], stored: Mapping[str, Stored], adapter: Tensors, folder: Path) -> None:
    """Refuse halves whose product does not have the shape of the tensor that it changes."""
    for name, change in changes.items():
        a, b = adapter.stored[change.a].shape, adapter.stored[change.b].shape
        product = (b[0], a[1]) if len(a) == len(b) == 2 and a[0] == b[1] else ()
        if (product[::-1] if change.transposed else product) != stored[name].shape:
            raise ValueError(
                f"{folder / WEIGHTS}: the low-rank maps of {name} have shapes {a} and {b}, which do not give its shape"
                f" {stored[name].shape}"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """The config of the adapter, checked."""
    if not os.path.lexists(folder / CONFIG):
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is no adapter")
    if not os.path.lexists(folder / WEIGHTS):
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}. An adapter_model.bin is a pickle, which can run any code when it is read:"
            " save it anew with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    settings = read_object(folder / CONFIG)
    wrong = [f"the key {key} is missing" for key in ("peft_type", "r", "lora_alpha") if key not in settings]
    wrong += faults(settings, _RULES)
    for key, value in settings.items():
        if key not in _RULES and key not in _ONLY_TRAINING and value:  # null, false and empty say that there is none
            wrong.append(f"{key}={shown(value)} is not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) if _PATTERNS.accepts(settings.get(key)) else None
        wrong += [f"{key} holds the pattern {shown(p)}, {_SIMPLE}" for p in patterns or {} if not _is_simple(p)]
    if wrong:
        raise ValueError(f"{folder / CONFIG} describes an adapter that is not supported: {'; '.join(wrong)}")
    return settings


_SIMPLE = "expected a regular expression of at most 200 characters and three repetitions, none of them of a group"


def _is_simple(pattern: str) -> bool:
    """Whether a regular expression takes no more than some million steps on the name of a module.

    Groups that are repeated can take exponentially many.
    """
    if len(pattern) > 200 or re.search(r"\)[*+?{]|\\\d|\(\?", pattern) or len(re.findall(r"[*+?{]", pattern)) > 3:
        return False
    try:
        return re.compile(pattern) is not None
    except (re.error, OverflowError):
        return False


def _by_target(
    adapter: Tensors, folder: Path, target: Callable[[str], str | None]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The names of the adapter's tensors, by the tensor of the checkpoint that they change.

    Args:
        adapter: the adapter's tensors.
        folder: the adapter's folder.
        target: the name in the checkpoint of a tensor's full name; `None` where it holds none.

    Returns:
        Of each weight that gets a low-rank change the names of the halves `"A"` and `"B"`; and the names of the
        tensors that are put in the place of one of the checkpoint.
    """
    low_rank: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    wrong = []
    for name, (dtype, _) in adapter.stored.items():
        inner = name.removeprefix(_START)
        half, whole = _LOW_RANK.match(inner), _WHOLE.match(inner)
        full = f"{half[1]}.weight" if half else f"{whole[1]}.{whole[2]}" if whole else inner
        changed = target(full)
        if dtype not in FLOATS:
            wrong.append(f"{name} is stored as {dtype}, which is no floating point that is read ({', '.join(FLOATS)})")
        elif changed is None:
            wrong.append(f"{name} fits no tensor of the checkpoint")
        elif half:
            other = low_rank.setdefault(changed, {}).setdefault(half[2] or half[3], name)
            wrong += [f"{name} and {other} are for the same tensor"] if other != name else []
        else:
            other = replaced.setdefault(changed, name)
            wrong += [f"{name} and {other} are for the same tensor"] if other != name else []
    wrong += [f"{next(iter(pair.values()))} lacks its other half" for pair in low_rank.values() if len(pair) != 2]
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} does not fit the checkpoint: {'; '.join(wrong[:8])}")
    return low_rank, replaced


def _scale(settings: Mapping[str, Any], name: str, shape: tuple[int, ...], folder: Path) -> float:
    """The factor of a low-rank product, whose half A is the tensor `name` of this shape."""
    rank = shape[0] if shape else 0
    module = _LOW_RANK.sub(r"\1", name.removeprefix(_START))

    def setting(key: str, patterns: str) -> int | float:
        matching = (v for k, v in (settings.get(patterns) or {}).items() if re.match(rf"(.*\.)?({k})$", module))
        return next(matching, settings[key])

    if rank != setting("r", "rank_pattern"):
        raise ValueError(
            f"{folder}: the low-rank maps of {module} have rank {rank}, and {CONFIG} says {setting('r', 'rank_pattern')}"
        )
    return setting("lora_alpha", "alpha_pattern") / (rank**0.5 if settings.get("use_rslora") else rank)
