"""Theory and geometry of toy models: against the exact loss, against simulation, and against known bodies."""

import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.spatial

from mijax import superposition as sp
from mijax.superposition import bounds, geometry, kgons, phase, theory
from mijax.superposition.corners import POLYTOPES, THOMSON

DENSITIES = [0.01, 0.1, 0.5, 0.9, 1.0]


def exact(w, b, p, importance=1.0, order=40):
    w = jnp.asarray(w)
    made = sp.Toy(sp.relu_output(w.shape[1], w.shape[0]), sp.sparse(w.shape[1], p), jnp.asarray(importance))
    return float(sp.population_loss(made, {"W": w, "b": jnp.asarray(b)}, order))


@pytest.mark.parametrize("p", DENSITIES)
def test_closed_forms_are_the_exact_loss(p, x64):
    """To 1e-6, as relative to nothing: losses are of order p."""
    zero, i = np.zeros(2), np.array([1.0, 0.3])
    at = lambda w, b=zero, i=i: exact(w, b, p, i)
    assert abs(at([[1.0, 0.0]], [0, p / 2]) - theory.ignored(p, 0.3)) < 1e-6
    assert abs(at([[1.0, 0.0], [0.0, 1.0]]) - theory.dedicated(p, 0.3)) < 1e-6
    assert abs(at([[1.0, -1.0]]) - theory.antipodal(p, 1.0, 0.3)) < 1e-6
    for b in (0.05, 0.4, 0.9):
        assert abs(at([[1.0, -1.0]], [b, b]) - 1.3 * theory.antipodal_at(b, p)) < 1e-6
    grid = np.linspace(0, 1, 100_001)
    assert abs(theory.antipodal_biased(p, 1.0, 0.3) - 1.3 * theory.antipodal_at(grid, p).min()) < 1e-8
    angle = 2 * np.pi * np.arange(3) / 3
    triangle = np.stack([np.cos(angle), np.sin(angle)])
    assert abs(exact(triangle, np.zeros(3), p, np.ones(3)) - theory.triangle(p)) < 1e-6


def test_the_ignored_feature_has_its_best_bias():
    for p in DENSITIES:
        each = [exact([[1.0, 0.0]], [0, b], p) for b in (p / 2 - 0.01, p / 2, p / 2 + 0.01)]
        assert each[1] < min(each[0], each[2])


def test_boundaries_are_where_the_losses_cross():
    i = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
    known = {
        theory.boundary: [0.160, 0.267, 0.343, 0.444, 0.509, 0.571],
        theory.boundary_biased: [0.161, 0.270, 0.351, 0.465, 0.543, 0.627],
    }
    for boundary, values in known.items():
        assert np.allclose(boundary(i), values, atol=6e-4)
        assert np.allclose(boundary(1 / i), boundary(i), atol=1e-9)  # the features exchanged
    p = theory.boundary(i)
    assert np.allclose(theory.ignored(p, i), theory.antipodal(p, 1, i))
    assert np.allclose(theory.boundary_three([0.3, 1, 2, 10]), [theory.boundary(0.3), 4 / 7, 4 / 7, 4 / 7])


def test_the_true_boundary_lies_further_out():
    """Where the free minimum ends superposition, I = .1, .2, .5: .181, .296, .485, found apart by a multistart of ours and one of others."""
    densities = np.linspace(0.1, 0.6, 101)
    diagram = phase.free(2, 1, [0.1, 0.2, 0.5], densities)
    ends = [densities[np.flatnonzero(row == geometry.SHARING).max()] for row in diagram.winner]
    assert np.allclose(ends, [0.181, 0.296, 0.485], atol=0.012)


def test_the_linear_model_is_pca(x64):
    importance = np.array([1.0, 0.7, 0.2])
    made = sp.Toy(sp.linear(3, 2), sp.sparse(3, 0.4), jnp.asarray(importance))
    toy = lambda: made
    trained = sp.train(
        toy,
        {"seed": range(4)},
        batch=None,
        steps=1500,
        optimizer=lambda: optax.adam(optax.cosine_decay_schedule(0.05, 1500)),
        progress=False,
    )
    assert abs(float(trained.loss.min()) - theory.linear_loss(0.4, importance, 2)) < 1e-7
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    w, least = theory.principal_components(root @ root.T, 2)
    lost = lambda w: np.trace((np.eye(4) - w.T @ w) @ root @ root.T @ (np.eye(4) - w.T @ w))
    assert np.isclose(lost(w), least)
    assert all(lost(np.linalg.qr(rng.normal(size=(4, 2)))[0].T) > least for _ in range(50))


