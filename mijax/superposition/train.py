"""Training every toy model of a grid of settings in one compiled loop."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mijax import chunks
from mijax._types import Array, ArrayLike
from mijax.memory import PeakMemory, default_memory
from mijax.superposition.job import Programs, State, TrainingJob, advance, begin, judge, model_bytes
from mijax.superposition.loss import Toy
from mijax.superposition.model import Params
from mijax.superposition.settings import SettingsGrid, grid_of

if TYPE_CHECKING:
    import optax
    import xarray as xr

TURNS, STEPS = 20, 100
"""Into how many turns a chunk's steps are divided, each saved when it is done, and how many steps a turn has at least."""


def train(
    toy: Callable[..., Toy],
    over: Mapping[str, ArrayLike],
    *,
    optimizer: "Callable[..., optax.GradientTransformation] | None" = None,
    steps: int = 10_000,
    batch: int | None = 1024,
    judged_on: int | None = 16_384,
    log: Mapping[str, Callable[[Toy, Params], Array]] | None = None,
    log_at: Sequence[int] = (),
    nan: Literal["raise", "mask"] = "raise",
    memory: int | None = None,
    progress: bool = True,
    save: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
) -> "xr.Dataset":
    """Train a toy model at every point of a grid of settings, thousands at a time.

    `toy` and `optimizer` are functions of settings by name, `over` gives each setting its values, and the grid is their
    product. `"seed"` is a setting that neither need take: models of one seed begin alike and see the same draws in each step,
    whatever their other settings; those of different seeds share nothing. `optimizer` is by default Adam with 1e-3. `batch`
    examples are drawn for each of the `steps`; where it is `None` the loss is the exact expectation
    (`mijax.superposition.population_loss`, with 8 Gauss nodes in each amplitude; judge a model that is not `ReLU(A x + b)` with more).

    The result has the grid's dimensions. Variables are the parameters, and `loss`: the exact expectation in exact training, or
    where `judged_on` is `None`, else taken over `judged_on` fresh examples, the same for all models. (Where active features
    are rare, so are the pairs of them that tell models apart: to keep the best, judge exactly.) `log` names functions of a toy and its parameters, which
    become further variables; with `log_at` they and the loss, as `log.<name>`, are kept after each of these numbers of steps,
    along `step`.

    `memory`, `progress`, `save` and `mesh` are those of a sweep (`mijax.engine.options.Running`); finished steps of a chunk
    are saved too, and resumed from, and the mesh's first axis divides settings. How a grid is divided changes no draw: keys are
    counted out from seed and step by Threefry, whatever JAX's default generator is. (Sums may be rounded otherwise, in the last bit, which long
    training at a high rate amplifies.)

    A model that is no longer finite ends the run with `FloatingPointError`, which names it and its step; with `nan="mask"` it
    is NaN in all variables, and told in `failed_at` (after how many steps; -1 for the others). `ValueError` for settings that nobody
    takes, densities and importances that are none, and data of the wrong shape, before anything runs.

    >>> from mijax import superposition as sp
    >>> toy = lambda density: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, density))
    >>> found = sp.train(toy, {"density": [0.1, 1.0], "seed": range(4)}, steps=10, batch=32)
    >>> dict(found.W.sizes)
    {'density': 2, 'seed': 4, 'hidden': 2, 'feature': 3}
    """
    if nan not in ("raise", "mask"):
        raise ValueError(f"nan={nan!r}: 'raise' or 'mask' is expected")
    optimizer, mesh = optimizer or _adam, None if mesh is None else Mesh(mesh.devices, mesh.axis_names)
    grid = grid_of(over, {"toy": toy, "optimizer": optimizer})
    log_at = sorted({int(step) for step in log_at})
    job = TrainingJob(toy, optimizer, batch, judged_on, tuple((log or {}).items()))
    programs = chunks.repeatable(lambda: _checked(job, grid, steps, log_at), save)
    each = model_bytes(job, *_example(grid), programs.begin.out)
    budget = _default_memory(each) if memory is None else memory
    parts = _parts(grid, budget // each, 1 if mesh is None else mesh.devices.shape[0])
    if parts is None:
        raise ValueError(f"memory={budget} bytes does not hold one model for each device, which takes {each}")
    store = None if save is None else _store(save, job, programs, grid, steps, log_at, parts, mesh)
    parts = parts if store is None else store.plan or parts
    run = _Run(job, programs, grid, parts, steps, log_at, store, mesh, strict=nan == "raise")
    estimate = each * min(grid.cells * len(grid.seeds), run.parts[0][0].size * run.parts[0][1].size)
    bar = chunks.progress_bar(len(run.parts) * run.ends[-1], "train", "step", progress)
    with PeakMemory() as peak, bar:
        chunks.run_chunks(run, run.keep, len(run.parts) * len(run.ends), bar, store=store)
    told = {"memory_estimate": float(estimate)}
    return _labelled(run, told if peak.taken is None else {**told, "memory_peak": float(peak.taken)})


def _default_memory(least: int) -> int:
    """On a CPU, chunks that stay near its caches run up to twice as fast as those of 1 GiB; one model they must hold."""
    most = default_memory()
    return min(most, max(2**27, least)) if jax.default_backend() == "cpu" else most


def _adam() -> "optax.GradientTransformation":
    import optax

    return optax.adam(1e-3)


def _example(grid: SettingsGrid) -> tuple[dict[str, Any], Any]:
    return {name: own[0] for name, own in grid.at(np.zeros(1, int)).items()}, np.uint32(grid.seeds[0])


def _checked(job: TrainingJob, grid: SettingsGrid, steps: int, log_at: list[int]) -> Programs:
    """What is computed for one cell; raises for what cannot be trained, before anything is."""
    if steps < 0 or (job.batch is not None and job.batch < 1) or (job.judge is not None and job.judge < 1):
        raise ValueError(f"steps={steps}, batch={job.batch}, judged_on={job.judge}: positive numbers are expected")
    if log_at and not 0 <= log_at[0] <= log_at[-1] <= steps:
        raise ValueError(f"log_at={log_at}: between 0 and the {steps} steps are expected")
    settings, seed = _example(grid)
    state = jax.eval_shape(
        lambda *cell: job.begin(*cell), settings, seed
    )  # a new function: JAX finds traces by identity
    jax.eval_shape(lambda *cell: job.check(*cell), settings, seed, state)
    programs = job.programs(settings, seed)
    _check_names(job, grid, state, log_at)
    _check_values(job, grid)
    return programs


def _check_names(job: TrainingJob, grid: SettingsGrid, state: State, log_at: list[int]) -> None:
    """Every name of the result stands for one thing."""
    logged = ["loss", *(name for name, _ in job.log)]
    dims = {dim for own in _dims(job, grid).values() for dim in own} | ({"step"} if log_at else set())
    names = [
        *grid.axes,
        *dims,
        "failed_at",
        *logged,
        *_parameters(state),
        *(f"log.{name}" for name in logged if log_at),
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{', '.join(twice)}: the name of two things in the result (settings, logs, parameters, their axes)"
        )


def _check_values(job: TrainingJob, grid: SettingsGrid) -> None:
    """Probabilities, importances and used sizes of all cells and seeds are such."""

    def told(settings, seed):
        toy = job.made(settings, seed)[0]
        chances = toy.data.density if toy.data.chances is None else toy.data.chances
        return {
            "chances": jnp.ones(1) if chances is None else chances,
            "importance": toy.weights,
            "possible": toy.model.possible,
        }

    every = jax.vmap(jax.vmap(told, (0, None)), (None, 0))
    found = jax.tree.map(np.asarray, jax.jit(every)(grid.at(np.arange(grid.cells)), grid.seeds.astype(np.uint32)))
    p, importance = found["chances"], found["importance"]
    label = lambda at: grid.label(at[1], at[0] if "seed" in grid.axes else None)
    for at in np.argwhere(~((p > 0) & (p <= 1)))[:1]:
        raise ValueError(
            f"{label(at)}: density {p[tuple(at)]:g}: a probability p = 1 - S, in (0, 1], is expected (of a set, where features come in sets)"
        )
    for at in np.argwhere(~((importance >= 0) & np.isfinite(importance)))[:1]:
        raise ValueError(
            f"{label(at)}: importance {importance[tuple(at)]:g} of feature {at[2]} is negative, or no number"
        )
    for at in np.argwhere(~np.broadcast_to(found["possible"], p.shape[:2]))[:1]:
        raise ValueError(f"{label(at)}: the used sizes are not among the features and hidden dimensions that there are")


def _parts(grid: SettingsGrid, models: int, width: int) -> dict[str, np.ndarray] | None:
    """The cells and the seeds of each chunk: all of the same size, as few as hold `models` on each device.

    Many cells come before many seeds, since they share what is drawn.
    """
    if models < 1:
        return None
    cells = _equal(grid.cells, models * width, width)
    return {"cells": cells, "seeds": _equal(len(grid.seeds), max(1, models * width // cells.shape[1]), 1)}


def _equal(count: int, most: int, multiple: int) -> np.ndarray:
    """The numbers below `count` in rows of at most `most`, the last of them repeated where rows are not full."""
    rows = -(-count // most)
    width = -(-count // rows)
    width = -(-width // multiple) * multiple
    rows = -(-count // width)
    return np.minimum(np.arange(rows * width), count - 1).reshape(rows, width)


def _store(
    save: Any,
    job: TrainingJob,
    programs: Programs,
    grid: SettingsGrid,
    steps: int,
    log_at: list[int],
    parts: dict[str, np.ndarray],
    mesh: Mesh | None,
) -> chunks.Store:
    about: dict[str, Any] = {
        "toy or optimizer": (programs.begin, programs.step),
        "toy or log": (programs.judged, log_at),
    }
    about |= {"settings": grid.axes, "number of steps": steps, "batch": (job.batch, job.judge)}
    identity = {name: chunks.fingerprint(part) for name, part in about.items()}
    store = chunks.Store(save, identity)
    plan = store.begin(parts, {"axes": {k: v.tolist() for k, v in grid.axes.items()}})
    places = 1 if mesh is None else mesh.devices.shape[0]
    if plan["cells"].shape[1] % places:
        raise ValueError(
            f"{save} was begun with chunks of {plan['cells'].shape[1]} cells, which {places} devices cannot share"
        )
    return store


class _Run:
    """A grid's chunks, each in turns of some steps: called by `chunks.run_chunks` with a turn's number, in order."""

    def __init__(
        self, job: TrainingJob, programs: Programs, grid: SettingsGrid, parts: Mapping[str, np.ndarray], steps: int, log_at: list[int],
        store: chunks.Store | None, mesh: Mesh | None, strict: bool,
    ):  # fmt: skip
        self.job, self.grid, self.log_at, self.store, self.mesh, self.strict = job, grid, log_at, store, mesh, strict
        self.programs = programs
        self.parts = list(itertools.product(parts["seeds"], parts["cells"]))
        turns = max(1, min(TURNS, steps // STEPS))
        self.ends = sorted({*log_at, *(np.arange(1, turns + 1) * steps // turns).tolist()})
        self.state = jax.eval_shape(lambda *inputs: begin(programs, None, *inputs), *self._inputs(0))
        self.names = {f"state.{i}": name for i, name in enumerate(_parameters(self.state))}
        self.live: tuple[int, State] | None = None
        self.whole: dict[str, np.ndarray] = {}

    def _inputs(self, part: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        seeds, cells = self.parts[part]
        return self.grid.at(cells), self.grid.seeds[seeds].astype(np.uint32)

    def __call__(self, numbers: Sequence[int]) -> dict[str, Array]:
        part, turn = divmod(numbers[0], len(self.ends))
        inputs = self._inputs(part)
        start = self.ends[turn - 1] if turn else 0
        state = advance(
            self.programs, self.mesh, *inputs, self._before(numbers[0], turn, inputs), start, self.ends[turn]
        )
        self.live = numbers[0], state
        last = turn == len(self.ends) - 1
        found = {"failed_at": state.failed_at}
        if last or self.ends[turn] in self.log_at:
            found |= {f"judged.{k}": v for k, v in judge(self.programs, self.mesh, *inputs, state).items()}
        if last or self.store is not None:
            found |= {f"state.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        return found

    def _before(self, number: int, turn: int, inputs: Any) -> State:
        """What a turn goes on from: the last turn's state, in memory or saved."""
        if turn == 0:
            return begin(self.programs, self.mesh, *inputs)
        if self.live is not None and self.live[0] == number - 1:
            return self.live[1]
        found = self.store.load(number - 1) if self.store else None
        assert found is not None  # turns run in order, and a damaged one is run again before the next
        leaves, structure = jax.tree.flatten(self.state)
        return jax.tree.unflatten(structure, [found[f"state.{i}"] for i in range(len(leaves))])

    def keep(self, number: int, found: Mapping[str, np.ndarray]) -> int:
        """Put a turn's results in their place, and say how many steps it was."""
        part, turn = divmod(number, len(self.ends))
        seeds, cells = self.parts[part]
        if "judged.loss" in found:
            late = (found["failed_at"] < 0) & ~np.isfinite(found["judged.loss"])
            found = {**found, "failed_at": np.where(late, self.ends[turn], found["failed_at"])}
        if self.strict and (found["failed_at"] >= 0).any():
            raise FloatingPointError(self._failures(found["failed_at"], seeds, cells))
        at, step = np.ix_(seeds, cells), self.ends[turn]
        judged = {key.removeprefix("judged."): value for key, value in found.items() if key.startswith("judged.")}
        if step in self.log_at:
            for name, value in judged.items():
                self._whole(f"log.{name}", value, len(self.log_at))[(*at, self.log_at.index(step))] = value
        if turn == len(self.ends) - 1:
            last = {"failed_at": found["failed_at"], **judged} | {name: found[key] for key, name in self.names.items()}
            for name, value in last.items():
                self._whole(name, value)[at] = value
        return step - (self.ends[turn - 1] if turn else 0)

    def _whole(self, name: str, part: np.ndarray, *more: int) -> np.ndarray:
        shape = (len(self.grid.seeds), self.grid.cells, *more, *part.shape[2:])
        return self.whole.setdefault(name, np.zeros(shape, part.dtype))

    def _failures(self, failed: np.ndarray, seeds: np.ndarray, cells: np.ndarray) -> str:
        which = sorted({(seeds[i], cells[j], failed[i, j]) for i, j in np.argwhere(failed >= 0)}, key=lambda f: f[2])
        told = [f"{self.grid.label(cell, seed)} after step {step}" for seed, cell, step in which[:5]]
        more = [f"and {len(which) - 5} more"] * (len(which) > 5)
        return f"no longer finite: {'; '.join([*told, *more])}. nan='mask' trains the others"


def _parameters(state: Any) -> list[str]:
    """The names of a model's parameters, in the order of the state's leaves, which begin with them."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]]
    return ["".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path) or "params" for path in paths]


def _labelled(run: _Run, told: dict[str, float]) -> "xr.Dataset":
    """All that was kept, with the grid's dimensions; NaN where a model failed."""
    import xarray as xr

    grid, dims, failed = run.grid, _dims(run.job, run.grid), run.whole["failed_at"] >= 0
    variables: dict[str, Any] = {}
    for name, values in run.whole.items():
        if failed.any():
            values = (
                np.where(failed.reshape(*failed.shape, *[1] * (values.ndim - 2)), np.nan, values)
                if name != "failed_at"
                else values
            )
        along = ("step",) if name.startswith("log.") else ()
        inner = dims.get(name) or tuple(f"{name}_{i}" for i in range(values.ndim - 2 - len(along)))
        variables[name] = ((*grid.axes, *along, *inner), grid.shaped(values))
    coords = {**grid.axes, **({"step": run.log_at} if run.log_at else {})}
    attrs = {"steps": run.ends[-1], "batch": run.job.batch or "exact", "jax": jax.__version__, **told}
    return xr.Dataset(variables, coords, attrs)


def _dims(job: TrainingJob, grid: SettingsGrid) -> dict[str, tuple[str, ...]]:
    """The names of the parameters' dimensions, as the model tells them."""
    found = {}
    jax.eval_shape(lambda *given: found.update(job.made(*given)[0].model.dims or {}), *_example(grid))
    return found
