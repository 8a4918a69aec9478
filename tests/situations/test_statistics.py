"""Effects and their intervals: what they are of, and what becomes of results that are not finite or not whole."""

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import mijax as mj
from tests.situations import refused
from tests.situations.models import model
from tests.situations.prompts import IDS, LENGTHS, METRIC, OTHERS, prompts, small_model

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
    without = result_of([BASE + np.array([1.0, 1.0, 1.0, np.nan])]).assign_coords(
        has_position=(("layer", "batch"), [[True, True, True, False]])
    )
    assert mj.bootstrap(without).values.tolist() == [[1.0], [1.0]]
    assert np.isnan(mj.bootstrap(without.drop_vars("has_position"))).all()


FAILING = 1
"""The prompt in which the metric of `failed_patch` is NaN in some cells."""


def failed_patch(over=("layer", "pos"), site="resid_post"):
    """A patch of prompts of different lengths whose metric has no value in cells of one prompt, and the metric without that."""
    pair = {"clean": prompts(OTHERS), "corrupted": prompts(IDS), "site": site, "over": over, "progress": False}
    whole = mj.patch(small_model(), metric=METRIC, **pair)
    at_ends = min(float(whole.base[FAILING]), float(whole.source[FAILING]))
    bound = np.where(np.arange(len(IDS)) == FAILING, at_ends - 1e-3, -np.inf)

    def metric(out):
        value = METRIC(out)
        return jnp.where(value < bound, jnp.nan, value)

    return whole, metric, pair


def test_a_run_that_failed_is_no_position_that_a_prompt_lacks(x64, tmp_path):
    """Means and intervals by a plain loop over the prompts that have the position."""
    whole, metric, pair = failed_patch()
    with pytest.warns(UserWarning, match="not finite in"):
        result = mj.patch(small_model(), metric=metric, **pair)
    result.to_netcdf(tmp_path / "result.nc")
    stored = xr.load_dataarray(tmp_path / "result.nc")
    n_failed = 0
    for some in (slice(None), [0, 1, 2]):
        part, expected = result.isel(batch=some), whole.isel(batch=some)
        shares, bounds = mj.normalise(part), mj.bootstrap(part, draws=100)
        np.testing.assert_array_equal(mj.normalise(stored.isel(batch=some)), shares)
        for layer, pos in np.ndindex(shares.shape):
            has = LENGTHS[some] > pos
            failed = np.isnan(part.values[layer, pos][has]).any()
            n_failed += failed
            effect, scale = (
                (expected[layer, pos] - expected.base).values[has],
                (expected.source - expected.base).values[has],
            )
            right = np.nan if failed else effect.mean() / scale.mean()
            np.testing.assert_allclose(shares.values[layer, pos], right, rtol=1e-9, err_msg=f"{layer} {pos}")
            assert np.isnan(bounds.values[:, layer, pos]).all() == (failed or has.sum() < 2)
            share = mj.normalise(part.sel(layer=layer, pos=pos))
            np.testing.assert_array_equal(share, shares.values[layer, pos])
    assert n_failed >= 2


def test_a_failed_run_in_a_grid_of_roles_has_no_share(x64):
    _, metric, pair = failed_patch(mj.grid(layer=range(3), pos=[1, 2]))
    with pytest.warns(UserWarning, match="not finite in"):
        result = mj.patch(small_model(), metric=metric, **pair)
    failed = np.isnan(result.values).any(axis=-1)
    assert "has_position" not in result.coords and failed.any() and not failed.all()
    assert np.isnan(mj.normalise(result)).values.tolist() == failed.tolist()
    assert np.isnan(mj.bootstrap(result, draws=50)).all("bound").values.tolist() == failed.tolist()
    assert np.isnan(mj.sign_flips(result, draws=50).p).values.tolist() == failed.tolist()


def test_cells_of_positions_that_no_selected_prompt_has_are_nan(x64):
    whole, *_ = failed_patch()
    short = whole.isel(batch=[1, 4])  # of three tokens each
    for statistic in (mj.normalise, mj.bootstrap):
        assert (
            np.isnan(statistic(short)).all(set(statistic(short).dims) - {"pos"}).values.tolist()
            == [False] * 3 + [True] * 2
        )


def test_one_prompt_with_the_position_has_no_interval():
    has = [[True, False, False, False], [True, True, False, False]]
    values = np.where(has, BASE + np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 3.0, 1.0, 1.0]]), np.nan)
    for source in (None, BASE + 4.0):
        result = result_of(values, source).assign_coords(has_position=(("layer", "batch"), has))
        low, high = mj.bootstrap(result).values
        assert np.isnan([low[0], high[0]]).all() and low[1] < high[1]


