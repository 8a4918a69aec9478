"""What a family of architectures is: its config entries, the tensors of its checkpoints, and their names in mijax."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mijax.checkpoints.keys import Harmless, Key, check_keys, read_fields, write_fields
from mijax.model.config import Config


class Convert(NamedTuple):
    """How a checkpoint's tensor, its axes already arranged, becomes parameters, and back.

    Attributes:
        read: from the arranged tensor to one array for each of `Weight.ours`.
        write: from these arrays to the arranged tensor.
    """

    read: Callable[[np.ndarray, Config], Sequence[np.ndarray]]
    write: Callable[[Sequence[np.ndarray], Config], np.ndarray]


def _apart(x: np.ndarray, _: Config) -> Sequence[np.ndarray]:
    return list(x)


def _together(parts: Sequence[np.ndarray], _: Config) -> np.ndarray:
    return np.stack(parts)


ALONE = Convert(lambda x, _: [x], lambda parts, _: parts[0])
"""The tensor is one parameter."""
FUSED = Convert(_apart, _together)
"""The tensor holds several parameters of one shape, along its first axis once it is arranged."""


class Weight(NamedTuple):
    """The tensor of a checkpoint that holds a parameter, and how its axes are arranged there.

    Attributes:
        ours: dotted paths into `Transformer`; several where the checkpoint's tensor fuses several parameters.
        theirs: the tensor's name in the checkpoint, with `{layer}` for parameters of the blocks.
        axes: an einops pattern that arranges the checkpoint's tensor; from right to left it gives the inverse.
        convert: what is done with the arranged tensor.
    """

    ours: tuple[str, ...]
    theirs: str
    axes: str
    convert: Convert = ALONE


class Buffer(NamedTuple):
    """A tensor that checkpoints may hold beside parameters: dropped after a check that it repeats the config.

    Attributes:
        theirs: the tensor's name in the checkpoint, with `{layer}` where there is one per layer.
        redundant: whether a tensor repeats what a config says.
        meaning: what the tensor must be, for error messages.
    """

    theirs: str
    redundant: Callable[[Config, np.ndarray], bool]
    meaning: str


def _nothing(c: Any, fields: Any = None) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, a `model_type` of `config.json`: how its config is read and written, and where its weights are.

    Attributes:
        name: the `model_type`.
        weights: the table of parameters for a `Config`, which may list some that the config does not have.
        keys: the keys of `config.json` that give a field of `Config` each.
        fixed: the fields of `Config` that are the same in all models of the family.
        further: the other keys that are read, by `read`.
        read: from the contents of the file, and the fields read by `keys`, to further fields.
        write: from a `Config` to the entries beside `keys`; `None` where transformers would refuse them. Where reading
            gives another `Config`, the family cannot express the given one.
        harmless: the other keys that are accepted, and at which values.
        prefix: the start of tensors' names, which checkpoints of the bare model leave out.
        buffers: tensors that are checked and dropped.
        head: the tensor of the unembedding, which a checkpoint may hold although the config ties it to the
            embedding.
    """

    name: str
    weights: Callable[[Config], list[Weight]]
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    further: frozenset[str] = frozenset()
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = _nothing
    write: Callable[[Config], dict[str, Any] | None] = _nothing
    harmless: Mapping[str, Harmless] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    buffers: tuple[Buffer, ...] = ()
    head: str | None = None

    def config(self, c: Mapping[str, Any]) -> Config:
        """Read a `config.json`.

        Args:
            c: its contents.

        Returns:
            The config.

        Raises:
            KeyError: for a required key that is missing.
            ValueError: for a key that is not known or at an unsupported value, and for invalid values.
        """
        check_keys(c, self.name, frozenset(self.keys) | self.further, self.harmless)
        fields = {**self.fixed, **read_fields(c, self.keys)}
        return Config(**fields | self.read(c, fields))

    def entries(self, config: Config) -> dict[str, Any] | None:
        """The contents of a `config.json` for a config.

        Args:
            config: the config.

        Returns:
            The entries; `None` where transformers would refuse them.
        """
        written = self.write(config)
        return None if written is None else {**write_fields(config, self.keys), **written}


def norm(ours: str, theirs: str, bias: bool = True) -> list[Weight]:
    """Weight and bias of a norm.

    Args:
        ours: the path of the norm in `Transformer`.
        theirs: its name in the checkpoint.
        bias: whether it has a bias.
    """
    parts = ("weight", "bias") if bias else ("weight",)
    return [Weight((f"{ours}.{part}",), f"{theirs}.{part}", "d -> d") for part in parts]


def linear(ours: tuple[str, str], theirs: str, axes: tuple[str, str]) -> list[Weight]:
    """Weight and bias of a linear map.

    Args:
        ours: the paths of the matrix and of its bias in `Transformer`.
        theirs: the name of the map in the checkpoint.
        axes: the patterns of both.
    """
    return [Weight((path,), f"{theirs}.{part}", pattern) for path, part, pattern in zip(ours, ("weight", "bias"), axes)]
