"""The compiled part of training: one model's initialisation, steps and loss, mapped over all models `[seed, cell]`."""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray

from mijax._types import Array
from mijax.programs.convert import Converted, convert
from mijax.superposition.loss import Toy, loss, population_loss
from mijax.superposition.model import Params

if TYPE_CHECKING:
    import optax

Settings = dict[str, Any]
_INIT, _TRAINING, _JUDGING = range(3)  # the purpose of a key, folded into it


class State(NamedTuple):
    """A model in training.

    Attributes:
        params: the model's parameters.
        optimizer: the optimizer's state.
        failed_at: the number of steps after which the parameters were no longer finite, or -1.
    """

    params: Params
    optimizer: Any
    failed_at: Array


class Programs(NamedTuple):
    """The traced programs of a training, for one model.

    The user's factories are called, and the functions that they return traced, when these are made
    (`mijax.programs.convert`).

    Attributes:
        begin: `(settings, seed) -> State`, initialisation.
        step: `(number, settings, seed, state) -> State`, one step.
        judged: `(settings, seed, state) -> {name: array}`, the loss and the logged quantities.
    """

    begin: Converted
    step: Converted
    judged: Converted


class TrainingJob(NamedTuple):
    """A training without its settings; the methods are for one model.

    Attributes:
        toy: gives the toy model, from settings by parameter name.
        optimizer: gives the optimizer, from settings by parameter name.
        batch: number of examples in a step; `None` trains on the exact expectation of the loss.
        judge: number of examples of the final loss; `None` takes the exact expectation.
        log: names and functions `(toy, params) -> array` of the logged quantities.
    """

    toy: Callable[..., Toy]
    optimizer: "Callable[..., optax.GradientTransformation]"
    batch: int | None
    judge: int | None
    log: tuple[tuple[str, Callable[[Toy, Params], Array]], ...]

    def made(self, settings: Settings, seed: Any) -> "tuple[Toy, optax.GradientTransformation]":
        """The toy model and the optimizer of a cell: each factory is called with the settings that it takes.

        Args:
            settings: the cell's settings.
            seed: the seed, which is a setting too.

        Returns:
            The toy model and the optimizer.
        """
        values = {**settings, "seed": seed}
        taken = lambda f: {name: values[name] for name in inspect.signature(f).parameters if name in values}
        return self.toy(**taken(self.toy)), self.optimizer(**taken(self.optimizer))

    def programs(self, settings: Settings, seed: Any) -> Programs:
        """Trace `begin`, `step` and `judged`.

        Args:
            settings: a cell's settings, of which only shapes and dtypes matter.
            seed: a seed, likewise.

        Returns:
            The traced programs.
        """
        shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
        settings, seed = jax.tree.map(shape, (settings, seed))
        begin = convert(self.begin, settings, seed, name="the toy or the optimizer")
        state = begin.out
        step = convert(
            self.step, jax.ShapeDtypeStruct((), jnp.int32), settings, seed, state, name="the toy or the optimizer"
        )
        return Programs(begin, step, convert(self.judged, settings, seed, state, name="the toy, or what is logged,"))

    def check_repeatable(self, programs: Programs, settings: Settings, seed: Any) -> None:
        """Check that the factories give the same at every call: each program calls them apart.

        Args:
            programs: the programs, as `programs` gives them.
            settings: a cell's settings.
            seed: a seed.

        Raises:
            ValueError: where a second trace differs, as where a factory draws random numbers.
        """
        if any(_differ(a, b) for a, b in zip(programs, self.programs(settings, seed))):
            raise ValueError(
                "the factory of the toy or of the optimizer gives something else at each call (it draws numbers, or reads a clock), so"
                " that training, loss and result would be of different data: draw outside of the factory, or from a key of jax.random"
                " that is always the same"
            )

    def begin(self, settings: Settings, seed: Any) -> State:
        """A model before its first step.

        Args:
            settings: the cell's settings.
            seed: the seed.

        Returns:
            The initial state.
        """
        toy, optimizer = self.made(settings, seed)
        params = toy.model.init(_key(seed, _INIT))
        return State(params, optimizer.init(params), jnp.int32(-1))

    def step(self, number: Any, settings: Settings, seed: Any, state: State) -> State:
        """One step of the optimizer.

        Args:
            number: index of the step.
            settings: the cell's settings.
            seed: the seed.
            state: the state before the step.

        Returns:
            The state after it.
        """
        toy, optimizer = self.made(settings, seed)
        gradient = jax.grad(self.loss)(state.params, toy, seed, number)
        params, optimizer_state = _updated(optimizer, gradient, state.params, state.optimizer)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
        return State(params, optimizer_state, jnp.where(finite | (state.failed_at >= 0), state.failed_at, number + 1))

    def loss(self, params: Params, toy: Toy, seed: Any, number: Any) -> Array:
        """The loss whose gradient step `number` follows: exact, or on that step's batch.

        Args:
            params: the model's parameters.
            toy: the toy model.
            seed: the seed.
            number: index of the step.

        Returns:
            The loss, a scalar.
        """
        if self.batch is None:
            return population_loss(toy, params)
        return loss(toy, params, _sampled(toy, _key(seed, _TRAINING, number), self.batch))

    def check(self, settings: Settings, seed: Any, state: State) -> None:
        """Check that data, model and target fit together.

        Args:
            settings: the cell's settings.
            seed: the seed.
            state: the initial state.

        Raises:
            ValueError: for a model that does not take the examples, an output or a target of another shape than
                theirs, or a sampler that gives another shape than `[feature, batch]`.
        """
        toy, _ = self.made(settings, seed)
        x = jnp.zeros((toy.data.n, 2)) if self.batch is None else _sampled(toy, _key(seed, _TRAINING, 0), self.batch)
        try:
            output, target = toy.model.apply(state.params, x).shape, toy.wanted(x).shape
        except (TypeError, IndexError) as error:
            raise ValueError(f"the model does not take examples of {toy.data.n} features: {error}") from error
        if not output == target == x.shape:
            raise ValueError(
                f"examples are {x.shape}, the model gives {output} and the target is {target}: the same is expected of all"
            )

    def judged(self, settings: Settings, seed: Any, state: State) -> dict[str, Array]:
        """The logged quantities, and the loss.

        The loss is the exact expectation where `batch` or `judge` is `None`. Else it is the mean over examples that
        are the same for all models, computed a batch at a time.

        Args:
            settings: the cell's settings.
            seed: the seed.
            state: the state to judge.

        Returns:
            "loss", and each logged quantity by name.
        """
        toy, _ = self.made(settings, seed)
        logged = {name: function(toy, state.params) for name, function in self.log}
        if self.batch is None or self.judge is None:
            return {"loss": population_loss(toy, state.params), **logged}
        batch = self.batch
        batch_loss = lambda number: loss(toy, state.params, _sampled(toy, _key(0, _JUDGING, number), batch))
        return {"loss": jax.lax.map(batch_loss, jnp.arange(-(-self.judge // batch))).mean(), **logged}


def _differ(first: Converted, second: Converted) -> bool:
    """Whether two traces of a function differ, in what is computed or in the arrays that it reaches."""
    arrays, others = ([*f.constants, *f.leaves] for f in (first, second))
    if first.program is not second.program:
        try:
            return first.program.digest() != second.program.digest()
        except TypeError:  # a callback, which is known by its identity only
            return False
    numbers = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    same = lambda x, y: x is y or np.array_equal(numbers(x), numbers(y), equal_nan=numbers(x).dtype.kind in "fc")
    return not all(map(same, arrays, others))


def _updated(
    optimizer: "optax.GradientTransformation", gradient: Params, params: Params, state: Any
) -> tuple[Params, Any]:
    """The parameters and the optimizer's state after one update."""
    import optax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # optax promotes
        updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _sampled(toy: Toy, key: PRNGKeyArray, batch: int) -> Array:
    """A batch `[feature, batch]` of the toy model's data; `ValueError` for a sampler that gives another shape."""
    x = toy.data.sample(key, batch)
    if x.ndim != 2 or x.shape[0] != toy.data.n:
        raise ValueError(f"the sampler gave {x.shape}: (features, batch) with {toy.data.n} features is expected")
    return x


def _key(seed: Any, *counts: Any) -> PRNGKeyArray:
    """A key from a seed and counts, by Threefry: only its draws are the same under `vmap` as in a loop."""
    key = jax.random.key(seed, impl="threefry2x32")
    for count in counts:
        key = jax.random.fold_in(key, count)
    return key


def _every(function: Callable) -> Callable:
    """A function of one model, `(settings, seed, *state)`, mapped over all `[seed, cell]`.

    The inner map is over cells, so that what depends on the seed alone is computed once per seed.
    """
    of_cells = lambda settings, seed, *state: jax.vmap(lambda cell, *state: function(cell, seed, *state))(
        settings, *state
    )
    return lambda settings, seeds, *state: jax.vmap(lambda seed, *state: of_cells(settings, seed, *state))(
        seeds, *state
    )


def _begin(program: Converted, settings: Settings, seeds: Array) -> State:
    return _every(program)(settings, seeds)


def _advance(program: Converted, settings: Settings, seeds: Array, state: State, start: Array, stop: Array) -> State:
    step = lambda number: _every(lambda *args: program(number, *args))
    return jax.lax.fori_loop(start, stop, lambda number, state: step(number)(settings, seeds, state), state)


def _judge(program: Converted, settings: Settings, seeds: Array, state: State) -> dict[str, Array]:
    return _every(program)(settings, seeds, state)


@eqx.filter_jit
def _run(
    function: Callable, program: Converted, mesh: Mesh | None, settings: Settings, seeds: Array, *rest: Any
) -> Any:
    """The function's result; on a mesh the cells are divided over the devices along its first axis."""
    if mesh is None:
        return function(program, settings, seeds, *rest)
    axis = mesh.axis_names[0]
    cells, everywhere = PartitionSpec(None, axis), PartitionSpec()
    specs = [cells if isinstance(arg, State) else everywhere for arg in rest]
    arrays, fixed = eqx.partition(program, eqx.is_array)
    return jax.shard_map(
        lambda arrays, *args: function(eqx.combine(arrays, fixed), *args), mesh=mesh,
        in_specs=(everywhere, PartitionSpec(axis), everywhere, *specs), out_specs=cells,
        check_vma=False,  # nothing is communicated between cells, so replicated values need no tracking
    )(arrays, settings, seeds, *rest)  # fmt: skip


def begin(programs: Programs, mesh: Mesh | None, settings: Settings, seeds: Any) -> State:
    """The states of all models before their first step.

    Args:
        programs: the traced programs.
        mesh: devices along whose first axis cells are divided, or `None`.
        settings: `[cell]` values of each setting.
        seeds: `[seed]`.

    Returns:
        `[seed, cell, ...]` states.
    """
    return _run(_begin, programs.begin, mesh, settings, seeds)


def advance(
    programs: Programs, mesh: Mesh | None, settings: Settings, seeds: Any, state: State, start: int, stop: int
) -> State:
    """The states of all models after further steps, in one compiled loop: `start` and `stop` compile nothing anew.

    Args:
        programs: the traced programs.
        mesh: devices along whose first axis cells are divided, or `None`.
        settings: `[cell]` values of each setting.
        seeds: `[seed]`.
        state: `[seed, cell, ...]` states after `start` steps.
        start: index of the first step.
        stop: index after the last step.

    Returns:
        `[seed, cell, ...]` states after `stop` steps.
    """
    return _run(_advance, programs.step, mesh, settings, seeds, state, np.int32(start), np.int32(stop))


def judge(programs: Programs, mesh: Mesh | None, settings: Settings, seeds: Any, state: State) -> dict[str, Array]:
    """The loss and the logged quantities of all models.

    Args:
        programs: the traced programs.
        mesh: devices along whose first axis cells are divided, or `None`.
        settings: `[cell]` values of each setting.
        seeds: `[seed]`.
        state: `[seed, cell, ...]` states.

    Returns:
        `[seed, cell, ...]` arrays: "loss", and each logged quantity by name.
    """
    return _run(_judge, programs.judged, mesh, settings, seeds, state)


def model_bytes(job: TrainingJob, settings: Settings, seed: Any, state: State) -> int:
    """An upper bound on the bytes that one model takes in training.

    It is the sum of three times the state and of every intermediate value of the loss, as if all were kept for the
    backward pass.

    Args:
        job: the training.
        settings: a cell's settings.
        seed: a seed.
        state: a state, or its shapes.

    Returns:
        The number of bytes.
    """
    closed = jax.make_jaxpr(lambda *args: job.loss(args[2].params, job.made(*args[:2])[0], args[1], 0))(
        settings, seed, state
    )
    size = lambda v: (
        math.prod(v.shape) * v.dtype.itemsize
        if hasattr(v, "dtype") and not jnp.issubdtype(v.dtype, jax.dtypes.extended)
        else 0
    )
    inner = lambda eqn: [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]

    def computed(jaxpr: Any) -> int:
        return sum(
            sum(map(computed, inner(e))) if inner(e) else sum(size(v.aval) for v in e.outvars) for e in jaxpr.eqns
        )

    return computed(closed.jaxpr) + 3 * sum(size(leaf) for leaf in jax.tree.leaves(state))
