"""Uniform superposition: how many dimensions each of many alike features has, and where that number sticks.

    python -m experiments.superposition.uniform --help

Elhage et al. 2022 ("The geometry of superposition"): n=400 features of equal importance in m=30 dimensions (200 in 20
in the notebook). Dimensions per feature, D* = m / |W|_F^2, stick at 1 (no superposition) and at 1/2 (antipodal pairs)
while features get sparser; each feature's dimensionality D_i clusters at the fractions of small polytopes, and all of
them sum to m. Expected at 1/(1-S) = 2.3 and 3.5, on the second plateau, is D_i = 1/2 +- .02 for every feature that is
represented.
"""

import dataclasses

import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_most, finish
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import geometry


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Equally important features over a range of densities."""

    densities: int = 24
    """How many, 1/(1-S) from 1 to 20, beside the two of the second plateau."""
    seeds: int = 3
    """Models of each density, of which the best is kept."""
    steps: int = 3000
    """Of training; `--scale paper` takes 10,000."""
    batch: int = 512
    """Of training; `--scale paper` takes 1,024."""


PLATEAU = (2.3, 3.5)
FRACTIONS = {"1": 1.0, "3/4": 3 / 4, "2/3": 2 / 3, "1/2": 1 / 2, "2/5": 2 / 5, "3/8": 3 / 8, "0": 0.0}


def main(settings: Settings) -> xr.Dataset:
    """Train, measure dimensionalities, draw, compare, and write."""
    mj.compilation_cache()
    n, m = (400, 30) if settings.paper else (80, 8)
    trained = train(settings, n, m)
    w = trained.W.values
    over = ("density", "feature")
    results = trained.assign(
        dimensionality=(over, geometry.dimensionality(w)),
        norm=(over, geometry.norms(w)),
        dimensions_per_feature=("density", geometry.dimensions_per_feature(w)),
    )
    draw(settings, results, f"n={n}, m={m}")
    return finish(settings, results, compare(results, m))


def train(settings: Settings, n: int, m: int) -> xr.Dataset:
    """The best of some models at every density, densest first."""
    steps, batch = (10_000, 1024) if settings.paper else (settings.steps, settings.batch)
    toy = lambda density: sp.Toy(sp.relu_output(n, m), sp.sparse(n, density))
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.01, steps))
    sparser = np.sort(np.append(np.geomspace(1, 20, settings.densities), PLATEAU))
    over = {"density": 1 / sparser, "seed": np.arange(settings.seeds)}
    return sp.best(sp.train(toy, over, optimizer=optimizer, steps=steps, batch=batch, save=settings.saving(f"{n}_{m}")))


def compare(results: xr.Dataset, m: int) -> list[Claim]:
    """The claims, of both plateaus and of the sum."""
    dense = float(results.dimensions_per_feature.sel(density=1.0))
    claims = [at_most("1/(1-S) = 1: |D* - 1|", 0.05, abs(dense - 1))]
    for sparser in PLATEAU:
        cell = results.sel(density=1 / sparser)
        away = abs(cell.dimensionality.values - 0.5)[cell.norm.values > 0.5]
        claims.append(
            at_most(f"1/(1-S) = {sparser}: |D_i - 1/2|, largest of {len(away)} represented features", 0.02, away.max())
        )
        claims.append(at_most(f"1/(1-S) = {sparser}: |D* - 1/2|", 0.05, abs(float(cell.dimensions_per_feature) - 0.5)))
    total = results.dimensionality.sum("feature")
    claims.append(at_most("the sum of D_i over m, furthest from 1 at any density", 0.03, abs(total / m - 1).max()))
    return claims


def draw(settings: Settings, results: xr.Dataset, sizes: str) -> None:
    """D* and every represented feature's D_i against 1/(1-S)."""
    sparser = 1 / results.density.values
    shown = results.norm.values > 0.5
    dots = np.broadcast_to(sparser[:, None], shown.shape)[shown], results.dimensionality.values[shown]
    figure = plots.curves(
        {
            "D* = m / |W|²": {"D*": (sparser, results.dimensions_per_feature.values)},
            "D_i of features with |W_i| > 1/2": {"D_i": dots},
        },
        title=f"Dimensions per feature, {sizes}",
        xlabel="1 / (1 - S)",
        lines=FRACTIONS,
        dots=True,
        xscale="log",
    )
    plots.save(figure, settings.folder / "uniform.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
