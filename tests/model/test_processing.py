"""Weight processing leaves every log-probability as it was (float64, 1e-10), and does what it is for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, PADDINGS, batch, error, random_model
from tests.situations import refused

pytestmark = pytest.mark.usefixtures("x64")
P = mj.processing


def orthogonal(*shape):
    return jnp.linalg.qr(jnp.asarray(np.random.default_rng(0).normal(size=(*shape, shape[-1]))))[0]


def per_head(rotate):
    return lambda model: rotate(model, orthogonal(model.config.n_layers, model.config.n_kv_heads, model.config.d_head))


# name: (function, which models it applies to)
FUNCTIONS = {
    "fold_norms": (P.fold_norms, lambda c: c.norm != "none" and c.norm_at in ("input", "both")),
    "centre_writes": (P.centre_writes, lambda c: c.norm == "layer" and c.norm_at == "input"),
    "centre_unembedding": (P.centre_unembedding, lambda c: not c.logits_cap),
    "fold_value_biases": (P.fold_value_biases, lambda c: "v" in c.attn_bias and not c.sinks),
    "simplify": (P.simplify, lambda c: True),
    "rotate_qk": (per_head(P.rotate_qk), lambda c: isinstance(c.positions, str)),
    "rotate_ov": (per_head(P.rotate_ov), lambda c: True),
    "rotate_stream": (lambda m: P.rotate_stream(m, orthogonal(m.config.d_model)), lambda c: c.norm == "none"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_log_probabilities_stay(name, function):
    model = random_model(ARCHITECTURES[name])
    change, applies = FUNCTIONS[function]
    if not applies(model.config):
        with pytest.raises(ValueError, match=r"does not apply|needs"):
            change(model)
        return
    changed = change(model)
    differ = [
        a.shape != b.shape or float(jnp.max(jnp.abs(a - b))) > 1e-3
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(changed))
    ]
    assert any(differ) or len(jax.tree.leaves(model)) != len(jax.tree.leaves(changed))
    for padding in PADDINGS:
        tokens = batch(padding)
        real = np.asarray(tokens.mask)
        log_probs = lambda m, tokens=tokens, real=real: np.asarray(jax.nn.log_softmax(mj.run(m, tokens).logits))[real]
        assert error(log_probs(changed), log_probs(model)) < 1e-10
    # the config says what the model has: a fresh one of it has the same structure
    fresh = jax.eval_shape(lambda: mj.init(changed.config, jax.random.key(0), jnp.float64))
    assert jax.tree.structure(fresh) == jax.tree.structure(changed)
    assert [a.shape for a in jax.tree.leaves(fresh)] == [a.shape for a in jax.tree.leaves(changed)]


def test_what_it_is_for():
    model = P.simplify(random_model(ARCHITECTURES["gpt2"]))
    norms = (model.blocks.ln1, model.blocks.ln2, model.ln_final)
    assert all((n.weight == 1).all() and (n.bias == 0).all() for n in norms)
    out = mj.run(model, batch("none"), capture=("embed", "pos_embed", "result", "attn_out", "mlp_out", "resid_post"))
    for site, written in out.acts.items():
        assert np.abs(np.asarray(written).mean(-1)).max() < 1e-10 * np.abs(np.asarray(written)).max(), site
    assert np.abs(np.asarray(out.logits).mean(-1)).max() < 1e-10 * np.abs(np.asarray(out.logits)).max()
    assert (model.blocks.attn.b_V == 0).all()


def stacked():
    models = (random_model(ARCHITECTURES["gpt2"], seed) for seed in range(3))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_models_that_are_stacked_or_of_another_shape(function, as_a_user):
    """A mean over models would be one over tokens."""
    with refused(ValueError, "all parameters have a leading axis of 3: vmap over the model"):
        FUNCTIONS[function][0](stacked())
    model = random_model(ARCHITECTURES["normless"])
    with refused(ValueError, r"parameters do not fit its config: W_E has shape \(1, 12\), expected \(19, 12\)"):
        FUNCTIONS[function][0](dataclasses.replace(model, W_E=model.W_E[:1]))


def test_what_is_no_transformer(as_a_user):
    for name in ("fold_norms", "centre_writes", "centre_unembedding", "fold_value_biases", "simplify"):
        with refused(TypeError, f"{name} takes a Transformer, given NoneType"):
            getattr(P, name)(None)
    with refused(TypeError, "rotate_ov takes a Transformer, given NoneType"):
        P.rotate_ov(None, np.eye(2))


def test_vmap_over_models_is_a_loop_of_single_calls():
    models = stacked()
    single = [P.simplify(jax.tree.map(lambda x, i=i: x[i], models)) for i in range(3)]
    for many, *ones in zip(jax.tree.leaves(jax.vmap(P.simplify)(models)), *map(jax.tree.leaves, single), strict=True):
        np.testing.assert_allclose(many, np.stack(ones), atol=1e-12)


PLAIN = ARCHITECTURES["normless"]  # 3 layers, 4 key heads of 3 dimensions, a stream of 12
ROTATIONS = {
    "rotate_qk": (P.rotate_qk, (3, 4, 3, 3), lambda m: m.blocks.attn.W_Q),
    "rotate_ov": (P.rotate_ov, (3, 4, 3, 3), lambda m: m.blocks.attn.W_V),
    "rotate_stream": (P.rotate_stream, (12, 12), lambda m: m.W_E),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_of_another_shape_or_that_rotates_not(name, as_a_user):
    rotate, shape, _ = ROTATIONS[name]
    model, good = random_model(PLAIN), np.asarray(orthogonal(*shape[:-1]))
    for wrong in (good[..., :1, :], good[None], good[0], np.broadcast_to(good, (2, *shape)), 1.0):
        with refused(ValueError, rf"rotation must have shape \({shape[0]}, .*, given \("):
            rotate(model, wrong)
    for wrong in (
        np.ones(shape),
        good + 1e-6,
        good.astype("float32") + np.float32(1e-4),
        good * np.nan,
        np.zeros(shape, int),
    ):
        with refused(
            ValueError, "rotation must be orthogonal: rotation @ rotation.T differs from the identity by up to"
        ):
            rotate(model, wrong)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    with refused(ValueError, "rotation must be orthogonal"):  # rounded further than the model is
        rotate(model, good.astype(jnp.bfloat16))
    assert rotate(half, good.astype(jnp.bfloat16)).W_E.dtype == jnp.bfloat16
    with refused(TypeError, "rotation must be real numbers, given dtype complex128"):
        rotate(model, good.astype(complex))


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_permutation_of_integers_booleans_or_few_bits_is_one_of_floats(name):
    rotate, shape, rotated = ROTATIONS[name]
    model, order = random_model(PLAIN), np.random.default_rng(0).permutation(shape[-1])
    permutation = np.broadcast_to(np.eye(shape[-1], dtype=int)[:, order], shape)
    expected = np.asarray(rotated(model))[..., order]
    for dtype in (int, np.int8, bool, "float16", "bfloat16", "float32", "float64"):
        for matrices in (permutation.astype(dtype), jnp.asarray(permutation).astype(dtype)):
            assert (np.asarray(rotated(rotate(model, matrices))) == expected).all()


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_inside_a_trace(name):
    """It cannot raise there: what is no rotation gives NaN."""
    rotate, shape, rotated = ROTATIONS[name]
    model, good = random_model(PLAIN), orthogonal(*shape[:-1])
    both = jax.vmap(lambda rotation: rotated(rotate(model, rotation)))(jnp.stack([good, good + 1e-6]))
    assert error(both[0], rotated(rotate(model, good))) < 1e-12 and jnp.isnan(both[1]).all()
