"""Attention of long prompts, computed for some queries at a time, against the one whose pattern is captured."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.model import attention, fused, scores
from tests.architectures import ARCHITECTURES, cases, error, example, on_real, random_model, real

pytestmark = pytest.mark.usefixtures("x64")
POS = 27
IDS = np.random.default_rng(0).integers(0, 19, (3, POS))
CAPTURED = ("resid_post", "z", "k")
METRIC = mj.metrics.logit(3)


@pytest.fixture
def queries(monkeypatch):
    """Two queries in a block: four blocks in a segment of 8, and in the last of 3 a rest."""
    for module in (attention, fused):
        monkeypatch.setattr(module, "QUERIES", 2)
    monkeypatch.setattr(scores, "MANY", 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


def prompts(padding: str) -> mj.Tokens:
    """One prompt is shorter than a block, one ends within one."""
    mask = np.ones((3, POS), bool)
    for row, length in enumerate((POS, 20, 1)):
        mask[row, length:] = padding == "none"
    return mj.Tokens(IDS, mask[:, ::-1] if padding == "left" else mask)


def model_of(name: str) -> mj.Transformer:
    return random_model(dataclasses.replace(ARCHITECTURES[name], n_ctx=POS + 8))


@cases("left")
def test_it_equals_the_run_whose_pattern_is_captured(queries, name, padding):
    """Every site after it, and the derivative in every parameter, in float64 to 1e-10."""
    model, tokens = model_of(name), prompts(padding)
    blocks = mj.run(model, tokens, capture=CAPTURED)
    whole = mj.run(model, tokens, capture=(*CAPTURED, "pattern"))
    assert error(on_real(blocks.logits, tokens), on_real(whole.logits, tokens)) < 1e-10
    for site in CAPTURED:
        for i in range(3):
            given, expected = (example(out.acts[site], site, tokens, i) for out in (blocks, whole))
            assert error(given, expected) < 1e-10

    def loss(model, capture):
        out = mj.run(model, tokens, capture=capture)
        return jnp.sum(METRIC(out)) + 0 * sum(jnp.sum(x) for x in out.acts.values())

    given, expected = (eqx.filter_grad(loss)(model, capture) for capture in ((), ("pattern",)))
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected)):
        assert np.max(np.abs(a - b)) < 1e-9 * max(1.0, np.max(np.abs(b)))


@pytest.mark.parametrize("name", ["llama_gqa", "bidirectional"])
def test_scores_of_all_queries_are_in_no_array_unless_they_are_asked_for(queries, name):
    model, tokens = model_of(name), prompts("none")
    run = lambda *capture, **edits: lambda model: mj.run(model, tokens, edits, capture=capture).logits
    has_all = lambda f: f"{POS},{POS}]" in str(jax.make_jaxpr(f)(model))
    assert not has_all(run()) and not has_all(run("z", z=mj.Scale(0.5)))
    assert has_all(run("pattern")) and has_all(run(attn_scores=mj.Scale(0.5)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("site", ["k", "v", "resid_pre"])
@pytest.mark.parametrize("how", ["plain", "vmap"])
def test_what_is_not_finite_reaches_what_attends_to_it_and_nothing_else(queries, site, value, how):
    """As in the run whose pattern is captured; in the middle of a block."""
    model, tokens, at = model_of("llama_gqa"), prompts("none"), 16
    where = mj.Where(layer=2, pos=at, batch=1)

    def logits(value, *capture):
        return mj.run(model, tokens, {site: mj.Replace(value, where)}, capture=capture).logits

    given = logits(value) if how == "plain" else jax.vmap(logits)(jnp.full(2, value))[1]
    expected = np.isfinite(logits(value, "pattern"))
    assert (np.isfinite(given) == expected).all() and expected[[0, 2]].all() and expected[1, :at].all()
    if site != "k" or np.isnan(value):  # a score of -inf is a cut edge
        assert not expected[1, at:].any()


def test_patching_attribution_and_generation_of_long_prompts(queries):
    """Against the exhaustive loop, the same with the pattern asked for, and generation without cache."""
    model, tokens = model_of("gemma"), prompts("left")
    other = mj.Tokens((IDS + 5) % 19, tokens.mask)
    sweep = mj.patch(model, clean=tokens, corrupted=other, site="z", over=("layer", "head"), metric=METRIC)
    source = mj.run(model, tokens, capture=("z",)).acts["z"]
    for layer in range(3):
        for head in range(4):
            edit = mj.Replace(source, mj.Where(layer=layer, head=head))
            logits = mj.run(model, other, {"z": edit}, capture=("pattern",)).logits
            expected = [logits[i, real(other, i)[-1], 3] for i in range(3)]
            given = sweep.sel(layer=layer, head=head)
            assert error(given, expected) < 1e-9
    made = mj.generate(model, tokens, max_new_tokens=4)
    ids, mask = np.asarray(tokens.ids), np.asarray(tokens.mask)
    for _ in range(4):
        logits = mj.run(model, mj.Tokens(ids, mask), capture=("pattern",)).logits[:, -1]
        ids = np.concatenate([ids, np.argmax(logits, -1)[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones((3, 1), bool)], axis=1)
    assert (np.asarray(made.ids)[:, -4:] == ids[:, -4:]).all()
