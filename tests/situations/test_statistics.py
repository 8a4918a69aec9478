"""Effects and their intervals: what they are of, and what becomes of results that are not finite or not whole."""

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import mijax as mj
from tests.situations import refused
from tests.situations.prompts import IDS, METRIC, OTHERS, small_model

BASE = np.array([1.0, 2.0, 4.0, 8.0])


def result_of(values, source=None):
    """A sweep's result over layers, without a model."""
    coords = {"base": ("batch", BASE)} | ({} if source is None else {"source": ("batch", source)})
    return xr.DataArray(np.asarray(values, float), coords, ("layer", "batch"), name="m")


def percentiles(effects, level, draws=2000, seed=0):
    """The percentile bootstrap of a mean, by a plain loop over the same draws."""
    n = len(effects)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    means = [np.average(effects, weights=row) for row in counts]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="nearest")


def test_intervals_of_an_ablation_are_of_result_minus_base(x64):
    r = mj.ablate(small_model(), IDS, site="z", over=("layer",), metric=METRIC, progress=False)
    bounds = mj.bootstrap(r, level=0.9)
    assert bounds.attrs["interval_of"] == "result - base" and bounds.attrs["level"] == 0.9
    for layer in range(3):
        assert np.allclose(bounds.values[:, layer], percentiles(r.values[layer] - r.base.values, 0.9), rtol=1e-12)
    several = mj.sweep(
        small_model(), IDS, {"z": mj.Scale(0.0, mj.grid(layer=[1]))}, {"a": METRIC, "b": METRIC}, progress=False
    )
    assert np.allclose(
        mj.bootstrap(several).b.values[:, 0], percentiles(several.b.values[0] - several["base.b"].values, 0.95)
    )


def test_a_prompt_without_the_position_is_left_out_of_an_ablations_interval():
    bounds = mj.bootstrap(result_of([BASE + np.array([1.0, 1.0, 1.0, np.nan])]))
    assert bounds.values.tolist() == [[1.0], [1.0]]


def test_intervals_of_a_patch_say_that_they_are_normalised():
    bounds = mj.bootstrap(result_of([BASE + 2.0], source=BASE + 4.0))
    assert bounds.attrs["interval_of"] == "(result - base) / (source - base)" and bounds.values.tolist() == [
        [0.5],
        [0.5],
    ]


def test_normalising_an_ablation_says_what_to_do():
    with refused(ValueError, "no coordinate 'source'.*result - result.base.*mijax.bootstrap"):
        mj.normalise(result_of([BASE]))


@pytest.mark.parametrize("source", [None, BASE + 4.0])
@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
def test_an_infinite_result_has_no_finite_interval(source, infinite):
    r = result_of([BASE + np.array([1.0, infinite, 1.0, 1.0]), BASE + 1.0], source)
    bounds = mj.bootstrap(r)
    assert np.isnan(bounds.values[:, 0]).all() and np.isfinite(bounds.values[:, 1]).all()
    if source is not None:
        assert mj.normalise(r).values[0] == infinite


def test_a_base_that_is_not_finite_is_told():
    r = result_of([BASE], source=np.array([1.0, np.inf, 2.0, 3.0]))
    for statistic in (mj.normalise, mj.bootstrap):
        with refused(ValueError, "not finite on the source run"):
            statistic(r)


@pytest.mark.parametrize("statistic", [mj.normalise, mj.bootstrap, mj.sign_flips])
def test_one_prompt_selected_from_a_result_says_how_to_keep_it(statistic):
    r = result_of([BASE + 2.0], source=BASE + 4.0)
    with refused(ValueError, r"no dimension 'batch'.*isel\(batch=\[0\]\)"):
        statistic(r.isel(batch=0))
    with refused(ValueError, r"no dimension 'batch'"):
        statistic(xr.Dataset({"m": r.rename(base="base.m", source="source.m")}).mean("batch"))


@pytest.mark.parametrize(
    ("edit", "count", "place"),
    [
        (lambda where: mj.Replace(np.inf, where), 2, "layer=0"),
        (lambda where: mj.Replace(np.nan, where), 2, "layer=0"),
        (lambda where: mj.Scale(np.array([1.0, np.nan, 1.0]).reshape(3, 1, 1, 1), where), 1, "layer=1"),
    ],
)
def test_cells_that_are_not_finite_are_told_once(x64, recwarn, edit, count, place):
    r = mj.sweep(small_model(), IDS, {"mlp_out": edit(mj.grid(layer=[0, 1]))}, METRIC, progress=False)
    told = [str(w.message) for w in recwarn.list]
    assert len(told) == 1 and f"not finite in {count} of 2 cells, the first of them {place}" in told[0]
    assert (~np.isfinite(r.values)).all(axis=1).sum() == count


def test_positions_that_a_shorter_prompt_has_not_are_no_warning(x64):
    mask = np.arange(5) < np.array([5, 4, 3, 5, 5, 5, 5])[:, None]
    r = mj.patch(small_model(), clean=mj.Tokens(IDS, mask), corrupted=mj.Tokens(OTHERS, mask), site="resid_pre",
                 over=("layer", "pos"), metric=METRIC, progress=False)  # fmt: skip
    assert np.isnan(r.sel(pos=4)).sum() == 3 * 2


def loop(model, edits):
    return np.asarray(METRIC(mj.run(model, IDS, edits)))


def test_a_float64_model_gives_float64_results(x64):
    """To 1e-12 of a plain loop: float32 rounds at 6e-8."""
    model = small_model()
    source = mj.run(model, OTHERS, capture=("z",)).acts["z"]
    patched = mj.patch(model, clean=OTHERS, corrupted=IDS, site="z", over=("layer",), metric=METRIC, progress=False)
    expected = [loop(model, {"z": mj.Replace(source, mj.Where(layer=layer))}) for layer in range(3)]
    assert patched.dtype == patched.base.dtype == patched.source.dtype == np.float64
    assert (
        np.abs(patched.values / expected - 1).max() < 1e-12
        and np.abs(patched.base.values / loop(model, {}) - 1).max() < 1e-12
    )
    found = mj.attribute(
        model, clean=OTHERS, corrupted=IDS, sites={"z": ("layer",)}, metric=METRIC, verify=mj.Verify(3), progress=False
    )
    assert {found[name].dtype for name in ("z", "z.exact", "base", "source")} == {np.dtype(np.float64)}
    assert np.abs(found["z.exact"].values / expected - 1).max() < 1e-12
    traced = mj.mediate(model, base=IDS, source=OTHERS, site="z", over=("layer",), metric=METRIC, progress=False)
    assert {variable.dtype for variable in traced.data_vars.values()} == {np.dtype(np.float64)}


def test_counts_and_halves_become_float32():
    """A metric of less precision, or of whole numbers, is told in float32."""
    from mijax.engine.measure import as_floats

    for given in (
        jnp.ones(2, jnp.bfloat16),
        np.ones(2, np.float16),
        np.ones(2, np.int32),
        np.ones(2, bool),
        np.ones(2, np.float32),
    ):
        assert as_floats(given).dtype == np.float32
    assert as_floats(np.ones(2, np.float64)).dtype == np.float64
