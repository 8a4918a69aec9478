"""The laws of the design, in float64 at 1e-10, on every architecture, padded on either side and not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import (
    ARCHITECTURES,
    IDS,
    PADDINGS,
    batch,
    cases,
    error,
    example,
    existing,
    on_real,
    random_model,
    real,
)

pytestmark = pytest.mark.usefixtures("x64")
METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])


def base_and_source(name, padding):
    model = random_model(ARCHITECTURES[name])
    return model, batch(padding), batch(padding, (IDS + 5) % 19)


@cases(*PADDINGS)
def test_2_replacing_any_site_by_its_own_value_changes_nothing(name, padding):
    model, tokens, _ = base_and_source(name, padding)
    table = tuple(mj.sites(model, tokens))
    out = mj.run(model, tokens, capture=table)

    @eqx.filter_jit
    def edited(gates, model, acts):  # gate 1 at one site at a time: Mix is then Replace
        return mj.run(model, tokens, {s: mj.Mix(g, acts[s]) for s, g in zip(table, gates)}).logits

    for row, site in zip(np.eye(len(table)), table):
        assert error(on_real(edited(jnp.asarray(row), model, out.acts), tokens), on_real(out.logits, tokens)) < 1e-10, (
            site
        )


@cases(*PADDINGS)
def test_3_replacing_the_first_stream_gives_the_other_run(name, padding):
    model, tokens, other = base_and_source(name, padding)
    source = mj.run(model, other, capture=("resid_pre",))
    patched = mj.run(model, tokens, {"resid_pre": mj.Replace(source.acts["resid_pre"], mj.Where(layer=0))})
    assert error(on_real(patched.logits, tokens), on_real(source.logits, tokens)) < 1e-10


def normed(model, norm, x):
    """`x` after a norm of all layers, `[layer, batch, pos, d_model]`; unchanged where there is none."""
    if norm is None:
        return x
    x = x - jnp.mean(x, axis=-1, keepdims=True) if model.config.norm == "layer" else x
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.config.norm_eps) * norm.weight[:, None, None]
    return x if norm.bias is None else x + norm.bias[:, None, None]


@cases(*PADDINGS)
def test_4_the_stream_is_the_sum_of_what_is_written_to_it(name, padding):
    model, tokens, _ = base_and_source(name, padding)
    table = mj.sites(model, tokens)
    acts = mj.run(model, tokens, capture=tuple(table)).acts
    blocks, stream_norms = model.blocks, model.config.norm_at == "stream"
    b_O = blocks.attn.b_O
    heads = jnp.sum(acts["result"], axis=3) + (0 if b_O is None else b_O[:, None, None])
    heads = heads if stream_norms else normed(model, blocks.ln1_post, heads)
    assert error(heads, acts["attn_out"]) < 1e-10
    after = lambda norm, x: normed(model, norm, x) if stream_norms else x
    if "resid_mid" in table:
        assert error(after(blocks.ln1_post, acts["resid_pre"] + acts["attn_out"]), acts["resid_mid"]) < 1e-10
        assert error(after(blocks.ln2_post, acts["resid_mid"] + acts["mlp_out"]), acts["resid_post"]) < 1e-10
    else:
        written = acts["attn_out"] + acts.get("mlp_out", 0)
        assert error(acts["resid_pre"] + written, acts["resid_post"]) < 1e-10
    assert error(acts["resid_post"][:-1], acts["resid_pre"][1:]) < 1e-10


@cases("left")
def test_6_the_gate_gradient_is_the_difference_times_the_gradient(name, padding):
    model, tokens, other = base_and_source(name, padding)
    table = mj.sites(model, tokens)
    base, source = (mj.run(model, t, capture=tuple(table)).acts for t in (tokens, other))
    measured = lambda edits: jnp.sum(METRIC(mj.run(model, tokens, edits)))
    is_vector = {
        s: i.axes[-1] in ("d_model", "d_head", "d_mlp", "d_shared") for s, i in table.items()
    }  # one gate per vector
    gates = {s: jnp.zeros((*i.shape[:-1], 1) if is_vector[s] else i.shape) for s, i in table.items()}
    mixed = lambda gates: measured({s: mj.Mix(g, source[s]) for s, g in gates.items()})
    added = lambda vectors: measured({s: mj.Add(v) for s, v in vectors.items()})
    by_gate = jax.jit(jax.grad(mixed))(gates)
    by_vector = jax.jit(jax.grad(added))({s: jnp.zeros(i.shape) for s, i in table.items()})
    rng = np.random.default_rng(0)
    direction = {s: jnp.asarray(rng.normal(size=g.shape)) for s, g in gates.items()}
    expected = {s: (source[s] - base[s]) * by_vector[s] for s in table}
    expected |= {s: jnp.sum(x, axis=-1, keepdims=True) for s, x in expected.items() if is_vector[s]}
    for site in table:
        for i in range(3):  # padding has gradient zero, and differences of padding are nobody's business
            given, wanted = (existing(model, site, example(x[site], site, tokens, i)) for x in (by_gate, expected))
            if np.abs(wanted).max() > 0:
                assert error(given, wanted) < 1e-10, site
    # and, independently of autodiff, central differences along a random direction:
    # at h = 1e-6 they are right to about h^2 f''' = 1e-12 f''' and rounding / h = 1e-9, and f''' is large without norms
    step = lambda h: float(jax.jit(mixed)({s: h * d for s, d in direction.items()}))
    slope = sum(float(jnp.sum(by_gate[s] * direction[s])) for s in table)
    assert abs((step(1e-6) - step(-1e-6)) / 2e-6 - slope) < 1e-5 * max(1.0, abs(slope))


@cases("left")
def test_7_capturing_changes_nothing_and_uncaptured_edits_act(name, padding):
    model, tokens, other = base_and_source(name, padding)
    table = tuple(mj.sites(model, tokens))
    source = mj.run(model, other, capture=("z", "resid_pre")).acts
    edits = {
        "z": mj.Replace(source["z"], mj.Where(layer=1, head=[0, 2])),
        "resid_pre": mj.Scale(0.5, mj.Where(layer=2, pos=-2)),
    }
    plain, captured = mj.run(model, tokens, edits), mj.run(model, tokens, edits, capture=table)
    assert error(on_real(captured.logits, tokens), on_real(plain.logits, tokens)) < 1e-10
    assert error(on_real(plain.logits, tokens), on_real(mj.run(model, tokens).logits, tokens)) > 1e-6
    # what is captured is what stands there after the edit
    assert (captured.acts["z"][1, :, :, 2] == source["z"][1, :, :, 2]).all()


@cases("left", "right")
def test_8_a_padded_batch_is_its_rows_run_alone(name, padding):
    model, tokens, other = base_and_source(name, padding)
    source = mj.run(model, other, capture=("z",)).acts["z"]
    spots = np.array([[0, -1], [2, 1], [-2, 0]])
    together = mj.run(model, tokens, {
        "z": mj.Replace(source, mj.Where(layer=1, pos=-1)),
        "pattern": mj.Replace(0.2, mj.Where(layer=2, head=1)),
        "attn_out": mj.Scale(0.0, mj.Where(layer=0, pos=spots)),
        "result": mj.Add(1.0, mj.Where(head=-1, pos=1)),
    })  # fmt: skip
    for i in range(3):
        columns = real(tokens, i)
        alone = mj.run(model, np.asarray(tokens.ids)[i : i + 1, columns], {
            "z": mj.Replace(source[:, i : i + 1, columns], mj.Where(layer=1, pos=-1)),
            "pattern": mj.Replace(0.2, mj.Where(layer=2, head=1)),
            "attn_out": mj.Scale(0.0, mj.Where(layer=0, pos=spots[i])),
            "result": mj.Add(1.0, mj.Where(head=-1, pos=1)),
        })  # fmt: skip
        assert error(together.logits[i, columns], alone.logits[0]) < 1e-10
    assert np.isnan(np.asarray(together.logits)[~np.asarray(tokens.mask)]).all()


@cases(*PADDINGS)
def test_10_gates_on_all_that_is_written_lead_from_base_to_source(name, padding):
    model, tokens, other = base_and_source(name, padding)
    written = [s for s in ("embed", "pos_embed", "attn_out", "mlp_out") if s in mj.sites(model, tokens)]
    source = mj.run(model, other, capture=written)
    gated = lambda gate: mj.run(model, tokens, {s: mj.Mix(gate, source.acts[s]) for s in written})
    assert error(on_real(gated(1.0).logits, tokens), on_real(source.logits, tokens)) < 1e-10
    assert error(on_real(gated(0.0).logits, tokens), on_real(mj.run(model, tokens).logits, tokens)) < 1e-10
