"""Mixtures of experts against what they are by definition."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.model.experts import _block_size, _blocks
from tests.architectures import ARCHITECTURES, batch, error, random_model

SITES = ("router_logits", "expert_weights", "mlp_in", "mlp_out")


def model_of(n=4, top_k=2, **experts):
    config = dataclasses.replace(
        ARCHITECTURES["experts"], experts=mj.Experts(n, top_k, **experts), dense_layers=(), activation="silu"
    )
    return random_model(config)


def test_all_experts_are_the_dense_mixture(x64):
    """With top_k = n: the softmax-weighted sum of all, without any choice."""
    model, tokens = model_of(4, 4), batch("left")
    acts = mj.run(model, tokens, capture=(*SITES, "expert_out")).acts
    mixture = jnp.einsum("lbpe,lbped->lbpd", jax.nn.softmax(acts["router_logits"]), acts["expert_out"])
    assert error(acts["mlp_out"], mixture) < 1e-10


@pytest.mark.parametrize("normalise", [True, False])
def test_equal_experts_are_one_mlp(x64, normalise):
    """Whatever the router says, times the sum of the weights."""
    model, tokens = model_of(5, 2, normalise=normalise), batch("right")
    first = lambda w: jnp.broadcast_to(w[:, :1], w.shape)
    names = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")
    at = lambda m: [getattr(m.blocks.experts, name) for name in names]
    model = eqx.tree_at(at, model, replace_fn=first)
    acts = mj.run(model, tokens, capture=(*SITES, "ln2.normalized")).acts
    x = acts["ln2.normalized"] * model.blocks.ln2.weight[:, None, None]
    W_in, W_gate, W_out, b_in, b_gate, b_out = (w[:, 0] for w in at(model))
    affine = lambda x, W, b: jnp.einsum("lbpi,lio->lbpo", x, W) + b[:, None, None]
    output = affine(jax.nn.silu(affine(x, W_gate, b_gate)) * affine(x, W_in, b_in), W_out, b_out)
    assert error(acts["mlp_out"], output * jnp.sum(acts["expert_weights"], axis=-1, keepdims=True)) < 1e-10
    if normalise:
        assert error(acts["mlp_out"], output) < 1e-10


@pytest.mark.parametrize("n, top_k, pos", [(3, 1, 7), (8, 2, 200), (16, 3, 111), (5, 5, 40), (2, 2, 1)])
def test_blocks_of_many_tokens_give_what_all_experts_give(x64, n, top_k, pos):
    """Asking for `expert_out` computes all of them."""
    config = dataclasses.replace(ARCHITECTURES["experts"], experts=mj.Experts(n, top_k), dense_layers=(), n_ctx=256)
    model, ids = random_model(config), np.random.default_rng(0).integers(0, 19, (2, pos))
    used = mj.run(model, ids, capture=("mlp_out",))
    every = mj.run(model, ids, capture=("mlp_out", "expert_out", "expert_weights"))
    assert error(used.acts["mlp_out"], every.acts["mlp_out"]) < 1e-10
    assert (np.asarray(every.acts["expert_weights"] != 0).sum(-1) == top_k).all()


@pytest.mark.parametrize("gate", [True, False])
def test_the_shared_mlp_is_added(x64, gate):
    """Its neurons are `shared_pre`, `shared_pre_linear` and `shared_post`; without the experts' outputs it is what is left."""
    model, tokens = model_of(4, 2, shared=7, shared_gate=gate), batch("left")
    out = mj.run(model, tokens, capture=(*SITES, "shared_out", "shared_post", "expert_out", "ln2.normalized"))
    acts, shared = out.acts, model.blocks.experts.shared
    of_experts = jnp.einsum("lbpe,lbped->lbpd", acts["expert_weights"], acts["expert_out"])
    read = acts["ln2.normalized"] * model.blocks.ln2.weight[:, None, None]
    factor = (
        jax.nn.sigmoid(jnp.einsum("lbpd,ld->lbp", read, model.blocks.experts.W_shared_gate))[..., None] if gate else 1.0
    )
    down = jnp.einsum("lbpm,lmd->lbpd", acts["shared_post"], shared.W_out) + shared.b_out[:, None, None]
    assert acts["shared_post"].shape[-1] == 7 and error(acts["shared_out"], factor * down) < 1e-10
    assert error(acts["mlp_out"], of_experts + acts["shared_out"]) < 1e-10
    alone = mj.run(model, tokens, {"expert_weights": mj.Replace(0.0)}, capture=("mlp_out", "shared_out")).acts
    assert error(alone["mlp_out"], alone["shared_out"]) < 1e-10


