"""Attribution: the gates' gradient, exact where it must be, and what is said of its error."""

import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.attribution.atp import AtP
from mijax.attribution.estimates import AttributionJob, Schedule, _chunk, estimated, layers_bytes, prompt_bytes
from mijax.attribution.method import Examples
from mijax.attribution.nodes import nodes_of
from mijax.attribution.probe import logistic_probe
from mijax.attribution.verify import Verify, most_missed, verified
from mijax.engine.measure import metric_bytes
from tests.architectures import ARCHITECTURES, IDS, batch, error, example, random_model
from tests.compilations import compilations

METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def base_and_source(name, padding, dtype=jnp.float64):
    model = random_model(ARCHITECTURES[name], dtype=dtype)
    return model, batch(padding), batch(padding, (IDS + 5) % 19)


PLAIN = AtP()


def found_by(model, base, source, sites, method=PLAIN, metric=METRIC, checkpoint=0, prompts=3):
    """What the method estimates in the model's own precision, as it is before it is labelled, of a metric "m"."""
    job = AttributionJob(model, base, source, {"m": metric}, nodes_of(model, base, sites), method)
    return estimated(job, Schedule(prompts, checkpoint, 0), progress=False, save=None)[0]


def prompts(n):
    """So many prompts of a job, as a chunk is given them."""
    return Examples(np.arange(n, dtype=np.int32), jax.random.key(0))


SOME = ("embed", "resid_pre", "q_input", "ln1.scale", "k", "pattern", "z", "attn_out", "mlp_out", "ln_final.scale")
LEFT = [(name, "left", None, 0) for name in ARCHITECTURES]
OTHERS = [("llama_gqa", padding, SOME, 0) for padding in ("none", "right")]
AGAIN = [
    (name, "left", SOME[:9], checkpoint)
    for name in ("llama_gqa", "parallel_mqa_partial_rotary")
    for checkpoint in (1, 2)
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, padding, sites, checkpoint", LEFT + OTHERS + AGAIN)
def test_6_it_is_the_gradient_of_run_at_every_site(name, padding, sites, checkpoint):
    model, base, source = base_and_source(name, padding)
    table = sites or tuple(mj.sites(model, base))
    acts = mj.run(model, source, capture=table).acts
    gates = {s: jnp.zeros(_with_batch(s, nodes.shape)) for s, nodes in nodes_of(model, base, table).items()}
    total = lambda gates: jnp.sum(METRIC(mj.run(model, base, {s: mj.Mix(g, acts[s]) for s, g in gates.items()})))
    expected = jax.jit(jax.grad(total))(gates)
    result = found_by(model, base, source, table, checkpoint=checkpoint)
    for site in table:
        terms = np.moveaxis(result.terms["m"][site], 0, mj.SITES[site].axes.index("batch"))
        for i in range(3):  # padding has gradient zero, and differences of padding are nobody's business
            ours, theirs = (example(x, site, base, i) for x in (terms, expected[site]))
            if np.abs(theirs).max() > 0:
                assert error(ours, theirs) < 1e-10, site


def _with_batch(site, shape):
    i = mj.SITES[site].axes.index("batch")
    return (*shape[:i], 3, *shape[i:])


@pytest.mark.usefixtures("x64")
@each_architecture
def test_finite_differences_of_patching_itself(name):
    """The cells' own exact effect along the gate, by central differences: independent of every derivative."""
    model, base, source = base_and_source(name, "left")
    sites = {
        "z": ("layer", "head"),
        "attn_out": ("layer", "pos"),
        "v": ("layer", "pos", "kv_head"),
        "resid_pre": ("layer",),
    }
    acts = mj.run(model, source, capture=tuple(sites)).acts
    result = found_by(model, base, source, sites)
    h = 1e-5
    for site, over in sites.items():
        nodes = nodes_of(model, base, {site: over})[site]
        terms = nodes.by_cell(result.terms["m"][site], base)
        cells = nodes.where(np.arange(nodes.size), base)

        @jax.jit
        def metric(where, gate, site=site):
            return METRIC(mj.run(model, base, {site: mj.Mix(gate, acts[site], where)}))

        for number in np.random.default_rng(0).choice(nodes.size, 3, replace=False):
            where = jax.tree.map(lambda index, n=number: jnp.asarray(index[n]), cells)
            slope = np.asarray(metric(where, h) - metric(where, -h)) / (2 * h)
            estimate = terms.reshape(nodes.size, -1)[number]
            place = dict(zip(over, np.unravel_index(number, [len(entries) for entries in nodes.axes.values()])))
            there = np.asarray(base.lengths) > place.get("pos", -1)
            # right to h^2 = 1e-10 times a third derivative, which is large in models without norms, and rounding / h
            assert np.abs(estimate - slope)[there].max() < 1e-5 * max(1.0, np.abs(slope).max()), (site, place)


def linear_model(dtype=jnp.float64):
    """Attention by position alone (zero queries), no norm, no MLP: the logits are a linear function of the embeddings."""
    model = random_model(dataclasses.replace(ARCHITECTURES["attention_only"], sinks=False), dtype=dtype)
    return eqx.tree_at(lambda m: (m.blocks.attn.W_Q, m.blocks.attn.b_Q), model, replace_fn=jnp.zeros_like)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "method", [AtP(), mj.IntegratedGradients(2), mj.IntegratedGradients(1, along="inputs"), mj.AtPStar()]
)
def test_exact_on_a_linear_model(method):
    model, base, source = linear_model(), batch("left"), batch("left", (IDS + 5) % 19)
    for site, over in {
        "z": ("layer", "head"),
        "resid_pre": ("layer", "pos"),
        "v": ("layer", "pos", "head"),
        "embed": ("pos",),
    }.items():
        if getattr(method, "along", None) == "gate" and site != "embed":
            continue  # all gates open together: a later layer's are moved by an earlier one's
        estimate = found_by(model, base, source, {site: over}, method)
        exact = mj.patch(model, clean=source, corrupted=base, site=site, over=over, metric=METRIC)
        nodes = nodes_of(model, base, {site: over})[site]
        terms = nodes.by_cell(estimate.terms["m"][site], base) + estimate.base["m"]
        there = np.isfinite(exact.values)
        assert error(terms[there], exact.values[there]) < 1e-6, site  # patch gives float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_grids_of_roles_are_sums_of_their_entries(padding):
    model, base, source = base_and_source("llama_gqa", padding)
    roles = {"both": [[0, 1], [2, 2], [-1, 0]], "last": -1}
    grid = mj.grid(layer=range(3), pos=roles)
    by_role = found_by(model, base, source, {"z": grid}).terms["m"]["z"].T.reshape(3, 2, 3)
    entries = found_by(model, base, source, ("z",)).terms["m"]["z"].sum(axis=(3, 4))  # [batch, layer, column]
    columns = [np.flatnonzero(row) for row in np.asarray(base.mask)]
    for i in range(3):
        both = [columns[i][p] for p in dict.fromkeys(np.asarray(roles["both"][i]) % len(columns[i]))]
        assert error(by_role[:, 0, i], entries[i][:, both].sum(axis=1)) < 1e-10
        assert error(by_role[:, 1, i], entries[i][:, columns[i][-1]]) < 1e-10


