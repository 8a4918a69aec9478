"""NaN stays NaN, infinity reaches what attends to it and nothing else, and a gate of 0 changes nothing."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.situations.models import CONFIG, GQA, logits, model, padded

PROMPT = [[1, 2, 3, 4]]
CONFIGS = {"gpt2": CONFIG, "gqa": GQA}
EARLY, LATE = slice(0, 3), slice(3, 4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("site", ["attn_scores", "q", "k", "z", "resid_pre"])
@pytest.mark.parametrize("how", ["plain", "jit", "vmap"])
def test_nan_added_at_a_site_makes_the_logits_nan(name, site, how):
    given = lambda value: mj.run(model(CONFIGS[name]), PROMPT, {site: mj.Add(value, mj.Where(layer=1))}).logits
    run = {"plain": given, "jit": jax.jit(given), "vmap": lambda v: jax.vmap(given)(v[None])[0]}[how]
    assert np.isnan(run(jnp.float32(jnp.nan))).all() and np.isfinite(run(jnp.float32(0.0))).all()


@pytest.mark.parametrize("parameter", ["b_K", "b_Q", "W_Q"])
def test_training_with_a_nan_parameter_shows_a_nan_loss(parameter):
    healthy = model()
    broken = eqx.tree_at(
        lambda m: getattr(m.blocks.attn, parameter), healthy, replace_fn=lambda a: a.at[0, 0].set(jnp.nan)
    )
    loss = lambda m: mj.metrics.cross_entropy(PROMPT)(mj.run(m, PROMPT))[0]
    assert np.isfinite(loss(healthy)) and np.isnan(loss(broken)) and np.isnan(jax.grad(loss)(broken).W_E).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_nan_score_of_one_prompt_leaves_the_other_alone(side):
    tokens = padded(side)
    edits = {"attn_scores": mj.Add(np.nan, mj.Where(layer=0, batch=1))}
    plain, broken = logits(model(), tokens), logits(model(), tokens, edits)
    assert np.allclose(broken[0], plain[0]) and np.isnan(broken[1]).all()


def test_a_score_of_minus_infinity_is_a_cut_edge():
    """Against a NumPy softmax over the keys that are left."""
    edge = mj.Where(layer=0, head=1, query=-1, key=1)
    out = mj.run(model(), PROMPT, {"attn_scores": mj.Replace(-np.inf, edge)}, capture=("attn_scores", "pattern"))
    scores = np.asarray(out.acts["attn_scores"], np.float64)[0, 0, 1, -1]
    weights = np.where(np.isneginf(scores), 0.0, np.exp(scores - scores[np.isfinite(scores)].max()))
    assert np.allclose(out.acts["pattern"][0, 0, 1, -1], weights / weights.sum(), atol=1e-6) and weights[1] == 0


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
@pytest.mark.parametrize("site", ["attn_scores", "resid_mid", "z"])
def test_a_gate_of_zero_changes_nothing_whatever_the_value(site, value):
    gated = lambda gate: mj.run(model(), PROMPT, {site: mj.Mix(gate, value)}).logits
    plain = logits(model(), PROMPT)
    close = lambda given: np.allclose(given, plain, atol=1e-5)  # other programs round otherwise
    assert close(gated(0.0)) and close(jax.vmap(gated)(jnp.zeros(2))[1])
    loss = lambda m, edits: jnp.sum(mj.run(m, PROMPT, edits).readout.final[:, -1, :2])
    with_gate, without = (jax.grad(loss)(model(), edits) for edits in ({site: mj.Mix(0.0, value)}, None))
    chex.assert_trees_all_close(with_gate, without, rtol=1e-5, atol=1e-5)


def test_a_gate_of_one_is_the_value_whatever_stood_there():
    broken = {"resid_pre": [mj.Replace(np.nan, mj.Where(layer=1)), mj.Mix(1.0, 0.5, mj.Where(layer=1))]}
    assert np.allclose(
        logits(model(), PROMPT, broken), logits(model(), PROMPT, {"resid_pre": mj.Replace(0.5, mj.Where(layer=1))})
    )


def test_the_derivative_along_a_gate_is_the_difference_times_the_slope(x64):
    """Central differences of a Mix written out as Add, at gates 0, 0.3 and 1: right to h^2 = 1e-10 and rounding / h = 1e-11."""
    double = jax.tree.map(lambda a: a.astype(jnp.float64), model())
    value = np.random.default_rng(0).normal(size=8)
    at = np.asarray(mj.run(double, PROMPT, capture=("resid_mid",)).acts["resid_mid"])[1]
    read = lambda edits: jnp.sum(mj.run(double, PROMPT, edits).readout.logits(pos=-1, tokens=3))
    mixed = lambda gate: read({"resid_mid": mj.Mix(gate, value, mj.Where(layer=1))})
    added = lambda gate: float(
        read({"resid_mid": mj.Add(gate * (value - at), mj.Where(layer=1), axes=("batch", "pos", "unit"))})
    )
    for gate in (0.0, 0.3, 1.0):
        expected = (added(gate + 1e-5) - added(gate - 1e-5)) / 2e-5
        assert abs(float(jax.grad(mixed)(gate)) - expected) < 1e-6 * max(1, abs(expected))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("how", ["plain", "vmap"])
def test_a_broken_value_at_a_late_token_leaves_earlier_ones_alone(name, value, how):
    edit = lambda v: {"v": mj.Replace(v, mj.Where(layer=0, pos=3))}  # of all heads: one may not attend to it at all
    run = lambda v: mj.run(model(CONFIGS[name]), PROMPT, edit(v)).logits
    given = np.asarray(run(value) if how == "plain" else jax.vmap(run)(jnp.full(2, value))[1])
    plain = logits(model(CONFIGS[name]), PROMPT)
    assert np.allclose(given[:, EARLY], plain[:, EARLY], atol=1e-5) and np.isnan(given[:, LATE]).all()


def test_a_broken_stream_at_padding_is_nobodys_business():
    break_padding = lambda x, site, layer, positions: jnp.where(positions[..., None] < 0, jnp.inf, x)
    for side in ("left", "right"):
        edits = {"resid_pre": break_padding}
        real = np.asarray(padded(side).mask)
        assert np.allclose(logits(model(), padded(side), edits)[real], logits(model(), padded(side))[real])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_token_is_generated_from_logits_that_are_not_finite(value, temperature):
    """Broken at the second prompt's second new token: from there on it has none, and the other prompt is as it was."""
    prompts, key = [[1, 2, 3, 4], [4, 3, 2, 1]], jax.random.key(0)
    pos = np.zeros((2, 8), bool)
    pos[1, 4] = True
    run = lambda edits=None, **how: np.asarray(
        mj.generate(model(), prompts, edits, max_new_tokens=4, temperature=temperature, key=key, **how).ids
    )
    for how in ({}, {"capture": ("z",)}):
        broken, plain = run({"resid_post": mj.Replace(value, mj.Where(layer=2, pos=pos))}, **how), run(**how)
        assert (broken[0] == plain[0]).all() and (broken[1, :5] == plain[1, :5]).all() and (broken[1, 5:] == -1).all()


