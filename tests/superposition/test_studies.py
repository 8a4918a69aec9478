"""The studies of superposition, end to end at sizes for a test, and the page that gathers them."""

import importlib
import json
import re

import numpy as np
import pytest
import xarray as xr

import mijax as mj
from experiments.superposition import dynamics, overview, phase_diagrams, transitions
from experiments.superposition.study import Claim, Study, at_least, at_most, near
from mijax import superposition as sp

TINY = {
    "basic": dict(seeds=1, steps=2, batch=16, starts=2),
    "phase_diagrams": dict(cells=4, sampled_cells=3, seeds=2, steps=3, batch=8),
    "uniform": dict(seeds=1, steps=2, batch=8, densities=2),
    "polytopes": dict(seeds=1, steps=2, batch=8, relative=3, starts=1),
    "correlated": dict(seeds=1, steps=2, batch=8),
    "dynamics": dict(seeds=1, steps=6, batch=8, moments=6),
    "adversarial": dict(features=8, hidden=2, densities=3, steps=2, batch=8, seeds=1, examples=16),
    "privileged": dict(seeds=2, densities=2, steps=2, batch=8, turns=2),
    "computation": dict(clean_seeds=2, clean_steps=2, seeds=1, steps=5, batch=8),
    "double_descent": dict(features=12, sparsity=0.5, steps=2, seeds=1, tests=8),
    "transitions": dict(seeds=2, steps=10, moments=6, particles=8, rungs=2, moves=2),
}


@pytest.fixture(autouse=True)
def settings_of_jax_stay(monkeypatch):
    """The studies ask for the compilation cache; these tests share their process with others."""
    monkeypatch.setattr(mj, "compilation_cache", lambda: None)


def test_every_study_is_run_here_and_gathered():
    assert tuple(TINY) == overview.STUDIES


@pytest.mark.parametrize("name", TINY)
def test_a_study_leaves_data_figures_and_claims(name, tmp_path):
    """Claims are judged by what was found: at these sizes most do not hold, and the record says so."""
    module = importlib.import_module(f"experiments.superposition.{name}")
    results = module.main(module.Settings(out=tmp_path / name, **TINY[name]))
    record = json.loads((tmp_path / name / "record.json").read_text())
    assert record["settings"]["scale"] == "small" and record["claims"]
    for claim in record["claims"]:
        assert set(claim) == {"claim", "expected", "found", "holds"}
        within(claim)
    with xr.open_dataset(tmp_path / name / "results.nc") as saved:
        assert set(saved) == set(results) and all(np.isfinite(results[v].values).any() for v in results)
    figures = list((tmp_path / name).glob("*.png"))
    assert figures and all(f.read_bytes().startswith(b"\x89PNG") for f in figures)
    assert re.search(r"\d{4}", module.__doc__) and f"python -m experiments.superposition.{name}" in module.__doc__


def within(claim):
    """`holds` says whether `found` is as `expected` tells."""
    bound = re.fullmatch(r"at (least|most) ([\d.e+-]+)", claim["expected"])
    if bound:
        value = float(bound[2])
        inside = claim["found"] >= value if bound[1] == "least" else claim["found"] <= value
        assert claim["holds"] == inside
    middle = re.fullmatch(r"([\d.e+-]+) \+- ([\d.e+-]+)", claim["expected"])
    if middle:
        assert claim["holds"] == (abs(claim["found"] - float(middle[1])) <= float(middle[2]) + 1e-12)


def test_claims_and_their_bounds():
    assert near("x", 1.0, 1.009, 0.01).holds and not near("x", 1.0, 1.02, 0.01).holds
    assert at_least("x", 3, 3).holds and not at_least("x", 3, float("nan")).holds
    assert at_most("x", 3, 3).holds and at_most("x", 3, 4) == Claim("x", "at most 3", 4.0, False)
    assert not Study().paper and Study(scale="paper").paper


def leave(settings):
    """What a study leaves, in little."""
    settings.folder.mkdir(parents=True)
    claim = {"claim": "a < b & c", "expected": "at least 3", "found": 2.71828, "holds": False}
    (settings.folder / "record.json").write_text(json.dumps({"settings": {"scale": "small"}, "claims": [claim]}))
    (settings.folder / "figure.png").write_bytes(b"\x89PNG")


def test_the_overview_is_one_page_without_a_network(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no study's record"):
        overview.main(overview.Settings(folder=tmp_path))
    leave(Study(out=tmp_path / "dynamics"))
    page = overview.main(overview.Settings(folder=tmp_path)).read_text()
    assert "<section id=dynamics>" in page and "<section id=transitions>" not in page
    assert "Learning dynamics" in page and "a &lt; b &amp; c" in page and "2.718" in page and "at least 3" in page
    assert page.count("<img") == 1 and not re.search(r"(src|href)=(?!\"data:)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    run = []
    for name in overview.STUDIES:
        module = importlib.import_module(f"experiments.superposition.{name}")
        monkeypatch.setattr(module, "main", lambda settings, name=name: (run.append(name), leave(settings)))
    page = overview.main(overview.Settings(folder=tmp_path, run=True)).read_text()
    assert run == [name for name in overview.STUDIES if name != "dynamics"]
    assert all(f"<section id={name}>" in page for name in overview.STUDIES)


def test_hamiltonian_moves_keep_the_posterior():
    """With a loss of |x|^2 / 2 the posterior of n examples is a normal distribution of variance 1 / (n + 1): within 5 standard errors."""
    import jax
    import jax.numpy as jnp

    n, count = 9.0, 4000
    potential = lambda flat: (n + 1) * (flat**2).sum() / 2
    at = jax.random.normal(jax.random.key(0), (count, 3)) / (n + 1) ** 0.5
    keys = jax.random.split(jax.random.key(1), count)
    there, rate = jax.vmap(lambda k, a: transitions.trajectory(k, a, potential, jnp.asarray(0.3)))(keys, at)
    assert 0.5 < rate.mean() < 1 and float(abs(there - at).max()) > 0.1
    variance = np.asarray(there).var() * (n + 1)
    assert abs(variance - 1) < 5 * (2 / (3 * count)) ** 0.5


def test_resting_losses_and_corners():
    critical = sp.kgons.kgon_loss(5, 6)
    losses = np.array([critical, critical * 1.005, critical * 1.2])
    assert transitions.resting(losses).tolist() == [True, True, False]
    assert list(transitions.LEVELS)[transitions.levels(critical)] == "5-gon"
    params = sp.kgons.kgon_params(5, 6)
    assert transitions.corners(params["W"]) == 5
    flat = np.concatenate([params["W"].ravel(), params["b"]]).astype(np.float32)
    assert abs(float(transitions.energy(flat)) - critical) < 1e-5


def test_phase_axes_and_dynamics_windows():
    axes = phase_diagrams.axes_of(3)
    assert np.allclose(axes["importance"], [0.1, 1, 10]) and np.allclose(axes["density"], [1, 0.1, 0.01])
    step = np.array([1, 2, 100, 200])
    run = xr.Dataset(
        {
            "a: loss": ("step", [9.0, 4.0, 3.0, 1.0]),
            "a: dimensionality": (("step", "f"), np.array([[0.0], [1.0], [1.0], [0.5]])),
        },
        {"step": step},
    )
    jump, drop = dynamics.moved(run, "a")
    assert jump.tolist() == [0.5] and drop.tolist() == [2.0]