def test_windows_of_layers_and_overlapping_roles_add_up():
    model, base, source = base_and_source("gpt2", "right", jnp.float32)
    grid = mj.grid(layer={"all": [0, 1, 2], "first": [0]})
    terms = found_by(model, base, source, {"mlp_out": grid}).terms["m"]["mlp_out"]
    alone = found_by(model, base, source, {"mlp_out": ("layer",)}).terms["m"]["mlp_out"][:, :, 0, 0]
    assert error(terms, np.stack([alone.sum(axis=1), alone[:, 0]], axis=1)) < 1e-5
    with pytest.raises(ValueError, match="share no place"):
        mj.attribute(
            model, clean=source, corrupted=base, metric=METRIC, sites={"mlp_out": grid}, method=mj.IntegratedGradients()
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name, along", [*((name, "gate") for name in ARCHITECTURES), ("gpt2", "inputs"), ("llama_gqa", "inputs")]
)
def test_integrated_gradients_are_complete(name, along):
    model, base, source = base_and_source(name, "left")
    model = jax.tree.map(lambda x: 0.5 * x, model)  # smooth enough for a few points
    written = tuple(s for s in ("embed", "attn_out", "mlp_out") if s in mj.sites(model, base))
    sites = written if along == "gate" else ("embed",)
    whole = METRIC(mj.run(model, source)) - METRIC(mj.run(model, base))
    gaps = []
    for steps in (2, 24):
        result = found_by(model, base, source, sites, mj.IntegratedGradients(steps, along))
        total = sum(result.terms["m"][s].reshape(3, -1).sum(axis=1) for s in sites)
        assert error(result.gap["m"] + 1.0, total - np.asarray(whole) + 1.0) < 1e-8  # what is told is what there is
        gaps.append(np.abs(result.gap["m"]).max())
    config = ARCHITECTURES[name]
    if (
        config.activation != "relu" and config.experts is None
    ):  # which have kinks, and jumps where another expert is chosen
        assert gaps[1] < 1e-3 * gaps[0] or gaps[1] < 1e-9, gaps


@pytest.mark.usefixtures("x64")
def test_the_gap_falls_at_the_order_of_the_rule():
    """Gauss-Legendre with n points on a path of length e: an error of e^(2n + 1)."""
    model = base_and_source("llama_gqa", "none")[0]
    towards = jnp.asarray(np.random.default_rng(1).normal(size=(9, 12)))
    gaps = {}
    for steps in (1, 2):
        for length in (0.02, 0.01):
            W_E = model.W_E.at[10:19].set(model.W_E[1:10] + length * towards)
            near = eqx.tree_at(lambda m: m.W_E, model, W_E)
            ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3]])
            metric = mj.metrics.logit(0)
            result = found_by(
                near, mj.Tokens(ids), mj.Tokens(ids + 9), ("embed",), mj.IntegratedGradients(steps, "inputs"), metric
            )
            gaps[steps, length] = np.abs(result.gap["m"])
    for steps in (1, 2):
        order = np.log2(gaps[steps, 0.02] / gaps[steps, 0.01])
        assert np.abs(np.median(order) - (2 * steps + 1)) < 0.5, (steps, order)


