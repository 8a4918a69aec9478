"""Weight processing leaves every log-probability as it was (float64, 1e-10), and does what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, PADDINGS, batch, error, random_model

pytestmark = pytest.mark.usefixtures("x64")
P = mj.processing


def orthogonal(*shape):
    return jnp.linalg.qr(jnp.asarray(np.random.default_rng(0).normal(size=(*shape, shape[-1]))))[0]


def per_head(rotate):
    return lambda model: rotate(model, orthogonal(model.config.n_layers, model.config.n_kv_heads, model.config.d_head))


# name: (function, which models it applies to)
FUNCTIONS = {
    "fold_norms": (P.fold_norms, lambda c: c.norm != "none"),
    "centre_writes": (P.centre_writes, lambda c: c.norm == "layer"),
    "centre_unembedding": (P.centre_unembedding, lambda c: True),
    "fold_value_biases": (P.fold_value_biases, lambda c: c.qkv_bias),
    "simplify": (P.simplify, lambda c: True),
    "rotate_qk": (per_head(P.rotate_qk), lambda c: c.positions != "rotary"),
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
