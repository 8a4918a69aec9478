"""Options of long work: memory, progress, saving, devices."""

import difflib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from jax.sharding import Mesh

from mijax.arguments import bytes_of
from mijax.memory import default_memory


class Running(TypedDict, total=False):
    """How a sweep is run: keyword arguments of every driver that stands on `sweep`.

    Attributes:
        memory: the bytes that one chunk of cells may take; by default chosen for the device. Where it does not hold
            one cell of all prompts, groups of prompts run one after the other, if every metric allows it
            (`per_example`, as in `mijax.metrics`) and no edit is a function.
        progress: whether to show a bar on work of more than a second; by default true.
        save: a folder to which finished chunks are written. After a crash the same call continues from there with
            the plan with which the folder was begun, to the same values bit by bit; another model, prompts,
            interventions or metric are refused.
        mesh: devices; each place along the mesh's first axis runs its own chunks. The parameters may be sharded
            over other axes.
    """

    memory: int | None
    progress: bool
    save: str | os.PathLike[str] | None
    mesh: Mesh | None


class Options(NamedTuple):
    """`Running` after its checks, with the defaults filled in."""

    memory: int | None = None
    progress: bool = True
    save: str | os.PathLike[str] | None = None
    mesh: Mesh | None = None

    @property
    def budget(self) -> int:
        """The bytes that a chunk may take."""
        return default_memory() if self.memory is None else self.memory


def options_of(running: Mapping[str, Any]) -> Options:
    """Check the keyword arguments of a driver.

    Args:
        running: the keywords of `Running`.

    Returns:
        The options, with defaults.

    Raises:
        TypeError: for an unknown keyword, or a value of the wrong type.
        ValueError: for `memory` that is not positive, or a mesh without devices.
    """
    for name in running:
        if name not in Options._fields:
            close = difflib.get_close_matches(name, Options._fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"unexpected keyword {name!r}{hint}: how a sweep is run is told by {', '.join(Options._fields)}"
            )
    options = Options(**running)
    save, mesh = options.save, options.mesh
    options = options._replace(memory=bytes_of(options.memory))
    if not (save is None or isinstance(save, str | os.PathLike)):
        raise TypeError(f"save must be the path of a folder, given {save!r}")
    if not (mesh is None or isinstance(mesh, Mesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, given {mesh!r}")
    if mesh is not None and mesh.size == 0:
        raise ValueError(f"mesh {mesh.shape} has no devices")
    return options