def saturated(layer, n_kv_heads=4, positions="learned", dtype=jnp.float64):
    """Two layers of attention alone, that of one nearly one-hot, that of the other nearly even."""
    config = mj.Config(
        n_layers=2, d_model=12, n_heads=4, n_kv_heads=n_kv_heads, d_vocab=19, n_ctx=16, d_head=4, d_mlp=0, mlp="none",
        norm="none", attn_bias="qkv", positions=positions,
    )  # fmt: skip
    sharpness = jnp.full((2, 1, 1, 1), 0.2, dtype).at[layer].set(8.0)
    projections = lambda model: (model.blocks.attn.W_Q, model.blocks.attn.W_K)
    return eqx.tree_at(projections, random_model(config, dtype=dtype), replace_fn=lambda w: w * sharpness)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("over", [("layer", "pos", "head"), ("layer", "head")])
@pytest.mark.parametrize("n_kv_heads, positions, padding", [(4, "learned", "none"), (2, mj.Rotary(), "left")])
def test_atp_star_sees_through_saturated_attention(over, n_kv_heads, positions, padding):
    base, source, sites = batch(padding), batch(padding, (IDS + 5) % 19), {"q": over, "k": over}
    for layer in (0, 1):
        model = saturated(layer, n_kv_heads, positions)
        pattern = mj.run(model, base, capture=("pattern",)).acts["pattern"][layer]
        assert float(jnp.mean(jnp.max(pattern, axis=-1))) > 0.7  # padding's queries have none
        plain, star = (found_by(model, base, source, sites, method) for method in (AtP(), mj.AtPStar()))
        for site in sites:
            exact = mj.patch(model, clean=source, corrupted=base, site=site, over=over, metric=METRIC)[layer]
            nodes, there = nodes_of(model, base, sites)[site], np.isfinite(exact.values)
            effect = np.where(there, exact.values - exact.base.values, 0.0)
            terms = [np.where(there, nodes.by_cell(f.terms["m"][site], base)[layer], 0.0) for f in (plain, star)]
            off = [np.abs(term - effect).sum() / np.abs(effect).sum() for term in terms]
            # What follows the pattern of the last layer is linear: exact there, to patch's float32. Before, another layer is not.
            assert off[1] < (1e-5 if layer == 1 else 0.5 * off[0]), (site, layer, off)
            assert off[0] > 0.3, (site, layer, off)


def test_a_large_estimate_is_measured_even_where_grad_drop_says_nothing():
    """In two layers, what goes from the first through the second has no magnitude left where either is dropped."""
    model = saturated(0, dtype=jnp.float32)
    r = mj.attribute(model, clean=batch("none", (IDS + 5) % 19), corrupted=batch("none"), metric=METRIC, sites={"v": ("layer", "pos", "head")},
                     method=mj.AtPStar(), verify=mj.Verify(8, sample=0), progress=False)  # fmt: skip
    size = abs((r.v - r.base).mean("batch")).values.ravel()
    assert (r["v.measured"].values.ravel()[np.argsort(-size)[:3]] == 1).all()


def test_metrics_of_ones_own_arrays_are_not_split():
    model, base, source = base_and_source("gpt2", "left", jnp.float32)
    three = lambda out, tokens: jnp.sum(out.readout.logits(pos=-1, tokens=tokens), axis=1)  # as many tokens as examples
    metric = mj.metrics.Function(jax.tree_util.Partial(three, tokens=jnp.array([3, 5, 7])), name="three")
    both = {"clean": source, "corrupted": base, "sites": ("z",), "metric": metric, "progress": False}
    whole = mj.attribute(model, **both)
    assert whole.attrs["prompts_together"] == 3
    with pytest.raises(ValueError, match="the prompts take about"):
        mj.attribute(model, memory=int(whole.attrs["memory_estimate"] / 4), **both)
    with pytest.raises(ValueError, match="does not say that its arrays are per example"):
        metric.take(np.array([0]))


