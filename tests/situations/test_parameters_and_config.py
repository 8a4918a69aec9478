"""Parameters are held against the config: their names, shapes and dtypes, at trace time, by name."""

import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.model.norm import Norm
from mijax.model.transformer import check_parameters
from tests.architectures import ARCHITECTURES, random_model
from tests.reference.tiny_models import MODELS, STORED
from tests.situations import refused

pytestmark = pytest.mark.usefixtures("as_a_user")
MODEL = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
PLAIN = random_model(ARCHITECTURES["normless"], dtype=jnp.float32)  # without biases in q, k, v and the MLP
GATED = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32)


def put(model, place, value):
    """The model with another value (or none) for one parameter."""
    return eqx.tree_at(place, model, value, is_leaf=lambda x: x is None)


SHAPES = {
    "fewer positions": (lambda: put(MODEL, lambda m: m.W_pos, MODEL.W_pos[:2]), r"W_pos has shape \(2, 12\), expected \(16, 12\)"),
    "fewer tokens": (lambda: put(MODEL, lambda m: m.W_E, MODEL.W_E[:5]), r"W_E has shape \(5, 12\), expected \(19, 12\)"),
    "a head of another vocabulary": (lambda: put(GATED, lambda m: m.W_U, GATED.W_E[:7]), r"W_U has shape \(7, 12\), expected \(19, 12\)"),
    "axes in another order": (lambda: put(MODEL, lambda m: m.blocks.attn.W_O, jnp.swapaxes(MODEL.blocks.attn.W_O, 1, 2)), r"blocks.attn.W_O has shape \(3, 3, 4, 12\), expected \(3, 4, 3, 12\)"),
    "a bias that broadcasts": (lambda: put(MODEL, lambda m: m.blocks.attn.b_O, jnp.ones((3, 1))), r"blocks.attn.b_O has shape \(3, 1\), expected \(3, 12\)"),
    "one layer's weights": (lambda: put(GATED, lambda m: m.blocks.mlp.W_in, GATED.blocks.mlp.W_in[:1]), r"blocks.mlp.W_in has shape \(1, 12, 10\), expected \(3, 12, 10\)"),
    "keys of all heads": (lambda: put(GATED, lambda m: m.blocks.attn.W_K, GATED.blocks.attn.W_Q), r"blocks.attn.W_K has shape \(3, 12, 4, 6\), expected \(3, 12, 2, 6\)"),
    "two at once": (lambda: put(put(MODEL, lambda m: m.W_E, MODEL.W_E[:5]), lambda m: m.ln_final.bias, jnp.ones(1)), r"W_E has shape .*; ln_final.bias has shape \(1,\)"),
}  # fmt: skip
NAMES = {
    "an unembedding bias": (lambda: put(MODEL, lambda m: m.b_U, jnp.ones(19)), r"b_U is there, which unembed_bias=False does not announce \(set unembed_bias=True\)"),
    "an untied unembedding": (lambda: put(MODEL, lambda m: m.W_U, MODEL.W_E), r"W_U is there, which tied_unembed=True does not announce \(set tied_unembed=False\)"),
    "no unembedding": (lambda: put(GATED, lambda m: m.W_U, None), "W_U is missing, which tied_unembed=False announces"),
    "a bias of the values alone": (lambda: put(PLAIN, lambda m: m.blocks.attn.b_V, jnp.ones((3, 4, 3))), r"blocks.attn.b_V is there, which attn_bias=.* \(set attn_bias='.*v'\)"),
    "no bias of the keys": (lambda: put(MODEL, lambda m: m.blocks.attn.b_K, None), "blocks.attn.b_K is missing, which attn_bias='qkvo' announces"),
    "a bias after attention": (lambda: put(GATED, lambda m: m.blocks.attn.b_O, jnp.ones((3, 12))), "blocks.attn.b_O is there, which attn_bias=''"),
    "one bias of the MLP": (lambda: put(GATED, lambda m: m.blocks.mlp.b_gate, jnp.ones((3, 10))), "blocks.mlp.b_gate is there, which mlp_bias=False .* come together"),
    "a bias of an RMSNorm": (lambda: put(GATED, lambda m: m.blocks.ln2.bias, jnp.ones((3, 12))), "blocks.ln2.bias is there, which norm_bias=False"),
    "a norm's weight in a model without norms": (lambda: put(PLAIN, lambda m: m.ln_final, Norm(jnp.ones(12), None)), "ln_final.weight is there, which norm='none' does not announce"),
    "positions in a model without": (lambda: put(PLAIN, lambda m: m.W_pos, jnp.ones((16, 12))), "W_pos is there, which positions='none' does not announce"),
    "no gate": (lambda: put(GATED, lambda m: m.blocks.mlp.W_gate, None), "blocks.mlp.W_gate is missing, which mlp='gated' announces"),
    "no queries": (lambda: put(GATED, lambda m: m.blocks.attn.W_Q, None), "blocks.attn.W_Q is missing"),
}  # fmt: skip
DTYPES = {
    "integers": (lambda: put(MODEL, lambda m: m.W_E, MODEL.W_E.astype(int)), "W_E has dtype int32, expected floating point"),
    "booleans": (lambda: put(MODEL, lambda m: m.ln_final.bias, jnp.ones(12, bool)), "ln_final.bias has dtype bool"),
    "two dtypes": (lambda: put(MODEL, lambda m: m.W_pos, MODEL.W_pos.astype(jnp.bfloat16)), "parameters must be of one dtype: most have float32, W_pos has dtype bfloat16"),
    "a number": (lambda: put(MODEL, lambda m: m.ln_final.bias, 0.0), "ln_final.bias has shape None, expected"),
}  # fmt: skip
FAULTS = SHAPES | NAMES | DTYPES


