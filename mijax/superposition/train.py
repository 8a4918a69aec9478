"""Training every toy model of a grid of settings in one compiled loop."""

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
from mijax.superposition.gathered import Gathered
from mijax.superposition.job import Programs, State, TrainingJob, model_bytes
from mijax.superposition.loss import Toy
from mijax.superposition.model import Params
from mijax.superposition.settings import SettingsGrid, grid_of
from mijax.superposition.turns import Schedule, Trainer, parts_of

if TYPE_CHECKING:
    import optax
    import xarray as xr


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
    parts = parts_of(grid, budget // bytes_per_model, 1 if mesh is None else mesh.devices.shape[0])
    if parts is None:
        raise ValueError(
            f"memory={budget} bytes does not hold one model for each device, which takes {bytes_per_model}"
        )
    store = None if save is None else _store(save, job, programs, grid, steps, log_at, parts, mesh)
    schedule = Schedule(parts if store is None else store.plan or parts, steps, log_at)
    gathered = Gathered(grid, schedule, _parameters(programs.begin.out), strict=nan == "raise")
    bar = chunks.progress_bar(len(schedule.chunks) * schedule.ends[-1], "train", "step", progress)
    with PeakMemory() as peak, bar:
        trainer = Trainer(programs, grid, schedule, store, mesh)
        chunks.run_chunks(trainer, gathered.keep, len(schedule), bar, store=store)
    seeds, cells = schedule.chunks[0]
    estimate = bytes_per_model * min(grid.cells * len(grid.seeds), seeds.size * cells.size)
    attrs = {"steps": schedule.ends[-1], "batch": batch or "exact", "jax": jax.__version__}
    memory_attrs = {"memory_estimate": float(estimate)} | (
        {} if peak.taken is None else {"memory_peak": float(peak.taken)}
    )
    return gathered.labelled(_dims(job, grid), attrs | memory_attrs)


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


def _parameters(state: Any) -> list[str]:
    """The names of a model's parameters, in the order of the state's leaves; the parameters are its first leaves."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]]
    return ["".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path) or "params" for path in paths]


def _dims(job: TrainingJob, grid: SettingsGrid) -> dict[str, tuple[str, ...]]:
    """The names of the parameters' dimensions, from the model's `dims`."""
    dims = {}
    jax.eval_shape(lambda *cell: dims.update(job.made(*cell)[0].model.dims or {}), *_example(grid))
    return dims