@pytest.mark.parametrize("metric", [mj.metrics.kl, mj.metrics.cross_entropy, mj.metrics.log_prob])
def test_every_metric_is_split_by_its_examples(metric):
    model, base, source = base_and_source("llama_gqa", "left", jnp.float32)
    logits = mj.run(model, source).logits
    instance = {
        "kl": lambda: metric(logits, pos=None),
        "cross_entropy": lambda: metric(base),
        "log_prob": lambda: metric([3, 5, 7]),
    }[metric.name]()
    together, apart = (found_by(model, base, source, ("z",), metric=instance, prompts=n) for n in (3, 2))
    chex.assert_trees_all_close(
        apart, together, rtol=1e-4, atol=1e-4
    )  # a divergence from itself is zero but for rounding


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("site, grad_of_stream", [("z", False), ("resid_pre", True)])
def test_grad_drop_is_the_mean_magnitude_without_each_layer(site, grad_of_stream):
    """Against a gradient taken with the layer's writes held at their values, which is what no gradient through them means."""
    model, base, source = base_and_source("gpt2", "left")
    result = found_by(model, base, source, (site,), mj.AtPStar())
    acts = mj.run(model, base, capture=(site, "attn_out", "mlp_out")).acts
    change = mj.run(model, source, capture=(site,)).acts[site] - acts[site]
    total = 0.0
    for layer in range(3):
        held = {s: mj.Replace(acts[s], mj.Where(layer=layer)) for s in ("attn_out", "mlp_out")}

        def metric(gate, held=held):
            return jnp.sum(METRIC(mj.run(model, base, {site: mj.Add(gate * change), **held})))

        total += np.abs(jax.grad(metric)(jnp.zeros((*change.shape[:-1], 1))))
    expected = np.moveaxis(total / (3 if grad_of_stream else 2), 1, 0)
    columns = np.asarray(base.mask)
    for i in range(3):
        ours, theirs = (np.asarray(x)[i][:, columns[i]] for x in (result.unsigned["m"][site], expected))
        assert error(ours, theirs) < 1e-10


def test_saturated_attention_hides_from_gradients_and_their_error_but_not_from_a_sample():
    """The documented case: estimate and curvature are honest, near zero, and wrong; the sample tells."""
    model = saturated(0, dtype=jnp.float32)
    base, source, sites = batch("none"), batch("none", (IDS + 5) % 19), {"q": ("layer", "pos", "head")}
    both = {"clean": source, "corrupted": base, "metric": METRIC, "progress": False}
    r = mj.attribute(model, sites=sites, method=AtP(probes=32), verify=mj.Verify(6, sample=30), **both)
    exact = mj.patch(model, site="q", over=sites["q"], **both)
    whole = abs(float((r.source - r.base).mean()))
    hidden = (abs((exact - exact.base).mean("batch")) > 0.05 * whole) & (
        abs((r.q - r.base).mean("batch")) < 0.01 * whole
    )
    assert int(hidden.sum()) > 3  # missed by the estimate
    assert float(abs(r["q.error"].mean("batch")).where(hidden).median()) < 0.05 * whole  # and by its curvature
    missed = (abs((exact - exact.base).mean("batch")) >= 0.05 * whole) & (r["q.measured"] != 1)
    assert r["q.measured"].attrs["missed_in_sample"] > 0
    assert r["q.measured"].attrs["missed_at_most"] >= int(missed.sum())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "sites", [{"z": ("layer", "head")}, {"attn_out": mj.grid(layer=[[0, 1], [2]], pos={"a": 0, "end": -1})}]
)
def test_curvature_is_the_exact_diagonal_within_its_own_error(sites):
    model, base, source = base_and_source("llama_gqa", "left")
    (site,) = sites
    nodes = nodes_of(model, base, sites)[site]
    acts = mj.run(model, source, capture=(site,)).acts[site]
    cells = nodes.where(np.arange(nodes.size), base)

    def metric(gate, where):  # one cell's own gate: the second derivative of its exact effect
        return METRIC(mj.run(model, base, {site: mj.Mix(gate, acts, where)}))

    second = jax.jit(jax.vmap(jax.jacfwd(jax.jacfwd(metric)), in_axes=(None, 0)))(0.0, cells)
    result = found_by(model, base, source, sites, AtP(probes=200))
    half = nodes.by_cell(result.error["m"][site], base).reshape(nodes.size, -1)
    se = nodes.by_cell(result.error_se["m"][site], base).reshape(nodes.size, -1)
    off, sure = half - np.asarray(second) / 2, se == 0  # what is not read has no curvature, and no error
    assert np.abs(off[sure]).max(initial=0) < 1e-12
    z = off[~sure] / se[~sure]
    assert np.abs(z).max() < 4.5 and 0.6 < np.sqrt(np.mean(z**2)) < 1.5, z


def test_chunks_of_prompts_and_probes_do_not_change_what_is_found():
    model, base, source = base_and_source("llama_gqa", "left", jnp.float32)
    together, apart = (
        found_by(model, base, source, ("z", "mlp_out"), AtP(probes=4, seed=3), prompts=n) for n in (3, 2)
    )
    assert together.error["m"].keys() == {"z", "mlp_out"}
    for (path, whole), part in zip(
        *(jax.tree_util.tree_flatten_with_path(together)[0], jax.tree.leaves(apart)), strict=True
    ):
        assert error(part, whole) < 1e-5, path