@pytest.mark.parametrize(
    ("k", "expected"), [(4, (1, 0, 0)), (5, (1.17046, -0.28230, 0.23738)), (6, (1.32053, -0.61814, 0.86746))]
)
def test_kgons_are_those_of_the_paper(k, expected):
    assert np.allclose(kgons.kgon(k)[1:], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("k", "c", "positive"), [(4, 4, 0), (4, 6, 0), (4, 6, 2), (5, 6, 1), (5, 5, 0), (6, 6, 0), (7, 8, 0), (8, 8, 0)]
)
def test_kgons_are_critical_and_cost_what_is_told(k, c, positive, x64):
    made = sp.Toy(sp.relu_output(c, 2), sp.one_hot(c))
    params = jax.tree.map(jnp.asarray, kgons.kgon_params(k, c, positive))
    assert abs(float(sp.population_loss(made, params)) - kgons.kgon_loss(k, c, positive)) < 1e-6
    gradient = jax.grad(lambda q: sp.population_loss(made, q))(params)
    assert all(float(jnp.abs(leaf).max()) < 1e-5 for leaf in jax.tree.leaves(gradient))


def test_learning_coefficients_are_half_the_rank_of_the_hessian(x64):
    """A k-gon without dead features is a minimum that only rotating leaves as it is: its coefficient is half of the other directions."""
    for k, coefficient in kgons.LEARNING_COEFFICIENTS.items():
        made = sp.Toy(sp.relu_output(k, 2), sp.one_hot(k))
        params = jax.tree.map(jnp.asarray, kgons.kgon_params(k, k))
        flat, back = jax.flatten_util.ravel_pytree(params)
        gradient = jax.grad(lambda v, made=made, back=back: sp.population_loss(made, back(v)))
        steps = 1e-6 * np.eye(len(flat))
        hessian = np.stack([(gradient(flat + s) - gradient(flat - s)) / 2e-6 for s in steps])
        values = np.linalg.eigvalsh((hessian + hessian.T) / 2)
        assert (values > 1e-4).sum() / 2 == coefficient and np.abs(values).min() < 1e-5


def random_rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


@pytest.mark.parametrize("name", POLYTOPES)
def test_polytopes_are_named_up_to_rotation_order_and_noise(name):
    corners = POLYTOPES[name]
    rng = np.random.default_rng(1)
    d, k = corners.shape
    assert np.allclose(np.linalg.norm(corners, axis=0), 1)
    turned = random_rotation(d + 2)[:, :d] @ corners[:, rng.permutation(k)] * rng.uniform(0.8, 1.2, k)
    assert geometry.polytope(turned + 0.004 * rng.normal(size=turned.shape)) == name
    if k == 4:
        assert geometry.polytope(rng.normal(size=(3, 4))) == "4 in 3"


def test_features_per_dimension_of_known_bodies():
    for name, value in {"digon": 1 / 2, "triangle": 2 / 3, "pentagon": 2 / 5, "hexagon": 1 / 3, "tetrahedron": 3 / 4, "5-cell": 4 / 5, "octahedron": 1 / 2, "cube": 3 / 8, "icosahedron": 1 / 4}.items():  # fmt: skip
        corners = POLYTOPES[name]
        assert np.allclose(geometry.dimensionality(corners), value, atol=1e-6)
        assert np.isclose(geometry.dimensions_per_feature(corners), value)
        assert np.isclose(bounds.frame_potential(corners), corners.shape[1] ** 2 / corners.shape[0])
    assert np.allclose(geometry.dimensionality(POLYTOPES["square antiprism"]), 3 / 8, atol=0.01)


