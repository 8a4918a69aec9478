"""Basic results: what linear and ReLU-output models represent as features get sparser, and what negative weights hide.

    python -m experiments.superposition.basic --help

Elhage et al. 2022 ("Demonstrating superposition"): with n=20, m=5, I=.7^i (and n=80, m=20, I=.9^i) the linear model
always keeps the m most important features, as principal component analysis does; the ReLU-output model does so only
where features are dense, and represents more of them in superposition where they are sparse: over 2m at S=.999 is
expected. (From S=.99 on the number levels off, and need not grow at every step.) The introduction's n=5, m=2, I=.9^i
goes from two features through antipodal pairs to a pentagon, whose negative biases hide its interference.

"Computation in superposition": where a ReLU layer computes |x|, neurons that serve two features have the asymmetric
motif: large W1 and small W2 for one, small W1 and large W2 for the other; what the first then adds to the second's
output, negative weights of other neurons take away.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, at_most, finish, near
from mijax import plots
from mijax import superposition as sp
from mijax.superposition import geometry, theory


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Models of n=20, m=5 over a range of sparsities, of n=5, m=2, and of absolute values."""

    seeds: int = 3
    """Models of each sparsity, of which the best is kept."""
    steps: int = 4000
    """Of training; `--scale paper` takes 10,000."""
    batch: int = 4096
    """Of training n=20; in the plane, and of absolute values, a quarter of it."""
    starts: int = 8
    """Models of each density in the plane, the best of which is kept; of absolute values, half of twice as many are."""


SPARSITY = (0.0, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999)


class Size(NamedTuple):
    """Features, hidden dimensions, and the ratio of two neighbours' importances."""

    n: int
    m: int
    ratio: float

    @property
    def importance(self) -> np.ndarray:
        """Of each feature."""
        return self.ratio ** np.arange(self.n)


def main(settings: Settings) -> xr.Dataset:
    """Train, compare, draw, and write."""
    mj.compilation_cache()
    variables, claims, pictures = {}, [], {}
    for size in (Size(20, 5, 0.7), Size(80, 20, 0.9))[: 1 + settings.paper]:
        label = f"n={size.n}, m={size.m}"
        linear, relu = (train(settings, size, kind) for kind in (sp.linear, sp.relu_output))
        for kind, models in (("linear", linear), ("ReLU", relu)):
            for name, values in models[["W", "b", "loss"]].items():
                renamed = {k: f"{k}_{size.n}" for k in ("hidden", "feature") if k in values.dims}
                variables[f"{label}: {kind}: {name}"] = values.rename(renamed)
            for s, w, b in zip(SPARSITY, models.W.values, models.b.values):
                pictures[f"{label}, {kind}, S={s:g}" if settings.paper else f"{kind}, S={s:g}"] = w, b
        claims += compare_linear(label, size, linear) + compare_relu(label, size, relu)
    plane = introduce(settings)
    absolute = compute(settings)
    for label, models in (("plane", plane), ("absolute", absolute)):
        for name, values in models[[k for k in ("W", "W1", "W2", "b", "loss") if k in models]].items():
            variables[f"{label}: {name}"] = values.rename({k: f"{k}_{label}" for k in values.dims})
    claims += compare_plane(plane) + compare_motif(absolute)
    figure = plots.models(
        pictures,
        title="W^T W, b, and |W_i| (yellow: shares its dimension)",
        columns=len(SPARSITY),
    )
    plots.save(figure, settings.folder / "basic.png")
    figure = plots.directions(
        {f"1 - S = {float(p):.2g}": w for p, w in zip(plane.density, plane.W.values)},
        title="n=5, m=2, I=.9^i: from the most important two to a pentagon",
    )
    plots.save(figure, settings.folder / "basic_intro.png")
    results = xr.Dataset({name: values.reset_coords(drop=True) for name, values in variables.items()})
    return finish(settings, results, claims)


def fitted(settings: Settings, name: str, toy: Callable, density: np.ndarray, seeds: int, batch: int) -> xr.Dataset:
    """Some models at every density, the best first."""
    steps = 10_000 if settings.paper else settings.steps
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.01, steps))
    over = {"density": density, "seed": np.arange(seeds)}
    save = settings.saving(name)
    models = sp.train(toy, over, optimizer=optimizer, steps=steps, batch=batch, judged_on=2**17, save=save)
    return sp.best_of(models, seeds)


def train(settings: Settings, size: Size, kind: Callable) -> xr.Dataset:
    """Models of one kind at every sparsity."""
    toy = lambda density: sp.Toy(kind(size.n, size.m), sp.sparse(size.n, density), jnp.asarray(size.importance))
    density = 1 - np.array(SPARSITY)
    return sp.best(fitted(settings, f"{kind.__name__}_{size.n}", toy, density, settings.seeds, settings.batch))