@pytest.mark.parametrize("missed", [0, 1, 5, 40])
def test_the_bound_holds_as_often_as_it_claims(missed):
    rest, sample, rng = 300, 60, np.random.default_rng(missed)
    seen = rng.hypergeometric(missed, rest - missed, sample, size=4000)
    bound = {m: most_missed(rest, sample, m) for m in set(seen.tolist())}
    held = np.mean([bound[m] >= missed for m in seen.tolist()])
    assert held >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 4000)
    assert max(bound.values()) < rest  # and it says something


def test_verify_finds_planted_false_negatives_at_the_rate_of_its_bound():
    """Cells whose estimate is planted to be nothing; the engine measures them, and the bound covers what is left."""
    model, base, source = base_and_source("llama_gqa", "none", jnp.float32)
    sites = {"z": ("layer", "pos", "head")}
    both = {"clean": source, "corrupted": base, "metric": METRIC, "progress": False}
    r, exact = mj.attribute(model, sites=sites, **both), mj.patch(model, site="z", over=sites["z"], **both)
    whole = abs(float((r.source - r.base).mean()))
    effect = (abs((exact - exact.base).mean("batch")) / whole).values.reshape(-1)
    strong = np.flatnonzero(effect >= 0.05)
    job = AttributionJob(model, base, source, {"logit_diff": METRIC}, nodes_of(model, base, sites), AtP())
    covered, hits, expected = [], [], []
    for seed in range(30):
        planted = np.random.default_rng(seed).choice(strong, 12, replace=False)
        blind = r.copy(deep=True)
        flat = blind.z.values.reshape(-1, 3)
        flat[planted] = blind.base.values
        result = verified(job, blind, Verify(10, 20, 0.05, seed), None, False)
        mark = result["z.measured"].values.reshape(-1)
        missed = int((effect[mark != 1] >= 0.05).sum())
        covered.append(result["z.measured"].attrs["missed_at_most"] >= missed)
        hits.append(int((mark[planted] == 2).sum()))
        expected.append(12 * 20 / (len(effect) - 10))
        there = result["z.exact"].notnull().values
        assert error(result["z.exact"].values[there], exact.values[there]) < 1e-5
        assert (
            there.sum() == 30 * 3
            and result["z.measured"].attrs["missed_in_sample"] == (effect[mark == 2] >= 0.05).sum()
        )
    assert np.mean(covered) >= 0.85  # of 30 at 95 %: fewer than 26 have a probability of 1 %
    assert abs(np.mean(hits) - np.mean(expected)) < 4 * np.std(hits) / np.sqrt(30)


def test_gradient_times_input_estimates_a_zero_ablation():
    model, base, _ = base_and_source("gpt2", "left", jnp.float32)
    linear = linear_model(jnp.float32)
    for transformer, tolerance in ((linear, 1e-4), (model, None)):
        r = mj.attribute(
            transformer,
            clean=base,
            corrupted=None,
            sites={"z": ("layer", "head")},
            metric=METRIC,
            verify=mj.Verify(3),
            progress=False,
        )
        exact = mj.ablate(transformer, base, site="z", over=("layer", "head"), metric=METRIC, progress=False)
        assert "source" not in r.coords and r.direction == "noise"
        if tolerance:
            assert error(r.z, exact) < tolerance
        measured = r["z.exact"].notnull()
        assert int(measured.sum()) == 6 * 3  # three chosen and three at random
        assert error(r["z.exact"].values[measured], exact.values[measured]) < 1e-4
    acts = mj.run(model, base, capture=("z",)).acts["z"]
    slope = jax.grad(lambda v: jnp.sum(METRIC(mj.run(model, base, {"z": mj.Add(v)}))))(jnp.zeros_like(acts))
    expected = -jnp.sum(jnp.where(base.mask[None, :, :, None, None], acts * slope, 0.0), axis=(2, 4))
    assert error((r.z - r.base).values, np.moveaxis(np.asarray(expected), 1, 2)) < 1e-4


def test_several_metrics_directions_and_a_file(tmp_path):
    model, base, source = base_and_source("llama_gqa", "left", jnp.float32)
    metrics = {"difference": METRIC, "log_prob": mj.metrics.log_prob([3, 5, 7])}
    both = {"clean": source, "corrupted": base, "progress": False, "sites": ("z", "k", "pattern")}
    for direction in ("denoise", "noise"):
        several = mj.attribute(
            model, metric=metrics, direction=direction, verify=mj.Verify(2), method=AtP(probes=2), **both
        )
        assert several.z.dims == ("metric", "layer", "pos", "head", "batch")
        assert several.k.dims == ("metric", "layer", "pos", "kv_head", "batch")
        for name, metric in metrics.items():
            alone = mj.attribute(model, metric=metric, direction=direction, **both)
            exact = mj.patch(
                model,
                clean=source,
                corrupted=base,
                metric=metric,
                direction=direction,
                site="z",
                over=("layer", "pos", "head"),
                progress=False,
            )
            for site in ("z", "k", "pattern"):
                estimate = several[site].sel(metric=name)
                assert (estimate.notnull() == alone[site].notnull()).all()
                assert error(estimate.fillna(0), alone[site].fillna(0)) < 1e-5
            assert error(alone.base, exact.base) < 1e-5 and error(alone.source, exact.source) < 1e-5
            there = several["z.exact"].sel(metric=name).notnull()
            assert error(several["z.exact"].sel(metric=name).values[there], exact.values[there]) < 1e-5
    mj.normalise(several.z)
    several.to_netcdf(tmp_path / "r.nc", engine="scipy")


