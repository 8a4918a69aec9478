"""Ablation, knockout, mediation, tracing and the strongest cells, against loops of single runs and known truths."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, LENGTHS, batch, error, example, random_model, real

METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
TOLERANCE = 2e-7  # results are stored as float32


@pytest.fixture
def model(x64):
    return random_model(ARCHITECTURES["llama_gqa"])


def measured(model, tokens, edits, metric=METRIC):
    return np.asarray(metric(mj.run(model, tokens, edits)))


def mean_of(acts, site, tokens, pooled):
    """The mean over examples, of each position or of all, by a loop."""
    activations = [example(acts, site, tokens, i) for i in range(len(IDS))]
    axis = mj.SITES[site].axes.index("pos") - 1  # after the example is taken out
    if pooled:
        return np.concatenate(activations, axis=axis).mean(axis=axis)
    return [
        np.mean([np.take(o, p, axis=axis) for o in activations if o.shape[axis] > p], axis=0)
        for p in range(max(LENGTHS))
    ]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_mean_ablation_is_the_loop(model, padding):
    tokens, reference = batch(padding), batch("left", (IDS + 5) % 19)
    acts = mj.run(model, reference, capture=("z",)).acts["z"]
    for kind in ("mean", "pooled mean"):
        given = {"site": "z", "over": ("layer", "head"), "metric": METRIC, "kind": kind, "reference": reference}
        result = mj.ablate(model, tokens, **given, progress=False)
        value = np.zeros(acts.shape)
        mean = mean_of(acts, "z", reference, kind == "pooled mean")
        for i in range(3):
            for p, column in enumerate(real(tokens, i)):
                value[:, i, column] = mean if kind == "pooled mean" else mean[p]
        for layer, head in ((0, 1), (2, 3)):
            edits = {"z": mj.Replace(value, mj.Where(layer=layer, head=head))}
            assert error(result.sel(layer=layer, head=head), measured(model, tokens, edits)) < TOLERANCE
    with pytest.raises(ValueError, match="have at most 4 tokens, the longest prompt 6"):
        mj.ablate(model, tokens, **{**given, "kind": "mean", "reference": mj.Tokens(IDS[:, :4])}, progress=False)


def test_zero_resample_and_noise(model):
    tokens = batch("none")
    acts = mj.run(model, tokens, capture=("mlp_out",)).acts["mlp_out"]
    given = {"site": "mlp_out", "over": ("layer",), "metric": METRIC, "progress": False}
    zero = mj.ablate(model, tokens, **given)
    assert error(zero.sel(layer=1), measured(model, tokens, {"mlp_out": mj.Scale(0.0, mj.Where(layer=1))})) < TOLERANCE
    drawn = mj.ablate(model, tokens, **given, kind="resample", draws=8, key=jax.random.key(0))
    assert drawn.dims == ("draw", "layer", "batch")
    circles = [np.array(order) for order in ([1, 2, 0], [2, 0, 1])]  # the derangements of three
    possible = [
        measured(model, tokens, {"mlp_out": mj.Replace(acts[:, order], mj.Where(layer=1))}) for order in circles
    ]
    errors = [min(error(value, p) for p in possible) for value in drawn.sel(layer=1).values]
    assert max(errors) < TOLERANCE and len({tuple(np.round(v, 4)) for v in drawn.sel(layer=1).values}) == 2
    noisy = mj.ablate(model, tokens, **given, kind="noise", draws=3, scale=1e-4, key=jax.random.key(0))
    slight = np.abs(noisy - noisy.base).values
    assert (slight > 0).all() and slight.max() < 1e-2 * np.abs(noisy.base.values).max()
    assert (
        noisy.values
        == mj.ablate(model, tokens, **given, kind="noise", draws=3, scale=1e-4, key=jax.random.key(0)).values
    ).all()
    with pytest.raises(ValueError, match="needs a key"):
        mj.ablate(model, tokens, **given, kind="resample")
    with pytest.raises(ValueError, match="'pattern' has no one position"):
        mj.ablate(model, tokens, **{**given, "site": "pattern"}, kind="pooled mean")


def test_knockout_shares_the_weight_among_the_keys_that_are_left(model):
    tokens = batch("left")
    edges = {"last to first": (-1, 0), "last to two": (-1, [0, 2]), "roles": ([[-1], [1], [2]], [[1], [0], [1]])}
    result = mj.knock_out(model, tokens, edges, METRIC, window=2, progress=False)
    assert result.dims == ("layer", "edge", "batch")
    for layer, layers in ((0, [0]), (2, [1, 2])):
        for name, query, key in (("last to two", [[-1, -1]] * 3, [[0, 2]] * 3), ("roles", *edges["roles"])):
            cut = [
                mj.Replace(-np.inf, mj.Where(layer=cut_layer, query=np.array(query), key=np.array(key)))
                for cut_layer in layers
            ]
            alone = mj.run(model, tokens, {"attn_scores": cut}, capture=("pattern",))
            assert (
                error(
                    result.sel(layer=layer, edge=name),
                    METRIC(alone),
                )
                < TOLERANCE
            )
            plain = mj.run(model, tokens, capture=("pattern",)).acts["pattern"]
            first = layers[0]
            for i in range(3):
                row = np.array(example(plain, "pattern", tokens, i)[first][:, query[i][0]])
                row[:, np.array(key[i])] = 0
                row /= row.sum(axis=-1, keepdims=True)
                assert error(example(alone.acts["pattern"], "pattern", tokens, i)[first][:, query[i][0]], row) < 1e-10
    heads = mj.knock_out(model, tokens, {"edge": (-1, 0)}, METRIC, heads=[1, 2], progress=False)
    only = {"attn_scores": mj.Replace(-np.inf, mj.Where(layer=1, head=[1, 2], query=-1, key=0))}
    assert error(heads.sel(layer=1, edge="edge"), measured(model, tokens, only)) < TOLERANCE


def linear_model():
    """No norm, uniform attention, and ReLUs that offsets keep either on or off."""
    config = mj.Config(
        n_layers=3, d_model=12, n_heads=4, d_vocab=19, n_ctx=16, d_mlp=10, norm="none", activation="relu"
    )
    model = random_model(config)
    model = eqx.tree_at(lambda m: (m.blocks.attn.W_Q, m.blocks.attn.b_Q), model, replace_fn=jnp.zeros_like)
    return eqx.tree_at(lambda m: m.blocks.mlp.b_in, model, replace_fn=lambda b: b + 300.0)


@pytest.mark.parametrize("linear", [True, False])
def test_total_is_direct_plus_indirect_on_a_linear_model(x64, linear):
    model = linear_model() if linear else random_model(ARCHITECTURES["gpt2"])
    base, source = batch("left"), batch("left", (IDS + 5) % 19)
    effects = mj.mediate(
        model, base=base, source=source, site="mlp_out", over=("layer", "pos"), metric=METRIC, progress=False
    )
    gap, total = (float(np.abs(x).max()) for x in (effects.total - effects.direct - effects.indirect, effects.total))
    if linear:  # float32 rounds each of the four metrics, of which these are differences
        assert total > 1e-2 * np.abs(effects.metric_base).max() and gap < 3e-7 * np.abs(effects.metric_base).max()
    else:
        assert gap > 1e-2 * total
    acts = {
        side: mj.run(model, t, capture=("mlp_out",)).acts["mlp_out"] for side, t in (("base", base), ("source", source))
    }
    last = {side: mj.Where(layer=1, pos=-1) for side in acts}
    y = lambda tokens, other: measured(model, tokens, {"mlp_out": mj.Replace(acts[other], last[other])})
    at = lambda name: np.array([effects[name].sel(layer=1, pos=n - 1).values[i] for i, n in enumerate(LENGTHS)])
    scale = np.abs(measured(model, base, {})).max()
    assert np.abs(at("indirect") - (y(base, "source") - measured(model, base, {}))).max() < 1e-6 * scale
    assert np.abs(at("direct") - (y(source, "base") - measured(model, base, {}))).max() < 1e-6 * scale


def gate_model(gate):
    """Head 0 copies whether position 0 is on, head 1 position 1; one neuron pair computes OR or AND of the two."""
    config = mj.Config(
        n_layers=1, d_model=8, n_heads=2, d_head=2, d_vocab=4, n_ctx=3, d_mlp=2, norm="none", activation="relu",
        tied_unembed=False,
    )  # fmt: skip
    model = jax.tree.map(jnp.zeros_like, mj.init(config, jax.random.key(0)))
    on, first, second, query, left, right, out = range(7)
    attn, mlp = model.blocks.attn, model.blocks.mlp
    inputs = {"left": (0, first, left), "right": (1, second, right)}
    W_Q, W_K, W_V, W_O = attn.W_Q, attn.W_K, attn.W_V, attn.W_O
    for head, place, into in inputs.values():
        W_Q, W_K = W_Q.at[0, query, head, 0].set(100.0), W_K.at[0, place, head, 0].set(1.0)
        W_V, W_O = W_V.at[0, on, head, 0].set(1.0), W_O.at[0, head, 0, into].set(1.0)
    W_in = mlp.W_in.at[0, jnp.array([left, right])].set(1.0)
    W_out = mlp.W_out.at[0, :, out].set(jnp.array([1.0, -1.0] if gate == "or" else [0.0, 1.0]))
    return eqx.tree_at(
        lambda m: (m.W_E, m.W_pos, m.W_U, m.blocks.attn.W_Q, m.blocks.attn.W_K, m.blocks.attn.W_V, m.blocks.attn.W_O,
                   m.blocks.mlp.W_in, m.blocks.mlp.W_out, m.blocks.mlp.b_in),
        model,
        (model.W_E.at[1, on].set(1.0).at[2, query].set(1.0), model.W_pos.at[0, first].set(1.0).at[1, second].set(1.0),
         model.W_U.at[3, out].set(1.0), W_Q, W_K, W_V, W_O, W_in, W_out, mlp.b_in.at[0, 1].set(-1.0)),
    )  # fmt: skip


def test_or_and_and_circuits_show_what_each_direction_can_see():
    """One input of an OR suffices and is not necessary; one of an AND is necessary and does not suffice."""
    truth = {("or", "noise"): 0.0, ("or", "denoise"): 1.0, ("and", "noise"): 1.0, ("and", "denoise"): 0.0}
    for (gate, direction), expected in truth.items():
        model = gate_model(gate)
        logits = mj.run(model, [[0, 0, 2], [0, 1, 2], [1, 0, 2], [1, 1, 2]]).logits[:, -1, 3]
        assert np.allclose(logits, [0, 1, 1, 1] if gate == "or" else [0, 0, 0, 1], atol=1e-6)
        for site, over in (("z", ("head",)), ("resid_pre", ("pos",))):
            patched = mj.patch(model, clean=[[1, 1, 2]], corrupted=[[0, 0, 2]], site=site, over=over, progress=False,
                               metric=mj.metrics.logit(3), direction=direction)  # fmt: skip
            assert np.allclose(mj.normalise(patched).values[:2], expected, atol=1e-6)
        pairs = mj.sweep(model, [[1, 1, 2]], {"z": [mj.Scale(0.0, mj.grid(head=[0, 1])), mj.Scale(0.0, mj.grid(head=[0, 1]))]},
                         mj.metrics.logit(3), progress=False)  # fmt: skip
        both, single = pairs.values[0, 1, 0], pairs.values[0, 0, 0]  # the joint ablation finds the OR
        assert np.allclose([both, single], [0, 1] if gate == "or" else [0, 0], atol=1e-6)


def test_tracing_is_the_loop(model):
    """The same draws, by single runs; a subject of one and of two tokens, padded prompts."""
    tokens, subject = batch("left"), [[1, 2], [0], [1]]
    answer = np.asarray(mj.run(model, tokens).logits[:, -1].argmax(-1))
    trace = mj.trace(model, tokens, subject=subject, answer=answer, draws=2, progress=False)
    assert trace.restored.dims == ("layer", "pos", "draw", "batch") and trace.sizes["pos"] == 6
    severed = mj.trace(model, tokens, subject=subject, answer=answer, draws=2, severed="mlp_out", progress=False)
    mlps = mj.trace(
        model, tokens, subject=subject, answer=answer, draws=2, site="mlp_out", severed="mlp_out", progress=False
    )
    windows = mj.trace(
        model,
        tokens,
        subject=subject,
        answer=answer,
        draws=2,
        site="mlp_out",
        window=2,
        pos={"end": -1},
        progress=False,
    )
    clean = mj.run(model, tokens, capture=("resid_post", "mlp_out"))
    prob = mj.metrics.prob(answer)
    assert error(trace.clean, prob(clean)) < 1e-6
    mask = np.array([[p in span for p in row] for span, row in zip(subject, np.asarray(tokens.positions))])
    spread = 3 * np.asarray(model.W_E)[np.asarray(tokens.ids)[mask]].std()
    for draw, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        by_position = spread * np.asarray(jax.random.normal(key, (3, 6, 12), model.dtype))
        noise = np.take_along_axis(by_position, np.maximum(np.asarray(tokens.positions), 0)[..., None], axis=1)
        fixed = {"embed": mj.Add(noise, mj.Where(pos=mask))}
        corrupted = mj.run(model, tokens, fixed, capture=("mlp_out",))
        assert error(trace.corrupted.sel(draw=draw), prob(corrupted)) < 1e-5
        for layer, pos in ((0, 1), (1, 3), (2, 0)):
            place = mj.Where(layer=layer, pos=pos)
            edits = {**fixed, "resid_post": mj.Replace(clean.acts["resid_post"], place)}
            actual = trace.restored.sel(layer=layer, pos=pos, draw=draw)
            assert error(actual, measured(model, tokens, edits, prob)) < 1e-5
            held = [
                mj.Replace(corrupted.acts["mlp_out"], mj.Where(layer=later, pos=pos)) for later in range(layer + 1, 3)
            ]
            actual = severed.restored.sel(layer=layer, pos=pos, draw=draw)
            assert error(actual, measured(model, tokens, {**edits, "mlp_out": held}, prob)) < 1e-5
            restored = mj.Replace(clean.acts["mlp_out"], place)
            actual = mlps.restored.sel(layer=layer, pos=pos, draw=draw)
            assert error(actual, measured(model, tokens, {**fixed, "mlp_out": [restored, *held]}, prob)) < 1e-5
        edits = {**fixed, "mlp_out": mj.Replace(clean.acts["mlp_out"], mj.Where(layer=[0, 1], pos=-1))}
        assert error(windows.restored.sel(layer=1, pos="end", draw=draw), measured(model, tokens, edits, prob)) < 1e-5
    there = trace.isel(pos=slice(0, 4))
    assert error(there.indirect, there.restored.mean("draw") - there.corrupted.mean("draw")) < 1e-6
    missing = np.arange(6)[:, None] >= LENGTHS
    assert (np.isnan(trace.indirect.values) == missing[None]).all()
    assert error(trace.total, trace.clean - trace.corrupted.mean("draw")) < 1e-6
    # all of the last layer's last stream is all of the answer
    whole = [float(trace.indirect.sel(layer=2, pos=n - 1)[i] / trace.total[i]) for i, n in enumerate(LENGTHS)]
    assert np.allclose(whole, 1, atol=1e-4)
    with pytest.raises(ValueError, match=r"does not give the answer to prompts \[1\]"):
        mj.trace(model, tokens, subject=subject, answer=(answer + np.array([0, 1, 0])) % 19, draws=2)
    with pytest.raises(ValueError, match=r"prompt 1 has no positions \[5\]"):
        mj.trace(model, tokens, subject=[[1], [5], [1]], answer=answer)


def test_the_strongest_cells_are_those_of_the_whole_grid(model):
    given = {
        "clean": batch("left"),
        "corrupted": batch("left", (IDS + 5) % 19),
        "site": "post",
        "over": ("layer", "unit"),
    }
    whole = mj.patch(model, **given, metric=METRIC, progress=False)
    effect = np.abs((whole - whole.base).mean("batch").values).ravel()
    order = np.argsort(-effect)[:7]
    top = mj.strongest(model, **given, metric=METRIC, k=7, progress=False)
    places = [tuple(np.unravel_index(i, whole.shape[:2])) for i in order]
    assert list(zip(top.layer.values, top.unit.values)) == places
    assert error(top, [whole.values[p] for p in places]) < 1e-5
    with pytest.raises(ValueError, match="k must be from 1 to the 30 cells"):
        mj.strongest(model, **given, metric=METRIC, k=31)


def test_the_strongest_positions_are_ranked_among_the_prompts_that_have_them(model):
    over = ("pos", "layer")
    pair = {"clean": batch("left"), "corrupted": batch("left", (IDS + 5) % 19), "over": over, "metric": METRIC}
    pair |= {"site": "resid_pre", "progress": False}
    whole = mj.patch(model, **pair)
    effects = np.abs(np.nanmean(whole.values - whole.base.values, axis=-1))
    top = mj.strongest(model, **pair, k=9)
    places = [tuple(int(top[dim][i]) for dim in over) for i in range(9)]
    assert np.allclose([effects[place] for place in places], np.sort(effects.ravel())[::-1][:9], atol=TOLERANCE)
    shares = mj.normalise(whole).values
    assert np.allclose(mj.normalise(top), [shares[place] for place in places])


@pytest.mark.filterwarnings("ignore:the metric is not finite in")
def test_cells_that_cannot_be_ranked_come_last_and_are_told(model):
    pair = {"clean": batch("left"), "corrupted": batch("left", (IDS + 5) % 19), "site": "z", "over": ("layer", "head")}
    whole = mj.patch(model, **pair, metric=METRIC, progress=False)
    low = min(float(whole.base[0]), float(whole.source[0])) - 1e-6
    bound = np.array([low, -np.inf, -np.inf])

    def metric(out):
        return jnp.where(METRIC(out) < bound, jnp.nan, METRIC(out))

    failed = whole.values[..., 0] < low
    effects = np.where(failed, 0.0, np.abs((whole - whole.base).mean("batch").values))
    assert failed.any() and not failed.all()
    with pytest.warns(UserWarning, match=f"the mean effect of {failed.sum()} of 12 cells is not a number"):
        top = mj.strongest(model, **pair, metric=metric, k=12, progress=False)
    order = np.argsort(-effects.ravel(), kind="stable")[: (~failed).sum()]
    assert (top["layer"].values * 4 + top["head"].values).tolist()[: len(order)] == order.tolist()
    assert np.isnan(top.values[len(order) :]).any(axis=-1).all()


@pytest.mark.usefixtures("as_a_user")
def test_the_strongest_cells_and_mediation_are_of_one_metric(model):
    over = {"site": "z", "over": ("layer",)}
    pair = {"clean": batch("left"), "corrupted": batch("left", (IDS + 5) % 19), **over}
    with pytest.raises(TypeError, match="ranked by one metric, given 2"):
        mj.strongest(model, **pair, metric={"a": METRIC, "b": METRIC}, k=2)
    for k in (2.5, True, "3"):
        with pytest.raises(TypeError, match="k must be a whole number"):
            mj.strongest(model, **pair, metric=METRIC, k=k)
    with pytest.raises(ValueError, match="k must be at least 1"):
        mj.strongest(model, **pair, metric=METRIC, k=0)
    with pytest.raises(TypeError, match="effects are those of one metric, given 1"):
        mj.mediate(model, base=pair["corrupted"], source=pair["clean"], metric={"a": METRIC}, **over)


def by_hand(effects, signs):
    """max over cells of |t| for given signs of the clusters."""
    flipped = signs[:, None] * effects
    n = len(effects)
    return np.abs(flipped.mean(0) / np.sqrt(flipped.var(0, ddof=1) / n))


def test_sign_flips_are_the_enumeration_of_all_signs():
    """Eight clusters have 256 signs: the p-values of many draws come within their binomial error of all."""
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 1, (8, 5)) + np.array([0, 0, 0.5, 1.0, 3.0])
    result = xr.DataArray(
        np.repeat(effects, 2, axis=0).T, {"base": ("batch", np.zeros(16))}, ("head", "batch"), name="m"
    )
    flips = mj.sign_flips(result, clusters=np.repeat(np.arange(8), 2), draws=20_000)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    largest = np.array([by_hand(effects, s).max() for s in signs])
    t = by_hand(effects, np.ones(8))
    expected = [(largest >= value * (1 - 1e-6)).mean() for value in t]
    assert np.allclose(np.abs(flips.t), t, rtol=1e-4)
    assert np.abs(flips.p - expected).max() < 4 * np.sqrt(0.25 / 20_000) + 1e-4


def test_the_observed_signs_tie_with_their_like_however_large_t_is():
    """One cell of eight clusters with effects of one sign: 2 of the 256 signs reach it (binomial sd .09 %), and rounding does not decide."""
    for seed in range(12):
        effects = np.random.default_rng(seed).normal(5, 0.05, (1, 8))
        result = xr.DataArray(effects, {"base": ("batch", np.zeros(8))}, ("head", "batch"), name="m")
        assert abs(mj.sign_flips(result).p.item() - 2 / 256) < 4 * 0.0009


def test_the_family_wise_error_is_what_it_says():
    """200 grids of 30 null cells, correlated: one p below 0.1 in 10 % of them (binomial sd 2.1 %); a real effect is found."""
    rng, false, discoveries = np.random.default_rng(0), 0, 0
    for study in range(200):
        effects = rng.normal(0, 1, (12, 30)) + rng.normal(0, 1, (12, 1))
        effects[:, 0] += 3.0
        result = xr.DataArray(effects.T, {"base": ("batch", np.zeros(12))}, ("head", "batch"), name="m")
        p = mj.sign_flips(result, draws=400, seed=study).p.values
        false, discoveries = false + (p[1:] < 0.1).any(), discoveries + (p[0] < 0.1)
    assert 0.04 < false / 200 < 0.16 and discoveries / 200 > 0.9
    with pytest.raises(ValueError, match="at least 6 clusters"):
        mj.sign_flips(result, clusters=np.repeat([0, 1], 6))
