"""ReLU neurons privilege a basis: features align with them while dense, and share them as they grow sparse.

    python -m experiments.superposition.privileged --help

Elhage et al. 2022 ("Superposition in a privileged basis"): ReLU(W^T ReLU(W x) + b) of n=10 features in m=5 neurons with importance 0.75^i, the
best of 1,000 models for each density. While features are dense every neuron has one of them, with sparsity neurons become
polysemantic, in the end all of them; a linear hidden layer has no preferred basis, and its neurons mean nothing at any density.

At density 1 itself inputs are never 0 and a ReLU hidden layer with positive weights is linear: its basis is not privileged there, so that the
densities begin at 1/2. A basis is privileged where turning the hidden layer costs loss, which is measured too.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr
from scipy.stats import ortho_group

import mijax as mj
from experiments.superposition.study import Study, at_least, at_most, finish
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import geometry


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Monosemantic and polysemantic neurons over densities."""

    seeds: int = 100
    """Models of each density, of which the best is kept; `--scale paper` takes 1,000."""
    densities: int = 10
    """How many, from 0.5 to 0.02."""
    steps: int = 2500
    """Of the training, by Adam with a decaying rate; `--scale paper` takes 10,000, and a batch of 1,024."""
    batch: int = 256
    """Examples in each step."""
    turns: int = 20
    """Random rotations of the hidden layer over which the loss is averaged."""


N, M = 10, 5
MODELS = {"ReLU": sp.relu_hidden, "linear": sp.relu_output}
"""What a hidden layer is."""


def main(settings: Settings) -> xr.Dataset:
    """Train both kinds over densities, count their neurons, turn their bases, draw, compare, and write."""
    mj.compilation_cache()
    variables = {}
    for kind, model in MODELS.items():
        kept = sp.best(train(settings, kind, model)).drop_vars("seed")
        mono, poly = geometry.features_of_neurons(kept.W.transpose("density", "hidden", "feature").values)
        variables[f"{kind}: monosemantic"] = ("density", mono)
        variables[f"{kind}: polysemantic"] = ("density", poly)
        variables[f"{kind}: loss"] = kept.loss
        variables[f"{kind}: loss after turning"] = ("density", turned(settings, model, kept))
        variables[f"{kind}: W"] = kept.W
    results = xr.Dataset(variables)
    save(settings, results)
    return finish(settings, results, claims_of(results))


def toy_of(model: Callable[..., sp.Model]) -> Callable[..., sp.Toy]:
    """The setup of the paper over densities."""
    return lambda density: sp.Toy(model(N, M), sp.sparse(N, density), 0.75 ** np.arange(N))


def train(settings: Settings, kind: str, model: Callable[..., sp.Model]) -> xr.Dataset:
    """All models of one kind of hidden layer."""
    seeds, steps, batch = (1000, 10_000, 1024) if settings.paper else (settings.seeds, settings.steps, settings.batch)
    return sp.train(
        toy_of(model),
        {"density": np.geomspace(0.5, 0.02, settings.densities), "seed": np.arange(seeds)},
        optimizer=lambda: optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
        steps=steps,
        batch=batch,
        save=settings.saving(kind),
    )


def turned(settings: Settings, model: Callable[..., sp.Model], kept: xr.Dataset) -> np.ndarray:
    """The loss of each density's model after rotations of its hidden layer, relative to that before."""
    turns = jnp.asarray(ortho_group(M, seed=0).rvs(settings.turns), jnp.float32)
    ratios = []
    for density in kept.density.values:
        cell, toy = kept.sel(density=density), toy_of(model)(density)
        x = toy.data.sample(jax.random.key(1), 8192)
        w, b = jnp.asarray(cell.W.values), jnp.asarray(cell.b.values)
        after = jax.lax.map(lambda turn, w=w, b=b, x=x, toy=toy: sp.loss(toy, {"W": turn @ w, "b": b}, x), turns)
        ratios.append(after.mean() / sp.loss(toy, {"W": w, "b": b}, x))
    return np.array(ratios)


def claims_of(results: xr.Dataset) -> list:
    """What the paper says of neurons, at the densest and the sparsest and between them."""
    dense, thin = f"density {results.density.values[0]:g}", f"density {results.density.values[-1]:g}"
    share = lambda name, at: results[name].values[at] / M
    steps = np.diff(results["ReLU: polysemantic"].values)
    linear = results["linear: loss after turning"].values
    return [
        at_least(f"{dense}: monosemantic share of ReLU neurons", 0.8, share("ReLU: monosemantic", 0)),
        at_most(f"{dense}: monosemantic share of a linear hidden layer", 0.4, share("linear: monosemantic", 0)),
        at_least(
            "from each density to the next: share of steps that leave no fewer polysemantic ReLU neurons",
            0.8,
            (steps >= 0).mean(),
        ),
        at_least(f"{thin}: polysemantic share of ReLU neurons", 0.8, share("ReLU: polysemantic", -1)),
        at_most("a linear hidden layer turned: loss changes at most by", 1e-3, np.abs(linear - 1).max()),
        at_least(
            "a ReLU hidden layer turned: loss grows at least by the factor",
            1.5,
            results["ReLU: loss after turning"].min(),
        ),
    ]


def save(settings: Settings, results: xr.Dataset) -> None:
    """Draw neurons of each kind over sparsity."""
    sparsity = 1 / results.density.values
    panels = {
        f"{kind} hidden layer": {
            name: (sparsity, results[f"{kind}: {name}"].values) for name in ("monosemantic", "polysemantic")
        }
        for kind in MODELS
    }
    figure = plots.curves(
        panels,
        title=f"Neurons of the best models, of {M}",
        xlabel="1 / density",
        ylabel="neurons",
        xscale="log",
    )
    plots.save(figure, settings.folder / "privileged.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