def test_saved_estimates_go_on_where_they_were(tmp_path):
    model, base, source = base_and_source("gpt2", "left", jnp.float32)
    both = {"corrupted": base, "sites": ("z",), "metric": METRIC, "progress": False}
    whole = mj.attribute(model, clean=source, **both).attrs["memory_estimate"]
    both["memory"] = int(0.7 * whole)  # two prompts of three, or layers computed again
    plain = mj.attribute(model, clean=source, **both)
    assert plain.attrs["prompts_together"] < 3
    mj.attribute(model, clean=source, save=tmp_path, **both)
    both["memory"] = 10**9  # the folder's plan stands
    (tmp_path / "chunk_000001.npz").unlink()
    again = mj.attribute(model, clean=source, save=tmp_path, **both)
    assert again.z.equals(plain.z) and again.attrs["prompts_together"] == plain.attrs["prompts_together"]
    with pytest.raises(ValueError, match="another prompts"):
        mj.attribute(model, clean=batch("left", (IDS + 6) % 19), save=tmp_path, **both)


def test_another_seed_of_probes_compiles_nothing_and_is_another_job(tmp_path):
    model, base, source = base_and_source("gpt2", "left", jnp.float32)
    both = {"clean": source, "corrupted": base, "sites": ("z",), "metric": METRIC, "progress": False}
    run = lambda seed, **more: mj.attribute(model, method=AtP(probes=2, seed=seed), **both, **more)
    first = run(0, save=tmp_path)
    with compilations() as compiled:
        other = run(1)
    assert compiled == []
    assert not (other["z.error"] == first["z.error"]).all() and other.z.equals(first.z)
    assert (first.attrs["method"], other.attrs["method"]) == ("AtP(probes=2)", "AtP(probes=2, seed=1)")
    assert run(0, save=tmp_path)["z.error"].equals(first["z.error"])
    with pytest.raises(ValueError, match="another method"):
        run(1, save=tmp_path)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_metric_of_the_tokens_reads_each_runs_own(direction):
    model, base, source = base_and_source("llama_gqa", "left", jnp.float32)
    clean, corrupted = (source, base) if direction == "denoise" else (base, source)
    surprise = lambda out: mj.metrics.cross_entropy(out.readout.tokens)(out)
    both = {"clean": clean, "corrupted": corrupted, "metric": surprise, "direction": direction, "progress": False}
    result = mj.attribute(model, sites={"z": ("layer",)}, **both)
    assert error(result.base, surprise(mj.run(model, base))) < 1e-6
    assert error(result.source, surprise(mj.run(model, source))) < 1e-6
    exact = mj.patch(model, site="z", over=("layer",), **both)
    assert error(exact.source, result.source) < 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)]
)  # activations have 24 bits, and 8
def test_integrated_gradients_of_small_parameters_where_float64_is_allowed(dtype, tolerance):
    model, base, source = base_and_source("llama_gqa", "left", dtype)
    both = {"clean": source, "corrupted": base, "sites": ("embed", "mlp_out"), "metric": METRIC, "progress": False}
    both["method"] = mj.IntegratedGradients(3, along="inputs")
    result = mj.attribute(model, **both)
    wide = mj.attribute(jax.tree.map(lambda x: x.astype(jnp.float64), model), **both)
    for site in both["sites"]:
        terms, expected = (estimate[site] - estimate.base for estimate in (result, wide))
        assert error(terms.fillna(0), expected.fillna(0)) < tolerance


def test_a_gradient_that_is_small_or_that_one_example_lacks_is_a_gradient():
    model, base, source = base_and_source("llama_gqa", "left", jnp.float32)
    both = {"clean": source, "corrupted": base, "sites": {"z": ("layer",)}, "progress": False}
    # answers that are the same in one example: its metric is 0 whatever is done
    result = mj.attribute(model, metric=mj.metrics.logit_diff([3, 5, 7], [3, 6, 8]), **both)
    alone = mj.attribute(model, metric=mj.metrics.logit_diff([4, 5, 7], [3, 6, 8]), **both)
    assert (result.z[:, 0] == 0).all() and result.z[:, 1:].equals(alone.z[:, 1:])
    # logits so large that a random final stream gives every other token a probability of zero
    sharp = eqx.tree_at(lambda m: m.W_U, model, 1e3 * model.W_U)
    with jax.numpy_dtype_promotion("standard"):
        mj.attribute(sharp, metric=mj.metrics.prob([3, 5, 7]), **both)


