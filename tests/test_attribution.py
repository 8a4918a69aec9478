"""Attribution: the gates' gradient, exact where it must be, and what is said of its error."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.attribution.gradient import AtP
from mijax.attribution.nodes import nodes_of, spread
from mijax.attribution.scores import Job, Plan, scored
from mijax.attribution.side_by_side import Path, gated
from mijax.sweeps.measure import values_of
from tests.architectures import ARCHITECTURES, IDS, PADDINGS, batch, error, example, random_model

METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def base_and_source(name, padding, dtype=jnp.float64):
    model = random_model(ARCHITECTURES[name], dtype=dtype)
    return model, batch(padding), batch(padding, (IDS + 5) % 19)


def found_by(model, base, source, sites, method=AtP(), metric=METRIC, probes=0, checkpoint=0, prompts=3, seed=0):
    """What the method finds in the model's own precision, as it is before it is labelled."""
    job = Job(model, base, source, {"m": metric}, nodes_of(model, base, sites), method, probes, seed)
    return scored(job, Plan(prompts, checkpoint, 0), progress=False, save=None)


@pytest.mark.usefixtures("x64")
@each_architecture
@pytest.mark.parametrize("padding", PADDINGS)
def test_6_it_is_the_gradient_of_run_at_every_site(name, padding):
    model, base, source = base_and_source(name, padding)
    table = mj.sites(model, base)
    acts = mj.run(model, source, capture=tuple(table)).acts
    nodes = nodes_of(model, base, tuple(table))
    gates = {s: jnp.zeros(_with_batch(s, own.shape)) for s, own in nodes.items()}
    total = lambda gates: jnp.sum(METRIC(mj.run(model, base, {s: mj.Mix(g, acts[s]) for s, g in gates.items()}).readout))
    expected = jax.jit(jax.grad(total))(gates)
    for checkpoint in (0, 1, 2):
        found = found_by(model, base, source, tuple(table), checkpoint=checkpoint)
        for site in table:
            own = np.moveaxis(found[f"term:m:{site}"], 0, mj.SITES[site].axes.index("batch"))
            for i in range(3):  # padding has gradient zero, and differences of padding are nobody's business
                ours, theirs = (example(x, site, base, i) for x in (own, expected[site]))
                if np.abs(theirs).max() > 0:
                    assert error(ours, theirs) < 1e-10, (site, checkpoint)


def _with_batch(site, shape):
    i = mj.SITES[site].axes.index("batch")
    return (*shape[:i], 3, *shape[i:])


@pytest.mark.usefixtures("x64")
@each_architecture
def test_finite_differences_of_patching_itself(name):
    """The cells' own exact effect along the gate, by central differences: independent of every derivative."""
    model, base, source = base_and_source(name, "left")
    sites = {"z": ("layer", "head"), "attn_out": ("layer", "pos"), "v": ("layer", "pos", "kv_head"), "resid_pre": ("layer",)}
    acts = mj.run(model, source, capture=tuple(sites)).acts
    found = found_by(model, base, source, sites)
    h = 1e-5
    for site, over in sites.items():
        nodes = nodes_of(model, base, {site: over})[site]
        terms = nodes.by_cell(found[f"term:m:{site}"], base)
        cells = nodes.where(np.arange(nodes.size), base)

        @jax.jit
        def metric(where, gate, site=site):
            return METRIC(mj.run(model, base, {site: mj.Mix(gate, acts[site], where)}).readout)

        for number in np.random.default_rng(0).choice(nodes.size, 3, replace=False):
            where = jax.tree.map(lambda index, n=number: jnp.asarray(index[n]), cells)
            slope = np.asarray(metric(where, h) - metric(where, -h)) / (2 * h)
            own = terms.reshape(nodes.size, -1)[number]
            place = dict(zip(over, np.unravel_index(number, list(nodes.axes.values()))))
            there = np.asarray(base.lengths) > place.get("pos", -1)
            # right to h^2 = 1e-10 times a third derivative, which is large in models without norms, and rounding / h
            assert np.abs(own - slope)[there].max() < 1e-5 * max(1.0, np.abs(slope).max()), (site, place)


def linear_model():
    """Attention by position alone (zero queries), no norm, no MLP: the logits are a linear function of the embeddings."""
    model = random_model(ARCHITECTURES["attention_only"])
    return eqx.tree_at(lambda m: (m.blocks.attn.W_Q, m.blocks.attn.b_Q), model, replace_fn=jnp.zeros_like)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [AtP(), mj.IntegratedGradients(2), mj.IntegratedGradients(1, along="inputs"), mj.AtPStar()])
