"""Learning dynamics: the loss falls in drops, and features move to other dimensionalities while it does.

    python -m experiments.superposition.dynamics --help

Elhage et al. 2022 ("Superposition and learning dynamics"): while a model of many alike features learns, each feature's dimensionality
jumps between a few levels, and the sudden drops of the loss coincide with the jumps. With two sets of three correlated features in three
dimensions learning is a sequence of geometric transformations, between which the loss rests; the best models end as an
octahedron (a triangular antiprism), whose digons each join features of different sets.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import optax
import tyro
import xarray as xr
from scipy.stats import spearmanr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, at_most, finish
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import geometry


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Trajectories of many alike features, and of two sets of three."""

    seeds: int = 8
    """Models of the two sets, the best and the worst of which are shown."""
    steps: int = 5000
    """Of training by Adam with a constant rate of 1e-3; `--scale paper` takes 20,000."""
    batch: int = 2048
    """Examples in each step."""
    moments: int = 100
    """At which loss and weights are logged, evenly in the logarithm of the step."""


UNIFORM = (80, 8, 1 / 3.5)
"""Features, dimensions and density where every feature that is represented ends in an antipodal pair."""
SETS = (6, 3, 0.05)
EARLY = 0.02
"""The share of the steps in which lengths settle, before there are directions to speak of; not looked at."""


def main(settings: Settings) -> xr.Dataset:
    """Train with logs, relate jumps to drops, draw, and write."""
    mj.compilation_cache()
    n, m, p = UNIFORM
    alike = train(settings, "uniform", lambda: sp.Toy(sp.relu_output(n, m), sp.sparse(n, p)), 2)
    n, m, p = SETS
    sets = train(settings, "sets", lambda: sp.Toy(sp.relu_output(n, m), sp.correlated(n, p, 3)), settings.seeds)
    runs = {"80 in 8": sp.best(alike), "two sets of three": sp.best(sets)}
    results = xr.Dataset()
    for name, run in runs.items():
        size = run.sizes["feature"]
        results[f"{name}: loss"] = run["log.loss"].drop_vars("seed")
        results[f"{name}: dimensionality"] = (("step", f"feature_{size}"), geometry.dimensionality(weights(run)))
        results[f"{name}: norm"] = (("step", f"feature_{size}"), geometry.norms(weights(run)))
    draw(settings, results, list(runs))
    return finish(settings, results, claims_of(results, list(runs)) + ends(runs))


def train(settings: Settings, name: str, toy: Callable[..., sp.Toy], seeds: int) -> xr.Dataset:
    """Models with their losses and weights at the moments that are logged."""
    steps = 20_000 if settings.paper else settings.steps
    return sp.train(
        toy,
        {"seed": np.arange(seeds)},
        optimizer=lambda: optax.adam(1e-3),
        steps=steps,
        batch=settings.batch,
        log={"weights": lambda toy, params: params["W"]},
        log_at=np.unique(np.geomspace(1, steps, settings.moments).astype(int)).tolist(),
        save=settings.saving(name),
    )


def weights(run: xr.Dataset) -> np.ndarray:
    """`W [step, hidden, feature]` as it was logged."""
    return run["log.weights"].transpose("step", ...).values


def moved(results: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Between neighbouring moments after the first steps: how far all dimensionalities moved, and how much loss went."""
    late = results.isel(step=results.step.values >= EARLY * results.step.values[-1])
    return abs(np.diff(late[f"{name}: dimensionality"].values, axis=0)).sum(1), -np.diff(late[f"{name}: loss"].values)


def claims_of(results: xr.Dataset, runs: list[str]) -> list[Claim]:
    """Drops of the loss are where dimensionalities jump; a fifth of the moments has twice what an even fall would give it."""
    claims = []
    for name in runs:
        jump, drop = moved(results, name)
        steepest = np.sort(drop)[-(len(drop) // 5) :].sum() / drop.sum()
        claims += [
            at_least(
                f"{name}: rank correlation of the loss's drops and the jumps of D_i", 0.5, spearmanr(jump, drop)[0]
            ),
            at_least(f"{name}: share of the loss that goes in the steepest fifth of the moments", 0.4, steepest),
        ]
    return claims


def ends(runs: dict[str, xr.Dataset]) -> list[Claim]:
    """Where both come to rest."""
    alike, w = runs["80 in 8"].W.values, runs["two sets of three"].W.values
    away = abs(geometry.dimensionality(alike) - 0.5)[geometry.norms(alike) > 0.5]
    called, pairs = geometry.polytope(w), geometry.tegum_factors(w)
    across = [sum(i // 3 for i in pair) == 1 for pair in pairs]
    return [
        at_most(f"80 in 8: |D_i - 1/2| at the end, largest of {len(away)} represented features", 0.02, away.max()),
        Claim(f"two sets of three: the best is named {called!r}", "octahedron", float(called == "octahedron"), called == "octahedron"),
        Claim("two sets of three: share of its digons that join different sets", "1", float(np.mean(across)), all(across)),
    ]  # fmt: skip


def draw(settings: Settings, results: xr.Dataset, runs: list[str]) -> None:
    """Loss above dimensionalities, over the logarithm of the step."""
    panels = {}
    for name in runs:
        step = results.step.values
        panels[f"{name}: loss"] = {"loss": (step, results[f"{name}: loss"].values)}
        each = results[f"{name}: dimensionality"].values.T
        panels[f"{name}: D_i"] = {f"feature {i}": (step, d) for i, d in enumerate(each)}
    figure = plots.curves(
        panels,
        title="The loss drops where dimensionalities jump",
        xlabel="step",
        xscale="log",
    )
    plots.save(figure, settings.folder / "dynamics.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
