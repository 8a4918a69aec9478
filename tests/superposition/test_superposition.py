"""Toy models: data, losses and training, against closed forms, NumPy statements, and plain loops."""

import itertools
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

from mijax import superposition as sp
from mijax.superposition.data import Data
from mijax.superposition.model import Model
from tests.compilations import compilations

KEY = jax.random.key(0)
DATA = {
    "sparse": lambda: sp.sparse(4, jnp.array([0.1, 0.5, 0.9, 1.0])),
    "signed": lambda: sp.sparse(3, 0.4, signed=True),
    "correlated": lambda: sp.correlated(4, jnp.array([0.3, 0.6])),
    "anticorrelated": lambda: sp.anticorrelated(6, 0.5, size=3),
    "anticorrelated per feature": lambda: sp.anticorrelated(4, 0.3, per="feature"),
    "anticorrelated, signed": lambda: sp.anticorrelated(4, 0.7, signed=True),
    "one-hot": lambda: sp.one_hot(5),
}
MODELS = {
    "relu": lambda n: sp.relu_output(n, 2),
    "untied": lambda n: sp.untied(n, 2),
    "linear": lambda n: sp.linear(n, 2),
    "gelu": lambda n: sp.gelu_output(n, 2),
    "top-k": lambda n: sp.top_k_output(n, 2, 1),
    "relu hidden": lambda n: sp.relu_hidden(n, 2),
    "hidden layer": lambda n: sp.hidden_layer(n, 5),
}


