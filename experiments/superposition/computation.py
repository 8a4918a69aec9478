"""Computation in superposition: |x| of sparse features in fewer neurons than it takes.

    python -m experiments.superposition.computation --help

Elhage et al. 2022 ("Computation in superposition"): signed inputs x in [-1, 1], the target |x|, a hidden layer ReLU(W1 x) and the output
ReLU(W2 h + b). |x| = ReLU(x) + ReLU(-x) takes two neurons; with n=3 features in m=6 neurons models find just that in most
of the seeds (a loss below 1e-4). With n=100 in m=40 and importance 0.8^i nearly all of the 40 neurons
of a model (the median of several) are monosemantic while features are dense, and at most two when each is present once in a hundred times. (Twice as
many steps with the constant rate bring 0 to 17 of them back at that density.)

Whose a neuron is, is told by its row of W1, scaled to the geometric mean of the norms of its row of W1 and its column of
W2: a ReLU lets the two trade length freely, and a neuron that nobody reads is dead whatever it takes in.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Study, at_least, at_most, finish
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import geometry


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """The absolute value, with neurons enough and with too few."""

    clean_seeds: int = 200
    """Models of three features in six neurons."""
    clean_steps: int = 5000
    """Their steps, at a batch of 256."""
    seeds: int = 4
    """Models of each density with n=100, m=40; `--scale paper` takes 10."""
    steps: int = 10_000
    """Of their training, by AdamW with 1e-3, as in the paper's notebook, which falls to 0 in the last four tenths."""
    batch: int = 1024
    """Examples in each step."""


N, M = 100, 40
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.03, 0.01)
CLEAN = 1e-4
"""Below which loss a model of three features is clean."""


def main(settings: Settings) -> xr.Dataset:
    """Train both sizes, count clean models and monosemantic neurons, draw, compare, and write."""
    mj.compilation_cache()
    small, large = train_small(settings), train_large(settings)
    mono, poly = geometry.features_of_neurons(balanced(large))
    dims = ("density", "seed")
    results = xr.Dataset(
        {
            "n=3, m=6: loss": small.loss.rename(seed="small_seed"),
            "loss": large.loss,
            "monosemantic": (dims, mono),
            "polysemantic": (dims, poly),
            "W1": large.W1,
            "W2": large.W2,
            "b": large.b,
        }
    )
    claims = [
        at_least(f"n=3, m=6: share of seeds whose loss is below {CLEAN:g}", 0.5, (small.loss < CLEAN).mean()),
        at_least(f"density {DENSITIES[0]:g}: median number of monosemantic neurons of {M}", 38, np.median(mono[0])),
        at_most(f"density {DENSITIES[-1]:g}: median number of monosemantic neurons of {M}", 2, np.median(mono[-1])),
    ]
    save(settings, results)
    return finish(settings, results, claims)


def train_small(settings: Settings) -> xr.Dataset:
    """Three dense features in six neurons, many times."""
    return sp.train(
        lambda: sp.Toy(sp.hidden_layer(3, 6), sp.sparse(3, 1.0, signed=True), target=jnp.abs),
        {"seed": np.arange(settings.clean_seeds)},
        optimizer=lambda: optax.adam(optax.cosine_decay_schedule(1e-2, settings.clean_steps)),
        steps=settings.clean_steps,
        batch=256,
        save=settings.saving("3_6"),
    )


def train_large(settings: Settings) -> xr.Dataset:
    """A hundred features in forty neurons over densities."""
    steps, last = settings.steps, settings.steps * 2 // 5
    rate = optax.join_schedules([optax.constant_schedule(1e-3), optax.linear_schedule(1e-3, 0, last)], [steps - last])
    importance = 0.8 ** np.arange(N)
    return sp.train(
        lambda density: sp.Toy(sp.hidden_layer(N, M), sp.sparse(N, density, signed=True), importance, jnp.abs),
        {"density": DENSITIES, "seed": np.arange(10 if settings.paper else settings.seeds)},
        optimizer=lambda: optax.adamw(rate, weight_decay=0.01),
        steps=steps,
        batch=settings.batch,
        judged_on=2**17,
        save=settings.saving(f"{N}_{M}"),
    )


def balanced(models: xr.Dataset) -> np.ndarray:
    """Rows of W1 `[density, seed, hidden, feature]`, each with the geometric mean of its norm and that of its column of W2."""
    w1 = models.W1.transpose("density", "seed", "hidden", "feature").values
    reads = np.linalg.norm(w1, axis=-1)
    writes = np.linalg.norm(models.W2.transpose("density", "seed", "feature", "hidden"), axis=-2)
    return w1 * np.sqrt(writes / np.maximum(reads, 1e-9))[..., None]


def save(settings: Settings, results: xr.Dataset) -> None:
    """Draw the losses of the small models in order, and the neurons of the large ones over density."""
    losses = np.sort(results["n=3, m=6: loss"].values)
    sparsity = 1 / results.density.values
    figure = plots.curves(
        {
            "n=3, m=6: loss, seeds in order": {"loss": (np.linspace(0, 1, len(losses)), losses)},
            f"n={N}, m={M}: share of neurons, over 1 - density": {
                name: (1 - 1 / sparsity, results[name].median("seed").values / M)
                for name in ("monosemantic", "polysemantic")
            },
        },
        title="The absolute value in ReLU neurons",
    )
    plots.save(figure, settings.folder / "computation.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
