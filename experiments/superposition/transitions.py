"""Dynamical and Bayesian phase transitions: gradient descent falls from polygon to polygon, the posterior as data grow.

    python -m experiments.superposition.transitions --help

Chen et al. 2023 (arXiv:2310.06301): ReLU(W^T W x + b) of c=6 features in the plane, on data of one feature at a time, has k-gons for critical
points. Gradient descent rests at their losses, and ends in one of them; it goes from higher loss and lower complexity (learning
coefficient) to lower loss and higher complexity. The Bayesian posterior exp(-n L) does the same as the number of examples n grows, since
its free energy is n L + lambda log n: few corners while n is small, the hexagon, lambda = (3c - 1)/2 = 8.5, when it is large.

Both here with the exact population loss. The posterior, of a prior N(0, 1), is sampled by sequential Monte Carlo (Del Moral et al. 2006):
particles of the prior are weighted, resampled and moved by Hamiltonian Monte Carlo (Neal 2011) from each n to the next. In the hexagon n (E[L] - L_6)
tends to lambda, which tells whether the sampler is right.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr
from jaxtyping import PRNGKeyArray

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, at_most, finish, near
from mijax import plots
from mijax import superposition as sp
from mijax._types import Array, Float
from mijax.superposition import geometry, kgons


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Gradient descent and the posterior of six features in a plane."""

    seeds: int = 100
    """Models that learn; `--scale paper` takes 1,000."""
    steps: int = 20_000
    """Of gradient descent with a rate of 0.05."""
    moments: int = 120
    """At which the loss is logged, evenly in the logarithm of the step."""
    particles: int = 2000
    """Of the posterior; `--scale paper` takes 20,000."""
    rungs: int = 30
    """Numbers of examples n, from 10 to 10,000."""
    moves: int = 20
    """Hamiltonian trajectories at each n."""


C = 6
LEVELS = {
    f"{k}-gon" + "+" * positive: kgons.kgon_loss(k, C, positive) for k in (4, 5, 6) for positive in range(C - k + 1)
}
"""The critical losses; a plus is a dead feature with a positive bias."""
EARLY = 0.01
"""The share of the steps before gradient descent first comes to rest."""
LEAPS = 15
"""Leapfrog steps of a trajectory."""


def main(settings: Settings) -> xr.Dataset:
    """Learn and sample, tell polygons, draw, and write."""
    mj.compilation_cache()
    learnt = descend(settings)
    losses = learnt["log.loss"].transpose("seed", "step").values
    sampled = posterior(settings)
    results = xr.Dataset(
        {"learnt: loss": learnt["log.loss"], "learnt: W": learnt.W, "learnt: b": learnt.b, "learnt: level": ("seed", levels(learnt.loss.values))}
    ).merge(sampled)  # fmt: skip
    draw(settings, results, losses)
    return finish(settings, results, dynamical(learnt, losses) + bayesian(sampled))


def toy() -> sp.Toy:
    """Six features, one at a time, in a plane."""
    return sp.Toy(sp.relu_output(C, 2), sp.one_hot(C))


def descend(settings: Settings) -> xr.Dataset:
    """Gradient descent on the exact loss from many starts."""
    return sp.train(
        toy,
        {"seed": np.arange(1000 if settings.paper else settings.seeds)},
        optimizer=lambda: optax.sgd(0.05),
        steps=settings.steps,
        batch=None,
        log={"weights": lambda toy, params: params["W"]},
        log_at=np.unique(np.geomspace(1, settings.steps, settings.moments).astype(int)).tolist(),
        save=settings.saving("descent"),
    )


def levels(losses: np.ndarray) -> np.ndarray:
    """The critical loss nearest to each, by its number in `LEVELS`."""
    return abs(np.asarray(losses)[..., None] - np.array(list(LEVELS.values()))).argmin(-1)


def resting(losses: np.ndarray, tolerance: float = 0.01) -> np.ndarray:
    """Whether each loss lies within this share of a critical one."""
    nearest = np.array(list(LEVELS.values()))[levels(losses)]
    return abs(losses / nearest - 1) < tolerance