def random_params(model, key=KEY):
    params = model.init(key)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return jax.tree.unflatten(structure, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.mark.parametrize("kind", DATA)
def test_samples_have_the_patterns_that_are_listed(kind):
    """Frequencies of patterns within 4.5 standard errors; amplitudes uniform, by their first two moments."""
    data, count = DATA[kind](), 40_000
    x = np.asarray(data.sample(KEY, count))
    active, probability, low = data.patterns()
    assert x.shape == (data.n, count) and abs(float(probability.sum()) - 1) < 1e-6
    seen = (x != 0).T
    for row, p in zip(active, np.asarray(probability)):
        frequency = (seen == row).all(1).mean()
        assert abs(frequency - p) <= 4.5 * np.sqrt(p * (1 - p) / count) + 1e-9
    assert np.allclose(np.asarray(active).T @ np.asarray(probability), data.density, atol=1e-6)
    amounts = x[x != 0]
    assert amounts.min() >= low and amounts.max() <= 1
    assert abs(amounts.mean() - (1 + low) / 2) < 4.5 * (1 - low) / np.sqrt(12 * len(amounts))
    assert abs((amounts**2).mean() - (1 / 3)) < 4.5 * 0.3 / np.sqrt(len(amounts))
    if not kind.startswith(("sparse", "signed")):
        return
    each = np.corrcoef(x)  # features are independent
    assert np.abs(each - np.eye(data.n)).max() < 4.5 / np.sqrt(count)


def test_unit_norm_and_fixed():
    x = sp.unit_norm(sp.sparse(6, 0.3).sample(KEY, 100))
    length = np.linalg.norm(np.asarray(x), axis=0)
    assert np.all((abs(length - 1) < 1e-6) | (length == 0))
    assert (sp.fixed(x).sample(KEY, 7) == x).all()


def numpy_output(kind, params, x):
    p = {k: np.asarray(v, float) for k, v in params.items()}
    relu = lambda v: np.maximum(v, 0)
    from scipy.special import erf

    b = p["b"][:, None]
    if kind in ("untied", "hidden layer"):
        hidden = p["W1"] @ x
        return relu(p["W2"] @ (relu(hidden) if kind == "hidden layer" else hidden) + b)
    w = p["W"]
    z = w.T @ (relu(w @ x) if kind == "relu hidden" else w @ x) + b
    if kind == "top-k":
        return np.where(z == z.max(0), relu(z), 0)
    return {"linear": z, "gelu": z * (1 + erf(z / np.sqrt(2))) / 2}.get(kind, relu(z))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("n", [3, 12])  # 12: matrices that are not written out
def test_models_are_what_they_say(kind, n, x64):
    model = MODELS[kind](n)
    params, x = random_params(model), np.random.default_rng(0).random((n, 9))
    assert np.allclose(model.apply(params, jnp.asarray(x)), numpy_output(kind, params, x), atol=1e-12)
    assert {k: v.shape for k, v in params.items()}.keys() == model.dims.keys()
    if model.affine and kind != "linear":
        a, b = map(np.asarray, model.affine(params))
        assert np.allclose(np.maximum(a @ x + b[:, None], 0), numpy_output(kind, params, x), atol=1e-12)


def test_the_written_out_product_has_its_derivatives(x64):
    m, x = jax.random.normal(KEY, (2, 3)), jax.random.normal(KEY, (3, 5))
    plain = lambda m, x: jnp.sin(m @ x).sum()
    written_out = lambda m, x: jnp.sin(sp.times(m, x)).sum()
    for gradient, other in zip(jax.grad(plain, (0, 1))(m, x), jax.grad(written_out, (0, 1))(m, x)):
        assert np.allclose(gradient, other, atol=1e-12)
    second = lambda f: jax.jacrev(jax.grad(f))(m, x)
    assert np.allclose(second(plain), second(written_out), atol=1e-12)


def brute(toy, params, points):
    """The expectation by a midpoint rule in every amplitude."""
    active, probability, low = toy.data.patterns()
    at = low + (1 - low) * (np.arange(points) + 0.5) / points
    total = 0.0
    for row, p in zip(active, np.asarray(probability)):
        which = np.flatnonzero(row)
        grids = np.array(list(itertools.product(at, repeat=len(which)))).T.reshape(len(which), points ** len(which))
        x = np.zeros((toy.data.n, grids.shape[1]))
        x[which] = grids
        error = (np.asarray(toy.wanted(jnp.asarray(x))) - np.asarray(toy.model.apply(params, jnp.asarray(x)))) ** 2
        total += p * (np.asarray(toy.weights) @ error).mean()
    return total


@pytest.mark.parametrize("kind", ["relu", "untied", "linear", "gelu", "relu hidden"])
@pytest.mark.parametrize("data", ["signed", "correlated pairs", "one-hot"])
def test_population_loss_is_the_expectation(kind, data, x64):
    """Against a fine midpoint rule, whose error is 1e-5 or so; kinked models without a closed form to 1e-3."""
    distribution = {
        "signed": sp.sparse(2, jnp.array([0.3, 0.8]), signed=True),
        "correlated pairs": sp.correlated(2, 0.6),
        "one-hot": sp.one_hot(4),
    }[data]
    toy = sp.Toy(MODELS[kind](distribution.n), distribution, jnp.linspace(0.5, 1.5, distribution.n))
    params = random_params(toy.model)
    expected = brute(toy, params, 600)
    loss = float(sp.population_loss(toy, params, 48))
    assert abs(loss - expected) < (1e-3 if kind == "relu hidden" else 2e-5) * expected
    by = np.asarray(sp.loss_by_active(toy, params))
    assert by.shape == (distribution.n + 1,) and np.isclose(by.sum(), sp.population_loss(toy, params))


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_sampled_and_exact_loss_agree(kind):
    toy = sp.Toy(MODELS[kind](3), sp.sparse(3, 0.4), jnp.array([1.0, 0.5, 2.0]))
    params, x = random_params(toy.model), toy.data.sample(KEY, 200_000)
    each = (toy.weights[:, None] * (x - toy.model.apply(params, x)) ** 2).sum(0)
    error = float(each.std()) / np.sqrt(each.size)
    assert abs(float(sp.population_loss(toy, params)) - float(each.mean())) < 4.5 * error
    by, count = np.asarray(sp.loss_by_active(toy, params)), np.asarray((x > 0).sum(0))
    for k in range(4):
        losses = np.asarray(each) * (count == k)
        assert abs(by[k] - losses.mean()) < 4.5 * losses.std() / np.sqrt(losses.size) + 1e-9


@pytest.mark.parametrize("target", [None, jnp.abs])
@pytest.mark.parametrize("n", [2, 3])
def test_the_exact_gradient_is_that_of_finite_differences(n, target, x64):
    """A wrong closed form and its gradient would agree with each other; the values are checked above."""
    toy = sp.Toy(sp.relu_output(n, n - 1), sp.sparse(n, 0.6), 1.0, target)
    params = random_params(toy.model)
    exact = lambda params: sp.population_loss(toy, params, 12)
    gradient = jax.grad(exact)(params)
    for name, value in params.items():
        for at in np.ndindex(value.shape):
            moved = lambda by, name=name, value=value, at=at: float(exact({**params, name: value.at[at].add(by)}))
            slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
            assert abs(slope - float(gradient[name][at])) < (1e-6 if target is None else 2e-2)


def toy(density, importance=1.0):
    weights = jnp.stack([jnp.ones(()), jnp.asarray(importance, jnp.result_type(float))])
    return sp.Toy(sp.relu_output(2, 1), sp.sparse(2, density), weights)


GRID = {"density": [0.1, 0.5, 1.0], "importance": [0.3, 1.0], "seed": range(3)}


def same(result, other, tolerance=0.0):
    assert set(result) == set(other)
    for name in result:
        np.testing.assert_allclose(result[name], other[name], rtol=0, atol=tolerance, err_msg=name)


def adam(learning_rate=0.01):
    return optax.adam(learning_rate)


@pytest.mark.parametrize("batch", [16, None])
def test_a_grid_equals_a_loop_of_single_models(batch, x64):
    settings = dict(steps=12, batch=batch, judged_on=64, optimizer=adam, progress=False)
    whole = sp.train(toy, GRID, **settings)
    assert whole.W.dims == ("density", "importance", "seed", "hidden", "feature")
    for density, importance, seed in itertools.product(*GRID.values()):
        alone = sp.train(toy, {"density": [density], "importance": [importance], "seed": [seed]}, **settings)
        cell = whole.sel(density=density, importance=importance, seed=seed)
        same(cell[["W", "b", "loss"]], alone.isel(density=0, importance=0, seed=0)[["W", "b", "loss"]], 1e-12)


@pytest.mark.parametrize("seeds_first", [True, False])
def test_how_a_grid_is_divided_changes_nothing(seeds_first, x64):
    names = ["seed", "density", "importance"] if seeds_first else ["density", "seed", "importance"]
    over = {name: GRID[name] for name in names}
    settings = dict(
        steps=12,
        batch=16,
        judged_on=64,
        optimizer=adam,
        progress=False,
        log_at=[0, 5, 12],
        log={"norm": lambda toy, p: (p["W"] ** 2).sum()},
    )
    whole = sp.train(toy, over, **settings)
    assert whole["log.loss"].dims == (*names, "step") and whole.step.values.tolist() == [0, 5, 12]
    assert np.allclose(whole["log.norm"].isel(step=-1), (whole.W**2).sum(("hidden", "feature")))
    each = int(whole.memory_estimate) // 18
    for memory in (each, 2 * each, 5 * each):
        same(whole, sp.train(toy, over, memory=memory, **settings), 1e-12)
    mesh = jax.make_mesh((4,), ("cells",), axis_types=(jax.sharding.AxisType.Auto,))
    same(whole, sp.train(toy, over, mesh=mesh, **settings), 1e-12)


def test_cells_share_draws_and_seeds_do_not():
    begun = sp.train(toy, GRID, steps=0, batch=16, progress=False)
    for seed in range(3):
        weights = begun.W.sel(seed=seed).values
        assert (weights == weights[:1, :1]).all()
    assert len(np.unique(begun.W.values[..., 0, 0])) == 3
    sampler = lambda key, batch: jax.random.uniform(key, (2, batch))

    def watched(density):
        return sp.Toy(Model(lambda key: jnp.zeros((2, 4)), lambda p, x: p - x), Data(2, sampler))

    # the gradient of |x - (p - x)|^2 at p = 0 is -4 x / 4: one step of size 1 leaves the batch itself
    seen = sp.train(
        watched,
        {"density": [0.1, 0.9], "seed": range(2)},
        steps=1,
        batch=4,
        optimizer=lambda: optax.sgd(1.0),
        judged_on=4,
        progress=False,
    )
    batch = seen.params.values
    assert (batch[0] == batch[1]).all() and np.abs(batch[0, 0] - batch[0, 1]).min() > 1e-6
    assert batch.min() >= 0 and batch.max() <= 1 and len(np.unique(batch[0])) == 16


def test_the_default_generator_does_not_matter():
    settings = dict(steps=5, batch=16, judged_on=32, progress=False)
    result = sp.train(toy, {"density": [0.3]}, **settings)
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        same(result, sp.train(toy, {"density": [0.3]}, **settings))
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")


def test_training_is_gradient_descent(x64):
    """Fixed data, so that NumPy can do the same steps: the linear model's gradient, by hand, with momentum-free Adam too."""
    x = np.random.default_rng(0).random((3, 20))
    importance = np.array([1.0, 0.5, 2.0])
    make = lambda: sp.Toy(sp.linear(3, 2), sp.fixed(jnp.asarray(x)), jnp.asarray(importance))
    begun = sp.train(make, {}, steps=0, batch=20, judged_on=20, progress=False)
    w, b = begun.W.values.copy(), begun.b.values.copy()
    for _ in range(30):
        g = -2 * importance[:, None] * (x - w.T @ w @ x - b[:, None]) / 20
        w, b = w - 0.05 * (w @ (g @ x.T + x @ g.T)), b - 0.05 * g.sum(1)
    trained = sp.train(make, {}, steps=30, batch=20, judged_on=20, optimizer=lambda: optax.sgd(0.05), progress=False)
    assert np.allclose(trained.W, w, atol=1e-12) and np.allclose(trained.b, b, atol=1e-12)
    assert np.isclose(trained.loss, (importance[:, None] * (x - w.T @ w @ x - b[:, None]) ** 2).sum() / 20)


def test_sizes_in_one_call():
    """Padded models are the small ones: what is not used stays zero, and their output is that of the cut-out."""

    def padded(features, width):
        importance = jnp.where(jnp.arange(5) < features, 1.0, 0.0)
        return sp.Toy(sp.relu_output(5, 3, used=(features, width)), sp.sparse(5, 0.5), importance)

    trained = sp.train(
        padded, {"features": [3, 5], "width": [1, 3]}, steps=20, batch=32, optimizer=adam, judged_on=64, progress=False
    )
    for features, hidden in itertools.product([3, 5], [1, 3]):
        w = trained.W.sel(features=features, width=hidden).values
        assert (w[hidden:] == 0).all() and (w[:, features:] == 0).all() and (w[:hidden, :features] != 0).all()


def test_nothing_is_compiled_again():
    settings = dict(steps=200, batch=8, judged_on=8, optimizer=adam, progress=False)
    sp.train(toy, GRID, **settings)
    with compilations() as seen:
        sp.train(
            toy,
            {"density": [0.2, 0.3, 0.9], "importance": [0.1, 5.0], "seed": range(7, 10)},
            **{**settings, "steps": 321},
        )
    assert len(seen) <= 1  # the check of densities, whose function is new in each call


def failing(learning_rate):
    return optax.sgd(learning_rate)


def test_a_model_that_is_no_longer_finite_is_named(x64):
    over = {"density": [0.5, 1.0], "learning_rate": [0.01, 1e200], "seed": [3, 8]}
    settings = dict(steps=10, batch=16, judged_on=16, optimizer=failing, progress=False)
    with pytest.raises(FloatingPointError, match=r"density 0.5, learning_rate 1e\+200, seed 3 after step [12]"):
        sp.train(toy, over, **settings)
    trained = sp.train(toy, over, nan="mask", **settings)
    failed = trained.failed_at.values >= 0
    assert failed[:, 1].all() and not failed[:, 0].any()
    assert np.isnan(trained.loss.values[failed]).all() and np.isnan(trained.W.values[failed]).all()
    assert np.isfinite(trained.W.values[~failed]).all()
    assert np.isfinite(sp.best(trained, "learning_rate").loss).all()


def test_a_loss_that_is_not_finite_is_a_failure():
    """A single wild step leaves finite parameters, whose loss is infinite; and a model may begin as NaN."""
    settings = dict(batch=16, judged_on=16, progress=False)
    with pytest.raises(FloatingPointError, match=r"density 0\.5, seed 0 after step 1"):
        sp.train(toy, {"density": [0.5]}, steps=1, optimizer=lambda: optax.sgd(1e20), **settings)
    begun = sp.relu_output(2, 1)._replace(init=lambda key: {"W": jnp.full((1, 2), jnp.nan), "b": jnp.zeros(2)})
    with pytest.raises(FloatingPointError, match="after step 0"):
        sp.train(lambda: sp.Toy(begun, sp.sparse(2, 0.5)), {"seed": [0]}, steps=0, **settings)


def test_masked_models_have_no_numbers_at_all():
    log = {"negative": lambda toy, params: (params["W"] < 0).sum()}
    over = {"learning_rate": [0.01, 1e30], "density": [0.5]}
    settings = dict(steps=3, batch=16, judged_on=16, progress=False, nan="mask", log=log, log_at=[0, 3])
    trained = sp.train(toy, over, optimizer=failing, **settings)
    assert (trained.failed_at.values[1] >= 1).all() and (trained.failed_at.values[0] == -1).all()
    for name in set(trained) - {"failed_at"}:
        assert np.isnan(trained[name].values[1]).all() and np.isfinite(trained[name].values[0]).all()
    assert (sp.geometry.role(trained.W.values) == -1)[1].all()


def test_any_mesh_divides_any_toy():
    """Constant importance, tiny and larger models, explicit and automatic axes, several axes: as on one device."""
    makes = [lambda density, n=n: sp.Toy(sp.relu_output(n, 2), sp.sparse(n, density)) for n in (3, 20)]
    meshes = [
        jax.make_mesh((4,), ("c",)),
        jax.make_mesh((2, 2), ("c", "d")),
        jax.sharding.Mesh(np.array(jax.devices()[:2]), ("c",)),
    ]
    settings = dict(steps=20, batch=16, judged_on=16, optimizer=adam, progress=False)
    for make, mesh in itertools.product(makes, meshes):
        over = {"density": [0.3, 0.5, 0.9], "seed": range(2)}
        same(sp.train(make, over, **settings), sp.train(make, over, mesh=mesh, **settings), 1e-5)


def test_a_folder_is_not_taken_for_that_of_another_training(tmp_path):
    settings = dict(steps=2, batch=8, judged_on=8, progress=False, save=tmp_path)
    over = {"density": [0.3]}
    sp.train(lambda density: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, density)), over, **settings)
    with pytest.raises(ValueError, match="toy"):
        sp.train(lambda density: sp.Toy(sp.linear(3, 2), sp.sparse(3, density)), over, **settings)


