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
from mijax.arguments import bytes_of, whole_number
from mijax.memory import PeakMemory, default_memory
from mijax.superposition.job import Programs, State, TrainingJob, advance, begin, judge, model_bytes
from mijax.superposition.loss import Toy
from mijax.superposition.model import Params
from mijax.superposition.settings import SettingsGrid, grid_of

if TYPE_CHECKING:
    import optax
    import xarray as xr

TURNS, STEPS = 20, 100
"""The largest number of turns that a chunk's steps are divided into, and the least number of steps of several turns.

A turn is saved when it is done.
"""


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
    save: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
) -> "xr.Dataset":
    """Train a toy model at every point of a grid of settings, thousands at a time.

    The grid is the product of the settings in `over`. Models of one seed have the same initial draws and the same
    draws in each step, whatever their other settings; models of different seeds share no draw. The division of a
    grid into chunks and over devices changes no draw: keys are counted out from seed and step by Threefry,
    whatever JAX's default generator is. (It may change the last bit of sums, which long training at a high rate
    amplifies.)

    Args:
        toy: a function that gives the toy model, from settings by parameter name. It is called several times, and
            must give the same each time: random numbers are drawn outside of it.
        over: the values of each setting, by name. `"seed"` is a setting that no function need take.
        optimizer: a function that gives the optimizer, from settings by parameter name; by default Adam with rate
            1e-3.
        steps: number of steps.
        batch: number of examples that are drawn in each step. With `None` the loss is the exact expectation
            (`mijax.superposition.population_loss`, with 8 Gauss nodes in each amplitude; judge a model that is not
            `ReLU(A x + b)` with more).
        judged_on: number of fresh examples of the final loss, rounded up to whole batches, the same for all
            models. With `None`, and in exact training, it is the exact expectation. (Where active features are
            rare, so are the pairs of active features that distinguish models: to choose the best model, judge
            exactly.)
        log: functions `(toy, params) -> array` by name, whose results become further variables.
        log_at: numbers of steps after which the loss and the quantities of `log` are recorded, in variables
            `log.<name>` along `step`.
        nan: "raise" ends the run at a model that is no longer finite. "mask" sets all its variables to NaN and
            trains the others.
        memory: bytes that one chunk of models may take, by default chosen for the device.
        progress: whether to show a bar for work of more than a second.
        save: a folder to which finished chunks, and finished steps of a chunk, are written; the same call after a
            crash resumes from them, as in a sweep (`mijax.engine.options.Running`).
        mesh: devices; the settings are divided along its first axis.

    Returns:
        A dataset with the grid's dimensions. Its variables are the parameters, `loss`, the quantities of `log`, and
        `failed_at`: after how many steps a model was no longer finite, -1 for the others.

    Raises:
        FloatingPointError: for a model that is no longer finite, with `nan="raise"`; it names the model and its step.
        TypeError: for numbers of steps or examples that are not whole, and a `memory` that is no number.
        ValueError: before anything runs, for settings that no function takes, a `toy` or `optimizer` that gives
            something else at each call, densities outside (0, 1],
            importances that are negative or not finite, used sizes out of range, data, models and targets of
            different shapes, two variables or dimensions of one name, numbers of steps or examples out of range, a
            `memory` that does not hold one model for each device, or a folder of another training.

    >>> from mijax import superposition as sp
    >>> toy = lambda density: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, density))
    >>> results = sp.train(toy, {"density": [0.1, 1.0], "seed": range(4)}, steps=10, batch=32)
    >>> dict(results.W.sizes)
    {'density': 2, 'seed': 4, 'hidden': 2, 'feature': 3}
    """
    if nan not in ("raise", "mask"):
        raise ValueError(f"nan={nan!r}: 'raise' or 'mask' is expected")
    optimizer, mesh = optimizer or _adam, None if mesh is None else Mesh(mesh.devices, mesh.axis_names)
    grid = grid_of(over, {"toy": toy, "optimizer": optimizer})
    log_at, memory = _checked_numbers(steps, batch, judged_on, log_at), bytes_of(memory)
    job = TrainingJob(toy, optimizer, batch, judged_on, tuple((log or {}).items()))
    programs = _checked(job, grid, log_at)
    bytes_per_model = model_bytes(job, *_example(grid), programs.begin.out)
    budget = _default_memory(bytes_per_model) if memory is None else memory
    parts = _parts(grid, budget // bytes_per_model, 1 if mesh is None else mesh.devices.shape[0])
    if parts is None:
        raise ValueError(
            f"memory={budget} bytes does not hold one model for each device, which takes {bytes_per_model}"
        )
    store = None if save is None else _store(save, job, programs, grid, steps, log_at, parts, mesh)
    parts = parts if store is None else store.plan or parts
    run = _Run(job, programs, grid, parts, steps, log_at, store, mesh, strict=nan == "raise")
    estimate = bytes_per_model * min(grid.cells * len(grid.seeds), run.parts[0][0].size * run.parts[0][1].size)
    bar = chunks.progress_bar(len(run.parts) * run.ends[-1], "train", "step", progress)
    with PeakMemory() as peak, bar:
        chunks.run_chunks(run, run.keep, len(run.parts) * len(run.ends), bar, store=store)
    attrs = {"memory_estimate": float(estimate)}
    return _labelled(run, attrs if peak.taken is None else {**attrs, "memory_peak": float(peak.taken)})


def _default_memory(least: int) -> int:
    """The default bytes of a chunk: that of sweeps, but on a CPU at most 128 MiB, or `least`, the bytes of one model.

    Chunks near the size of a CPU's caches run up to twice as fast as those of 1 GiB.
    """
    limit = default_memory()
    return min(limit, max(2**27, least)) if jax.default_backend() == "cpu" else limit


def _adam() -> "optax.GradientTransformation":
    import optax

    return optax.adam(1e-3)


def _example(grid: SettingsGrid) -> tuple[dict[str, Any], Any]:
    """The settings of the first cell, and the first seed."""
    return {name: values[0] for name, values in grid.at(np.zeros(1, int)).items()}, np.uint32(grid.seeds[0])


def _checked_numbers(steps: Any, batch: Any, judged_on: Any, log_at: Sequence[Any]) -> list[int]:
    """The sorted steps of `log_at`, after checks of all numbers; raises for one of the wrong type or out of range."""
    whole_number("steps", steps)
    for name, count in {"batch": batch, "judged_on": judged_on}.items():
        if count is not None:
            whole_number(name, count, least=1)
    numbers = sorted({whole_number("a step of log_at", step) for step in log_at})
    if numbers and numbers[-1] > steps:
        raise ValueError(f"log_at={numbers}: between 0 and the {steps} steps are expected")
    return numbers


def _checked(job: TrainingJob, grid: SettingsGrid, log_at: list[int]) -> Programs:
    """The programs of one model, after all checks that take a model; `ValueError` for a training that cannot be run."""
    settings, seed = _example(grid)
    state = jax.eval_shape(
        lambda *cell: job.begin(*cell), settings, seed
    )  # new lambdas, since JAX caches traces by the function's identity
    jax.eval_shape(lambda *cell: job.check(*cell), settings, seed, state)
    programs = job.programs(settings, seed)
    job.check_repeatable(programs, settings, seed)
    _check_names(job, grid, state, log_at)
    _check_values(job, grid)
    return programs


def _check_names(job: TrainingJob, grid: SettingsGrid, state: State, log_at: list[int]) -> None:
    """Raise `ValueError` where two variables or dimensions of the result have the same name."""
    logged = ["loss", *(name for name, _ in job.log)]
    dims = {dim for axes in _dims(job, grid).values() for dim in axes} | ({"step"} if log_at else set())
    names = [
        *grid.axes,
        *dims,
        "failed_at",
        *logged,
        *_parameters(state),
        *(f"log.{name}" for name in logged if log_at),
    ]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(
            f"{', '.join(duplicates)}: the name of two things in the result (settings, logs, parameters, their axes)"
        )


def _check_values(job: TrainingJob, grid: SettingsGrid) -> None:
    """Raise `ValueError` for probabilities, importances or used sizes out of range, in any cell and seed."""

    def checked(settings, seed):
        toy = job.made(settings, seed)[0]
        chances = toy.data.density if toy.data.chances is None else toy.data.chances
        return {
            "chances": jnp.ones(1) if chances is None else chances,
            "importance": toy.weights,
            "possible": toy.model.possible,
        }

    of_grid = jax.vmap(jax.vmap(checked, (0, None)), (None, 0))
    values = jax.tree.map(np.asarray, jax.jit(of_grid)(grid.at(np.arange(grid.cells)), grid.seeds.astype(np.uint32)))
    p, importance = values["chances"], values["importance"]
    label = lambda index: grid.label(index[1], index[0] if "seed" in grid.axes else None)
    for index in np.argwhere(~((p > 0) & (p <= 1)))[:1]:  # the first is enough for an error
        raise ValueError(
            f"{label(index)}: density {p[tuple(index)]:g}: a probability p = 1 - S, in (0, 1], is expected (of a set, where features come in sets)"
        )
    for index in np.argwhere(~((importance >= 0) & np.isfinite(importance)))[:1]:
        raise ValueError(
            f"{label(index)}: importance {importance[tuple(index)]:g} of feature {index[2]} is negative, or no number"
        )
    for index in np.argwhere(~np.broadcast_to(values["possible"], p.shape[:2]))[:1]:
        raise ValueError(
            f"{label(index)}: the used sizes are not among the features and hidden dimensions that there are"
        )


def _parts(grid: SettingsGrid, models: int, width: int) -> dict[str, np.ndarray] | None:
    """The indices `cells [part, cell]` and `seeds [part, seed]`: a chunk is a row of each. `None` for `models` below 1.

    All chunks have the same size, at most `models` models on each of `width` devices. A chunk has as many cells as
    fit before it has several seeds, since the cells of one seed share its draws.
    """
    if models < 1:
        return None
    cells = _equal(grid.cells, models * width, width)
    return {"cells": cells, "seeds": _equal(len(grid.seeds), max(1, models * width // cells.shape[1]), 1)}


def _equal(count: int, limit: int, multiple: int) -> np.ndarray:
    """The numbers below `count` in rows of at most `limit`, a multiple of `multiple`, padded with the last number."""
    rows = -(-count // limit)
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
    """Open the folder `save`; `ValueError` where it holds another training, or chunks that the devices cannot share."""
    content: dict[str, Any] = {
        "toy or optimizer": (programs.begin, programs.step),
        "toy or log": (programs.judged, log_at),
    }
    # The order of the settings numbers the cells, so that they are no dictionary, whose keys a checksum sorts.
    content |= {"settings": list(grid.axes.items()), "number of steps": steps, "batch": (job.batch, job.judge)}
    identity = {name: chunks.fingerprint(part) for name, part in content.items()}
    store = chunks.Store(save, identity)
    plan = store.begin(parts, {"axes": {k: v.tolist() for k, v in grid.axes.items()}})
    devices = 1 if mesh is None else mesh.devices.shape[0]
    if plan["cells"].shape[1] % devices:
        raise ValueError(
            f"{save} was begun with chunks of {plan['cells'].shape[1]} cells, which {devices} devices cannot share"
        )
    return store


class _Run:
    """The chunks of a grid, each divided into turns of several steps.

    `chunks.run_chunks` calls it with the number of a turn, in order, and `keep` with the results. Turns are
    numbered chunk by chunk.
    """

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
        """The settings `[cell]` and the seeds `[seed]` of a chunk."""
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
        is_last = turn == len(self.ends) - 1
        results = {"failed_at": state.failed_at}
        if is_last or self.ends[turn] in self.log_at:
            results |= {f"judged.{k}": v for k, v in judge(self.programs, self.mesh, *inputs, state).items()}
        if is_last or self.store is not None:
            results |= {f"state.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        return results

    def _before(self, number: int, turn: int, inputs: Any) -> State:
        """The state before a turn: initial, or that of the previous turn, in memory or saved."""
        if turn == 0:
            return begin(self.programs, self.mesh, *inputs)
        if self.live is not None and self.live[0] == number - 1:
            return self.live[1]
        arrays = self.store.load(number - 1) if self.store else None
        assert arrays is not None  # turns run in order, and a damaged one is run again before the next
        leaves, structure = jax.tree.flatten(self.state)
        return jax.tree.unflatten(structure, [arrays[f"state.{i}"] for i in range(len(leaves))])

    def keep(self, number: int, arrays: Mapping[str, np.ndarray]) -> int:
        """Write a turn's results into the arrays of the whole grid.

        Args:
            number: number of the turn.
            arrays: its results, on the host.

        Returns:
            The number of steps of the turn.

        Raises:
            FloatingPointError: where `strict`, for a model that is no longer finite.
        """
        part, turn = divmod(number, len(self.ends))
        seeds, cells = self.parts[part]
        if "judged.loss" in arrays:  # finite parameters may have a loss that is not finite
            failed = (arrays["failed_at"] < 0) & ~np.isfinite(arrays["judged.loss"])
            arrays = {**arrays, "failed_at": np.where(failed, self.ends[turn], arrays["failed_at"])}
        if self.strict and (arrays["failed_at"] >= 0).any():
            raise FloatingPointError(self._failures(arrays["failed_at"], seeds, cells))
        index, step = np.ix_(seeds, cells), self.ends[turn]
        judged = {key.removeprefix("judged."): value for key, value in arrays.items() if key.startswith("judged.")}
        if step in self.log_at:
            for name, value in judged.items():
                self._whole(f"log.{name}", value, len(self.log_at))[(*index, self.log_at.index(step))] = value
        if turn == len(self.ends) - 1:
            variables = {"failed_at": arrays["failed_at"], **judged} | {
                name: arrays[key] for key, name in self.names.items()
            }
            for name, value in variables.items():
                self._whole(name, value)[index] = value
        return step - (self.ends[turn - 1] if turn else 0)

    def _whole(self, name: str, part: np.ndarray, *axes: int) -> np.ndarray:
        """The array `[seed, cell, *axes, ...]` of the whole grid for a variable of which `part` is a chunk's."""
        shape = (len(self.grid.seeds), self.grid.cells, *axes, *part.shape[2:])
        return self.whole.setdefault(name, np.zeros(shape, part.dtype))

    def _failures(self, failed: np.ndarray, seeds: np.ndarray, cells: np.ndarray) -> str:
        """The error message for chunk-sized `failed_at [seed, cell]`: the first five models, by step."""
        models = sorted({(seeds[i], cells[j], failed[i, j]) for i, j in np.argwhere(failed >= 0)}, key=lambda f: f[2])
        labels = [f"{self.grid.label(cell, seed)} after step {step}" for seed, cell, step in models[:5]]
        more = [f"and {len(models) - 5} more"] * (len(models) > 5)
        return f"no longer finite: {'; '.join([*labels, *more])}. nan='mask' trains the others"


def _parameters(state: Any) -> list[str]:
    """The names of a model's parameters, in the order of the state's leaves; the parameters are its first leaves."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]]
    return ["".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path) or "params" for path in paths]


def _labelled(run: _Run, memory_attrs: dict[str, float]) -> "xr.Dataset":
    """All variables with the grid's dimensions, NaN where a model failed."""
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
    attrs = {"steps": run.ends[-1], "batch": run.job.batch or "exact", "jax": jax.__version__, **memory_attrs}
    return xr.Dataset(variables, coords, attrs)


def _dims(job: TrainingJob, grid: SettingsGrid) -> dict[str, tuple[str, ...]]:
    """The names of the parameters' dimensions, from the model's `dims`."""
    dims = {}
    jax.eval_shape(lambda *cell: dims.update(job.made(*cell)[0].model.dims or {}), *_example(grid))
    return dims