def corners(w: np.ndarray) -> np.ndarray:
    """How many features are represented: longer than half of 1."""
    return (geometry.norms(w) > 0.5).sum(-1)


def dynamical(learnt: xr.Dataset, losses: np.ndarray) -> list[Claim]:
    """Gradient descent's claims."""
    late = learnt.step.values > EARLY * learnt.step.values[-1]
    rests = resting(losses) & late
    counted = corners(learnt["log.weights"].transpose("seed", "step", ...).values)
    named = np.array([int(name[0]) for name in LEVELS])[levels(losses)]
    several = [len(np.unique(levels(row)[mask])) > 1 for row, mask in zip(losses, rests)]
    lasted = np.broadcast_to(np.diff(learnt.step, prepend=0) * late, losses.shape)
    return [
        at_least("gradient descent: share of models that end within 1 % of a critical loss", 0.99, resting(losses[:, -1]).mean()),
        at_least(f"gradient descent: share of the steps after the first {EARLY:.0%} within 1 % of a critical loss", 0.8, np.average(resting(losses), weights=lasted)),
        at_least("gradient descent: share of models that rest at one critical loss before another", 0.5, np.mean(several)),
        at_least(
            "gradient descent: at rest, share of the steps with as many corners as the critical loss tells",
            0.95,
            lasted[rests & (counted == named)].sum() / max(1, lasted[rests].sum()),
        ),
    ]  # fmt: skip


def bayesian(sampled: xr.Dataset) -> list[Claim]:
    """The posterior's claims."""
    share = sampled.share.values
    most = sampled.corners.values[share.argmax(1)]
    hexagon = sampled.sel(corners=6)
    return [
        at_most("posterior: corners of the most frequent polygon at the fewest examples", 5, most[0]),
        near("posterior: corners of the most frequent polygon at the most examples", 6, most[-1], 0),
        at_least("posterior: steps of n at which the most frequent polygon has no fewer corners", 1.0, (np.diff(most) >= 0).mean()),
        near("posterior: lambda of the hexagon, n (E[L] - L_6) at the most examples", kgons.LEARNING_COEFFICIENTS[6], hexagon.complexity.values[-1], 0.5),
        at_least("Hamiltonian moves: share accepted, least at any n", 0.5, sampled.accepted.values.min()),
    ]  # fmt: skip


def posterior(settings: Settings) -> xr.Dataset:
    """At each number of examples: the share of particles with each number of corners, and n times their excess loss."""
    count = 20_000 if settings.paper else settings.particles
    examples = np.geomspace(10, 10_000, settings.rungs)
    size = 3 * C
    key, start = jax.random.split(jax.random.key(0))
    particles, step, before = jax.random.normal(start, (count, size)), jnp.asarray(0.3), 0.0
    ks = np.arange(C + 1)
    share, excess, accepted = [], [], []
    for number, n in enumerate(examples):
        subkey = jax.random.fold_in(key, number)
        particles, step, rate = rung(subkey, particles, step, jnp.asarray(before), jnp.asarray(n), settings.moves)
        before = n
        w = np.asarray(particles[:, : 2 * C]).reshape(count, 2, C)
        k, losses = corners(w), np.asarray(jax.vmap(energy)(particles))
        share.append([(k == each).mean() for each in ks])
        floor = [min((v for name, v in LEVELS.items() if name.startswith(str(each))), default=np.nan) for each in ks]
        excess.append([n * (losses[k == each].mean() - floor[each]) if (k == each).any() else np.nan for each in ks])
        accepted.append(float(rate))
    return xr.Dataset(
        {
            "share": (("examples", "corners"), np.array(share)),
            "complexity": (("examples", "corners"), np.array(excess)),
            "accepted": ("examples", np.array(accepted)),
            "particles": (("particle", "parameter"), np.asarray(particles)),
        },
        {"examples": examples, "corners": ks},
    )


