"""Few examples are memorised as points, many are understood as features: a test loss that rises and falls between them.

    python -m experiments.superposition.double_descent --help

Henighan et al. 2023 ("Superposition, memorization, and double descent"): ReLU(W^T W x + b) in m=2 dimensions, trained on fixed sets of T sparse
examples of unit norm. With few of them the hidden vectors W x of the examples form polygons, with many the columns of W do, and between the
two the test loss has its peak. Theirs is n=10,000, S=0.999, T = 3 to 1e6; here n=256, S=0.97, trained on the full set by AdamW.
Losses are sums of squared errors per example, on fresh examples; a model that gives nothing has 1. The height of the peak depends on the set
and the start, threefold and more; its place and the ends do not. Expected is 1.5 times both ends at least.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
import xarray as xr

import mijax as mj
from experiments.superposition.study import Claim, Study, at_least, finish
from mijax import plots
from mijax import superposition as sp
from mijax._types import Array, Float
from mijax.superposition import geometry


@dataclasses.dataclass(frozen=True)
class Settings(Study):
    """Test loss and arrangement over the number of examples."""

    features: int = 256
    """n; `--scale paper` takes 10,000."""
    sparsity: float = 0.97
    """S; `--scale paper` takes 0.999."""
    steps: int = 5000
    """On the full set; `--scale paper` takes 50,000."""
    rate: float = 5e-3
    """Of AdamW."""
    decay: float = 1e-2
    """Of the weights, by AdamW."""
    seeds: int = 3
    """Starts for each set, of which the one of the lowest training loss is kept."""
    tests: int = 4096
    """Fresh examples."""


SIZES = (5, 8, 16, 64, 128, 256, 512, 1024, 2048)
PAPER_SIZES = (3, 5, 6, 8, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)


def main(settings: Settings) -> xr.Dataset:
    """Train on each set, test, draw, compare, and write."""
    mj.compilation_cache()
    sizes = PAPER_SIZES if settings.paper else SIZES
    fresh = examples_of(settings, 0, settings.tests)
    kept, test, hidden = [], [], {}
    for size in sizes:
        examples = examples_of(settings, 1, size)
        model = sp.best(train(settings, examples))
        params = {"W": jnp.asarray(model.W.values), "b": jnp.asarray(model.b.values)}
        test.append(float(sp.loss(toy_of(examples)(), params, fresh)))
        hidden[size] = np.asarray(params["W"] @ examples)
        kept.append(model)
    stacked = {name: np.stack([model[name].values for model in kept]) for name in ("W", "b", "loss")}
    dims = {"W": ("examples", "hidden", "feature"), "b": ("examples", "feature"), "loss": ("examples",)}
    results = xr.Dataset({name: (dims[name], values) for name, values in stacked.items()}, {"examples": list(sizes)})
    results["test_loss"] = ("examples", np.array(test))
    save(settings, results, hidden)
    return finish(settings, results, claims_of(results, hidden))


def examples_of(settings: Settings, key: int, count: int) -> Float[Array, "feature example"]:
    """Sparse examples of unit norm; those of another key or another number are others."""
    n, density = (10_000, 0.001) if settings.paper else (settings.features, 1 - settings.sparsity)
    subkey = jax.random.fold_in(jax.random.key(key), count)
    return sp.unit_norm(sp.sparse(n, density).sample(subkey, count))


def toy_of(examples: Float[Array, "feature example"]) -> Callable[[], sp.Toy]:
    """The model on one set."""
    return lambda: sp.Toy(sp.relu_output(len(examples), 2), sp.fixed(examples))


def train(settings: Settings, examples: Float[Array, "feature example"]) -> xr.Dataset:
    """Some starts on one set; every step, and the judgement, sees all of it."""
    count = examples.shape[1]
    return sp.train(
        toy_of(examples),
        {"seed": np.arange(settings.seeds)},
        optimizer=lambda: optax.adamw(settings.rate, weight_decay=settings.decay),
        steps=50_000 if settings.paper else settings.steps,
        batch=count,
        judged_on=count,
        save=settings.saving(str(count)),
    )


def claims_of(results: xr.Dataset, hidden: dict[int, np.ndarray]) -> list[Claim]:
    """The peak, and the polygons: of examples where they are few, of features where examples are many."""
    test, sizes = results.test_loss.values, results.examples.values
    peak = int(test.argmax())
    few, many = geometry.polytope(hidden[5], 0.2), geometry.polytope(long_columns(results.W.values[-1]), 0.2)
    return [
        at_least(f"test loss at the peak (T={sizes[peak]}), relative to T={sizes[0]}", 1.5, test[peak] / test[0]),
        at_least(f"test loss at the peak (T={sizes[peak]}), relative to T={sizes[-1]}", 1.5, test[peak] / test[-1]),
        Claim(
            f"T=5: the examples' hidden vectors are a pentagon ({few})",
            "1",
            float(few == "pentagon"),
            few == "pentagon",
        ),
        Claim(
            f"T={sizes[-1]}: the long columns of W are a pentagon ({many})",
            "1",
            float(many == "pentagon"),
            many == "pentagon",
        ),
    ]


def long_columns(w: Float[np.ndarray, "hidden feature"]) -> np.ndarray:
    """The features of at least half of the longest one's length."""
    length = geometry.norms(w)
    return w[:, length > 0.5 * length.max()]


def save(settings: Settings, results: xr.Dataset, hidden: dict[int, np.ndarray]) -> None:
    """Draw losses over the number of examples, and on a second page hidden vectors of examples above columns of W."""
    sizes = results.examples.values
    figure = plots.curves(
        {
            "sum of squared errors": {
                "test": (sizes, results.test_loss.values),
                "training": (sizes, np.maximum(results.loss.values, 1e-4)),
            }
        },
        title="Double descent",
        xlabel="examples",
        xscale="log",
        yscale="log",
        lines={"gives nothing": 1.0},
    )
    plots.save(figure, settings.folder / "double_descent.png")
    shown = [i for i, size in enumerate(sizes) if size <= 16 or size in (128, sizes[-1])]
    longest = lambda v: v / geometry.norms(v).max()
    pages = {f"T={sizes[i]}: W x": longest(hidden[int(sizes[i])][:, :200]) for i in shown}
    pages |= {f"T={sizes[i]}: W": longest(results.W.values[i]) for i in shown}
    figure = plots.directions(
        pages,
        title="Examples (above) and features (below), relative to the longest",
        columns=len(shown),
    )
    plots.save(figure, settings.folder / "double_descent_directions.png")


if __name__ == "__main__":
    main(tyro.cli(Settings))
