"""Padding between real tokens, as in what `generate` returns: everything is that of the tokens run alone."""

import numpy as np
import pytest

import mijax as mj
from tests.situations.models import CONFIG, GQA, model, padded

HOLES = np.array([[1, 2, 0, 3, 0, 0, 4], [0, 5, 0, 6, 7, 0, 0]])
TOKENS = mj.Tokens(HOLES, HOLES > 0)
ALONE = [[[1, 2, 3, 4]], [[5, 6, 7]]]


def loss_by_hand(transformer, ids):
    """The mean of -log p of each next token, from the logits in NumPy."""
    logits = np.asarray(mj.run(transformer, ids).logits, np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.mean([log_p[i, token] for i, token in enumerate(np.asarray(ids)[0, 1:])])


@pytest.mark.parametrize("config", [CONFIG, GQA])
def test_the_loss_over_a_mask_with_holes(config):
    given = mj.metrics.cross_entropy(TOKENS)(mj.run(model(config), TOKENS))
    assert np.allclose(given, [loss_by_hand(model(config), ids) for ids in ALONE], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_what_generate_returned(side):
    done = mj.generate(model(), padded(side), max_new_tokens=3)
    whole = mj.Tokens(done.ids, done.mask)
    given = mj.metrics.cross_entropy(whole)(mj.run(model(), whole))
    rows = [np.asarray(done.ids)[i][np.asarray(done.mask)[i]][None] for i in range(2)]
    assert np.allclose(given, [loss_by_hand(model(), row) for row in rows], atol=1e-5)


def test_the_loss_after_a_stop_token_counts_no_padding():
    done = mj.generate(model(), padded("right"), max_new_tokens=4)
    stop = int(np.asarray(done.ids)[1, 4])
    ended = mj.generate(model(), padded("right"), max_new_tokens=4, stop=stop)
    whole = mj.Tokens(ended.ids, ended.mask)
    row = np.asarray(ended.ids)[1][np.asarray(ended.mask)[1]][None]
    given = mj.metrics.cross_entropy(whole)(mj.run(model(), whole))[1]
    assert row.shape[1] == 3 and np.allclose(given, loss_by_hand(model(), row), atol=1e-5)


def test_the_mean_divergence_over_a_mask_with_holes():
    other = mj.run(model(seed=1), TOKENS).logits
    given = mj.metrics.kl(other, pos=None)(mj.run(model(), TOKENS))
    by_row = [mj.metrics.kl(mj.run(model(seed=1), ids).logits, pos=None)(mj.run(model(), ids))[0] for ids in ALONE]
    assert np.allclose(given, by_row, atol=1e-5)


def test_positions_and_sweeps_over_a_mask_with_holes():
    grid = {"resid_pre": mj.Scale(0.0, mj.grid(layer=[1, 2], pos=[0, 2, -1]))}
    metric = mj.metrics.logit(3)
    given = mj.sweep(model(), TOKENS, grid, metric, progress=False).values
    for i, ids in enumerate(ALONE):
        assert np.allclose(
            given[..., i], mj.sweep(model(), ids, grid, metric, progress=False).values[..., 0], atol=1e-5
        )
