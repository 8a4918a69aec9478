"""Correlated and anticorrelated features: what lies orthogonal, what antipodal, and when pairs collapse.

    python -m experiments.superposition.correlated --help

Elhage et al. 2022 ("Correlated features"): in a plane, two features that are always present together are laid
orthogonally where there are two such pairs, and two that are never present together antipodally. Of three correlated
pairs, more than the plane has orthogonal places for, some collapse instead: the pair is represented by one direction,
its principal component, and one pair does so after another as the density grows. Expected, best of 12 models: |cos| <
.05 in a correlated pair (n=4), cos < -.99 in an anticorrelated one (n=4, 6), and of three pairs none, one, two and
three collapsed (cos > .9) at p = .03, .08, .17 and .7.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, at_most, finish, near
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import theory


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Pairs of features in a plane."""

    seeds: int = 12
    """Models of each density, of which the best is kept."""
    density: float = 0.05
    """Of a pair, where orthogonal and antipodal pairs are looked for."""
    steps: int = 2000
    """Of sampled training; `--scale paper` takes 10,000."""
    batch: int = 2048
    """Of sampled training."""


COLLAPSED = {0.03: 0, 0.08: 1, 0.17: 2, 0.7: 3}
Make = Callable[..., sp.Data]


def main(settings: Settings) -> xr.Dataset:
    """Train, measure cosines, compare with principal components, draw, and write."""
    mj.compilation_cache()
    variables, claims, panels = {}, [], {}
    for make, n, limit in ((sp.correlated, 4, 0.05), (sp.anticorrelated, 4, -0.99), (sp.anticorrelated, 6, -0.99)):
        label = f"{make.__name__}, n={n}"
        w = train(settings, label, sp.relu_output, make, n, np.array([settings.density])).W.values[0]
        variables[label] = (("hidden", f"feature_{n}"), w)
        panels[f"{make.__name__}\nn={n}, p={settings.density:g}"] = w
        claims.append(arranged(label, w, limit))
    dense = train(settings, "collapse", sp.relu_output, sp.correlated, 6, np.array(list(COLLAPSED)))
    variables["collapse"] = dense.W.drop_vars("seed").rename(feature="feature_6")
    claims += [collapsed(p, w) for p, w in zip(COLLAPSED, dense.W.values)]
    panels |= {f"correlated\nn=6, p={p:g}": w for p, w in zip(COLLAPSED, dense.W.values)}
    linear = train(settings, "linear", sp.linear, sp.correlated, 6, np.array(list(COLLAPSED)))
    variables["linear"] = linear.W.drop_vars("seed").rename(feature="feature_6")
    claims += principal(dense, linear)
    figure = plots.directions(
        panels,
        title="Pairs of features in a plane; each pair has one colour",
        columns=4,
        groups=[0, 0, 1, 1, 2, 2],
    )
    plots.save(figure, settings.folder / "correlated.png")
    return finish(settings, xr.Dataset(variables), claims)


def train(settings: Settings, name: str, model: Callable, make: Make, n: int, density: np.ndarray) -> xr.Dataset:
    """The best of some models at every density; on the exact loss where few features are active together."""
    exact = model is sp.relu_output and (n == 4 or make is sp.anticorrelated)
    sampled = 10_000 if settings.paper else settings.steps
    steps, batch, rate = (600, None, 0.03) if exact else (sampled, settings.batch, 0.01)
    toy = lambda density: sp.Toy(model(n, 2), make(n, density))
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(rate, steps))
    over = {"density": density, "seed": np.arange(settings.seeds)}
    return sp.best(
        sp.train(toy, over, optimizer=optimizer, steps=steps, batch=batch, judged_on=2**18, save=settings.saving(name))
    )


def cosines(w: np.ndarray) -> np.ndarray:
    """Of the two features of each pair."""
    unit = w / np.linalg.norm(w, axis=0)
    return (unit[:, ::2] * unit[:, 1::2]).sum(0)


def arranged(label: str, w: np.ndarray, limit: float) -> Claim:
    """Pairs are orthogonal, or antipodal where the limit is negative."""
    if limit > 0:
        return at_most(f"{label}: largest |cos| within a pair", limit, abs(cosines(w)).max())
    return at_most(f"{label}: largest cos within a pair", limit, cosines(w).max())


def collapsed(p: float, w: np.ndarray) -> Claim:
    """How many pairs have one direction."""
    return near(f"correlated, n=6, p={p:g}: pairs with cos > .9", COLLAPSED[p], (cosines(w) > 0.9).sum(), 0)


def covariance(p: float) -> np.ndarray:
    """Of three correlated pairs: both present with probability p, and then independent and uniform."""
    diagonal, other = p / 3 - p**2 / 4, p / 4 - p**2 / 4
    return np.kron(np.eye(3), np.array([[diagonal, other], [other, diagonal]]))


def principal(relu: xr.Dataset, linear: xr.Dataset) -> list[Claim]:
    """Linear models have the loss of principal components; the ReLU model's W comes to lie in the span of these."""
    pca = np.array([theory.principal_components(covariance(p), 2)[1] for p in relu.density.values])
    away = abs(linear.loss.values / pca - 1).max()
    sums = np.kron(np.eye(3), np.full((2, 1), 0.5**0.5))
    share = ((relu.W.values @ sums) ** 2).sum((1, 2)) / (relu.W.values**2).sum((1, 2))
    last = f"p={relu.density.values[-1]:g}"
    return [
        at_most("linear model: loss over that of principal components, furthest from 1", 0.02, away),
        at_least(f"correlated, n=6, {last}: share of |W|^2 along the three leading components", 0.98, share[-1]),
        at_most("correlated, n=6, sparsest: the same", 0.8, share[0]),
        at_most(
            "correlated, n=6: ReLU model's loss over that of principal components, largest",
            1.0,
            (relu.loss.values / pca).max(),
        ),
    ]


if __name__ == "__main__":
    main(tyro.cli(Settings))