def test_sign_flips_leave_out_what_a_prompt_lacks_and_nothing_else():
    values = np.random.default_rng(0).normal(1.0, 1.0, (3, 8))
    has = np.ones((3, 8), bool)
    has[1, 6:] = False
    values[1, 6:] = values[2, 0] = np.nan
    result = xr.DataArray(
        values, {"base": ("batch", np.zeros(8)), "has_position": (("pos", "batch"), has)}, ("pos", "batch"), name="m"
    )
    tests = mj.sign_flips(result, draws=200)
    t = lambda x: x.mean() / (x.std(ddof=1) / np.sqrt(len(x)))
    assert np.allclose(tests.t.values[:2], [t(values[0]), t(values[1, :6])])
    assert np.isnan(tests.t.values[2]) and np.isnan(tests.p.values[2]) and np.isfinite(tests.p.values[:2]).all()
    paired = mj.sign_flips(result.isel(pos=[0]), clusters=np.repeat(np.arange(6), [2, 2, 1, 1, 1, 1]), draws=200)
    means = np.array([values[0, :2].mean(), values[0, 2:4].mean(), *values[0, 4:]])
    assert np.allclose(paired.t.values, t(means))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"level": 95}, ValueError, "level.*between 0 and 1.*95"),
        ({"level": 1}, ValueError, "level.*between 0 and 1"),
        ({"level": 0.0}, ValueError, "level.*between 0 and 1"),
        ({"level": float("nan")}, ValueError, "level.*between 0 and 1"),
        ({"level": "0.9"}, TypeError, "level.*'0.9'"),
        ({"level": True}, TypeError, "level.*True"),
        ({"draws": 0}, ValueError, "draws.*at least 1"),
        ({"draws": 2.5}, TypeError, "draws.*whole number.*2.5"),
        ({"seed": -1}, ValueError, "seed.*at least 0"),
    ],
)
def test_levels_and_draws_that_are_none(keywords, error, message):
    with refused(error, message):
        mj.bootstrap(result_of([BASE + 2.0]), **keywords)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"draws": -3}, ValueError, "draws.*at least 1.*-3"),
        ({"draws": "many"}, TypeError, "draws.*whole number"),
        ({"clusters": "abc"}, ValueError, "a label for each of the 7 prompts.*'abc'"),
        ({"clusters": np.arange(7)[:, None]}, ValueError, r"a label for each.*\(7, 1\)"),
        ({"clusters": [np.nan, np.nan, 1, 2, 3, 4, 5]}, ValueError, "none of them NaN"),
    ],
)
def test_clusters_and_draws_that_are_none(keywords, error, message):
    result = xr.DataArray(np.ones((1, 7)), {"base": ("batch", np.zeros(7))}, ("head", "batch"), name="m")
    with refused(error, message):
        mj.sign_flips(result, **keywords)


def test_a_cell_that_fails_counts_as_missed(x64):
    """The measured cells that are NaN are those that are NaN in a patch of all cells, and each could have any effect."""
    whole, metric, pair = failed_patch(("layer", "head"), "z")
    pair = {name: pair[name] for name in ("clean", "corrupted", "progress")}
    with pytest.warns(UserWarning, match="not finite in"):
        r = mj.attribute(
            small_model(), sites={"z": ("layer", "head")}, metric=metric, verify=mj.Verify(0, sample=12), **pair
        )
    share = abs((whole - whole.base).mean("batch") / (whole.source - whole.base).mean("batch")).values
    failed = np.isnan(r["z.exact"].values).any(axis=-1)
    measured = r["z.measured"].attrs
    assert failed.any() and not failed.all()
    assert measured["missed_in_sample"] == measured["missed_at_most"] == (failed | (share >= 0.05)).sum()
    assert measured["not_finite_in_sample"] == failed.sum()


def test_a_threshold_that_is_no_number():
    with refused(TypeError, "threshold.*'a'"):
        mj.Verify(3, threshold="a")


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
    messages = [str(w.message) for w in recwarn.list]
    assert len(messages) == 1 and f"not finite in {count} of 2 cells, the first of them {place}" in messages[0]
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
    estimates = mj.attribute(
        model, clean=OTHERS, corrupted=IDS, sites={"z": ("layer",)}, metric=METRIC, verify=mj.Verify(3), progress=False
    )
    assert {estimates[name].dtype for name in ("z", "z.exact", "base", "source")} == {np.dtype(np.float64)}
    assert np.abs(estimates["z.exact"].values / expected - 1).max() < 1e-12
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