def test_the_blocks_hold_every_pair_once():
    rng = np.random.default_rng(0)
    for n, pairs in ((1, 5), (3, 1), (4, 64), (8, 1000), (128, 64)):
        for expert in (rng.integers(0, n, pairs), np.full(pairs, n - 1), np.minimum(np.arange(pairs), n - 1)):
            size = _block_size(pairs, n)
            most = min(pairs, pairs // size + n)
            number, slot, of_block = map(np.asarray, _blocks(jnp.asarray(expert, jnp.int32), n, size, most))
            assert len(set(slot.tolist())) == pairs and slot.min() >= 0 and slot.max() < number * size <= most * size
            assert (of_block[slot // size] == expert).all()


def test_ablate_an_expert_and_force_a_routing(x64):
    model, tokens = model_of(), batch("none")
    base = mj.run(model, tokens, capture=(*SITES, "expert_out"))
    weights, out = base.acts["expert_weights"], base.acts["expert_out"]
    written = lambda weights: jnp.einsum("bpe,bped->bpd", weights, out[1])
    run = lambda edits: mj.run(model, tokens, edits, capture=("mlp_out",)).acts["mlp_out"][1]
    # without expert 2 in layer 1
    edits = {"expert_weights": mj.Replace(0.0, mj.Where(layer=1, expert=2))}
    assert error(run(edits), written(weights[1].at[..., 2].set(0.0))) < 1e-10
    # all four experts, more than a token uses of itself
    edits = {"expert_weights": mj.Replace(0.25, mj.Where(layer=1))}
    assert error(run(edits), written(jnp.full_like(weights[1], 0.25))) < 1e-10
    # the router made to choose experts 0 and 3
    logits = jnp.full((4,), -50.0).at[jnp.array([0, 3])].set(1.0)
    edits = {"router_logits": mj.Replace(logits, mj.Where(layer=1))}
    assert error(run(edits), written(jnp.zeros_like(weights[1]).at[..., jnp.array([0, 3])].set(0.5))) < 1e-10
    # the output of an expert that no token uses has no effect; of one that is used, its weighted change
    edits = {"expert_out": mj.Add(1.0, mj.Where(layer=1, expert=1))}
    assert error(run(edits), base.acts["mlp_out"][1] + weights[1][..., 1:2]) < 1e-10


def test_sweep_over_experts_equals_a_loop(x64):
    model, tokens = model_of(), batch("left")
    metric = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
    r = mj.ablate(model, tokens, site="expert_weights", over=("layer", "expert"), metric=metric, kind="zero")
    for layer in range(3):
        for expert in range(4):
            edits = {"expert_weights": mj.Replace(0.0, mj.Where(layer=layer, expert=expert))}
            assert error(r.values[layer, expert], metric(mj.run(model, tokens, edits))) < 1e-6  # float32 results


def test_a_token_that_is_not_a_number_stays_alone(x64):
    """It is NaN with and without the sites of the experts, and no other token is."""
    model, tokens = model_of(), batch("none")
    nan = {"mlp_in": mj.Replace(jnp.nan, mj.Where(layer=2, pos=1))}
    for capture in ((), ("expert_out",), ("expert_weights",)):
        logits = np.asarray(mj.run(model, tokens, nan, capture=capture).logits)
        assert np.isnan(logits[:, 1]).all() and np.isfinite(np.delete(logits, 1, axis=1)).all()


@pytest.mark.parametrize("sites", [("expert_weights",), ("expert_weights", "expert_out")])
def test_the_derivative_in_the_weight_of_an_expert_that_is_not_used(x64, sites):
    """It is what opening the gate a little changes, by central differences: patching may give a token another expert."""
    model, tokens, other = model_of(), batch("none"), (batch("none").ids + 5) % 19
    metric = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])
    acts = mj.run(model, other, capture=("expert_weights",)).acts["expert_weights"]
    base = mj.run(model, tokens, capture=("expert_weights",)).acts["expert_weights"]
    assert ((np.asarray(base) == 0) & (np.asarray(acts) != 0)).any()
    gated = lambda gate: metric(mj.run(model, tokens, {"expert_weights": mj.Mix(gate, acts)}, capture=sites[1:]))
    for layer in range(3):
        for expert in range(4):
            at = lambda gate, layer=layer, expert=expert: metric(
                mj.run(
                    model, tokens, {"expert_weights": mj.Mix(gate, acts, mj.Where(layer=layer, expert=expert))}, capture=sites[1:]
                )
            )  # fmt: skip
            slope = jax.jacfwd(at)(0.0)
            assert np.allclose((at(1e-6) - at(-1e-6)) / 2e-6, slope, rtol=1e-6, atol=1e-7)
    assert np.abs(jax.jacfwd(gated)(0.0)).max() > 0.01
    r = mj.attribute(
        model,
        clean=other,
        corrupted=tokens,
        sites={"expert_weights": ("layer", "expert")},
        metric=metric,
        progress=False,
    )
    slopes = [
        [
            jax.jacfwd(
                lambda gate, where=mj.Where(layer=i, expert=e): metric(
                    mj.run(model, tokens, {"expert_weights": mj.Mix(gate, acts, where)})
                )
            )(0.0)
            for e in range(4)
        ]
        for i in range(3)
    ]
    assert error(r.expert_weights.values - r.base.values, np.asarray(slopes)) < 1e-5  # float32 results


def test_keeping_the_weights_computes_no_other_experts():
    """The outputs of 16 experts for 200 tokens are an array of the program only where an edit, or a tap, needs them."""
    config = dataclasses.replace(ARCHITECTURES["experts"], experts=mj.Experts(16, 2), dense_layers=(), n_ctx=256)
    model, ids = random_model(config, dtype=jnp.float32), np.ones((1, 200), np.int32)

    def computes_all(edits, *capture):
        program = jax.make_jaxpr(lambda m, i: mj.run(m, i, edits, capture=capture, readout=False).acts)(model, ids)
        return "f32[16,200,12]" in str(program)

    assert not computes_all({}, "mlp_out") and not computes_all({}, "mlp_out", "expert_weights")
    assert computes_all({"expert_weights": mj.Scale(0.0, mj.Where(layer=1, expert=2))}, "mlp_out")
    assert computes_all({}, "mlp_out", "expert_out")


def test_an_infinite_expert_concerns_the_tokens_that_use_it(x64):
    """Weight zero times infinity is no NaN: an expert that a token does not use is not in its sum."""
    model, tokens = model_of(), batch("none")
    edits = {"expert_out": mj.Replace(jnp.inf, mj.Where(layer=1, expert=1))}
    acts = mj.run(model, tokens, edits, capture=("expert_weights", "mlp_out")).acts
    uses = np.asarray(acts["expert_weights"][1, ..., 1] != 0)
    assert 0 < uses.mean() < 1 and (np.isfinite(np.asarray(acts["mlp_out"][1])).all(-1) == ~uses).all()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"n": 0, "top_k": 1}, "n=0 must be positive"), ({"n": 2, "top_k": 3}, "top_k=3 must be at most n=2"),
        ({"n": 2, "top_k": 0}, "top_k=0 must be positive"), ({"n": 2.0, "top_k": 1}, "n=2.0 must be an integer"),
        ({"n": 2, "top_k": 1, "normalise": 1}, "normalise=1 must be a boolean"),
    ],
)  # fmt: skip
def test_experts_by_hand(values, message, as_a_user):
    with pytest.raises(ValueError, match=f"invalid Experts: {message}"):
        mj.Experts(**values)
