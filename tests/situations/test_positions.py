"""A list of positions means the same everywhere: `[k]` are k of every example, `[batch, k]` are each example's own."""

import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.models import model

IDS = [[1, 2, 3, 4], [5, 6, 7, 8], [2, 4, 6, 8]]
METRICS = {
    "logit": lambda pos: mj.metrics.logit(7, pos=pos), "logit_diff": lambda pos: mj.metrics.logit_diff(7, 8, pos=pos),
    "prob": lambda pos: mj.metrics.prob(7, pos=pos), "log_prob": lambda pos: mj.metrics.log_prob(7, pos=pos),
    "rank": lambda pos: mj.metrics.rank(7, pos=pos), "accuracy": lambda pos: mj.metrics.accuracy(7, pos=pos),
    "kl": lambda pos: mj.metrics.kl(np.zeros((3, 11), np.float32), pos=pos),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("pos", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), [1]])
def test_a_metric_at_a_list_of_positions(name, pos):
    with refused(ValueError, r"positions of every example, as in mijax.Where, or one per example.*\[batch, 1\]"):
        METRICS[name](pos)


def test_a_metric_at_a_traced_list_of_positions():
    import jax

    with refused(ValueError, r"one per example is \[batch, 1\], pos=pos\[:, None\]"):
        jax.jit(lambda pos: mj.metrics.logit(7, pos=pos)(mj.run(model(), IDS)))(jnp.array([1, 2, 3]))


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_at_one_position_of_each_prompt(name):
    given = METRICS[name]([[1], [2], [3]])(mj.run(model(), IDS))
    one_by_one = [METRICS[name](p)(mj.run(model(), IDS))[i] for i, p in enumerate((1, 2, 3))]
    assert np.allclose(given, one_by_one, atol=1e-6)


def test_an_edit_and_a_metric_read_one_list_alike():
    """The stream put to zero at [[1], [2], [3]] has the logits of the bias there and the plain run's elsewhere."""
    pos = [[1], [2], [3]]
    cut = mj.run(model(), IDS, {"ln_final.normalized": mj.Scale(0.0, mj.Where(pos=pos))})
    plain = mj.run(model(), IDS)
    at = lambda out, p: np.asarray(mj.metrics.logit(7, pos=p)(out))
    assert (at(cut, pos) == 0).all() and np.allclose(at(cut, 0), at(plain, 0)) and (at(plain, pos) != 0).all()


@pytest.mark.parametrize("call", [
    lambda pos: mj.gradients(model(), IDS, mj.metrics.logit(7), ("resid_post",), pos=pos).grads["resid_post"],
    lambda pos: mj.concept(model(), positive=IDS, negative=[[9, *row[1:]] for row in IDS], site="resid_post", metric=mj.metrics.logit(7), pos=pos).direction.values,
])  # fmt: skip
def test_gradients_and_concepts_at_positions(call):
    assert np.isfinite(call([[1], [2], [3]])).all()
    with refused(ValueError, "could be 3 positions of every example"):
        call([1, 2, 3])


def test_a_metric_module_of_ones_own_that_says_a_list():
    import equinox as eqx

    class Last(eqx.Module):
        pos: tuple = (1, 2, 3)

        def __call__(self, out):
            return out.readout.final[:, -1, 0]

    with refused(ValueError, "could be 3 positions of every example"):
        mj.sweep(model(), IDS, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, Last(), progress=False)
