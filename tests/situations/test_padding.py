"""What stands in a padded column is no prediction: its logits are NaN, so that a mistake is loud."""

import chex
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
