"""Grids, sweeps and patching against a loop of single runs (law 5), and what is told of them."""

import jax
import numpy as np
import pytest
import xarray as xr

import mijax as mj
from mijax.engine.cells import cells_of
from mijax.engine.layout import cell_bytes, row_bytes
from tests.architectures import ARCHITECTURES, IDS, LENGTHS, batch, error, random_model

METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
SHORTEST = int(LENGTHS.min())


@pytest.fixture
def model(x64):
    return random_model(ARCHITECTURES["llama_gqa"])


def source_of(model, site, padding="left"):
    return mj.run(model, batch(padding, (IDS + 5) % 19), capture=(site,)).acts[site]


def test_memory_does_not_change_the_result_and_bounds_the_batches(model):
    tokens, source = batch("left"), source_of(model, "z")
    edits = {"z": mj.Replace(source, mj.grid(layer=range(3), head=range(4)))}
    whole = mj.sweep(model, tokens, edits, METRIC, progress=False)
    cell_memory = IDS.size * row_bytes(model, cells_of(edits).edits) + 2 * cell_bytes(model, tokens, {"m": METRIC})
    for cells in (1, 5, 12):
        part = mj.sweep(model, tokens, edits, METRIC, memory=cells * cell_memory, progress=False)
        assert error(part, whole) < 1e-6
    with pytest.raises(ValueError, match=r"one cell takes about .* bytes, memory=10 allows none"):
        mj.sweep(model, tokens, edits, METRIC, memory=10, progress=False)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_everything_leads_from_base_to_source(model, direction):
    clean, corrupted = batch("left"), batch("left", (IDS + 5) % 19)
    over = mj.grid(layer=[0], pos={"all": list(range(SHORTEST)), "last": -1})
    result = mj.patch(
        model,
        clean=clean,
        corrupted=corrupted,
        site="resid_pre",
        over=over,
        metric=METRIC,
        direction=direction,
        progress=False,
    )
    base, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    assert error(result.base, METRIC(mj.run(model, base))) < 2e-7
    assert error(result.source, METRIC(mj.run(model, source))) < 2e-7
    shortest = int(np.argmin(LENGTHS))
    assert error(result.sel(layer=0, pos="all")[shortest], result.source[shortest]) < 2e-7  # all of its positions
    assert result.attrs["direction"] == direction and result.attrs["sites"] == "resid_pre"
    normalised = (result.mean("batch") - result.base.mean()) / (result.source.mean() - result.base.mean())
    assert error(mj.normalise(result), normalised.values) < 1e-5
    assert mj.normalise(result).name == "logit_diff" and mj.normalise(result).attrs == result.attrs


def test_patching_over_named_axes_is_the_loop(model):
    clean, corrupted = batch("left"), batch("left", (IDS + 5) % 19)
    result = mj.patch(
        model, clean=clean, corrupted=corrupted, site="k", over=("head", "pos"), metric=METRIC, progress=False
    )
    source = mj.run(model, clean, capture=("k",)).acts["k"]
    assert result.sizes == {"head": 2, "pos": 6, "batch": 3}  # two key/value heads
    for head in range(2):
        for pos in range(6):
            for i in range(3):
                value = float(result.sel(head=head, pos=pos, batch=i))
                if pos >= LENGTHS[i]:
                    assert np.isnan(value)
                    continue
                tokens = mj.Tokens(corrupted.ids, corrupted.mask)
                full = mj.Where(head=head, pos=[[min(pos, n - 1)] for n in LENGTHS])
                alone = METRIC(mj.run(model, tokens, {"k": mj.Replace(source, full)}))[i]
                assert abs(value - float(alone)) < 1e-5 * abs(float(alone))


def test_several_metrics_are_read_from_one_run(model):
    clean, corrupted = batch("none"), batch("none", (IDS + 5) % 19)
    metrics = {"difference": METRIC, "probability": mj.metrics.prob([3, 5, 7])}
    over = ("layer", "head")
    together = mj.patch(model, clean=clean, corrupted=corrupted, site="z", over=over, metric=metrics, progress=False)
    assert set(together.data_vars) == set(metrics)
    for name, metric in metrics.items():
        alone = mj.patch(model, clean=clean, corrupted=corrupted, site="z", over=over, metric=metric, progress=False)
        assert error(together[name], alone) < 1e-6
        assert (
            error(
                together[f"{name}.base"] if f"{name}.base" in together.coords else together[f"base.{name}"], alone.base
            )
            < 1e-6
        )
        assert error(mj.normalise(together)[name], mj.normalise(alone)) < 1e-5
        bounds = mj.bootstrap(together)[name]
        assert (bounds.sel(bound="low") <= bounds.sel(bound="high")).all()


def test_cells_where_the_prompts_agree_are_exactly_zero():
    """Only the third token differs: causality leaves everything before it as it was, to the bit."""
    model = random_model(ARCHITECTURES["llama_gqa"], dtype=jax.numpy.float32)
    corrupted = np.array(IDS)
    corrupted[:, 2] = (IDS[:, 2] + 5) % 19
    for direction in ("denoise", "noise"):
        for site in ("resid_pre", "attn_out", "mlp_out", "k"):
            r = mj.patch(
                model,
                clean=IDS,
                corrupted=corrupted,
                site=site,
                over=("layer", "pos"),
                metric=METRIC,
                direction=direction,
                progress=False,
            )
            effect = r - r.base
            assert (effect.sel(pos=[0, 1]) == 0).all()
            assert (effect.sel(pos=2, layer=0) != 0).all()
            if site == "resid_pre":
                assert (effect.sel(pos=[3, 4, 5], layer=0) == 0).all()  # these embed the same tokens
                assert error(r.sel(pos=2, layer=0), r.source) < 1e-4