LOWEST = float(np.finfo(np.float32).min)  # what other libraries put in place of a cut


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_lowest_float_as_a_cut(side):
    """Of a query's keys one is cut: the others share the weight; where all are, they are equal, as softmax says."""
    edit = lambda **where: {"attn_scores": mj.Replace(LOWEST, mj.Where(layer=0, head=0, **where))}
    first = np.asarray(mj.run(model(), PROMPT, edit(key=0), capture=("pattern",)).acts["pattern"])[0, 0, 0]
    assert np.array_equal(first[0], [1, 0, 0, 0]) and np.allclose(first[1:].sum(-1), 1) and (first[1:, 0] == 0).all()
    every = np.asarray(mj.run(model(), PROMPT, edit(), capture=("pattern",)).acts["pattern"])[0, 0, 0]
    assert np.allclose(every, np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None])
    tokens = padded(side)
    together = logits(model(), tokens, edit(key=0))[np.asarray(tokens.mask)]
    alone = [logits(model(), [row], edit(key=0))[0] for row in ([1, 2, 3, 4], [5, 6])]
    assert np.allclose(together, np.concatenate(alone), atol=1e-4)


def test_values_too_large_for_the_parameters_dtype():
    """1e5 at the last token is infinite in float16: NaN there, and nowhere before."""
    half = jax.tree.map(lambda a: a.astype(jnp.float16), model())
    edit = {"v": mj.Replace(1e5, mj.Where(layer=0, pos=3))}
    broken, plain = logits(half, PROMPT, edit), logits(half, PROMPT)
    assert np.allclose(broken[:, :3], plain[:, :3]) and np.isnan(broken[:, 3]).all()


