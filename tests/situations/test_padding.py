"""What stands in a padded column is no prediction: its logits are NaN, so that a mistake is loud."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.models import CONFIG, GQA, model, padded

CONFIGS = [CONFIG, GQA]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("how", [lambda f: f, jax.jit, lambda f: lambda t: jax.vmap(lambda _: f(t))(jnp.zeros(2))[0]])
def test_the_last_column_of_prompts_of_different_length(config, how):
    last = np.asarray(how(lambda tokens: mj.run(model(config), tokens).logits[:, -1])(padded("right")))
    alone = np.asarray(mj.run(model(config), [[1, 2, 3, 4]]).logits[0, -1])
    assert np.allclose(last[0], alone, atol=1e-5) and np.isnan(last[1]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_all_columns_and_some_tokens(side):
    tokens = padded(side)
    readout = mj.run(model(), tokens).readout
    real, some = np.asarray(tokens.mask), np.asarray(readout.logits(tokens=[3, 4]))
    assert (
        np.isnan(some[~real]).all()
        and np.isfinite(some[real]).all()
        and np.isnan(np.asarray(readout.logits(tokens=3))[~real]).all()
    )
    assert np.isfinite(readout.final).all()  # only what is read of it is NaN


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_gradient_and_real_tokens_have_theirs(side):
    loss = lambda m, tokens: jnp.sum(jnp.nan_to_num(mj.run(m, tokens).logits[1]) ** 2)
    given = jax.grad(loss)(model(), padded(side))
    alone = jax.grad(lambda m: jnp.sum(mj.run(m, [[5, 6]]).logits[0] ** 2))(model())
    chex.assert_trees_all_close(given, alone, rtol=1e-3, atol=1e-3)


def test_a_metric_of_ones_own_that_reads_the_last_column():
    heads = {"z": mj.Replace(0.0, mj.grid(layer=[0], head=[0, 1]))}
    last = lambda out: out.readout.logits()[:, -1, 3]
    with refused(ValueError, "metric '<lambda>' is nan on the base run of example 1"):
        mj.sweep(model(), padded("right"), heads, last, progress=False)
    given = mj.sweep(model(), padded("left"), heads, last, progress=False)
    by_position = mj.sweep(model(), padded("left"), heads, mj.metrics.logit(3), progress=False)
    assert np.allclose(given, by_position, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "z", "pattern"])
def test_resampling_prompts_of_different_length(site):
    """Each gets the activations of one that is as long, position by position: the loop over single prompts."""
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10]]
    donors = {0: [2], 1: [0, 2], 2: [0]}
    results = []
    for side, pad in (("left", 0), ("right", 0), ("right", 9)):
        padded_row = lambda row: ([pad] * (4 - len(row)) + row) if side == "left" else row + [pad] * (4 - len(row))
        mask = np.array([padded_row([1] * len(row)) for row in rows]) == 1 if pad != 1 else None
        tokens = mj.Tokens([padded_row(row) for row in rows], mask)
        results.append(mj.ablate(model(), tokens, site=site, over=mj.grid(layer=[0, 1]), metric=mj.metrics.logit(4),
                                 kind="resample", draws=6, key=jax.random.key(0), progress=False).values)  # fmt: skip
        assert np.allclose(results[0], results[-1], atol=1e-4)
    for i, row in enumerate(rows):
        possible = []
        for donor in donors[i]:
            acts = np.asarray(mj.run(model(), [rows[donor]], capture=(site,)).acts[site])
            acts = acts[..., : len(row), : len(row)] if site == "pattern" else acts[:, :, : len(row)]
            edit = lambda layer: {site: mj.Replace(acts, mj.Where(layer=layer))}
            possible.append([float(mj.run(model(), [row], edit(n)).readout.logits(pos=-1)[0, 4]) for n in (0, 1)])
        drawn = results[0][..., i]  # [draw, layer]
        nearest = np.abs(drawn[:, None] - np.array(possible)).max(axis=-1)
        assert nearest.min(axis=1).max() < 1e-3 and set(nearest.argmin(axis=1)) == set(range(len(possible)))


def test_resampling_where_no_other_prompt_is_as_long():
    with refused(ValueError, "prompt 0 has 4 tokens, and no other prompt as many"):
        mj.ablate(
            model(),
            padded("left"),
            site="z",
            over=("layer",),
            metric=mj.metrics.logit(4),
            kind="resample",
            key=jax.random.key(0),
        )


def test_mean_ablation_beside_a_pad_token_that_is_not_a_number():
    broken = eqx.tree_at(lambda m: m.W_E, model(), model().W_E.at[0].set(jnp.nan))
    tokens = mj.Tokens([[1, 2, 3, 0], [4, 5, 6, 7]], [[1, 1, 1, 0], [1, 1, 1, 1]])
    over = {"site": "resid_mid", "over": mj.grid(layer=[1], pos=[0, 2]), "metric": mj.metrics.logit(4), "kind": "mean"}
    result, plain = (mj.ablate(m, tokens, **over, progress=False) for m in (broken, model()))
    assert np.allclose(result, plain, atol=1e-4)
