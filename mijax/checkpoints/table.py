"""What a family of architectures is: its config entries, the tensors of its checkpoints, and their names in mijax."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mijax.checkpoints.contents import Tensors
from mijax.checkpoints.keys import Harmless, Key, check_keys, read_fields, same_as, write_fields
from mijax.model.config import Config
from mijax.rules import Rule


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
        further: the other keys that are read, by `read`, and what they may hold.
        read: from the contents of the file, and the fields read by `keys`, to further fields.
        write: from a `Config` to the entries beside `keys`; `None` where transformers would refuse them. Where reading
            gives another `Config`, the family cannot express the given one.
        harmless: the other keys that are accepted, and at which values.
        aliases: other names of keys, which transformers accepts; where a file has both names, they must agree.
        prefix: the start of tensors' names, which checkpoints of the bare model leave out.
        buffers: tensors that are checked and dropped.
        head: the tensor of the unembedding, which a checkpoint may hold although the config ties it to the
            embedding.
        inputs_first: whether the matrices of the layers have the axes `[inputs, outputs]` (`Conv1D` of transformers),
            not `[outputs, inputs]` (`torch.nn.Linear`).
        decode: from the tensors of a folder, the contents of its `config.json` and its name in error messages, to the
            tensors that `weights` names.
    """

    name: str
    weights: Callable[[Config], list[Weight]]
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    further: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = _nothing
    write: Callable[[Config], dict[str, Any] | None] = _nothing
    harmless: Mapping[str, Harmless] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    buffers: tuple[Buffer, ...] = ()
    head: str | None = None
    inputs_first: bool = False
    decode: Callable[[Tensors, Mapping[str, Any], str], Tensors] = lambda tensors, c, source: tensors

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
        c = {**{key: c[alias] for alias, key in self.aliases.items() if alias in c}, **c}
        repeated = {alias: same_as(key) for alias, key in self.aliases.items()}
        check_keys(c, self.name, {**dict.fromkeys(self.keys), **self.further}, {**self.harmless, **repeated})
        fields = {**self.fixed, **read_fields(c, self.keys)}
        return Config(**fields | self.read(c, fields))

    def ignored(self, c: Mapping[str, Any]) -> list[str]:
        """The keys of a `config.json` that have no effect on the model, whatever they say.

        Args:
            c: its contents, which `config` accepts.
        """
        anything = object()
        free = {key for key, accepts in self.harmless.items() if accepts(anything, c)}
        return sorted(key for key, value in c.items() if key in free and value is not None)

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


def dense_mlp(to_neurons: str, from_neurons: str) -> list[Weight]:
    """Weights and biases of a dense MLP, as `torch.nn.Linear` arranges them.

    Args:
        to_neurons: the name of its first map.
        from_neurons: the name of its second map.
    """
    return [
        *linear(("blocks.mlp.W_in", "blocks.mlp.b_in"), to_neurons, ("m d -> d m", "m -> m")),
        *linear(("blocks.mlp.W_out", "blocks.mlp.b_out"), from_neurons, ("d m -> m d", "d -> d")),
    ]


def fused_attention(qkv: str, out: str, axes: tuple[str, str], convert: Convert = FUSED) -> list[Weight]:
    """Weights and biases of attention whose queries, keys and values are one tensor.

    Args:
        qkv: the name of the map of these.
        out: the name of the output's map.
        axes: the patterns of weight and bias of `qkv`.
        convert: how the arranged tensor becomes three.
    """
    fused = [
        Weight(tuple(f"blocks.attn.{kind}_{name}" for name in "QKV"), f"{qkv}.{part}", pattern, convert)
        for kind, part, pattern in zip("Wb", ("weight", "bias"), axes)
    ]
    return [*fused, *linear(("blocks.attn.W_O", "blocks.attn.b_O"), out, ("d (head e) -> head e d", "d -> d"))]


INTERLEAVED = ("(head three e) d -> three d head e", "(head three e) -> three head e")
"""The `axes` of `fused_attention` where each head has its query, key and value beside one another."""
