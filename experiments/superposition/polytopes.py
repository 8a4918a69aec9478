"""Small polytopes: which arrangements few alike features take, and how a pentagon breaks as one gets sparser.

    python -m experiments.superposition.polytopes --help

Elhage et al. 2022 ("The geometry of superposition"): sparse features of equal importance take the corners of uniform
polytopes, which are often solutions of the Thomson problem: five in a plane a pentagon (D = 2/5), six in three
dimensions an octahedron (1/2), eight a square antiprism (about 3/8). The pentagon of n=5, m=2 at p=.05 changes
suddenly to two antipodal pairs when one feature's density falls to about 1/2.5 of the others'. There trained models
change; the least losses of the two solutions cross at a relative density of about .26, and .2 to .45 is expected.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_most, finish, near
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import bounds, geometry
from mijax.superposition.corners import THOMSON


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Polytopes of five, six and eight features, and the perturbed pentagon."""

    seeds: int = 12
    """Models of each polytope, of which the best is kept."""
    steps: int = 3000
    """Of training six and eight features; `--scale paper` takes 10,000."""
    batch: int = 2048
    """Of training six and eight features. With five the loss is exact."""
    relative: int = 17
    """Relative densities of the pentagon's fifth feature, from .05 to 1; twice as many with `--scale paper`."""
    starts: int = 6
    """Models of each relative density."""


POLYTOPES = {"pentagon": (5, 2, 2 / 5), "octahedron": (6, 3, 1 / 2), "square antiprism": (8, 3, 0.37)}
PERTURBED = 0.05


def main(settings: Settings) -> xr.Dataset:
    """Train, name, compare with bounds, draw, and write."""
    mj.compilation_cache()
    variables, claims = {}, []
    for name, (n, m, dimensionality) in POLYTOPES.items():
        w = train(settings, name, n, m).W.values
        variables[name] = ((f"hidden_{m}", f"feature_{n}"), w)
        claims += compare(name, w, dimensionality)
    breaking = perturb(settings)
    pentagon, digons = split(breaking)
    claims.append(crossing(breaking.relative.values, pentagon, digons))
    of_best = sp.best(breaking)
    results = xr.Dataset(variables).assign(
        perturbed=of_best.W,
        loss=of_best.loss,
        loss_pentagon=("relative", pentagon),
        loss_digons=("relative", digons),
    )
    draw(settings, of_best)
    return finish(settings, results, claims)


def train(settings: Settings, name: str, n: int, m: int) -> xr.Dataset:
    """The best of some models of n equally important features in m dimensions, p = .1."""
    steps = 10_000 if settings.paper else settings.steps
    steps, batch, rate = (500, None, 0.03) if n == 5 else (steps, settings.batch, 0.01)
    toy = lambda: sp.Toy(sp.relu_output(n, m), sp.sparse(n, 0.1))
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(rate, steps))
    over = {"seed": np.arange(settings.seeds)}
    return sp.best(
        sp.train(toy, over, optimizer=optimizer, steps=steps, batch=batch, judged_on=2**18, save=settings.saving(name))
    )


def compare(name: str, w: np.ndarray, dimensionality: float) -> list[Claim]:
    """A polytope's claims: name, dimensionality, frame potential beside its bound, energy beside Thomson's."""
    m, n = w.shape
    label = f"{n} in {m}"
    called = geometry.polytope(w)
    each = geometry.dimensionality(w)
    away = abs(each - dimensionality).max() if name != "square antiprism" else abs(each.mean() - dimensionality)
    which = "largest" if name != "square antiprism" else "of the mean D"
    claims = [
        Claim(f"{label}: named {called!r}", name, float(called == name), called == name),
        at_most(f"{label}: |D_i - {dimensionality:g}|, {which}", 0.01, away),
        near(f"{label}: frame potential over its least, n^2 / m", 1.0, bounds.frame_potential(w) * m / n**2, 0.01),
    ]
    if m == 3:
        claims.append(
            near(
                f"{label}: energy as charges on a sphere, over Thomson's",
                1.0,
                geometry.thomson_energy(w) / THOMSON[n],
                0.002,
            )
        )
    return claims


def perturb(settings: Settings) -> xr.Dataset:
    """Five features in a plane, of which the last has a relative density of .05 to 1; all models."""

    def toy(relative):
        return sp.Toy(sp.relu_output(5, 2), sp.sparse(5, PERTURBED * jnp.ones(5).at[-1].set(relative)))

    steps, count = (1500, 2 * settings.relative) if settings.paper else (400, settings.relative)
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.03, steps))
    over = {"relative": np.geomspace(0.05, 1, count), "seed": np.arange(settings.starts)}
    return sp.train(toy, over, optimizer=optimizer, steps=steps, batch=None, save=settings.saving("perturbed"))


def split(models: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The least loss at each relative density of pentagons, and of models whose other four features are two digons."""
    digons = np.array([[are_digons(w) for w in row] for row in models.W.values])
    least = lambda mask: np.where(mask, models.loss.values, np.inf).min(axis=1)
    return least(~digons), least(digons)


def are_digons(w: np.ndarray) -> bool:
    """Whether the four features of the usual density are two antipodal pairs."""
    return geometry.polytopes(w[:, :4]) in (["digon", "digon"], ["square"])


def crossing(relative: np.ndarray, pentagon: np.ndarray, digons: np.ndarray) -> Claim:
    """The relative density at which both solutions cost the same, where the digons' gain changes its sign."""
    both = np.isfinite(pentagon) & np.isfinite(digons)
    relative, gain = relative[both], (pentagon - digons)[both]
    ends = np.flatnonzero((gain[:-1] > 0) & (gain[1:] <= 0))
    at = np.interp(0.0, -gain[ends[-1] :][:2], relative[ends[-1] :][:2]) if len(ends) else np.nan
    return near("perturbed pentagon: relative density at which digons cost as much", 0.325, at, 0.125)


def draw(settings: Settings, models: xr.Dataset) -> None:
    """The best model of each relative density."""
    best = [models.isel(relative=i) for i in range(models.sizes["relative"])]
    name = lambda m: f"{float(m.relative):.2f}: {'digons' if are_digons(m.W.values) else 'pentagon'}"
    figure = plots.directions(
        {name(m): m.W.values for m in best},
        title="Five features in a plane, the fifth's relative density",
        columns=6,
    )
    plots.save(figure, settings.folder / "polytopes.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