def test_coinciding_baselines_are_told():
    model, base, _ = base_and_source("gpt2", "none", jnp.float32)
    later = mj.Tokens(np.where(np.arange(6) == 5, (IDS + 5) % 19, IDS))  # the metric reads before
    with pytest.warns(UserWarning, match="source and base coincide"):
        mj.attribute(
            model, clean=later, corrupted=base, sites=("z",), metric=mj.metrics.logit(3, pos=0), progress=False
        )


def test_a_concepts_cosines_do_not_depend_on_its_size():
    model, positive, negative = base_and_source("gpt2", "left", jnp.float32)
    both = {"positive": positive, "negative": negative, "site": "resid_post"}
    large = mj.concept(model, metric=mj.metrics.logit(3), **both)
    small = mj.concept(model, metric=lambda r: 1e-25 * mj.metrics.logit(3)(r), **both)
    assert np.abs(small.cosine - large.cosine).max() < 1e-5


def test_9_nothing_is_compiled_twice():
    model, base, _ = base_and_source("llama_gqa", "left", jnp.float32)
    grid = lambda pos: {"z": mj.grid(layer=range(3), pos={"a": pos, "end": -1}), "mlp_out": ("layer",)}

    def call(pos, ids, answer):
        other = mj.Tokens((np.asarray(ids) + 3) % 19, base.mask)
        metric = mj.metrics.logit(answer)
        mj.attribute(
            model, clean=other, corrupted=mj.Tokens(ids, base.mask), sites=grid(pos), metric=metric, progress=False
        )

    call(0, np.asarray(base.ids), 3)
    with compilations() as seen:
        call(2, (np.asarray(base.ids) + 1) % 19, 5)
    assert not seen, seen


def test_bfloat16_parameters():
    model, base, source = base_and_source("llama_gqa", "left", jnp.float32)
    small = jax.tree.map(lambda x: 0.5 * x, model)
    both = {"clean": source, "corrupted": base, "sites": ("z", "mlp_out"), "metric": METRIC, "progress": False}
    exact = mj.attribute(small, **both)
    half = mj.attribute(jax.tree.map(lambda x: x.astype(jnp.bfloat16), small), **both)
    for site in ("z", "mlp_out"):  # products of 8 bits each, of some ten layers of sums
        assert error((half[site] - half.base).fillna(0), (exact[site] - exact.base).fillna(0)) < 0.1


@pytest.mark.usefixtures("x64")
def test_a_concepts_directions_are_what_they_say():
    model, positive, negative = base_and_source("normless", "left")
    metric, pos = mj.metrics.logit_diff(3, 4), np.array([[-1], [0], [-2]])
    read = mj.metrics.logit_diff(metric.correct, metric.wrong, pos)
    result = mj.concept(model, positive=positive, negative=negative, site="resid_post", metric=read, pos=pos)
    # no norm: after the last layer the gradient is the difference of two columns of the unembedding
    assert error(result.direction.sel(kind="gradient")[-1], model.W_E[3] - model.W_E[4]) < 1e-6
    acts = [mj.run(model, t, capture=("resid_post",)).acts["resid_post"] for t in (positive, negative)]
    columns = [np.flatnonzero(row)[p] for row, p in zip(np.asarray(positive.mask), pos[:, 0])]
    at = [np.asarray(a)[:, np.arange(3), columns] for a in acts]
    assert error(result.direction.sel(kind="difference"), (at[0] - at[1]).mean(axis=1)) < 1e-6
    for i, a in enumerate(result.kind.values):
        for j, b in enumerate(result.kind.values):
            u, v = (np.asarray(result.direction.sel(kind=k), np.float64) for k in (a, b))
            expected = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
            assert np.abs(result.cosine.values[i, j] - expected).max() < 1e-5
    same = mj.concept(model, positive=positive, negative=negative, site="pos_embed" if "pos_embed" in mj.sites(model, positive) else "embed",
                      metric=read, pos=0)  # fmt: skip
    assert np.isfinite(same.cosine).all()
    mine = np.ones((3, 12))
    probe_result = mj.concept(
        model, positive=positive, negative=negative, site="resid_post", metric=read, pos=pos, probe=mine
    )
    assert error(probe_result.direction.sel(kind="probe"), mine) < 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("site", ["z", "post", "embed"])
def test_gradients_of_any_site_by_finite_differences(site):
    model, tokens, _ = base_and_source("llama_gqa", "left")
    gradients = mj.gradients(model, tokens, METRIC, (site,))
    rng = np.random.default_rng(0)
    direction = jnp.asarray(rng.normal(size=gradients.grads[site].shape))
    step = lambda h: METRIC(mj.run(model, tokens, {site: mj.Add(h * direction)}))
    axes = tuple(i for i, axis in enumerate(mj.SITES[site].axes) if axis != "batch")
    slope, h = jnp.sum(gradients.grads[site] * direction, axis=axes), 1e-6
    assert error((step(h) - step(-h)) / (2 * h), slope) < 1e-6
    at, whole = mj.gradients(model, tokens, METRIC, (site,), pos=-1), np.asarray(gradients.grads[site])
    last = [np.flatnonzero(row)[-1] for row in np.asarray(tokens.mask)]
    i = mj.SITES[site].axes.index("pos")
    expected = np.stack([np.take(np.take(whole, b, axis=i - 1), last[b], axis=i - 1) for b in range(3)], axis=i - 1)
    assert error(np.squeeze(at.grads[site], i), expected) < 1e-10
    assert error(gradients.values, METRIC(mj.run(model, tokens))) < 1e-10


