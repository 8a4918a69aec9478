"""When a feature is ignored, shares a dimension or has one: phase diagrams of importance and density, theory beside training.

    python -m experiments.superposition.phase_diagrams --help

Elhage et al. 2022 ("A phase change"): in the smallest models (n=2, m=1; n=3, m=2, the last feature of importance 0.1 to 10) the
optimal configuration changes discontinuously, where the closed-form losses cross: p = 4I / (2 + 5I) for I <= 1. With biases and norms free the
boundary lies further out. Models are trained on the exact loss, and on samples, and the best of each cell is kept, by the exact loss (pairs of
rare features are too rare in a sample to tell); expected of 99 % and 97 % of the cells, outside the band between the two boundaries,
is what theory says.
"""

import dataclasses
from typing import Any

import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, finish
from mijax import superposition as sp
from mijax.plots import save_phases
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
    steps: int = 1500
    """Of the sampled training."""
    batch: int = 256
    """Of the sampled training; `--scale paper` takes 1,024 and 10,000 steps."""


SIZES = ((2, 1), (3, 2))


def main(settings: Settings) -> xr.Dataset:
    """Compute theory and train, draw, compare, and write."""
    mj.compilation_cache()
    found, claims, panels = {}, [], {}
    for n, m in SIZES:
        cells = settings.cells if m == 1 or settings.paper else settings.sampled_cells
        exact_seeds = 4 if m == 1 else 16  # a third of the starts find the partner that is best
        own = f"n={n}, m={m}"
        for kind, count, seeds in (("exact", cells, exact_seeds), ("sampled", settings.sampled_cells, settings.seeds)):
            axes = axes_of(count)
            closed, true = phase.closed_form(n, m, *axes.values()), phase.free(n, m, *axes.values())
            trained = train(settings, n, m, kind, axes, seeds)
            roles = geometry.role(trained.W.values)
            share, clear = phase.agreement(roles, closed, true)
            told = {
                "closed form": closed.winner,
                "bias optimised": phase.closed_form(n, m, *axes.values(), biased=True).winner,
                "true minimum": true.winner,
            }
            told[f"trained, {kind}"] = roles
            for name, values in told.items():
                found[f"{own}: {name}" if "trained" in name else f"{own}: {name} ({count})"] = along(axes, values)
            found[f"{own}: trained, {kind}: loss"] = along(axes, trained.loss.values)
            found[f"{own}: trained, {kind}: W"] = along(axes, trained.W.values)
            panels.setdefault(own, {}).update(
                {k: (axes, v) for k, v in told.items() if kind == "exact" or "trained" in k}
            )
            claims.append(
                at_least(
                    f"{own}, {kind}: cells with theory's role, outside the band ({1 - clear.mean():.1%} of all)",
                    {"exact": 0.99, "sampled": 0.97}[kind],
                    share,
                )
            )
            if kind == "exact":
                below = float((trained.loss.values - true.losses.min(0)).min())
                claims.append(
                    Claim(
                        f"{own}: no trained model lies below the true minimum by more than",
                        "at most 1e-4",
                        -min(0.0, below),
                        below >= -1e-4,
                    )
                )
    results = xr.Dataset(found)
    save_phases(
        panels,
        settings.folder / "phase_diagrams.png",
        title="The last feature: ignored, sharing a dimension, dedicated",
    )
    return finish(settings, results, claims)


def axes_of(count: int) -> dict[str, np.ndarray]:
    """Importance from 0.1 to 10 and density from 1 to 0.01, both logarithmic."""
    return {"importance": np.geomspace(0.1, 10, count), "density": np.geomspace(1, 0.01, count)}


def along(axes: dict[str, np.ndarray], values: np.ndarray) -> xr.DataArray:
    """With dimensions of this number of cells."""
    count = len(axes["density"])
    dims = (f"importance_{count}", f"density_{count}")
    coords = dict(zip(dims, axes.values()))
    return (
        xr.DataArray(values, coords, (*dims, "hidden", "feature")[: values.ndim])
        if values.ndim == 2
        else xr.DataArray(values, coords, (*dims, f"hidden_{values.shape[2]}", f"feature_{values.shape[3]}"))
    )


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