def test_exact_on_a_linear_model(method):
    model, base, source = linear_model(), batch("left"), batch("left", (IDS + 5) % 19)
    for site, over in {"z": ("layer", "head"), "resid_pre": ("layer", "pos"), "v": ("layer", "pos", "head"), "embed": ("pos",)}.items():
        if getattr(method, "along", None) == "gate" and site != "embed":
            continue  # all gates open together: a later layer's are moved by an earlier one's
        estimate = found_by(model, base, source, {site: over}, method)
        exact = mj.patch(model, clean=source, corrupted=base, site=site, over=over, metric=METRIC)
        nodes = nodes_of(model, base, {site: over})[site]
        terms = nodes.by_cell(estimate[f"term:m:{site}"], base) + estimate["base:m"]
        there = np.isfinite(exact.values)
        assert error(terms[there], exact.values[there]) < 1e-6, site  # patch gives float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_grids_of_roles_are_sums_of_their_entries(padding):
    model, base, source = base_and_source("llama_gqa", padding)
    roles = {"both": [[0, 1], [2, 2], [-1, 0]], "last": -1}
    grid = mj.grid(layer=range(3), pos=roles)
    by_role = found_by(model, base, source, {"z": grid})["term:m:z"].T.reshape(3, 2, 3)
    entries = found_by(model, base, source, ("z",))["term:m:z"].sum(axis=(3, 4))  # [batch, layer, column]
    columns = [np.flatnonzero(row) for row in np.asarray(base.mask)]
    for i in range(3):
        both = [columns[i][p] for p in dict.fromkeys(np.asarray(roles["both"][i]) % len(columns[i]))]
        assert error(by_role[:, 0, i], entries[i][:, both].sum(axis=1)) < 1e-10
        assert error(by_role[:, 1, i], entries[i][:, columns[i][-1]]) < 1e-10


def test_windows_of_layers_and_overlapping_roles_add_up():
    model, base, source = base_and_source("gpt2", "right", jnp.float32)
    grid = mj.grid(layer={"all": [0, 1, 2], "first": [0]})
    found = found_by(model, base, source, {"mlp_out": grid})["term:m:mlp_out"]
    alone = found_by(model, base, source, {"mlp_out": ("layer",)})["term:m:mlp_out"][:, :, 0, 0]
    assert error(found, np.stack([alone.sum(axis=1), alone[:, 0]], axis=1)) < 1e-5
    with pytest.raises(ValueError, match="share no place"):
        mj.attribute(model, clean=source, corrupted=base, metric=METRIC, sites={"mlp_out": grid}, method=mj.IntegratedGradients())


@pytest.mark.usefixtures("x64")
@each_architecture
@pytest.mark.parametrize("along", ["gate", "inputs"])
def test_integrated_gradients_are_complete(name, along):
    model, base, source = base_and_source(name, "left")
    model = jax.tree.map(lambda x: 0.5 * x, model)  # smooth enough for a few points
    written = tuple(s for s in ("embed", "attn_out", "mlp_out") if s in mj.sites(model, base))
    sites = written if along == "gate" else ("embed",)
    whole = METRIC(mj.run(model, source).readout) - METRIC(mj.run(model, base).readout)
    gaps = []
    for steps in (1, 4, 16):
        found = found_by(model, base, source, sites, mj.IntegratedGradients(steps, along))
        total = sum(found[f"term:m:{s}"].reshape(3, -1).sum(axis=1) for s in sites)
        assert error(found["gap:m"] + 1.0, total - np.asarray(whole) + 1.0) < 1e-8  # what is told is what there is
        gaps.append(np.abs(found["gap:m"]).max())
    if name != "normless":  # relu has kinks
        assert gaps[2] < 1e-3 * gaps[0] or gaps[2] < 1e-9, gaps


@pytest.mark.usefixtures("x64")
def test_the_gap_falls_at_the_order_of_the_rule():
    """Gauss-Legendre with n points on a path of length e: an error of e^(2n + 1)."""
    model, base, _ = base_and_source("llama_gqa", "none")
    towards = jnp.asarray(np.random.default_rng(1).normal(size=(9, 12)))
    gaps = {}
    for steps in (1, 2):
        for length in (0.02, 0.01):
            W_E = model.W_E.at[10:19].set(model.W_E[1:10] + length * towards)
            near = eqx.tree_at(lambda m: m.W_E, model, W_E)
            ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3]])
            metric = mj.metrics.logit(0)
            found = found_by(near, mj.Tokens(ids), mj.Tokens(ids + 9), ("embed",), mj.IntegratedGradients(steps, "inputs"), metric)
            gaps[steps, length] = np.abs(found["gap:m"])
    for steps in (1, 2):
        order = np.log2(gaps[steps, 0.02] / gaps[steps, 0.01])
        assert np.abs(np.median(order) - (2 * steps + 1)) < 0.5, (steps, order)
