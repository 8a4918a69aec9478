"""What training compiles: one model's steps, for all models `[seed, cell]` at once."""

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
_INIT, _TRAINING, _JUDGING = range(3)  # what a key is for


class State(NamedTuple):
    """A model while it is trained; `failed_at` is the number of steps after which it was no longer finite, or -1."""

    params: Params
    optimizer: Any
    failed_at: Array


class Programs(NamedTuple):
    """What a training computes for one cell, as the user's functions are now: factories are called, and what they return traced."""

    begin: Converted
    step: Converted
    judged: Converted


class TrainingJob(NamedTuple):
    """Everything of a training but its settings."""

    toy: Callable[..., Toy]
    optimizer: "Callable[..., optax.GradientTransformation]"
    batch: int | None
    judge: int | None
    log: tuple[tuple[str, Callable[[Toy, Params], Array]], ...]

    def made(self, settings: Settings, seed: Any) -> "tuple[Toy, optax.GradientTransformation]":
        """The toy model and the optimizer of a cell."""
        given = {**settings, "seed": seed}
        own = lambda f: {name: given[name] for name in inspect.signature(f).parameters if name in given}
        return self.toy(**own(self.toy)), self.optimizer(**own(self.optimizer))

    def programs(self, settings: Settings, seed: Any) -> Programs:
        """Its functions for settings and a seed of these shapes."""
        shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
        settings, seed = jax.tree.map(shape, (settings, seed))
        begin = convert(self.begin, settings, seed, name="the toy or the optimizer")
        state = begin.out
        step = convert(
            self.step, jax.ShapeDtypeStruct((), jnp.int32), settings, seed, state, name="the toy or the optimizer"
        )
        return Programs(begin, step, convert(self.judged, settings, seed, state, name="the toy, or what is logged,"))

    def begin(self, settings: Settings, seed: Any) -> State:
        """A model before its first step."""
        toy, optimizer = self.made(settings, seed)
        params = toy.model.init(_key(seed, _INIT))
        return State(params, optimizer.init(params), jnp.int32(-1))

    def step(self, number: Any, settings: Settings, seed: Any, state: State) -> State:
        """One step of the optimizer."""
        toy, optimizer = self.made(settings, seed)
        gradient = jax.grad(self.loss)(state.params, toy, seed, number)
        params, kept = _updated(optimizer, gradient, state.params, state.optimizer)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
        return State(params, kept, jnp.where(finite | (state.failed_at >= 0), state.failed_at, number + 1))

    def loss(self, params: Params, toy: Toy, seed: Any, number: Any) -> Array:
        """What step `number` follows the gradient of."""
        if self.batch is None:
            return population_loss(toy, params)
        return loss(toy, params, _sampled(toy, _key(seed, _TRAINING, number), self.batch))

    def check(self, settings: Settings, seed: Any, state: State) -> None:
        """Raise `ValueError` for data, model and target that do not fit together."""
        toy, _ = self.made(settings, seed)
        x = jnp.zeros((toy.data.n, 2)) if self.batch is None else _sampled(toy, _key(seed, _TRAINING, 0), self.batch)
        try:
            given, wanted = toy.model.apply(state.params, x).shape, toy.wanted(x).shape
        except (TypeError, IndexError) as fault:
            raise ValueError(f"the model does not take examples of {toy.data.n} features: {fault}") from fault
        if not given == wanted == x.shape:
            raise ValueError(
                f"examples are {x.shape}, the model gives {given} and the target is {wanted}: the same is expected of all"
            )

    def judged(self, settings: Settings, seed: Any, state: State) -> dict[str, Array]:
        """What is logged, and the loss: exact, or on examples that are the same for all models, a batch at a time."""
        toy, _ = self.made(settings, seed)
        logged = {name: function(toy, state.params) for name, function in self.log}
        if self.batch is None or self.judge is None:
            return {"loss": population_loss(toy, state.params), **logged}
        batch = self.batch
        one = lambda number: loss(toy, state.params, _sampled(toy, _key(0, _JUDGING, number), batch))
        return {"loss": jax.lax.map(one, jnp.arange(-(-self.judge // batch))).mean(), **logged}


def _updated(
    optimizer: "optax.GradientTransformation", gradient: Params, params: Params, state: Any
) -> tuple[Params, Any]:
    """The parameters and the optimizer's state after one update."""
    import optax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # optax promotes
        updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _sampled(toy: Toy, key: PRNGKeyArray, batch: int) -> Array:
    x = toy.data.sample(key, batch)
    if x.ndim != 2 or x.shape[0] != toy.data.n:
        raise ValueError(f"the sampler gave {x.shape}: (features, batch) with {toy.data.n} features is expected")
    return x


def _key(seed: Any, *counts: Any) -> PRNGKeyArray:
    """Counted out by Threefry, whose draws under `vmap` are those of a loop; other generators' are not."""
    key = jax.random.key(seed, impl="threefry2x32")
    for count in counts:
        key = jax.random.fold_in(key, count)
    return key


def _every(function: Callable) -> Callable:
    """A function of a cell's settings, a seed, and more, for all `[seed, cell]`: what depends on the seed alone is computed once."""
    of_cells = lambda settings, seed, *own: jax.vmap(lambda one, *own: function(one, seed, *own))(settings, *own)
    return lambda settings, seeds, *own: jax.vmap(lambda seed, *own: of_cells(settings, seed, *own))(seeds, *own)


def _begin(program: Converted, settings: Settings, seeds: Array) -> State:
    return _every(program)(settings, seeds)


def _advance(program: Converted, settings: Settings, seeds: Array, state: State, start: Array, stop: Array) -> State:
    one = lambda number: _every(lambda *own: program(number, *own))
    return jax.lax.fori_loop(start, stop, lambda number, state: one(number)(settings, seeds, state), state)


def _judge(program: Converted, settings: Settings, seeds: Array, state: State) -> dict[str, Array]:
    return _every(program)(settings, seeds, state)


@eqx.filter_jit
def _run(
    function: Callable, program: Converted, mesh: Mesh | None, settings: Settings, seeds: Array, *rest: Any
) -> Any:
    """The function's result; on a mesh each place along its first axis computes its own cells."""
    if mesh is None:
        return function(program, settings, seeds, *rest)
    axis = mesh.axis_names[0]
    cells, everywhere = PartitionSpec(None, axis), PartitionSpec()
    specs = [cells if isinstance(own, State) else everywhere for own in rest]
    arrays, fixed = eqx.partition(program, eqx.is_array)
    return jax.shard_map(
        lambda arrays, *args: function(eqx.combine(arrays, fixed), *args), mesh=mesh,
        in_specs=(everywhere, PartitionSpec(axis), everywhere, *specs), out_specs=cells,
        check_vma=False,  # cells never meet, and what all share need not be told from what varies
    )(arrays, settings, seeds, *rest)  # fmt: skip


def begin(programs: Programs, mesh: Mesh | None, settings: Settings, seeds: Any) -> State:
    """All models before their first step."""
    return _run(_begin, programs.begin, mesh, settings, seeds)


def advance(
    programs: Programs, mesh: Mesh | None, settings: Settings, seeds: Any, state: State, start: int, stop: int
) -> State:
    """All models after the steps from `start` to `stop`, in one compiled loop whatever these are."""
    return _run(_advance, programs.step, mesh, settings, seeds, state, np.int32(start), np.int32(stop))


def judge(programs: Programs, mesh: Mesh | None, settings: Settings, seeds: Any, state: State) -> dict[str, Array]:
    """The loss and what is logged of all models."""
    return _run(_judge, programs.judged, mesh, settings, seeds, state)


def model_bytes(job: TrainingJob, settings: Settings, seed: Any, state: State) -> int:
    """The bytes that one model takes at most: its state, and all that its loss computes, kept for the backward pass."""
    made = jax.make_jaxpr(lambda *own: job.loss(own[2].params, job.made(*own[:2])[0], own[1], 0))(settings, seed, state)
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

    return computed(made.jaxpr) + 3 * sum(size(leaf) for leaf in jax.tree.leaves(state))
