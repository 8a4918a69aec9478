"""Figures of memory are what they say; what cannot be run is refused before anything is computed."""

import contextlib
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax import memory, superposition
from tests.situations import refused
from tests.situations.prompts import ANSWERS, IDS, METRIC, OTHERS, bytes_of_one, prompts, small_model

BOTH = {"clean": IDS, "corrupted": OTHERS}
HEADS = {"site": "z", "over": ("layer", "head")}
DRIVERS = {
    "sweep": lambda model, metric, **kw: mj.sweep(
        model, IDS, {"z": mj.Scale(0.0, mj.grid(layer=[0, 1]))}, metric, **kw
    ),
    "patch": lambda model, metric, **kw: mj.patch(model, **BOTH, **HEADS, metric=metric, **kw),
    "ablate": lambda model, metric, **kw: mj.ablate(model, IDS, **HEADS, metric=metric, kind="mean", **kw),
    "dose_response": lambda model, metric, **kw: mj.dose_response(
        model, IDS, **HEADS, factors=[0.5], metric=metric, **kw
    ),
    "knock_out": lambda model, metric, **kw: mj.knock_out(model, IDS, {"back": (-1, 0)}, metric, **kw),
    "mediate": lambda model, metric, **kw: mj.mediate(model, base=IDS, source=OTHERS, **HEADS, metric=metric, **kw),
    "strongest": lambda model, metric, **kw: mj.strongest(model, **BOTH, **HEADS, metric=metric, k=2, **kw),
    "trace": lambda model, metric, **kw: mj.trace(model, IDS, subject=[[0]] * 7, answer=ANSWERS[0], draws=2, **kw),
}


@pytest.fixture
def model(x64):
    return small_model()


@contextlib.contextmanager
def nothing_runs(monkeypatch):
    """No layer is traced or run: the one block of the model is never called."""

    def called(*arguments, **keywords):
        raise AssertionError("a layer was run")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["mijax.model.walk"], "block", called)
        jax.clear_caches()
        yield


def test_the_same_call_twice_tells_the_same_memory():
    model = mj.init(mj.Config(n_layers=1, d_model=64, n_heads=4, d_vocab=101, n_ctx=64), jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 101, (64, 32))
    run = lambda: mj.sweep(
        model, ids, {"z": mj.Scale(0.0, mj.grid(layer=[0], head=range(4)))}, mj.metrics.logit(3), progress=False
    )
    attrs = [{name: value for name, value in run().attrs.items() if name.startswith("memory")} for _ in range(2)]
    assert attrs[0] == attrs[1] and set(attrs[0]) == {"memory_estimate"}  # no CPU counts what a program took
    assert attrs[0]["memory_estimate"] > 2**24


def test_attribution_and_training_tell_no_peak_that_nobody_measured():
    model = mj.init(mj.Config(n_layers=1, d_model=256, n_heads=2, d_vocab=11, n_ctx=64), jax.random.key(0))
    ids = np.arange(16 * 64).reshape(16, 64) % 11
    attributed = mj.attribute(
        model, clean=ids, corrupted=(ids + 1) % 11, sites=("pattern",), metric=mj.metrics.logit(3), progress=False
    )
    toy = lambda: superposition.Toy(superposition.relu_output(600, 2), superposition.sparse(600, 0.1))
    trained = superposition.train(toy, {"seed": range(2)}, steps=1, batch=16_384, judged_on=1, progress=False)
    for result in (attributed, trained):
        assert result.attrs["memory_estimate"] > 2**24 and "memory_peak" not in result.attrs


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, None),
        ({"bytes_in_use": 10, "peak_bytes_in_use": 15}, {"bytes_in_use": 11, "peak_bytes_in_use": 90}, 80),
        ({"bytes_in_use": 10, "peak_bytes_in_use": 90}, {"bytes_in_use": 11, "peak_bytes_in_use": 90}, None),
    ],
)
def test_a_device_that_counts_tells_a_peak_where_this_call_reached_it(monkeypatch, before, after, expected):
    """The count never falls: where it was higher before, nobody knows how much the call took."""
    counts = iter([before, after])
    monkeypatch.setattr(memory, "_device_memory", lambda: next(counts))
    with memory.PeakMemory() as peak:
        pass
    assert peak.taken == expected


def mixing(out):
    """A metric that looks at all examples."""
    return out.readout.logits(pos=-1)[:, 3] - jnp.mean(out.readout.logits(pos=-1))