def test_dimensionalities_never_sum_to_more_than_there_are():
    w = np.random.default_rng(0).normal(size=(200, 3, 7))
    assert geometry.dimensionality(w).sum(-1).max() <= 3 + 1e-9
    apart = geometry.norms(w) ** 2 + geometry.interference(w)
    unit = w / np.linalg.norm(w, axis=-2, keepdims=True)
    assert np.allclose(apart, (np.einsum("ahi,ahj->aij", unit, w) ** 2).sum(-1))


def test_tegum_factors():
    w = np.zeros((5, 8))
    w[:2, :3], w[2:4, 3:5], w[4, 5:7] = POLYTOPES["triangle"], np.eye(2), [1, -1]
    w = random_rotation(5) @ w  # the last feature is not represented
    assert geometry.tegum_factors(w) == [[0, 1, 2], [5, 6], [3], [4]]
    assert geometry.polytopes(w) == ["triangle", "digon", "point", "point"]
    assert geometry.polytope(np.zeros((2, 3))) == "nothing"


def test_thomson_energies():
    """Of the bodies by name, and never less of random points on the sphere."""
    names = {
        2: "digon",
        3: "triangle",
        4: "tetrahedron",
        5: "triangular bipyramid",
        6: "octahedron",
        7: "pentagonal bipyramid",
        8: "square antiprism",
    }
    for k, name in names.items():
        assert np.isclose(geometry.thomson_energy(POLYTOPES[name]), THOMSON[k], rtol=1e-6)
        for seed in range(20):
            assert geometry.thomson_energy(np.random.default_rng(seed).normal(size=(3, k))) > THOMSON[k]


def test_roles_and_neurons():
    w = np.array([[[1.0, -0.9]], [[1.0, 0.05]], [[0.1, 1.0]], [[0.3, 0.2]]])
    assert geometry.role(w).tolist() == [geometry.SHARING, geometry.IGNORED, geometry.DEDICATED, geometry.IGNORED]
    norm, shared = geometry.represented(w[0])
    assert np.allclose(norm, [1.0, 0.9]) and np.allclose(shared, [0.81, 1.0])


def test_welch_and_frame_bounds_hold_and_are_met():
    rng = np.random.default_rng(0)
    for n, m in [(3, 2), (7, 3), (20, 5)]:
        for _ in range(20):
            w = rng.normal(size=(m, n))
            unit = w / np.linalg.norm(w, axis=0)
            assert np.abs(unit.T @ unit - np.eye(n)).max() >= bounds.welch(n, m)
            assert bounds.frame_potential(w) >= n**2 / m - 1e-9
    for name in ("triangle", "tetrahedron", "5-cell"):  # simplices meet it
        corners = POLYTOPES[name]
        assert np.isclose(
            np.abs(corners.T @ corners - np.eye(corners.shape[1])).max(), bounds.welch(*corners.shape[::-1])
        )


def test_random_projections_keep_distances_as_claimed():
    points, epsilon = 40, 0.5
    m = bounds.johnson_lindenstrauss(points, epsilon)
    rng, failed = np.random.default_rng(0), []
    x = rng.normal(size=(points, 1000))
    true = scipy.spatial.distance.pdist(x, "sqeuclidean")
    for _ in range(60):
        ratio = scipy.spatial.distance.pdist(x @ rng.normal(size=(1000, m)) / np.sqrt(m), "sqeuclidean") / true
        failed.append((np.abs(ratio - 1) > epsilon).mean())
    assert 0 < np.mean(failed) < 2 / points**2  # of single pairs, as the union bound takes them