@pytest.mark.parametrize("make", [mj.metrics.rank, mj.metrics.accuracy, mj.metrics.prob, mj.metrics.log_prob])
def test_infinite_logits_have_no_rank(make):
    bias = jnp.zeros(11).at[jnp.array([3, 5])].set(jnp.inf)
    config = mj.Config(**{**CONFIG.__dict__, "unembed_bias": True})
    broken = eqx.tree_at(lambda m: m.b_U, model(config), bias)
    for answer in (3, 5):
        assert np.isnan(np.asarray(make(answer)(mj.run(broken, PROMPT)))).all()
    cut = eqx.tree_at(lambda m: m.b_U, model(config), -bias)  # a cut token is behind all others
    assert np.asarray(mj.metrics.rank(3)(mj.run(cut, PROMPT)))[0] >= 9


@pytest.mark.parametrize("edit", [
    lambda g: {"resid_post": mj.Mix(g, np.float32([1, 2, np.inf, 3])[:, None] * np.ones(8, np.float32), mj.Where(layer=0, pos=0))},
    lambda g: {"z": [mj.Replace(np.inf, mj.Where(layer=2, pos=3)), mj.Scale(g, mj.Where(layer=2, pos=0))]},
])  # fmt: skip
def test_what_is_not_selected_has_no_gradient(edit):
    """Infinite at another position than the edit's: against central differences."""
    value = lambda g: mj.run(model(), PROMPT, edit(g)).readout.logits(pos=0)[0, 5]
    step = 1e-2
    slope = (float(value(0.3 + step)) - float(value(0.3 - step))) / (2 * step)
    assert abs(float(jax.grad(value)(0.3)) - slope) < 2e-2 * max(1, abs(slope))


def test_the_gradient_of_a_divergence_of_cut_tokens():
    reference = jnp.asarray(np.random.default_rng(0).normal(size=(1, 11)), jnp.float32).at[0, 3].set(-jnp.inf)
    config = mj.Config(**{**CONFIG.__dict__, "unembed_bias": True})
    cut = eqx.tree_at(lambda m: m.b_U, model(config), jnp.zeros(11).at[3].set(-jnp.inf))
    out = mj.run(cut, PROMPT)
    slope = np.asarray(jax.grad(lambda r: mj.metrics.kl(r)(out)[0])(reference))[0]
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (reference[0], out.readout.logits(pos=-1)[0]))
    ratio = np.subtract(p, q, where=np.isfinite(p), out=np.zeros(11, np.float32))
    expected = np.exp(p) * (ratio - (np.exp(p) * ratio).sum())  # the softmax's derivative of sum p (log p - log q)
    assert np.allclose(slope, expected, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_post", "z", "pattern"])
def test_no_activations_of_tokens_that_were_not_generated(site):
    """Logits are NaN after token 7, which nothing then follows."""
    free = np.asarray(mj.generate(model(), PROMPT, max_new_tokens=4).ids)[0]
    broken = eqx.tree_at(lambda m: m.W_E, model(), model().W_E)
    pos = np.zeros((1, 8), bool)
    pos[0, 5] = True
    edit = {"resid_post": mj.Replace(np.nan, mj.Where(layer=2, pos=pos))}
    done = mj.generate(broken, PROMPT, edit, max_new_tokens=4, capture=(site,))
    assert done.ids[0].tolist() == [*free[:6], -1, -1]
    acts = np.moveaxis(
        np.asarray(done.acts[site]),
        mj.sites(model(), PROMPT)[site].axes.index("query" if site == "pattern" else "pos"),
        0,
    )
    assert np.isnan(acts[6:]).all() and np.isfinite(acts[:5]).all()
