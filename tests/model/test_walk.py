"""The walk over the layers: ranges compose, what lies outside them is not computed, and there is no other loop."""

import ast
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import pytest

import mijax as mj
from mijax.model.tap import Nothing
from tests.architectures import ARCHITECTURES, batch, error, random_model

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def stream(model, tokens, *ranges, grouped=None):
    """The final stream, the layers walked in several ranges; and the sum of each layer's mean, stacked."""
    frame = model.frame(tokens)
    x, _ = model.embed(jnp.asarray(tokens.ids), frame, Nothing(), None)

    def body(layer, x, weight):
        x, _ = layer(x, frame, Nothing(), None)
        return x, weight * jnp.mean(x)

    means, weights = 0.0, jnp.arange(1.0, 1 + model.n_layers)
    for how in ranges:
        x, part = model.walk(body, x, weights, **how)
        means += part
    return model.final(x, frame, Nothing(), None)[0], means


def flat(tree):
    """All numbers of a pytree: those of some parameters' gradients are rounding alone."""
    return jax.flatten_util.ravel_pytree(tree)[0]


@each_architecture
def test_walking_a_range_and_then_the_next_is_walking_both(x64, name):
    """With bounds that are data, forwards and in the gradient with respect to the parameters."""
    model, tokens = random_model(ARCHITECTURES[name]), batch("left")

    @eqx.filter_jit
    def value(model, at):
        ranges = [{}] if at is None else [{"last": at}, {"first": at}]
        (final, means), real = stream(model, tokens, *ranges), jnp.asarray(tokens.mask)
        return jnp.sum(jnp.where(real[..., None], final, 0.0) ** 2) + jnp.sum(means), means

    whole, means = value(model, None)
    slope = lambda at: flat(eqx.filter_grad(lambda m: value(m, at)[0])(model))
    for at in (0, 1, 2, 3):
        there, split_means = value(model, jnp.int32(at))
        assert abs(there - whole) < 1e-10 * abs(whole) and error(split_means, means) < 1e-10
    assert error(slope(jnp.int32(2)), slope(None)) < 1e-10


def test_what_lies_outside_is_left_as_it_is(x64):
    model = random_model(ARCHITECTURES["gpt2"])
    body = lambda layer, carry, x: (carry + 10.0 * layer.index.astype(float), (layer.index, x))
    carry, (index, xs) = model.walk(body, jnp.float64(0), jnp.arange(1.0, 4), first=1, last=jnp.int32(2))
    assert float(carry) == 10 and index.tolist() == [0, 1, 0] and xs.tolist() == [0, 2, 0]


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_layer_that_the_backward_pass_computes_again_gives_the_same(x64, group):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("right")

    def value(model, **how):
        final, means = stream(model, tokens, how)
        return jnp.sum(jnp.where(jnp.asarray(tokens.mask)[..., None], final, 0.0) ** 2) + jnp.sum(means)

    again = {"remat": lambda f: jax.checkpoint(f, prevent_cse=False), "group": group}
    plain, kept = (eqx.filter_grad(lambda m, how=how: value(m, **how))(model) for how in ({}, again))
    assert error(flat(kept), flat(plain)) < 1e-10
    if group > 1:
        with pytest.raises(
            ValueError, match=f"groups of {group} layers are computed again where all layers are walked"
        ):
            value(model, last=2, **again)


def test_a_part_of_the_layers_may_be_computed_again(x64):
    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("right")
    again = {"remat": lambda f: jax.checkpoint(f, prevent_cse=False)}

    @eqx.filter_jit
    def slope(model, at, how):
        def value(model):
            final, means = stream(model, tokens, {"last": at, **how}, {"first": at, **how})
            return jnp.sum(jnp.where(jnp.asarray(tokens.mask)[..., None], final, 0.0) ** 2) + jnp.sum(means)

        return eqx.filter_grad(value)(model)

    program = lambda how: str(eqx.filter_make_jaxpr(slope)(model, jnp.int32(1), how)[0])
    assert "remat" in program(again) and "remat" not in program({})
    assert error(flat(slope(model, jnp.int32(1), again)), flat(slope(model, jnp.int32(1), {}))) < 1e-10