def test_a_folder_of_settings_in_another_order_is_refused(tmp_path):
    """The cells are numbered in the order of the settings."""
    settings = dict(steps=0, batch=8, judged_on=8, progress=False, save=tmp_path)
    over = {"importance": [0.5, 0.9], "density": [0.1, 1.0]}
    sp.train(toy, over, **settings)
    with pytest.raises(ValueError, match="was begun with another settings"):
        sp.train(toy, dict(reversed(over.items())), **settings)


def test_a_factory_that_draws_its_data_is_refused(as_a_user):
    """It would train on one draw, and be judged on another."""
    rng = np.random.default_rng(0)
    make = lambda: sp.Toy(sp.linear(2, 1), sp.fixed(rng.random((2, 4))))
    with pytest.raises(ValueError, match=r"something else at each call.*draw outside of the factory"):
        sp.train(make, {}, steps=2, batch=8, judged_on=8, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 2.9}, r"steps must be a whole number.*given 2.9"),
        ({"steps": True}, "steps must be a whole number"),
        ({"batch": 2.5}, "batch must be a whole number"),
        ({"judged_on": 2.5}, "judged_on must be a whole number"),
        ({"log_at": [1.7]}, r"log_at must be a whole number.*given 1.7"),
        ({"memory": "1GB"}, "memory must be a number of bytes"),
    ],
)
def test_numbers_that_are_not_whole_are_told(given, message, as_a_user):
    with pytest.raises(TypeError, match=message):
        sp.train(toy, {"density": [0.5]}, **{"steps": 3, "batch": 8, "judged_on": 8, "progress": False, **given})