@pytest.mark.parametrize("metric", [METRIC, mixing], ids=["split", "together"])
@pytest.mark.parametrize("site", ["z", "resid_pre", "pattern"])
def test_the_memory_that_the_refusal_names_is_enough(model, metric, site):
    over = {"z": ("layer", "head"), "resid_pre": ("layer", "pos"), "pattern": ("layer", "head", "query")}[site]
    run = lambda memory: mj.patch(model, **BOTH, site=site, over=over, metric=metric, memory=memory, progress=False)
    least = bytes_of_one(lambda memory: run(memory))
    assert run(least).attrs["memory_estimate"] <= least
    with refused(ValueError, f"one cell takes about {least:,} bytes, memory={least - 1:,} allows none"):
        run(least - 1)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_mistyped_keyword_is_told_before_anything_runs(model, monkeypatch, driver):
    with nothing_runs(monkeypatch), refused(TypeError, "'memroy'.*did you mean 'memory'.*memory, progress, save, mesh"):
        DRIVERS[driver](model, METRIC, memroy=10**9)


@pytest.mark.parametrize("driver", DRIVERS)
def test_memory_that_holds_no_cell_is_told_before_anything_runs(model, monkeypatch, driver):
    with nothing_runs(monkeypatch), refused(ValueError, "one cell takes about .* bytes, memory=10 allows none"):
        DRIVERS[driver](model, METRIC, memory=10)


def test_an_attribution_that_could_not_be_verified_is_told_before_anything_runs(model, monkeypatch):
    """A cell takes less than an estimate as a rule: here it is made to take more."""
    run = lambda **kw: mj.attribute(model, **BOTH, sites=("z",), metric=METRIC, progress=False, **kw)
    enough = int(run().attrs["memory_estimate"])
    monkeypatch.setattr(sys.modules["mijax.attribution.verify"], "check_sweep", Mock(side_effect=ValueError("no cell")))
    monkeypatch.setattr(
        sys.modules["mijax.attribution.attribute"], "estimated", Mock(side_effect=AssertionError("ran"))
    )
    with refused(ValueError, "no cell"):
        run(memory=enough, verify=mj.Verify(2))


def test_a_folder_of_another_sweep_is_told_before_anything_runs(model, monkeypatch, tmp_path):
    run = lambda **kw: mj.patch(model, **{**BOTH, **kw}, **HEADS, metric=METRIC, save=tmp_path / "s", progress=False)
    run()
    with nothing_runs(monkeypatch):
        with refused(ValueError, "begun with another prompts"):
            run(clean=(IDS + 1) % 19)
        with refused(ValueError, "begun with another prompts"):
            run(corrupted=(OTHERS + 1) % 19)


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"memory": "2e9"}, TypeError, "memory must be a number of bytes, given '2e9'"),
        ({"memory": True}, TypeError, "memory must be a number of bytes"),
        ({"memory": -1}, ValueError, "memory must be a number of bytes over 0, given -1"),
        ({"memory": float("nan")}, ValueError, "memory must be a number of bytes over 0, given nan"),
        ({"save": 3}, TypeError, "save must be the path of a folder, given 3"),
        ({"mesh": 8}, TypeError, "mesh must be a jax.sharding.Mesh, given 8"),
        ({"mesh": jax.sharding.Mesh(np.zeros((0,), object), ("cells",))}, ValueError, "has no devices"),
    ],
)
def test_what_no_sweep_can_be_run_by_is_told_before_anything_runs(
    model, monkeypatch, as_a_user, keywords, kind, message
):
    for driver in ("sweep", "patch", "ablate"):
        with nothing_runs(monkeypatch), refused(kind, message):
            DRIVERS[driver](model, METRIC, **keywords)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "medium"}, "kind must be one of 'zero'"),
        ({"kind": "noise"}, "needs a key"),
        ({"kind": "pooled mean", "site": "pattern"}, "cannot be pooled"),
        ({"kind": "mean", "reference": IDS[:, :2]}, "at most 2 tokens, the longest prompt 5"),
        (
            {"kind": "resample", "key": jax.random.key(0), "reference": IDS[:, :2]},
            "prompt 0 has 5 tokens, and no prompt of the reference as many",
        ),
        ({"kind": "zero", "key": jax.random.key(0), "draws": 3}, "kind 'zero' does not use key and draws"),
        ({"kind": "mean", "scale": 3.0}, "kind 'mean' does not use scale"),
    ],
)
def test_an_ablation_that_cannot_be_had_is_told_before_its_reference_runs(
    model, monkeypatch, as_a_user, given, message
):
    with nothing_runs(monkeypatch), refused(ValueError, message):
        mj.ablate(model, IDS, **{**HEADS, **given}, metric=METRIC)


def test_a_metric_of_wrong_shape_is_told_before_anything_runs(model, monkeypatch, as_a_user):
    for metric, message in (
        (mj.metrics.logit([1, 2, 3]), "3 answers or positions, the batch 7 examples"),
        (lambda out: out.readout.logits(pos=-1), r"must give one number per example, \[7\]"),
    ):
        with nothing_runs(monkeypatch), refused(ValueError, message):
            mj.patch(model, clean=prompts(), corrupted=prompts(OTHERS), **HEADS, metric=metric)
