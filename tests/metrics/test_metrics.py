"""Every metric against a NumPy statement, padded on either side (float64, 1e-10)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, PADDINGS, batch, error, on_real, random_model, real

pytestmark = pytest.mark.usefixtures("x64")
ANSWERS, WRONG = np.array([3, 5, 7]), np.array([4, 6, 8])


def at(logits, tokens, pos):
    """`[batch, vocab]` at one real position of each example."""
    pos = np.broadcast_to(np.ravel(pos), 3)
    return np.stack([np.asarray(logits)[i, real(tokens, i)[pos[i]]] for i in range(3)])


# name: (our metric, the same from logits [batch, vocab] at the position)
METRICS = {
    "logit": (lambda pos: mj.metrics.logit(ANSWERS, pos), lambda x: x[range(3), ANSWERS]),
    "logit_diff": (
        lambda pos: mj.metrics.logit_diff(ANSWERS, WRONG, pos),
        lambda x: x[range(3), ANSWERS] - x[range(3), WRONG],
    ),
    "log_prob": (lambda pos: mj.metrics.log_prob(ANSWERS, pos), lambda x: log_softmax(x, -1)[range(3), ANSWERS]),
    "prob": (lambda pos: mj.metrics.prob(ANSWERS, pos), lambda x: np.exp(log_softmax(x, -1))[range(3), ANSWERS]),
    "rank": (
        lambda pos: mj.metrics.rank(ANSWERS, pos),
        lambda x: [sorted(-row).index(-row[a]) for row, a in zip(x, ANSWERS)],
    ),
    "accuracy": (lambda pos: mj.metrics.accuracy([10, 2, 7], pos), lambda x: x.argmax(-1) == [10, 2, 7]),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pos", [-1, 0, [[1], [-2], [3]]])
def test_metrics_at_a_position(name, padding, pos):
    model, tokens = random_model(ARCHITECTURES["parallel_mqa_partial_rotary"]), batch(padding)
    out = mj.run(model, tokens)
    ours, theirs = METRICS[name]
    expected = np.asarray(theirs(at(out.logits, tokens, pos)), np.float64)
    given = ours(pos)(out)
    assert given.shape == (3,) and np.abs(np.asarray(given) - expected).max() < 1e-10 * max(1, np.abs(expected).max())


def test_accuracy_is_one_where_the_answer_is_on_top():
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("left")
    out = mj.run(model, tokens)
    top = at(out.logits, tokens, -1).argmax(-1)
    assert (np.asarray(mj.metrics.accuracy(top)(out)) == 1).all()
    assert (np.asarray(mj.metrics.rank(top)(out)) == 0).all()
    assert np.asarray(mj.metrics.accuracy((top + 1) % 19)(out)).sum() == 0


@pytest.mark.parametrize("padding", PADDINGS)
def test_kl_and_cross_entropy(padding):
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch(padding)
    other = mj.run(random_model(ARCHITECTURES["gpt2"], seed=1), tokens)
    out = mj.run(model, tokens)
    q, p = log_softmax(np.asarray(out.logits), -1), log_softmax(np.asarray(other.logits), -1)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    everywhere = [divergence[i, real(tokens, i)].mean() for i in range(3)]
    last = [divergence[i, real(tokens, i)[-1]] for i in range(3)]
    assert error(mj.metrics.kl(other.logits, pos=None)(out), everywhere) < 1e-10
    assert error(mj.metrics.kl(other.readout.logits(pos=-1))(out), last) < 1e-10
    assert error(mj.metrics.kl(jax.nn.log_softmax(other.readout.logits(pos=-1)))(out), last) < 1e-10
    assert np.abs(np.asarray(mj.metrics.kl(out.logits, pos=None)(out))).max() < 1e-10
    losses = []
    for i in range(3):
        columns = real(tokens, i)
        losses.append(np.mean([-q[i, a, np.asarray(tokens.ids)[i, b]] for a, b in itertools.pairwise(columns)]))
    assert error(mj.metrics.cross_entropy(tokens)(out), losses) < 1e-10


def test_logits_are_computed_where_they_are_asked_for():
    model, tokens = random_model(ARCHITECTURES["parallel_mqa_partial_rotary"]), batch("left")
    readout = mj.run(model, tokens).readout
    whole = np.asarray(readout.logits())
    last = at(whole, tokens, -1)
    assert error(readout.logits(pos=-1), last) < 1e-10
    assert error(readout.logits(pos=-1, tokens=[3, 4]), last[:, [3, 4]]) < 1e-10
    assert error(readout.logits(pos=-1, tokens=5), last[:, 5]) < 1e-10
    ids = np.array([[1, 2], [3, 4], [5, 6]])
    assert error(readout.logits(pos=-1, tokens=ids), np.take_along_axis(last, ids, 1)) < 1e-10
    several = np.stack([at(whole, tokens, p) for p in (0, -1)], axis=1)
    assert error(readout.logits(pos=[0, -1]), several) < 1e-10
    assert error(readout.logits(pos=[[0, -1]] * 3, tokens=ids), np.take_along_axis(several, ids[:, None], 2)) < 1e-10
    assert error(on_real(readout.logits(tokens=[2]), tokens), on_real(whole[..., [2]], tokens)) < 1e-10


@pytest.mark.parametrize(
    "metric", [mj.metrics.rank(3), mj.metrics.accuracy(3), mj.metrics.logit(3), mj.metrics.prob(3)]
)
def test_a_failed_run_is_nan_in_every_metric(metric):
    model = random_model(ARCHITECTURES["gpt2"])
    out = mj.run(model, IDS, {"resid_pre": mj.Replace(np.nan, mj.Where(layer=1))})
    assert np.isnan(np.asarray(metric(out))).all()


def test_out_of_range_inside_a_trace_is_nan():
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("left")

    @jax.jit
    def measured(pos, token, layer):
        out = mj.run(model, tokens, {"z": mj.Scale(0.5, mj.Where(layer=layer))})
        return mj.metrics.logit(token, pos)(out)

    assert np.isfinite(measured(3, 2, 1)).all()
    assert np.isnan(measured(4, 2, 1)).tolist() == [False, True, False]  # the prompts have 6, 4 and 5 tokens
    assert np.isnan(measured(-5, 2, 1)).tolist() == [False, True, False]
    assert np.isnan(measured(3, 19, 1)).all() and np.isnan(measured(3, -1, 1)).all()
    assert np.isnan(measured(3, 2, 3)).all() and np.isnan(measured(3, 2, -4)).all()
    ids = jnp.asarray(IDS)
    outside = jax.jit(lambda ids: mj.run(model, ids).logits)
    assert np.isfinite(outside(ids)).all() and np.isnan(outside(ids.at[1, 2].set(19))).all()


def test_a_failed_reference_is_nan_too_and_labels_must_be_tokens():
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("left")
    out = mj.run(model, tokens)
    assert np.isnan(np.asarray(mj.metrics.kl(np.full((3, 19), np.nan))(out))).all()
    assert np.isnan(np.asarray(mj.metrics.kl(np.full((3, 6, 19), np.nan), pos=None)(out))).all()
    certain = np.where(np.arange(19) == 2, 0.0, -np.inf)[None].repeat(3, 0)  # zero probability elsewhere is no NaN
    assert error(mj.metrics.kl(certain)(out), -np.asarray(mj.metrics.log_prob(2)(out))) < 1e-10
    ignored = mj.Tokens(np.where(np.asarray(tokens.mask), tokens.ids, -100), tokens.mask)  # padding may be anything
    loss = mj.metrics.cross_entropy
    assert error(loss(ignored)(out), loss(tokens)(out)) < 1e-10
    labels = mj.Tokens(np.where(tokens.ids == 8, -100, tokens.ids), tokens.mask)
    with pytest.raises(IndexError, match="token -100 is outside the vocabulary of 19"):
        loss(labels)(out)
    assert np.isnan(jax.jit(lambda m: loss(labels)(mj.run(m, tokens)))(model)).tolist() == [False, True, False]
    on_device = mj.Tokens(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask))
    inside = jax.jit(lambda m: loss(on_device)(mj.run(m, on_device)))(model)
    assert error(inside, loss(tokens)(out)) < 1e-10


def test_captures_are_nan_where_a_traced_index_is_out_of_range():
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("left")
    for site in ("embed", "pos_embed", "resid_pre", "z", "ln_final.scale"):
        kept = jax.jit(lambda p, site=site: mj.run(model, tokens, capture={site: mj.Where(pos=p)}).acts[site])
        assert np.isfinite(kept(3)).all() and np.isnan(kept(4)).all()
    empty = jax.jit(lambda mask: mj.run(model, mj.Tokens(IDS, mask)).logits)
    assert np.isnan(empty(jnp.asarray(tokens.mask).at[1].set(False))).all()