def test_chunks_that_devices_cannot_share_are_refused(tmp_path, as_a_user):
    make = lambda density: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, density))
    settings = dict(steps=2, batch=8, judged_on=8, progress=False, save=tmp_path)
    sp.train(make, {"density": [0.3, 0.4, 0.5]}, **settings)
    with pytest.raises(ValueError, match="chunks of 3 cells, which 4 devices cannot share"):
        sp.train(make, {"density": [0.3, 0.4, 0.5]}, mesh=jax.make_mesh((4,), ("c",)), **settings)


@pytest.mark.parametrize("batch", [64, None])
def test_padding_leaves_the_small_model(batch):
    """Features beyond those used are data as any other, but no gradient reaches what is beyond; weight decay neither."""
    padded = lambda features: sp.Toy(
        sp.relu_output(4, 2, used=(features, 2)), sp.sparse(4, 0.5), jnp.where(jnp.arange(4) < features, 1.0, 0.0)
    )
    settings = dict(
        steps=40, batch=batch, judged_on=64, progress=False, optimizer=lambda: optax.adamw(0.01, weight_decay=0.1)
    )
    trained = sp.train(padded, {"features": [2, 3]}, **settings)
    for row, features in zip(trained.W.values, [2, 3]):
        assert (row[:, features:] == 0).all() and (row[:, :features] != 0).all()
    with pytest.raises(ValueError, match="not among 4 features"):
        sp.relu_output(4, 2, used=(5, 2))