@pytest.mark.parametrize("what", FAULTS)
def test_a_model_with(what):
    make, message = FAULTS[what]
    with refused(ValueError, f"the model's parameters do not fit its config: {message}"):
        check_parameters(make())


@pytest.mark.parametrize("what", ["fewer positions", "an unembedding bias", "two dtypes"])
def test_a_model_that_is_traced_or_only_described(what):
    make, message = FAULTS[what]
    for check in (jax.jit(check_parameters), jax.grad(lambda m: check_parameters(m) or 0.0)):
        with refused(ValueError, message):
            check(make())
    with refused(ValueError, message):
        check_parameters(jax.eval_shape(make))


def test_models_stacked_by_vmap():
    keys = jax.random.split(jax.random.key(0), 5)
    stacked = jax.vmap(lambda key: mj.init(ARCHITECTURES["llama_gqa"], key))(keys)
    with refused(ValueError, "all parameters have a leading axis of 5: vmap over the model"):
        check_parameters(stacked)
    jax.vmap(check_parameters)(stacked)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_that_we_make_fits(name):
    """Fresh, cast, traced, described, and after every step of processing that applies."""
    model = random_model(ARCHITECTURES[name], dtype=jnp.float32)
    check_parameters(model)
    check_parameters(jax.tree.map(lambda x: np.asarray(x, np.float16), model))
    jax.jit(check_parameters)(model)
    check_parameters(jax.eval_shape(lambda: model))
    done = 0
    p = mj.processing
    for step in (p.fold_norms, p.centre_writes, p.centre_unembedding, p.fold_value_biases, p.simplify):
        try:
            processed = step(model)
        except ValueError:
            continue
        check_parameters(processed)
        done += 1
    assert done >= 2


@pytest.mark.parametrize("name", MODELS)
def test_every_model_that_we_load_fits(name):
    check_parameters(mj.load(STORED / name)[0])


def test_the_check_costs_no_time():
    """Well below a millisecond, for every driver makes it on every call."""
    check_parameters(MODEL)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        check_parameters(MODEL)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-4


def test_the_check_moves_nothing_to_the_device():
    model = mj.init(dataclasses.replace(ARCHITECTURES["gpt2"], n_ctx=17), jax.random.key(0))
    with jax.transfer_guard("disallow"):
        check_parameters(model)
