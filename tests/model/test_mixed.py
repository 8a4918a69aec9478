"""Models of which some layers have an MLP and the others experts (values and edits at every site: the laws, on the architecture `experts`)."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import mijax as mj
from mijax.checkpoints.registry import FAMILIES
from tests.architectures import ARCHITECTURES, IDS, batch, error, on_real, random_model
from tests.files.formats import family_json
from tests.situations import refused

pytestmark = pytest.mark.usefixtures("x64")
MIXED = ARCHITECTURES["experts"]  # layer 1 has an MLP, layers 0 and 2 experts
METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
METRIC_OF_TWO = mj.metrics.logit_diff(3, 4)
BOTH = {"clean": batch("left"), "corrupted": batch("left", (IDS + 5) % 19)}


@pytest.fixture
def model():
    return random_model(MIXED)


def test_what_a_layer_lacks_is_nan(model):
    acts = mj.run(model, batch("left"), capture=("post", "router_logits", "shared_post", "mlp_out")).acts
    is_nan = {site: np.isnan(x).all(axis=(1, 2, 3)).tolist() for site, x in acts.items()}
    absent = [False, True, False]
    assert is_nan == {
        "post": [True, False, True],
        "router_logits": absent,
        "shared_post": absent,
        "mlp_out": [False] * 3,
    }
    assert acts["post"].shape[-1] == 10 and acts["shared_post"].shape[-1] == 6


@pytest.mark.parametrize(
    "name, layer, site", [("an index", 0, "post"), ("from the end", -1, "post"), ("a list", [0, 1], "router_logits")]
)
def test_a_layer_without_the_site_is_refused(model, name, layer, site):
    tokens, where = batch("left"), mj.Where(layer=layer)
    message = rf"layer \d has no site '{site}', which is in layers \[(1|0, 2)\]"
    with refused(ValueError, message):
        mj.run(model, tokens, {site: mj.Scale(0.0, where)})
    with refused(ValueError, message):
        mj.run(model, tokens, capture={site: where})
    layers = layer if isinstance(layer, list) else [1, layer]
    with refused(ValueError, message):
        mj.sweep(model, tokens, {site: mj.Scale(0.0, mj.grid(layer=layers))}, METRIC, progress=False)
    traced = jax.jit(lambda layer: mj.run(model, tokens, {site: mj.Scale(0.0, mj.Where(layer=layer))}).logits)
    assert np.isnan(traced(jnp.asarray(layer, jnp.int32))).all()


def test_a_mask_selects_among_the_layers_that_have_the_site(model):
    tokens, scaled = batch("left"), lambda where: {"post": mj.Scale(0.0, where)}
    of_mask = mj.run(model, tokens, scaled(mj.Where(layer=np.array([True, True, False])))).logits
    of_index = mj.run(model, tokens, scaled(mj.Where(layer=1))).logits
    everywhere = mj.run(model, tokens, scaled(mj.Where())).logits
    assert (on_real(of_mask, tokens) == on_real(of_index, tokens)).all()
    assert (on_real(everywhere, tokens) == on_real(of_index, tokens)).all()
    with refused(
        ValueError, r"Scale at site 'post' selects nothing: the site is in layers \[1\], which its mask leaves out"
    ):
        mj.run(model, tokens, scaled(mj.Where(layer=np.array([True, False, True]))))


@pytest.mark.parametrize("site, layers", [("post", [1]), ("router_logits", [0, 2]), ("expert_weights", [0, 2])])
def test_grids_are_over_the_layers_that_have_the_site(model, site, layers):
    """Patching is a loop of runs."""
    over = ("layer", "pos")
    exact = mj.patch(model, **BOTH, site=site, over=over, metric=METRIC, progress=False)
    assert exact["layer"].values.tolist() == layers
    source = mj.run(model, BOTH["clean"], capture=(site,)).acts[site]
    for i, layer in enumerate(layers):
        edited = mj.run(model, BOTH["corrupted"], {site: mj.Replace(source, mj.Where(layer=layer, pos=-1))})
        patched = exact.isel(layer=i, pos=5, batch=0)  # the first prompt, whose last position is 5
        assert abs(float(patched) - float(METRIC(edited)[0])) < 1e-10


@pytest.mark.parametrize("site, layers", [("post", [1]), ("router_logits", [0, 2]), ("expert_weights", [0, 2])])
def test_effects_are_estimated_at_the_layers_that_have_the_site(model, site, layers):
    """They are slopes, with the labels of these layers; in other layers a gate has slope zero."""
    over, source = ("layer", "pos"), mj.run(model, BOTH["clean"], capture=(site,)).acts[site]
    estimated = mj.attribute(model, **BOTH, sites={site: over}, metric=METRIC, verify=None)
    assert estimated[site]["layer"].values.tolist() == layers
    base, gate = float(METRIC(mj.run(model, BOTH["corrupted"]))[0]), jnp.zeros((3, 3, 6))  # [layer, batch, pos]
    measured = lambda gate: jnp.sum(METRIC(mj.run(model, BOTH["corrupted"], {site: mj.Mix(gate[..., None], source)})))
    slopes = np.asarray(jax.grad(measured)(gate))
    assert np.isfinite(slopes).all() and (slopes[[i for i in range(3) if i not in layers]] == 0).all()
    for i, layer in enumerate(layers):  # the first prompt has no padding
        effects = estimated[site].isel(layer=i, batch=0).values - base
        np.testing.assert_allclose(effects, slopes[layer, 0], atol=1e-9)


def test_one_layer_costs_what_it_has(model):
    """The scan has one branch for each kind, and its length adds nothing to the program."""
    tokens = batch("none")

    def program(n_layers, dense):
        config = dataclasses.replace(MIXED, n_layers=n_layers, dense_layers=dense, window=0)
        model = jax.eval_shape(lambda: random_model(config))
        return jax.make_jaxpr(lambda m: mj.run(m, tokens).logits)(model)

    count = lambda jaxpr: sum(1 + sum(map(count, jaxprs_in_params(e.params))) for e in jaxpr.eqns)
    assert count(program(3, (1,)).jaxpr) == count(program(12, (0, 2, 4, 6, 8, 10)).jaxpr)


def test_the_gradient_of_every_parameter(model):
    """Against central differences along a random direction, of each array: right to h^2 f''' and rounding / h = 1e-9."""
    tokens, rng = batch("left"), np.random.default_rng(0)
    loss = lambda m: jnp.sum(METRIC(mj.run(m, tokens)))
    grads, value = eqx.filter_grad(loss)(model), eqx.filter_jit(loss)
    for part in ("mlp", "experts"):
        parameters = getattr(model.blocks, part)
        direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), parameters)
        moved = lambda h: eqx.tree_at(
            lambda m: getattr(m.blocks, part), model, jax.tree.map(lambda a, d: a + h * d, parameters, direction)
        )
        difference = float(value(moved(1e-6)) - value(moved(-1e-6))) / 2e-6
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), getattr(grads.blocks, part), direction)))
        assert abs(difference - float(slope)) < 1e-5 * max(1.0, abs(difference))


def test_recomputed_and_batched_over_models(model):
    """The range that is walked in parts, gradients with recomputation, and a vmap over models."""
    tokens = batch("left")
    plain = mj.run(model, tokens).logits
    other = random_model(MIXED, seed=1)
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), model, other)
    both = eqx.filter_vmap(lambda m: mj.run(m, tokens).logits)(stack)
    assert error(on_real(both[0], tokens), on_real(plain, tokens)) < 1e-10
    assert error(on_real(both[1], tokens), on_real(mj.run(other, tokens).logits, tokens)) < 1e-10
    whole = mj.attribute(model, **BOTH, sites={"z": None}, metric=METRIC, verify=None)["z"]
    tight = mj.attribute(model, **BOTH, sites={"z": None}, metric=METRIC, verify=None, memory=2**17)["z"]
    np.testing.assert_allclose(whole.values, tight.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", ["fold_norms", "fold_value_biases"])
def test_processing_keeps_the_log_probabilities(function):
    model, tokens = random_model(dataclasses.replace(MIXED, sinks=False)), batch("left")
    before, after = mj.run(model, tokens).logits, mj.run(getattr(mj.processing, function)(model), tokens).logits
    assert error(on_real(jax.nn.log_softmax(after), tokens), on_real(jax.nn.log_softmax(before), tokens)) < 1e-10


def test_gradients_of_an_edit_that_is_captured_are_finite(model):
    """In layers that lack the site the edit meets NaN, which a zero derivative does not stop."""
    tokens, basis = batch("none"), jnp.asarray(np.random.default_rng(0).normal(size=(2, 10)))
    where = mj.Where(layer=1)

    def loss(factor, captured):
        out = mj.run(model, tokens, {"post": mj.Scale(factor)}, capture={"post": captured})
        return jnp.sum(out.acts["post"][1 if captured is None else 0])

    for captured in (None, where):
        slope = jax.grad(loss)(1.0, captured)
        plain = jnp.sum(mj.run(model, tokens, capture={"post": where}).acts["post"])
        np.testing.assert_allclose(slope, plain, rtol=1e-9)
    projected = lambda basis: jnp.sum(
        mj.run(model, tokens, {"post": mj.Project(basis, where)}, capture={"post": where}).acts["post"]
    )
    assert np.isfinite(jax.grad(projected)(basis)).all()


def test_an_edit_above_what_is_captured_is_refused(model):
    edit = {"router_logits": mj.Scale(0.0, mj.Where(layer=2))}
    with refused(ValueError, "acts above all that is captured"):
        mj.run(model, batch("none"), edit, capture={"router_logits": mj.Where(layer=0)}, readout=False)


def test_positions_that_cannot_differ_have_no_effect_at_all(model):
    """Exactly zero, though what two layers have at the site is NaN in both runs."""
    other = np.array(IDS)
    other[:, 3:] = (other[:, 3:] + 5) % 19
    effects = mj.patch(model, clean=other, corrupted=IDS, site="post", over=("pos",), metric=METRIC, progress=False)
    change = effects.values - effects.base.values
    assert (change[:3] == 0).all() and (change[3:] != 0).any()


def test_a_concept_has_the_directions_of_the_layers_that_have_the_site(model):
    result = mj.concept(model, positive=IDS[:2], negative=(IDS[:2] + 5) % 19, site="shared_post", metric=METRIC_OF_TWO)
    assert result["layer"].values.tolist() == [0, 2] and np.isfinite(result.direction.values).all()


REFUSED = {
    "without experts": ({"experts": None, "d_mlp": 10}, r"dense_layers=\(1,\) needs experts in the other layers"),
    "all layers": ({"dense_layers": (0, 1, 2)}, "dense_layers are all layers: leave out experts"),
    "beyond the last": ({"dense_layers": (3,)}, r"dense_layers=\(3,\) must be different layers, of 3"),
    "twice": ({"dense_layers": (1, 1)}, r"dense_layers=\(1, 1\) must be different layers, of 3"),
    "a boolean": ({"dense_layers": (True,)}, r"dense_layers=\(True,\) must be a sequence of integers"),
    "a number": ({"dense_layers": 1}, "dense_layers=1 must be a sequence of integers"),
    "two widths in all layers": ({"dense_layers": ()}, "d_mlp=10 does not go with experts of d_mlp=7 in all layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_do_not_fit(name, as_a_user):
    fields, message = REFUSED[name]
    with refused(ValueError, message):
        dataclasses.replace(MIXED, **fields)


def test_equal_architectures_are_equal_configs(as_a_user):
    of_all = dataclasses.replace(MIXED, dense_layers=(), d_mlp=0)
    assert of_all.d_mlp == 7 and of_all == dataclasses.replace(MIXED, dense_layers=(), d_mlp=7, experts=MIXED.experts)
    assert dataclasses.replace(MIXED, dense_layers=[np.int64(1)]) == MIXED
    assert (MIXED.mlp_layers, MIXED.expert_layers) == ((1,), (0, 2))


@pytest.mark.parametrize("key", ["moe_intermediate_size", "intermediate_size"])
def test_a_file_that_says_no_neurons_is_refused(key):
    """Zero would otherwise stand for a number that is derived."""
    c = json.loads(family_json("qwen3_moe")) | {"decoder_sparse_step": 2, "mlp_only_layers": None}
    assert FAMILIES["qwen3_moe"].config(c).dense_layers == (0, 2)
    with refused(ValueError, f"{key}=0 must be a positive integer"):
        FAMILIES["qwen3_moe"].config(c | {key: 0})