@pytest.mark.parametrize("layers, run", [([0], [0]), ([1], [0, 1]), ([-2, 0], [0, 1]), ([2], [0, 1, 2])])
def test_nothing_above_the_last_captured_layer_is_computed_without_a_readout(layers, run):
    """Layers call back when they are really computed."""
    model, tokens, called = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32), batch("left"), []

    def watched(x, site, layer, positions):
        jax.debug.callback(lambda layer: called.append(int(layer)), layer)
        return x

    capture = {"z": mj.Where(layer=layers, pos=-1), "embed": None, "mlp_out": mj.Where(layer=layers[0])}
    out = mj.run(model, tokens, {"resid_pre": watched}, capture=capture, readout=False)
    jax.effects_barrier()
    whole = mj.run(model, tokens, capture=capture)
    assert out.readout is None and called == run
    for site, act in whole.acts.items():
        assert error(out.acts[site], act) < 1e-6


@pytest.mark.parametrize("capture, run", [(("z",), 3), (("embed", "z"), 3), (("ln_final.scale",), 3)])
def test_what_is_captured_of_all_layers_or_after_them_takes_them_all(capture, run):
    model, tokens, called = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32), batch("left"), []
    watched = lambda x, site, layer, positions: (jax.debug.callback(lambda: called.append(1)), x)[1]
    out = mj.run(model, tokens, {"resid_pre": watched}, capture=capture, readout=False)
    jax.effects_barrier()
    assert len(called) == run and set(out.acts) == set(capture)
    whole = mj.run(model, tokens, capture=capture)
    assert all(error(out.acts[site], whole.acts[site]) < 1e-6 for site in capture)


def test_9_other_layers_compile_nothing_and_a_vmap_over_them_is_a_loop(x64):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def at(layer):
        return mj.run(model, tokens, capture={"resid_mid": mj.Where(layer=layer)}, readout=False).acts["resid_mid"]

    each = [at(jnp.int32(layer)) for layer in range(3)]
    assert error(jax.vmap(at)(jnp.arange(3, dtype=jnp.int32)), jnp.stack(each)) < 1e-10
    slope = jax.grad(lambda edit: jnp.sum(mj.run(
        model, tokens, {"z": mj.Add(edit)}, capture={"attn_out": mj.Where(layer=1, pos=-1)}, readout=False
    ).acts["attn_out"]))  # fmt: skip
    full = jax.grad(lambda edit: jnp.sum(
        mj.run(model, tokens, {"z": mj.Add(edit)}, capture={"attn_out": mj.Where(layer=1, pos=-1)}).acts["attn_out"]
    ))  # fmt: skip
    assert error(slope(jnp.float64(0.3)), full(jnp.float64(0.3))) < 1e-10


def test_there_is_one_block_and_one_loop_over_layers():
    """`block` is called in one module, and only the walk scans over layers; no other module slices layers' parameters."""
    calls: dict[str, set[str]] = {"block": set(), "scan": set(), "fori_loop": set()}
    for path in Path(mj.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name in calls:
                    calls[name].add(str(path.relative_to(Path(mj.__file__).parent)))
    assert calls["block"] == {"model/walk.py"} and not any("model/" in p for p in calls["fori_loop"])
    others = {
        "generation/generate.py",
        "attribution/integrated.py",
        "attribution/atp_star.py",
        "attribution/curvature.py",
    }  # tokens, steps, dropped layers, probes
    others |= {"programs/hoist.py", "attribution/probe.py", "model/experts.py"}  # blocks of experts
    assert {p for p in calls["scan"] if not p.startswith("superposition/")} <= {"model/walk.py", *others}


ABOVE = {
    "a later layer": ({"z": mj.Scale(0.0, mj.Where(layer=2))}, {"z": mj.Where(layer=1)}),
    "several later layers": ({"mlp_out": mj.Scale(0.0, mj.Where(layer=[1, -1]))}, {"resid_post": mj.Where(layer=0)}),
    "the last norm": ({"final_in": mj.Scale(0.0)}, {"z": mj.Where(layer=1)}),
    "any layer": ({"z": mj.Scale(0.0)}, ("embed",)),
}


@pytest.mark.parametrize("where", ABOVE)
def test_an_edit_above_all_that_is_captured_is_refused_without_a_readout(where):
    edits, capture = ABOVE[where]
    model, tokens = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32), batch("none")
    with pytest.raises(ValueError, match="acts above all that is captured, which readout=False leaves out"):
        mj.run(model, tokens, edits, capture=capture, readout=False)
    assert mj.run(model, tokens, edits, capture=capture).acts
    with pytest.raises(ValueError, match="it has no logits"):
        _ = mj.run(model, tokens, capture=capture, readout=False).logits