def introduce(settings: Settings) -> xr.Dataset:
    """Five features in a plane, density 1 to .05."""
    toy = lambda density: sp.Toy(sp.relu_output(5, 2), sp.sparse(5, density), 0.9 ** np.arange(5))
    return sp.best(fitted(settings, "plane", toy, 20.0 ** -np.linspace(0, 1, 10), settings.starts, settings.batch // 4))


def compute(settings: Settings) -> xr.Dataset:
    """Absolute values of ten features by six neurons: the better half of the models."""
    n, m = 10, 6

    def toy(density):
        return sp.Toy(sp.hidden_layer(n, m), sp.sparse(n, density, signed=True), 0.8 ** np.arange(n), jnp.abs)

    models = fitted(settings, "absolute", toy, np.array([0.3, 0.1]), 2 * settings.starts, settings.batch // 4)
    return models.isel(seed=slice(settings.starts)).drop_vars("seed")


def linear_error(w: np.ndarray, b: np.ndarray, p: float, importance: np.ndarray) -> float:
    """The linear model's expected loss: of each output the variance of its error, and its mean squared."""
    left = np.eye(len(b)) - w.T.astype(float) @ w
    return float(importance @ (left**2 @ np.full(len(b), theory.ignored(p)) + (left.sum(1) * p / 2 - b) ** 2))


def compare_linear(label: str, size: Size, models: xr.Dataset) -> list[Claim]:
    """The linear model keeps the most important features, and costs what theory says."""
    norms = geometry.norms(models.W.values)
    kept = np.arange(size.n) < size.m
    density = models.density.values
    errors = [linear_error(w, b, p, size.importance) for w, b, p in zip(models.W.values, models.b.values, density)]
    best = [theory.linear_loss(p, size.importance, size.m) for p in density]
    least, most = (f"{label}, linear: features represented, {which} over all S" for which in ("least", "most"))
    count = (norms > 0.5).sum(1)
    return [
        near(least, size.m, count.min(), 0),
        near(most, size.m, count.max(), 0),
        at_most(f"{label}, linear: |W_i| from 1 for the first m, 0 for others, furthest", 0.1, abs(norms - kept).max()),
        at_most(f"{label}, linear: loss over theory's, furthest from 1", 0.02, abs(np.array(errors) / best - 1).max()),
    ]


def compare_relu(label: str, size: Size, models: xr.Dataset) -> list[Claim]:
    """The ReLU-output model represents more than m features where they are sparse, and then costs less."""
    count = (geometry.norms(models.W.values) > 0.5).sum(1)
    sparsest = models.isel(density=-1)
    gain = float(sparsest.loss) / theory.linear_loss(float(sparsest.density), size.importance, size.m)
    return [
        near(f"{label}, ReLU, S=0: features represented", size.m, count[0], 0),
        at_least(f"{label}, ReLU, S={SPARSITY[-1]}: features represented, more than 2m", 2 * size.m + 1, count[-1]),
        at_least(f"{label}, ReLU, S >= .7: features represented, least, more than m", size.m + 1, count[1:].min()),
        at_most(f"{label}, ReLU, S={SPARSITY[-1]}: loss over the linear model's", 0.5, gain),
    ]


def compare_plane(models: xr.Dataset) -> list[Claim]:
    """Two features where dense, a pentagon with negative biases where sparse."""
    count = (geometry.norms(models.W.values) > 0.5).sum(1)
    called = geometry.polytope(models.W.values[-1])
    return [
        near("n=5, m=2, S=0: features represented", 2, count[0], 0),
        near("n=5, m=2, S=.95: features represented", 5, count[-1], 0),
        Claim(f"n=5, m=2, S=.95: named {called!r}", "pentagon", float(called == "pentagon"), called == "pentagon"),
        at_most("n=5, m=2, S=.95: largest bias", -0.01, models.b.values[-1].max()),
    ]


class Motif(NamedTuple):
    """A neuron that two features share: ratios of their weights, and what the first puts into the second's output."""

    into: float
    """|W1| of the feature with the larger one over that of the other."""
    out_of: float
    """|W2| of that feature over that of the other."""
    excited: float
    """The other's output when that feature alone is 1 in size and fires the neuron, without negative W2."""
    shown: float
    """The same, with all of W2."""


def motifs(w1: np.ndarray, w2: np.ndarray, b: np.ndarray) -> list[Motif]:
    """Those of every neuron that passes two features: with W1 W2 over 1/2, where 1 computes |x| for one sign of x."""
    neurons = []
    for k in range(len(w1)):
        through = w1[k] * w2[:, k]
        used = np.flatnonzero(through > 0.5)
        if len(used) != 2:
            continue
        first, second = used[np.argsort(-abs(w1[k, used]))]
        fires = np.maximum(np.sign(w1[k, first]) * w1[:, first], 0)
        excited, shown = (max(0.0, float(w @ fires + b[second])) for w in (np.maximum(w2[second], 0), w2[second]))
        neurons.append(Motif(abs(w1[k, first] / w1[k, second]), abs(w2[first, k] / w2[second, k]), excited, shown))
    return neurons


def compare_motif(models: xr.Dataset) -> list[Claim]:
    """Shared neurons have the asymmetric motif, and its interference is inhibited."""
    every = (np.concatenate(models[k].values) for k in ("W1", "W2", "b"))
    neurons = [motif for model in zip(*every) for motif in motifs(*model)]
    asymmetric = [m for m in neurons if m.into > 1.5 and m.out_of < 1 / 1.5]
    share = len(asymmetric) / max(1, len(neurons))
    left = sum(m.shown for m in asymmetric) / sum(m.excited for m in asymmetric) if asymmetric else np.nan
    label = f"|x|, n=10, m=6, {len(neurons)} shared neurons"
    return [
        at_least(f"{label}: share with one feature's W1 over 1.5x larger and its W2 smaller, most", 0.5, share),
        at_most(f"{label}: what it puts into the other's output, with inhibition over without", 0.05, left),
    ]


if __name__ == "__main__":
    main(tyro.cli(Settings))