def test_noising_is_denoising_with_the_prompts_exchanged(model):
    a, b = batch("left"), batch("left", (IDS + 5) % 19)
    run = lambda clean, corrupted, direction: mj.patch(
        model,
        clean=clean,
        corrupted=corrupted,
        site="z",
        over=("head",),
        metric=METRIC,
        direction=direction,
        progress=False,
    )
    assert error(run(a, b, "noise"), run(b, a, "denoise")) == 0


def test_labels_and_saving(model, tmp_path):
    clean, corrupted = batch("left"), batch("left", (IDS + 5) % 19)
    clean.strings = corrupted.strings = [
        [f"t{i}" if real else "" for i, real in zip(row, mask)] for row, mask in zip(clean.ids, clean.mask)
    ]
    result = mj.patch(
        model, clean=clean, corrupted=corrupted, site="resid_pre", over=("layer", "pos"), metric=METRIC, progress=False
    )
    assert result.token.dims == ("batch", "pos")
    assert result.token.values[1].tolist() == ["t7", "t8", "t9", "t10", "", ""]
    assert result["layer"].dtype.kind == result["pos"].dtype.kind == "i"
    assert result.attrs["metric"] == "logit_diff" and {"mijax", "jax", "model", "device"} <= set(result.attrs)
    assert all(isinstance(v, str | int | float) for v in result.attrs.values())
    result.to_netcdf(tmp_path / "result.nc", engine="scipy")
    xr.testing.assert_identical(xr.load_dataarray(tmp_path / "result.nc", engine="scipy"), result)


def test_grid_products_and_roles():
    grid = mj.grid(layer=range(2), pos={"a": 1, "b": [2, 3], "c": [[0], [1], [2]]}, head=[[0, 1], [2, 2]])
    assert grid.shape == (2, 3, 2) and grid.size == 12
    assert grid.labels == {"layer": [0, 1], "pos": ["a", "b", "c"], "head": [0, 1]}
    # each cell selects every pair of its own lists
    last = jax.tree.map(lambda i: i[-1], grid.where)  # layer 1, c, second pair of heads
    pairs = [set(zip(row.tolist(), last.head.tolist())) for row in last.pos]
    assert int(last.layer) == 1 and pairs == [{(0, 2)}, {(1, 2)}, {(2, 2)}]
    second = jax.tree.map(lambda i: i[2], grid.where)  # layer 0, b, first pair of heads
    assert set(zip(second.pos[0].tolist(), second.head.tolist())) == {(2, 0), (2, 1), (3, 0), (3, 1)}


def test_one_grid_may_move_several_edits(model):
    tokens = batch("left")
    grid = mj.grid(layer=[0, 2])
    both = mj.sweep(
        model,
        tokens,
        {"attn_out": mj.Scale(0.0, grid), "mlp_out": [mj.Add(1.0, mj.Where(layer=1)), mj.Scale(0.5, grid)]},
        METRIC,
        progress=False,
    )
    for layer in (0, 2):
        edits = {
            "attn_out": mj.Scale(0.0, mj.Where(layer=layer)),
            "mlp_out": [mj.Add(1.0, mj.Where(layer=1)), mj.Scale(0.5, mj.Where(layer=layer))],
        }
        assert error(both.sel(layer=layer), METRIC(mj.run(model, tokens, edits))) < 2e-7
    fixed = METRIC(mj.run(model, tokens, {"mlp_out": mj.Add(1.0, mj.Where(layer=1))}))
    assert error(both.base, fixed) < 2e-7


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """Normal data of known mean effect .5: of 400 studies of 40 prompts, the 90 % interval misses 10 %, give or take
    (binomial: sd 1.5 %; the percentile interval is a little too short at n = 40, by about 1 %)."""
    rng = np.random.default_rng(0)
    misses = 0
    for study in range(400):
        base, source = rng.normal(0, 1, 40), rng.normal(4, 1, 40)
        coords = {"base": ("batch", base), "source": ("batch", source)}
        result = xr.DataArray([0.5 * (base + source) + rng.normal(0, 1, 40)], coords, ("layer", "batch"), name="m")
        low, high = mj.bootstrap(result, level=0.9, draws=400, seed=study).values[:, 0]
        misses += not low <= 0.5 <= high
    assert 0.06 < misses / 400 < 0.16


def test_positions_that_only_some_prompts_have_are_normalised_among_those(model):
    clean, corrupted = batch("right"), batch("right", (IDS + 5) % 19)
    r = mj.patch(
        model, clean=clean, corrupted=corrupted, site="resid_post", over=("layer", "pos"), metric=METRIC, progress=False
    )
    # the last token's last stream decides all, and only the first prompt has a sixth token
    assert abs(float(mj.normalise(r).sel(layer=2, pos=5)) - 1) < 1e-5
    assert np.isnan(mj.bootstrap(r).sel(layer=2, pos=5).values).all()  # of one prompt nothing is known of others
    assert abs(mj.bootstrap(r, draws=50).sel(layer=2, pos=2).values).max() < 1e-5  # which no prompt reads any more
