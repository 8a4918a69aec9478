"""Superposition makes models vulnerable: small changes along many directions reach outputs that they should not.

    python -m experiments.superposition.adversarial --help

Elhage et al. 2022 ("The relationship between superposition and adversarial examples"): models of n features in m dimensions, equally
important, over densities, are attacked by changes of L2 norm 0.1 of the inputs' mean norm. The best direction against output i is its row of
W^T W; here without its own feature's entry, so that what counts is interference alone. Of the n attacks on an example the one that costs
most is taken. Vulnerability is the loss so added, per squared size of the change (sizes follow density), relative to the dense model's,
which has no superposition. The paper finds over 3x more of it, following the features per dimension |W|_F^2 / m.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr
from scipy.stats import spearmanr

import mijax as mj
from experiments.superposition.study import Study, at_least, finish
from mijax import plots
from mijax import superposition as sp
from mijax._types import Array, Float


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Vulnerability to small changes over features per dimension."""

    features: int = 100
    """n."""
    hidden: int = 15
    """m; `--scale paper` takes 20, 10,000 steps and a batch of 1,024."""
    densities: int = 10
    """How many, from 1 to 0.02."""
    steps: int = 5000
    """Of the training, by Adam with a decaying rate."""
    batch: int = 512
    """Examples in each step."""
    seeds: int = 2
    """Models of each density, of which the best is attacked."""
    size: float = 0.1
    """Of an attack, relative to the mean norm of inputs."""
    examples: int = 2048
    """That are attacked."""


def main(settings: Settings) -> xr.Dataset:
    """Train over densities, attack, draw, compare, and write."""
    mj.compilation_cache()
    toy = toy_of(settings.features, 20 if settings.paper else settings.hidden)
    trained = sp.best(train(settings, toy))
    rows = [
        attacked(toy(density), jax.tree.map(jnp.asarray, params), settings) for density, params in models_of(trained)
    ]
    added, share = np.array(rows).T
    results = xr.Dataset(
        {
            "features_per_dimension": ("density", 1 / sp.geometry.dimensions_per_feature(trained.W.values)),
            "vulnerability": ("density", added / added[0]),
            "loss_ratio": ("density", share),
            "loss": trained.loss,
        }
    )
    crowd, vulnerability = results.features_per_dimension.values, results.vulnerability.values
    claims = [
        at_least(f"vulnerability at {crowd[-1]:.3g} features per dimension, relative to dense", 3, vulnerability[-1]),
        at_least(
            "rank correlation of vulnerability and features per dimension", 0.9, spearmanr(crowd, vulnerability)[0]
        ),
    ]
    figure = plots.curves(
        {
            "vulnerability, relative to dense": {"|W|² / m": (crowd, vulnerability)},
            "loss under attack / loss": {"|W|² / m": (crowd, share)},
        },
        title="Vulnerability follows superposition",
        xlabel="features per dimension",
    )
    plots.save(figure, settings.folder / "adversarial.png")
    return finish(settings, results, claims)


def toy_of(n: int, m: int) -> Callable[..., sp.Toy]:
    """Equally important features over densities."""
    return lambda density: sp.Toy(sp.relu_output(n, m), sp.sparse(n, density))


def train(settings: Settings, toy: Callable[..., sp.Toy]) -> xr.Dataset:
    """Models of all densities, the dense one first."""
    steps, batch = (10_000, 1024) if settings.paper else (settings.steps, settings.batch)
    return sp.train(
        toy,
        {"density": np.geomspace(1, 0.02, settings.densities), "seed": np.arange(settings.seeds)},
        optimizer=lambda: optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
        steps=steps,
        batch=batch,
        save=settings.saving("train"),
    )


def models_of(trained: xr.Dataset) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Each density with its model's parameters."""
    return [
        (float(model.density), {"W": model.W.values, "b": model.b.values})
        for model in (trained.isel(density=i) for i in range(trained.sizes["density"]))
    ]


def attacked(toy: sp.Toy, params: dict[str, Array], settings: Settings) -> tuple[float, float]:
    """The loss that the worst attack on each example adds, per squared size; and the loss under attack relative to that without."""
    x = toy.data.sample(jax.random.key(1), settings.examples)
    size = settings.size * jnp.linalg.norm(x, axis=0).mean()
    error = lambda changed: ((toy.model.apply(params, changed) - x) ** 2).sum(axis=0)
    worst = jax.lax.map(lambda d: error(x + size * d[:, None]), directions(params["W"])).max(axis=0)
    clean = error(x).mean()
    return float((worst.mean() - clean) / size**2), float(worst.mean() / clean)


def directions(w: Float[Array, "hidden feature"]) -> Float[Array, "output feature"]:
    """The unit change of the input that moves each output most while its own feature stays as it is."""
    gram = w.T @ w
    others = gram - jnp.diag(jnp.diag(gram))
    return others / jnp.maximum(jnp.linalg.norm(others, axis=1, keepdims=True), 1e-6)


if __name__ == "__main__":
    main(tyro.cli(Settings))