def test_effects_from_which_the_base_was_taken_already():
    """`result - result.base` still has the coordinate `base`: it is not taken off again."""
    prompts, others = [[i, i + 1, i + 2] for i in range(1, 8)], [[i, i + 3, i + 2] for i in range(1, 8)]
    result = mj.patch(
        model(), clean=prompts, corrupted=others, site="z", over=("layer",), metric=mj.metrics.logit(3), progress=False
    )
    effect = result - result.base
    assert "base" in effect.coords
    values = effect.values.astype(np.float64)
    t = values.mean(1) / (values.std(1, ddof=1) / np.sqrt(7))
    for given in (result, effect):
        assert np.allclose(mj.sign_flips(given, draws=99).t, t, rtol=1e-3)
    alone = result.drop_vars("source")
    assert np.allclose(mj.bootstrap(effect), mj.bootstrap(alone), rtol=1e-6)
    with refused(ValueError, "holds no metric but what was computed from one"):
        mj.normalise(effect)
    both = mj.patch(model(), clean=prompts, corrupted=others, site="z", over=("layer",), progress=False,
                    metric={"a": mj.metrics.logit(3), "b": mj.metrics.logit(5)})  # fmt: skip
    assert np.allclose(mj.normalise(both.rename(a="b", b="a")).b, mj.normalise(both).a)
    assert np.allclose(mj.sign_flips(both.a - both["base.a"], draws=99).t, t, rtol=1e-3)


def test_the_error_of_an_estimate_is_no_metric():
    prompts, others = [[i, i + 1, i + 2] for i in range(1, 8)], [[i, i + 3, i + 2] for i in range(1, 8)]
    result = mj.attribute(
        model(),
        clean=prompts,
        corrupted=others,
        sites={"z": ("layer",)},
        metric=mj.metrics.logit(3),
        method=mj.AtP(probes=2),
    )
    error = result["z.error"].values.astype(np.float64)
    t = error.mean(1) / (error.std(1, ddof=1) / np.sqrt(7))
    assert np.allclose(mj.sign_flips(result, draws=99)["z.error.t"], t, rtol=1e-3, atol=1e-3)
    with refused(ValueError, "'z.error' holds no metric"):
        mj.normalise(result["z.error"])
    verified = mj.attribute(
        model(),
        clean=prompts,
        corrupted=others,
        sites={"z": ("layer",)},
        metric=mj.metrics.logit(3),
        verify=mj.Verify(1),
    )
    assert set(mj.bootstrap(verified[["z", "z.measured"]])) == {"z"}  # which cells were measured is of no prompt


def test_a_result_that_lost_its_attributes():
    prompts, others = [[i, i + 1, i + 2] for i in range(1, 8)], [[i, i + 3, i + 2] for i in range(1, 8)]
    result = mj.patch(
        model(),
        clean=prompts,
        corrupted=others,
        site="z",
        over=("layer", "head"),
        metric=mj.metrics.logit(3),
        progress=False,
    )
    with xr.set_options(keep_attrs=False):
        mean = result.mean("head")
    for call in (mj.normalise, mj.bootstrap, mj.sign_flips):
        with refused(ValueError, "whether its base is taken off already cannot be told"):
            call(mean)
    kept = result.mean("head")
    assert np.allclose(
        mj.sign_flips((kept - kept.base).drop_vars(["base", "source"]), draws=9).t,
        mj.sign_flips(kept, draws=9).t,
        rtol=1e-3,
    )


def two_metrics():
    rng = np.random.default_rng(3)
    prompts = rng.integers(0, 11, (7, 4))
    others = (prompts + np.array([0, 3, 0, 0])) % 11
    both = {"diff": mj.metrics.logit_diff(7, 8), "prob": mj.metrics.prob(7)}
    return mj.patch(
        model(), clean=prompts, corrupted=others, site="z", over=("layer", "head"), metric=both, progress=False
    )


@pytest.mark.parametrize(
    "combine",
    [
        lambda r: xr.concat([r["diff"], r["prob"]], dim="metric"),
        lambda r: xr.concat([r["diff"], r["prob"]], dim=xr.IndexVariable("metric", ["diff", "prob"])),
        lambda r: r.to_array("metric"),
        lambda r: r.to_stacked_array("z", sample_dims=["batch"]),
        lambda r: r["diff"] - r["prob"],
    ],
)
def test_several_metrics_in_one_array(combine):
    """The base of one of them must not be taken off the others."""
    together = combine(two_metrics())
    for call in (mj.normalise, mj.bootstrap, mj.sign_flips):
        with refused(ValueError, r"runs of several metrics \(diff, prob\), and may hold more than one"):
            call(together)


def test_one_metric_of_several():
    result = two_metrics()
    flips = mj.sign_flips(result, draws=9)
    for name in ("diff", "prob"):
        array = result[name]
        effects = ((array - result[f"base.{name}"]) / (result[f"source.{name}"] - result[f"base.{name}"]).mean()).mean(
            "batch"
        )
        for same in (array, array.stack(cell=("layer", "head")).unstack("cell").transpose(*array.dims)):
            assert np.allclose(mj.normalise(same), effects, atol=1e-5)
        assert np.allclose(mj.sign_flips(array - result[f"base.{name}"], draws=9).t, flips[f"{name}.t"], atol=1e-5)
        assert np.allclose(mj.normalise(array.mean("head")), effects.mean("head"), atol=1e-5)