def test_what_is_recoverable_is_unique():
    """No two sets of so few columns span a common vector; checked by ranks."""
    for seed in range(5):
        w = np.random.default_rng(seed).normal(size=(8, 9))
        k = bounds.recoverable(w)
        for columns in itertools.combinations(range(9), min(2 * k, 9)):
            assert np.linalg.matrix_rank(w[:, columns]) == len(columns)
    assert bounds.recoverable(np.eye(4)) == 4
    assert (
        bounds.recoverable(np.concatenate([np.eye(64), scipy.linalg.hadamard(64) / 8], axis=1)) == 4
    )  # mu = 1/8: k < 4.5
    with pytest.raises(ValueError, match="between 0 and all"):
        bounds.compressed_sensing(10, 11.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
def test_rounding_does_not_decide_what_is_recoverable(dtype):
    """Known bodies in random positions: orthogonal, a simplex (3 mu = 1), and parallel columns."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        assert bounds.recoverable(turn.astype(dtype)) == bounds.recoverable(jnp.asarray(turn.astype(dtype))) == 3
        assert bounds.recoverable((turn @ POLYTOPES["tetrahedron"]).astype(dtype)) == 1
        assert bounds.recoverable(np.stack([turn[0], -2 * turn[0]], axis=1).astype(dtype)) == 0
    nearly = np.eye(3) + 1e-9 * rng.normal(size=(3, 3))
    assert bounds.recoverable(nearly) == 3  # at most n


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bounds.recoverable(np.array([[1.0, 0.0], [0.0, 0.0]])), ValueError, "column 1 of W is zero"),
        (lambda: bounds.recoverable(np.array([[1.0, np.nan]])), ValueError, "not finite"),
        (lambda: bounds.frame_potential(np.zeros((2, 2))), ValueError, "column 0 of W is zero"),
        (lambda: geometry.thomson_energy(np.zeros((2, 2))), ValueError, "column 0 of W is zero"),
        (lambda: bounds.welch(3, 0), ValueError, "m must be at least 1, given 0"),
        (lambda: bounds.welch(2.5, 1), TypeError, "n must be a whole number"),
        (lambda: bounds.johnson_lindenstrauss(np.nan, 0.5), ValueError, "nan points"),
        (lambda: geometry.polytope(np.eye(2), np.nan), ValueError, "tolerance must be"),
        (lambda: geometry.polytope(np.zeros((2, 0))), ValueError, r"given shape \(2, 0\)"),
        (lambda: theory.boundary(-1.0), ValueError, "importances are not negative"),
        (lambda: theory.boundary_three([1.0, -2.0]), ValueError, "importances are not negative"),
        (lambda: theory.boundary_biased(-0.5), ValueError, "importances are not negative"),
        (lambda: theory.ignored(0.5, -1.0), ValueError, "importances are not negative"),
        (lambda: theory.antipodal_at(2.0, 0.5), ValueError, r"bias in \[0, 1\]"),
        (lambda: theory.linear_loss(0.5, [-1.0, 0.5], 1), ValueError, "importances are not negative"),
        (lambda: theory.linear_loss([0.5, 0.1], np.ones(3), 1), ValueError, r"shape \(2,\).*shape \(3,\)"),
        (lambda: theory.linear_loss(0.5, [1.0, 0.5], 1.5), TypeError, "m must be a whole number"),
        (lambda: theory.principal_components(np.array([[1.0, 2.0], [0.0, 1.0]]), 1), ValueError, "symmetric"),
        (lambda: kgons.kgon(5.5), TypeError, "k must be a whole number"),
        (lambda: phase.closed_form(2, 1, [-1.0], [0.5]), ValueError, "importances are not negative"),
    ],
)
def test_what_a_formula_does_not_hold_for_is_told(call, error, message, as_a_user):
    with pytest.raises(error, match=message):
        call()


def test_nan_stays_nan_in_closed_forms():
    nan = np.nan
    for value in (
        theory.boundary(nan), theory.boundary_three(nan), theory.boundary_biased(nan), theory.ignored(0.5, nan),
        theory.dedicated(0.5, nan), theory.antipodal(0.5, nan), theory.antipodal_biased(0.5, 1.0, nan),
        theory.antipodal_at(nan, 0.5), theory.linear_loss(0.5, [nan, 0.5], 1),
    ):  # fmt: skip
        assert np.isnan(value)
    assert np.allclose(theory.boundary_biased([0.5, nan, 2.0])[[0, 2]], theory.boundary_biased(0.5))
    diagram = phase.closed_form(2, 1, [nan, 0.5], [0.01, 1.0])
    assert diagram.winner.tolist() == [[geometry.UNKNOWN] * 2, [geometry.SHARING, geometry.IGNORED]]
    assert phase.agreement(diagram.winner, diagram, diagram)[1].tolist() == [[False, False], [True, True]]
    nowhere = phase.Phase(np.full((2, 1, 1), np.inf), (0, 1))
    assert nowhere.winner.tolist() == [[geometry.UNKNOWN]]


def test_densities_per_feature_are_those_of_a_loop():
    losses = [theory.ignored(p) for p in (0.5, 0.1)]
    assert np.isclose(theory.linear_loss([0.5, 0.1], 1.0, 1), min(losses))


@pytest.mark.parametrize(("n", "m", "seeds"), [(2, 1, 4), (3, 2, 12)])
def test_exact_training_finds_the_phases(n, m, seeds):
    """The issue's figure on a coarse grid: at least 99 % of the cells outside the band between the boundaries."""
    axes = {"importance": np.geomspace(0.1, 10, 8), "density": np.geomspace(1, 0.01, 8)}
    closed, true = phase.closed_form(n, m, **axes), phase.free(n, m, **axes, steps=200)
    optimizer = lambda: optax.adam(optax.cosine_decay_schedule(0.04, 300))
    trained = sp.best(
        sp.train(
            phase.toy(n, m), {**axes, "seed": range(seeds)}, batch=None, steps=300, optimizer=optimizer, progress=False
        )
    )
    share, clear = phase.agreement(geometry.role(trained.W.values), closed, true)
    assert clear.mean() > 0.9 and share >= 0.99
    assert (trained.loss.values > true.losses.min(0) - 1e-4).all()


def test_best_sampled_models_are_not_below_the_exact_minimum():
    density = [0.05, 0.3]
    made = phase.toy(2, 1)
    settings = dict(progress=False, optimizer=lambda: optax.adam(optax.cosine_decay_schedule(0.03, 600)), steps=600)
    over = {"importance": [0.3, 0.8], "density": density, "seed": range(6)}
    log = {"exact": lambda toy, params: sp.population_loss(toy, params)}
    sampled = sp.train(made, over, batch=256, log=log, **settings)
    judged = sp.train(made, over, batch=256, judged_on=None, **settings)
    assert np.allclose(judged.loss, sampled.exact, rtol=1e-5)
    least = sp.best(sp.train(made, over, batch=None, **settings)).loss
    assert (sampled.exact.min("seed") >= least - 1e-6).all()
    assert (sampled.exact.min("seed") <= 1.1 * least).all()
    often = sampled.sel(
        density=0.3
    )  # both features are active in some 1,500 of 16,384 examples, which errs by 4 % or so
    assert (abs(often.loss - often.exact) < 0.15 * often.exact).all()


def test_phases_of_other_sizes_are_refused(as_a_user):
    for function in (phase.closed_form, phase.free):
        with pytest.raises(ValueError, match="known for n=2, m=1"):
            function(4, 2, [1.0], [0.5])


def test_what_is_not_finite_has_no_geometry():
    """A failed model is neither ignored nor dead: it is told."""
    w = np.array([[[1.0, -1.0]], [[np.nan, 1.0]]])
    assert geometry.role(w).tolist() == [geometry.SHARING, geometry.UNKNOWN]
    assert [v.tolist() for v in geometry.features_of_neurons(w)] == [[0, -1], [1, -1]]
    with pytest.raises(ValueError, match="not finite"):
        geometry.polytope(w[1])


def test_ranks_beyond_the_features_are_refused(as_a_user):
    with pytest.raises(ValueError, match="3 hidden dimensions for 2 features"):
        theory.linear_loss(0.5, [1.0, 1.0], 3)
    with pytest.raises(ValueError, match="3 hidden dimensions for 2 features"):
        theory.principal_components(np.eye(2), 3)


@pytest.mark.parametrize(("k", "c"), [(4, 6), (5, 7), (6, 8)])
def test_dead_features_are_where_the_loss_has_no_kink(k, c, x64):
    """Both one-sided derivatives vanish along every bias."""
    toy = sp.Toy(sp.relu_output(c, 2), sp.one_hot(c))
    params = jax.tree.map(jnp.asarray, kgons.kgon_params(k, c))
    at = lambda i, h: float(sp.population_loss(toy, {**params, "b": params["b"].at[i].add(h)}))
    for i in range(k, c):
        assert abs(at(i, 1e-5) - at(i, 0.0)) < 1e-9 and abs(at(i, -1e-5) - at(i, 0.0)) < 1e-9
    assert abs(at(0, 0.0) - kgons.kgon_loss(k, c)) < 1e-6
