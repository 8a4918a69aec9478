"""Sampling settings at and beyond the edge: the tokens that they mean, or an error, or -1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.generation.sampling import as_sampling, sample
from tests.situations import refused
from tests.situations.models import model

PROMPTS = [[1, 2, 3], [4, 5, 6]]
go = lambda temperature=0.0, **how: np.asarray(
    mj.generate(model(), PROMPTS, max_new_tokens=2, temperature=temperature, key=jax.random.key(0), **how).ids
)[:, 3:]


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-50])
def test_a_tiny_temperature_is_greedy(temperature):
    assert (go(temperature) == go()).all()


@pytest.mark.parametrize("how", [jax.jit, lambda f: lambda t: jax.vmap(f)(t[None])[0]])
def test_a_temperature_that_only_a_trace_knows(how):
    ids = lambda t: mj.generate(model(), PROMPTS, max_new_tokens=2, temperature=t, key=jax.random.key(0)).ids[:, 3:]
    traced = lambda t: np.asarray(how(ids)(jnp.float32(t)))
    assert (traced(0.0) == go()).all() and (traced(0.7) == go(0.7)).all()
    for wrong in (np.nan, -1.0, np.inf):
        assert (traced(wrong) == -1).all()


def test_the_smallest_top_p_keeps_the_likeliest_token():
    assert (go(1.0, top_p=1e-50) == go()).all()


def drawn(logits, **cuts) -> set[int]:
    sampling, filtered = as_sampling(1.0, *(cuts.get(name) for name in ("top_k", "top_p", "min_p")), len(logits))
    draw = lambda key: sample(jnp.asarray([logits], jnp.float32), sampling, filtered, key)[0]
    return set(np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 500))).tolist())


@pytest.mark.parametrize("cuts, kept", [
    ({"top_p": 0.5}, {0, 1, 2, 3}), ({"top_p": 0.51}, {0, 1, 2, 3, 4}), ({"top_k": 3}, set(range(8))), ({"min_p": 1.0}, set(range(8))),
])  # fmt: skip
def test_cuts_among_equal_logits(cuts, kept):
    """Eight tokens of 1/8 each. As transformers: `TopPLogitsWarper` keeps the fewest, the others all that are equal."""
    assert drawn([0.0] * 8, **cuts) == kept


def test_cuts_of_a_distribution():
    probs = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    assert drawn(np.log(probs), top_k=2) == {1, 3}
    assert drawn(np.log(probs), top_p=0.65) == {1, 3} and drawn(np.log(probs), top_p=0.75) == {1, 3, 4}
    assert drawn(np.log(probs), min_p=0.3) == {1, 3, 4} and drawn(np.log(probs), top_k=4, top_p=0.85) == {1, 3, 4}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("how, message", [
    ({"top_k": 2.5}, "top_k must be a whole number"), ({"top_k": np.nan}, "top_k must be a whole number"), ({"top_k": True}, "top_k must be a whole number"),
    ({"top_k": np.array([1, 2])}, "top_k must be a whole number"), ({"top_p": np.array([0.5, 0.6])}, "top_p must be one number"), ({"top_p": "0.5"}, "top_p must be one number"),
    ({"stop": 2.5}, "a stop token must be a whole number"), ({"stop": [2.5]}, "a stop token"), ({"stop": True}, "a stop token"), ({"stop": [[1, 2]]}, "a stop token"),
    ({"key": 3}, "key must be one random key"), ({"key": jax.random.split(jax.random.key(0))}, "key must be one random key"),
])  # fmt: skip
def test_settings_of_another_type(how, message):
    with refused(TypeError, message):
        mj.generate(model(), PROMPTS, max_new_tokens=2, **{"temperature": 1.0, "key": jax.random.key(0)} | how)


@pytest.mark.parametrize("how", [{"top_p": np.nan}, {"top_p": 0.0}, {"min_p": np.nan}, {"min_p": 1.5}, {"top_k": 0}])
def test_settings_out_of_their_range(how):
    with refused(ValueError, f"{next(iter(how))} must be"):
        go(1.0, **how)