def test_a_large_model_runs_in_a_chunk_of_its_own():
    """The default budget of a CPU is small, but not smaller than one model."""
    large = lambda: sp.Toy(sp.relu_output(600, 2), sp.sparse(600, 0.1))
    trained = sp.train(large, {"seed": range(2)}, steps=1, batch=16_384, judged_on=1, progress=False)
    assert trained.memory_estimate > 2**27 and np.isfinite(trained.loss).all()


BAD = {
    "nobody takes it": (dict(over={"densty": [0.1]}), "'densty' is taken by none of toy"),
    "lacking": (dict(over={"importance": [1.0]}), "toy takes 'density', which the grid lacks"),
    "zero density": (dict(over={"density": [0.1, 0.0]}), r"density 0: density 0: a probability p = 1 - S, in \(0, 1\]"),
    "density over 1": (dict(over={"density": [1.5]}), "density 1.5"),
    "NaN": (dict(over={"density": [float("nan")]}), "density nan"),
    "negative importance": (dict(over={"density": [0.1], "importance": [-1.0]}), "importance -1 of feature 1 is negative"),
    "no numbers": (dict(over={"density": ["a"]}), "a list of numbers is expected"),
    "same seeds": (dict(over={"density": [0.1], "seed": [1, 1]}), "seeds are different integers"),
    "memory": (dict(over={"density": [0.1]}, memory=10), "does not hold one model"),
    "log": (dict(over={"density": [0.1]}, log={"W": lambda toy, params: params["W"]}), "W: the name of two things"),
    "steps": (dict(over={"density": [0.1]}, steps=-1), "steps must be at least 0, given -1"),
    "log_at": (dict(over={"density": [0.1]}, log_at=[50]), "between 0 and the 5 steps"),
    "sampler": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(2, 1), Data(2, lambda k, n: jnp.zeros((n, 2))))), "the sampler gave"),
    "no patterns": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(2, 1), sp.fixed(jnp.zeros((2, 3)))), batch=None), "lists no activity patterns"),
    "m > n": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(2, 3), sp.sparse(2, 0.1))), "3 hidden dimensions for 2 features"),
    "too many patterns": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(20, 3), sp.sparse(20, 0.1)), batch=None), "sample them instead"),
    "infinite": (dict(over={"importance": [np.inf]}, toy=lambda importance: sp.Toy(sp.relu_output(2, 1), sp.sparse(2, 0.1), importance)), "importance inf of feature 0"),
    "of one seed": (dict(over={"seed": [0, 1]}, toy=lambda seed: sp.Toy(sp.relu_output(2, 1), sp.sparse(2, 1.0 + 0.5 * seed.astype(float)))), "seed 1: density 1.5"),
    "of sets": (dict(over={"density": [0.5, 1.5]}, toy=lambda density: sp.Toy(sp.relu_output(2, 1), sp.anticorrelated(2, density))), "density 1.5: a probability"),
    "per feature": (dict(over={"density": [0.8]}, toy=lambda density: sp.Toy(sp.relu_output(2, 1), sp.anticorrelated(2, density, per="feature"))), "density 1.6: a probability"),
    "large seed": (dict(over={"seed": [0, 2**32]}), "seeds are different integers from 0 to"),
    "large integer": (dict(over={"k": [2**31 + 1]}, toy=lambda k: toy(0.5)), "'k' has integers beyond"),
    "nan": (dict(over={}, nan="maks"), "'raise' or 'mask'"),
    "output": (dict(over={}, toy=lambda: sp.Toy(Model(lambda key: jnp.zeros(3), lambda w, x: x[:1]), sp.sparse(3, 0.1))), r"the model gives \(1, 8\)"),
    "target": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, 0.1), target=lambda x: x[:1])), r"the target is \(1, 8\)"),
    "other n": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(1, 1), sp.sparse(4, 0.1)), batch=None), "examples (of|are)"),
    "axis": (dict(over={"feature": [1]}, toy=lambda feature: toy(0.5)), "feature: the name of two things"),
    "step": (dict(over={"step": [1]}, toy=lambda step: toy(0.5), log_at=[1]), "step: the name of two things"),
    "parameter": (dict(over={}, toy=lambda: sp.Toy(Model(lambda key: {"loss": jnp.zeros(3)}, lambda params, x: x), sp.sparse(3, 0.1))), "loss: the name of two things"),
    "used": (dict(over={"m": [1, 3]}, toy=lambda m: sp.Toy(sp.relu_output(4, 3, used=(2, m)), sp.sparse(4, 0.1))), "m 3: the used sizes"),
    "importance shape": (dict(over={}, toy=lambda: sp.Toy(sp.relu_output(2, 1), sp.sparse(2, 0.1), jnp.ones(3))), "importance of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name, as_a_user):
    given, message = BAD[name]
    settings = {"toy": toy, "steps": 5, "batch": 8, "judged_on": 8, "progress": False, **given}
    with pytest.raises(ValueError, match=message):
        sp.train(settings.pop("toy"), settings.pop("over"), **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sp.sparse(3, 1.2), "density 1.2: a probability"),
        (lambda: sp.sparse(3, [0.1, 0.2]), "density of shape"),
        (lambda: sp.correlated(5, 0.1), "do not fall into sets of 2"),
        (lambda: sp.anticorrelated(4, 0.6, per="feature"), "density of a set"),
        (lambda: sp.anticorrelated(4, 0.6, per="pair"), "a 'set' or of a 'feature'"),
        (lambda: sp.top_k_output(4, 2, 5), "between 1 and 4"),
        (lambda: sp.fixed([1.0, 2.0]), "given is shape"),
        (lambda: sp.theory.antipodal([0.5, 1.5]), "from 0.5 to 1.5"),
        (lambda: sp.theory.linear_loss(float("nan"), [1.0, 1.0], 1), "a density is a probability"),
        (
            lambda: sp.population_loss(
                sp.Toy(sp.linear(2, 1), sp.sparse(2, 0.5), [1.0, -1.0]), {"W": np.eye(1, 2), "b": np.zeros(2)}
            ),
            "importances are not negative",
        ),
    ],
)
def test_bad_data_and_models_are_told(build, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.usefixtures("as_a_user")
def test_the_best_of_each_cell():
    losses = np.array([[3.0, 1.0, np.nan], [0.5, 9.0, 2.0]])
    results = xr.Dataset(
        {"loss": (("cell", "seed"), losses), "W": (("cell", "seed", "i"), np.arange(12.0).reshape(2, 3, 2))},
        {"seed": [5, 6, 7]},
    )
    assert sp.best(results).loss.values.tolist() == [1.0, 0.5] and sp.best(results).W.values.tolist() == [
        [2, 3],
        [6, 7],
    ]
    assert sp.best_of(results, 2).loss.values.tolist() == [[1.0, 3.0], [0.5, 2.0]]
    assert sp.best_of(results, 2).seed.values.tolist() == [[6, 5], [5, 7]]
    with pytest.raises(ValueError, match="4 of 3 models"):
        sp.best_of(results, 4)
    with pytest.raises(TypeError, match="count must be a whole number"):
        sp.best_of(results, 2.0)
    with pytest.raises(ValueError, match="along a dimension of the loss, cell, seed: given 'sed'"):
        sp.best(results, "sed")


SCRIPT = """
import hashlib, sys, numpy as np, optax, jax.numpy as jnp
from mijax import superposition as sp
def toy(density): return sp.Toy(sp.relu_output(5, 2), sp.sparse(5, density))
found = sp.train(toy, {"density": np.geomspace(0.05, 1, 6), "seed": range(2)}, steps=int(sys.argv[2]), batch=256, memory=800_000, save=sys.argv[1], progress=False)
print(hashlib.sha256(b"".join(np.ascontiguousarray(found[n]).tobytes() for n in ("W", "b", "loss"))).hexdigest())
"""


def test_killed_and_continued_it_ends_in_the_same_bits(tmp_path):
    command = lambda name: [sys.executable, "-c", SCRIPT, str(tmp_path / name), "1500"]
    whole = subprocess.run(command("whole"), stdout=subprocess.PIPE, text=True, check=True).stdout
    files = sorted(p.name for p in (tmp_path / "whole").glob("chunk_*"))
    assert len(files) > 20  # several chunks, each in turns
    folder = tmp_path / "killed"
    with subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(folder.glob("chunk_*"))) < 18:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    left = sorted(folder.glob("chunk_*"))
    assert process.returncode == -signal.SIGKILL and len(left) < len(files)
    left[3].write_bytes(left[3].read_bytes()[:-20])  # a damaged turn is run again from the one before
    done = subprocess.run(command("killed"), capture_output=True, text=True, check=True)
    assert (done.stdout == whole and "damaged" in done.stderr) or "cannot be read" in done.stderr
    other = [*command("killed")[:-1], "1600"]
    refused = subprocess.run(other, capture_output=True, text=True, check=False)
    assert "another number of steps" in refused.stderr
