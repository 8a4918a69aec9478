"""`run` inside the user's own transformations, and what is compiled when (law 9)."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, batch, error, random_model
from tests.compilations import compilations

CONFIG = ARCHITECTURES["llama_gqa"]
METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])


@pytest.fixture
def model(x64):
    return random_model(CONFIG)


@pytest.fixture
def source(model):
    return mj.run(model, batch("left", (IDS + 5) % 19), capture=("z",)).acts["z"]


def patched(model, tokens, value, layer, head, metric=METRIC):
    return metric(mj.run(model, tokens, {"z": mj.Replace(value, mj.Where(layer=layer, head=head))}))


def test_vmap_over_where_value_prompt_parameters_and_all_of_them(model, source):
    tokens = batch("left")
    layers, heads = jnp.array([0, 1, 2, 2]), jnp.array([3, 0, 1, 1])
    values = jnp.stack([source, 2 * source, -source, 0 * source])
    prompts = jax.tree.map(
        lambda *x: jnp.stack([jnp.asarray(i) for i in x]), *[batch("left", (IDS + i) % 19) for i in range(4)]
    )
    models = jax.tree.map(lambda *x: jnp.stack(x), *[random_model(CONFIG, seed) for seed in range(4)])
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    cases = {
        "where": (None, None, None, 0, 0),
        "value": (None, None, 0, None, None),
        "prompt": (None, 0, None, None, None),
        "parameters": (0, None, None, None, None),
        "all": (0, 0, 0, 0, 0),
    }
    everything = (models, prompts, values, layers, heads)
    fixed = (model, tokens, source, layers[1], heads[1])
    for case, axes in cases.items():
        given = [whole if axis == 0 else single for axis, whole, single in zip(axes, everything, fixed)]
        together = jax.jit(jax.vmap(patched, in_axes=axes))(*given)
        alone = [patched(*[pick(g, i) if axis == 0 else g for axis, g in zip(axes, given)]) for i in range(4)]
        assert error(together, jnp.stack(alone)) < 1e-10, case


def test_forward_and_reverse_gradients_agree_and_pass_through_scan_and_checkpoint(model, source):
    tokens = batch("left")
    loss = lambda value: jnp.sum(patched(model, tokens, value, 1, 2))
    gradient = jax.grad(loss)(source)
    tangent = jnp.asarray(np.random.default_rng(0).normal(size=source.shape))
    forward = jax.jvp(loss, (source,), (tangent,))[1]
    assert abs(float(forward - jnp.sum(gradient * tangent))) < 1e-10 * abs(float(forward))
    assert error(jax.grad(jax.checkpoint(loss))(source), gradient) < 1e-10
    scanned = lambda value: jax.lax.scan(
        lambda total, layer: (total + jnp.sum(patched(model, tokens, value, layer, 2)), None), 0.0, jnp.arange(3)
    )[0]
    looped = lambda value: sum(jnp.sum(patched(model, tokens, value, layer, 2)) for layer in range(3))
    assert error(jax.jit(jax.grad(scanned))(source), jax.grad(looped)(source)) < 1e-10


def test_gradients_of_every_parameter_and_of_narrowed_captures(model):
    tokens = batch("left")
    loss = lambda m, where: jnp.sum(mj.run(m, tokens, capture={"mlp_out": where}).acts["mlp_out"] ** 2)
    narrowed = eqx.filter_grad(loss)(model, mj.Where(layer=[1]))
    whole = eqx.filter_grad(lambda m: jnp.sum(mj.run(m, tokens, capture=("mlp_out",)).acts["mlp_out"][1] ** 2))(model)
    for a, b in zip(jax.tree.leaves(narrowed), jax.tree.leaves(whole)):
        assert a.shape == b.shape and float(jnp.max(jnp.abs(a - b))) < 1e-10 * max(1.0, float(jnp.max(jnp.abs(b))))


def test_shard_map_over_cells_prompts_and_parameters(model, source):
    tokens, mesh = batch("left"), jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    sharded = lambda f, *specs: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("d")))
    layers = jnp.array([0, 1, 2, 0, 1, 2, 0, 1])
    cells = jax.vmap(lambda layer: patched(model, tokens, source, layer, 1))
    assert error(sharded(cells, P("d"))(layers), cells(layers)) < 1e-10
    kept = jax.vmap(
        lambda layer: mj.run(
            model, tokens, {"z": mj.Scale(0.5, mj.Where(layer=layer))}, capture={"z": mj.Where(layer=[0, 2])}
        ).acts["z"]
    )
    assert error(sharded(kept, P("d"))(layers), kept(layers)) < 1e-10

    prompts = jnp.asarray(np.arange(8 * 5).reshape(8, 5) % 19)
    logits = lambda ids: mj.run(model, ids).readout.logits(pos=-1)
    assert error(sharded(logits, P("d"))(prompts), logits(prompts)) < 1e-10

    models = jax.tree.map(lambda *x: jnp.stack(x), *[random_model(CONFIG, seed) for seed in range(4)])
    gradients = jax.vmap(jax.grad(lambda m: jnp.sum(patched(m, tokens, source, 1, 0))))
    given, expected = sharded(gradients, P("d"))(models), gradients(models)
    chex.assert_trees_all_close(
        given, expected, rtol=1e-10, atol=1e-10 * float(max(abs(x).max() for x in jax.tree.leaves(expected)))
    )


def test_9_new_places_values_answers_and_prompts_compile_nothing(model, source):
    def everything(shift, layer, spot):
        tokens = batch("left", (IDS + shift) % 19)
        edits = {
            "z": mj.Replace(source * shift, mj.Where(layer=layer, head=[0, layer], pos=spot)),
            "resid_pre": [mj.Add(source[0, 0, 0].ravel()[:12] * shift, mj.Where(pos=[[spot], [0], [1]])), mj.Scale(0.1 * shift, mj.Where(unit=layer))],
            "result": mj.Mix(0.5, 1.0 * shift, mj.Where(head=layer)),
        }  # fmt: skip
        out = mj.run(model, tokens, edits, capture={"z": mj.Where(layer=[layer], pos=spot), "post": None})
        metric = mj.metrics.logit_diff([3 + layer, 5, 7], 4 + layer, pos=spot)
        return [np.asarray(x) for x in (metric(out), out.acts["z"], out.acts["post"])]

    first = everything(1, 0, -1)
    with compilations() as compiled:
        second = everything(2, 2, 1)
    assert compiled == []
    assert all(a.shape == b.shape and not np.allclose(a, b) for a, b in zip(first, second))


def test_9_a_second_sweep_compiles_nothing(model, source):
    def sweep(shift, layers, heads):
        metrics = {"a": mj.metrics.logit_diff([3 + shift, 5, 7], 4), "b": mj.metrics.prob(shift)}
        tokens = batch("left", (IDS + shift) % 19)
        grid = mj.grid(layer=layers, head=heads, pos={"x": [[0], [1], [shift]], "end": -1})
        return mj.sweep(model, tokens, {"z": mj.Replace(source * shift, grid)}, metrics, progress=False)

    sweep(1, [0, 1], [0, 1, 2])
    with compilations() as compiled:
        sweep(2, [1, 2], [3, 1, 0])
    assert compiled == []


def test_9_a_plain_run_compiles_to_the_work_of_a_plain_forward():
    """8 matrix products in the one body that all layers share, and none outside: nothing is unembedded."""
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)

    def products(jaxpr):
        count = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        inner = [
            p
            for eqn in jaxpr.eqns
            for p in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"))
        ]
        return count + sum(products(getattr(p, "jaxpr", p)) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr"))

    plain = jax.make_jaxpr(lambda ids: mj.run(model, ids).readout.final)(jnp.asarray(IDS))
    assert products(plain.jaxpr) == 8  # q k v scores z result-sum in out
    answers = jax.make_jaxpr(lambda ids: METRIC(mj.run(model, ids)))(jnp.asarray(IDS))
    assert products(answers.jaxpr) == 9
    assert not any(19 in v.aval.shape for eqn in answers.jaxpr.eqns for v in eqn.outvars), (
        "the whole vocabulary was unembedded"
    )


def test_compile_time_does_not_grow_with_depth():
    lines = []
    for n_layers in (2, 24):
        model = mj.init(mj.Config(n_layers=n_layers, d_model=8, n_heads=2, d_vocab=11, n_ctx=8), jax.random.key(0))
        lines.append(
            str(jax.make_jaxpr(lambda ids, m=model: mj.run(m, ids).readout.final)(jnp.zeros((1, 4), jnp.int32))).count(
                "\n"
            )
        )
    assert lines[0] == lines[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_parameters_accumulate_in_float32(dtype):
    """Against the same rounded parameters in float64: the error is that of rounding the inputs of products
    (2^-8 for bfloat16, 2^-11 for float16), some tens of roundings deep; 2^-24 for float32."""
    config = ARCHITECTURES["llama_gqa"]
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float64), random_model(config))
        expected = np.asarray(mj.run(exact, IDS).logits)
    model = jax.tree.map(lambda x: x.astype(dtype), random_model(config, dtype=jnp.float32))
    out = mj.run(model, IDS, capture=tuple(mj.sites(model, IDS)))
    assert all(a.dtype == jnp.float32 for a in out.acts.values()) and out.logits.dtype == jnp.float32
    assert error(out.logits, expected) < 100 * float(jnp.finfo(dtype).eps)


def test_a_matrix_product_is_asked_for_at_full_precision_unless_the_caller_says_otherwise():
    model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=8), jax.random.key(0))
    text = lambda: str(jax.make_jaxpr(lambda ids: mj.run(model, ids).logits)(jnp.zeros((1, 4), jnp.int32)))
    assert text().count("HIGHEST") >= 2 * 9 and "precision=None" not in text()
    with jax.default_matmul_precision("bfloat16"):
        assert "HIGHEST" not in text()
