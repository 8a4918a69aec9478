"""When a feature is ignored, shares a dimension or has one: phase diagrams of importance and density, theory beside training.

    python -m experiments.superposition.phase_diagrams --help

Elhage et al. 2022 ("A phase change"): in the smallest models (n=2, m=1; n=3, m=2, the last feature of importance 0.1 to 10) the
optimal configuration changes discontinuously, where the closed-form losses cross: p = 4I / (2 + 5I) for I <= 1. With biases and norms free the
boundary lies further out. Models are trained on the exact loss, and on samples, and the best of each cell is kept, by the exact loss (pairs of
rare features are too rare in a sample to tell); expected of 99 % and 97 % of the cells, outside the band between the two boundaries,
is what theory says.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, at_most, finish
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import geometry, phase


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Phase diagrams of n=2, m=1 and n=3, m=2."""

    cells: int = 100
    """Importances, and densities, of the exact diagram n=2, m=1."""
    sampled_cells: int = 50
    """The same of the sampled diagrams, and of n=3, m=2 unless `--scale paper`."""
    seeds: int = 10
    """Models in each cell of the sampled diagrams, of which the best is kept."""
    steps: int = 1000
    """Of the sampled training."""
    batch: int = 256
    """Of the sampled training; `--scale paper` takes 1,024 and 10,000 steps."""


SIZES = ((2, 1), (3, 2))


def main(settings: Settings) -> xr.Dataset:
    """Compute theory and train, draw, compare, and write."""
    mj.compilation_cache()
    results, claims, panels = xr.Dataset(), [], {}
    for n, m in SIZES:
        label, panels[f"n={n}, m={m}"] = f"n={n}, m={m}", {}
        cells = settings.cells if m == 1 or settings.paper else settings.sampled_cells
        starts = 4 if m == 1 else 16  # a third of the starts find the partner that is best
        for kind, count, seeds in (("exact", cells, starts), ("sampled", settings.sampled_cells, settings.seeds)):
            axes, theories = axes_of(count), theory(n, m, count)
            trained = train(settings, n, m, kind, axes, seeds)
            roles = geometry.role(trained.W.values)
            for name, diagram in theories.items():
                results[f"{label}: {name} ({count})"] = along(axes, diagram.winner)
                if kind == "exact":
                    panels[label][name] = axes, diagram.winner
            panels[label][f"trained, {kind}"] = axes, roles
            results[f"{label}: true minimum ({count}): loss"] = along(axes, theories["true minimum"].losses.min(0))
            for name, values in (("role", roles), ("loss", trained.loss.values), ("W", trained.W.values)):
                results[f"{label}: trained, {kind}: {name}"] = along(axes, values)
            claims += compare(label, kind, theories, roles, trained.loss.values)
    figure = plots.phases(
        panels,
        title="The last feature: ignored, sharing a dimension, dedicated",
    )
    plots.save(figure, settings.folder / "phase_diagrams.png")
    return finish(settings, results, claims)


def axes_of(count: int) -> dict[str, np.ndarray]:
    """Importance from 0.1 to 10 and density from 1 to 0.01, both logarithmic."""
    return {"importance": np.geomspace(0.1, 10, count), "density": np.geomspace(1, 0.01, count)}


@functools.cache
def theory(n: int, m: int, count: int) -> dict[str, phase.Phase]:
    """The three diagrams that are not trained."""
    axes = axes_of(count).values()
    return {
        "closed form": phase.closed_form(n, m, *axes),
        "bias optimised": phase.closed_form(n, m, *axes, biased=True),
        "true minimum": phase.free(n, m, *axes),
    }


def along(axes: dict[str, np.ndarray], values: np.ndarray) -> xr.DataArray:
    """With dimensions that tell their sizes: those of several diagrams are in one data set."""
    coords = {f"{name}_{len(at)}": at for name, at in axes.items()}
    rest = [f"{name}_{size}" for name, size in zip(("hidden", "feature"), values.shape[2:])]
    return xr.DataArray(values, coords, (*coords, *rest))


def compare(
    label: str, kind: str, theories: dict[str, phase.Phase], roles: np.ndarray, losses: np.ndarray
) -> list[Claim]:
    """Agreement outside the band between the boundaries; and no exact loss below the true minimum."""
    closed, true = theories["closed form"], theories["true minimum"]
    share, clear = phase.agreement(roles, closed, true)
    claim = f"{label}, {kind}: cells with theory's role, outside the band ({1 - clear.mean():.1%} of all)"
    claims = [at_least(claim, {"exact": 0.99, "sampled": 0.97}[kind], share)]
    if kind == "exact":
        below = (1 - losses / true.losses.min(0)).max()
        claims.append(
            at_most(
                f"{label}: share of its loss by which a trained model lies below the true minimum",
                1e-3,
                max(0.0, below),
            )
        )
    return claims


def train(settings: Settings, n: int, m: int, kind: str, axes: dict[str, Any], seeds: int) -> xr.Dataset:
    """The best of some models in every cell."""
    steps, batch, rate = (300, None, 0.04) if kind == "exact" else (settings.steps, settings.batch, 0.02)
    if kind == "sampled" and settings.paper:
        steps, batch, rate = 10_000, 1024, 0.003
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(rate, steps))
    over = {**axes, "seed": np.arange(seeds)}
    return sp.best(
        sp.train(
            phase.toy(n, m),
            over,
            optimizer=optimizer,
            steps=steps,
            batch=batch,
            judged_on=None,
            save=settings.saving(f"{n}_{m}_{kind}"),
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