def energy(flat: Float[Array, " parameter"]) -> Float[Array, ""]:
    """The population loss of W and b, laid out in one vector."""
    return sp.population_loss(toy(), {"W": flat[: 2 * C].reshape(2, C), "b": flat[2 * C :]})


@functools.partial(jax.jit, static_argnums=5)
def rung(
    key: PRNGKeyArray, particles: Float[Array, "particle parameter"], step: Float[Array, ""], before: Float[Array, ""], n: Float[Array, ""], moves: int,
) -> tuple[Float[Array, "particle parameter"], Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Particles of n examples from those of `before`, the step size that suits them, and the share of moves accepted."""
    choose, move = jax.random.split(key)
    weight = jax.nn.softmax(-(n - before) * jax.vmap(energy)(particles))
    at = (jax.random.uniform(choose) + jnp.arange(len(particles), dtype=particles.dtype)) / len(
        particles
    )  # systematic resampling
    particles = particles[jnp.clip(jnp.searchsorted(jnp.cumsum(weight), at), 0, len(particles) - 1)]
    potential = lambda flat: n * energy(flat) + (flat**2).sum() / 2

    def moved(carry, key):
        particles, step = carry
        keys = jax.random.split(key, len(particles))
        particles, rate = jax.vmap(lambda k, p: trajectory(k, p, potential, step))(keys, particles)
        return (particles, step * jnp.exp(rate.mean() - 0.8)), rate.mean()

    (particles, step), rates = jax.lax.scan(moved, (particles, step), jax.random.split(move, moves))
    return particles, step, rates[moves // 2 :].mean()


def trajectory(
    key: PRNGKeyArray, at: Float[Array, " parameter"], potential: Callable[[Array], Array], step: Float[Array, ""]
) -> tuple[Float[Array, " parameter"], Float[Array, ""]]:
    """One Hamiltonian trajectory by leapfrog, accepted or not, and the probability of that; lengths vary, so that none is a period."""
    push, length, coin = jax.random.split(key, 3)
    begun = jax.random.normal(push, at.shape)
    step = step * jax.random.uniform(length, minval=0.5, maxval=1.0)
    force = jax.grad(potential)

    def leap(carry, _):
        at, momentum = carry
        at = at + step * momentum
        return (at, momentum - step * force(at)), None

    there, momentum = jax.lax.scan(leap, (at, begun - step / 2 * force(at)), None, length=LEAPS)[0]
    momentum = momentum + step / 2 * force(there)
    change = potential(at) - potential(there) + ((begun**2).sum() - (momentum**2).sum()) / 2
    rate = jnp.nan_to_num(jnp.minimum(1.0, jnp.exp(change)))
    return jnp.where(jax.random.uniform(coin) < rate, there, at), rate


def draw(settings: Settings, results: xr.Dataset, losses: np.ndarray) -> None:
    """Trajectories with critical losses, the posterior's shares, and one model of each final level."""
    late = results.step.values > EARLY * results.step.values[-1]
    step, shown = results.step.values[late], losses[:20, late]
    figure = plots.curves(
        {"gradient descent: loss": {str(i): (step, row) for i, row in enumerate(shown)}},
        title="Gradient descent rests at k-gons",
        xlabel="step",
        lines=LEVELS,
        xscale="log",
    )
    plots.save(figure, settings.folder / "transitions_1_dynamical.png")
    share = results.share
    figure = plots.curves(
        {"posterior": {f"{k} corners": (results.examples.values, share.sel(corners=k).values) for k in (3, 4, 5, 6)}},
        title="The posterior's polygons",
        xlabel="examples",
        ylabel="share of particles",
        xscale="log",
    )
    plots.save(figure, settings.folder / "transitions_2_bayesian.png")
    level = results["learnt: level"].values
    indices = {name: np.flatnonzero(level == i) for i, name in enumerate(LEVELS)}
    figure = plots.directions(
        {
            f"{name}: {len(which)} models": results["learnt: W"].values[which[0]]
            for name, which in indices.items()
            if len(which)
        },
        title="Where gradient descent ends",
    )
    plots.save(figure, settings.folder / "transitions_3_ends.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