@pytest.mark.usefixtures("x64")
def test_the_probe_is_the_minimum_that_scipy_finds():
    import scipy.optimize

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)) * 3 + 1, rng.integers(0, 2, 40).astype(float)
    x[y == 1] += [2, 0, 0, 1, 0, 0]
    centred = x - x.mean(0)
    scale = np.sqrt((centred**2).mean())

    def loss(w):
        logits = centred / scale @ w[:-1] + w[-1]
        return np.mean(np.logaddexp(0, logits) - y * logits) + 0.005 * np.sum(w[:-1] ** 2)

    expected = scipy.optimize.minimize(loss, np.zeros(7), tol=1e-12).x[:-1] / scale
    assert error(logistic_probe(jnp.asarray(x), jnp.asarray(y)), expected) < 1e-4


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
@pytest.mark.parametrize("method", [AtP(), AtP(probes=2), mj.IntegratedGradients(3, "inputs"), mj.AtPStar()], ids=repr)
def test_the_estimate_bounds_what_the_program_takes(checkpoint, method):
    config = mj.Config(
        n_layers=8, d_model=64, n_heads=4, d_vocab=101, n_ctx=64, mlp="gated", norm="rms", positions=mj.Rotary()
    )
    model = mj.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    base, source = (mj.Tokens(rng.integers(0, 101, (4, 48))) for _ in range(2))
    metric = mj.metrics.logit_diff(3, 4)
    sites = ("resid_pre", "z", "mlp_out", "q", "k", "v", "pattern")
    job = AttributionJob(model, base, source, {"m": metric}, nodes_of(model, base, sites), method)
    estimate = layers_bytes(model) + 4 * prompt_bytes(job, checkpoint) + metric_bytes(model, base, {"m": metric})
    arguments = (method, model, base, jnp.asarray(source.ids), {"m": metric}, {}, prompts(4), job.layout, checkpoint)
    how = "in_little_memory" if checkpoint else "for_speed"
    taken = _chunk.lower(*arguments, how=how).compile().compiled.memory_analysis()
    taken = taken.temp_size_in_bytes + taken.output_size_in_bytes
    assert taken <= estimate <= 4 * taken, taken / estimate


@pytest.mark.parametrize(("checkpoint", "passes"), [(0, 3), (1, 5)])
def test_no_product_is_computed_twice(checkpoint, passes):
    """Two runs forwards and one backwards, and both forwards again where layers are; what is no product with parameters takes
    less than one more. (XLA counts the operations of a loop's body once.)"""
    c = mj.Config(n_layers=3, d_model=64, n_heads=4, d_vocab=101, n_ctx=16)
    model, rng = mj.init(c, jax.random.key(0)), np.random.default_rng(0)
    base, source = (mj.Tokens(rng.integers(0, 101, (4, 16))) for _ in range(2))
    job = AttributionJob(
        model, base, source, {}, nodes_of(model, base, ("resid_pre", "z", "mlp_out", "q", "k", "v")), AtP()
    )
    metrics = {"m": mj.metrics.logit(3)}
    arguments = (AtP(), model, base, jnp.asarray(source.ids), metrics, {}, prompts(4), job.layout, checkpoint)
    counted = _chunk.lower(*arguments).compile().compiled.cost_analysis()["flops"]
    products = 2 * 4 * 16 * (4 * c.d_model**2 + 2 * c.d_model * c.d_mlp)
    assert passes <= counted / products < passes + 1


def test_memory_is_flat_in_depth_where_layers_are_computed_again():
    """Beyond what a layer's parameters and gates take: 4 times the layers take less than a third more."""
    taken = {}
    for n_layers in (6, 24):
        config = mj.Config(n_layers=n_layers, d_model=32, n_heads=4, d_vocab=101, n_ctx=128)
        model = mj.init(config, jax.random.key(0))
        base = mj.Tokens(np.random.default_rng(0).integers(0, 101, (2, 128)))
        job = AttributionJob(model, base, base, {}, nodes_of(model, base, ("z", "mlp_out")), AtP())
        for checkpoint in (0, 2):
            metrics = {"m": mj.metrics.logit(3)}
            arguments = (AtP(), model, base, jnp.asarray(base.ids), metrics, {}, prompts(2), job.layout, checkpoint)
            taken[n_layers, checkpoint] = (
                _chunk.lower(*arguments).compile().compiled.memory_analysis().temp_size_in_bytes
            )
    assert taken[24, 2] < 1.3 * taken[6, 2], taken
    assert taken[24, 0] - taken[6, 0] > 5 * (taken[24, 2] - taken[6, 2]), taken
