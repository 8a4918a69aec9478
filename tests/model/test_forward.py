"""The forward pass, and the value and effect of every site, against the NumPy statement (float64, 1e-10)."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.model.rotary import frequencies
from tests.architectures import ARCHITECTURES, PADDINGS, batch, error, example, existing, random_model, real
from tests.reference.forward import forward

pytestmark = pytest.mark.usefixtures("x64")
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@each_architecture
@pytest.mark.parametrize("padding", PADDINGS)
def test_logits_and_every_site(name, padding):
    model, tokens = random_model(ARCHITECTURES[name]), batch(padding)
    table = mj.sites(model, tokens)
    out = mj.run(model, tokens, capture=tuple(table))
    assert set(out.acts) == set(table)
    assert {s: (a.shape, a.dtype, a.nbytes) for s, a in out.acts.items()} == {
        s: (i.shape, i.dtype, i.bytes) for s, i in table.items()
    }
    for i in range(3):
        seen = {}
        ids = np.asarray(tokens.ids)[i, real(tokens, i)]
        logits = forward(model, ids, lambda site, layer, x, seen=seen: seen.setdefault((site, layer), x))
        assert error(out.logits[i, real(tokens, i)], logits) < 1e-10
        for site in table:
            mine = example(out.acts[site], site, tokens, i)
            layers = existing(model, site, np.arange(3)) if mj.SITES[site].has_layer else [None]
            if mj.SITES[site].has_layer:
                assert np.isnan(np.delete(mine, layers, axis=0)).all()  # layers that lack the site
                mine = existing(model, site, mine)
            theirs = np.stack([seen[site, layer] for layer in layers])
            mine = mine if mj.SITES[site].has_layer else mine[None]
            if (
                site == "attn_scores" and model.config.causal
            ):  # the mask comes after this site; the order of sums differs
                assert mine.shape == theirs.shape
            assert error(mine, theirs) < 1e-10, site


@each_architecture
@pytest.mark.parametrize("padding", ["left", "right"])
def test_an_edit_at_every_site_acts_as_in_the_reference(name, padding):
    """Add noise at one site at a time (a gate per site, so that one program serves them all)."""
    model, tokens = random_model(ARCHITECTURES[name]), batch(padding)
    table = mj.sites(model, tokens)
    rng = np.random.default_rng(1)
    noise = {site: 0.3 * rng.normal(size=info.shape) for site, info in table.items()}

    @eqx.filter_jit
    def logits(gates, model):
        edits = {site: mj.Add(gate * jnp.asarray(noise[site])) for site, gate in zip(table, gates)}
        return mj.run(model, tokens, edits).logits

    plain = mj.run(model, tokens).logits
    for row, site in zip(np.eye(len(table)), table):
        edited = logits(jnp.asarray(row), model)
        for i in range(3):
            columns = real(tokens, i)
            dx = example(noise[site], site, tokens, i)
            add = lambda s, layer, x, site=site, dx=dx: x + (dx if layer is None else dx[layer]) if s == site else x
            expected = forward(model, np.asarray(tokens.ids)[i, columns], add)
            assert error(edited[i, columns], expected) < 1e-10, site
            assert error(edited[i, columns], plain[i, columns]) > 1e-6, f"{site} has no effect"


def test_padding_never_leaks():
    """Whatever stands in the padding, real positions are the same to the bit, in logits and gradients."""
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    other = mj.Tokens(np.where(tokens.mask, tokens.ids, 3), tokens.mask)
    a, b = (np.asarray(mj.run(model, t).logits)[np.asarray(tokens.mask)] for t in (tokens, other))
    assert (a == b).all()
    loss = lambda m, t: jnp.sum(mj.metrics.cross_entropy(t)(mj.run(m, t)))
    grads = [eqx.filter_grad(loss)(model, t) for t in (tokens, other)]
    same = jax.tree.map(lambda x, y: bool((x == y).all()) and bool(jnp.isfinite(x).all()), *grads)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind, expected", [("linear", 4.0), ("llama3", None)])
def test_rotary_scaling(kind, expected):
    """`linear` is exactly slower positions; `llama3` keeps high frequencies and slows low ones (formula of the Llama 3 report)."""
    scaling = mj.RotaryScaling(kind, 4.0, low_freq=1.0, high_freq=4.0, original_n_ctx=64)
    plain, scaled = frequencies(mj.Rotary(dim=32)), frequencies(mj.Rotary(dim=32, scaling=scaling))
    if expected:
        assert np.allclose(plain / scaled, expected, rtol=1e-12)
    else:
        for f, s in zip(plain, scaled):
            wavelength = 2 * np.pi / f
            if wavelength < 64 / 4:
                want = f
            elif wavelength > 64 / 1:
                want = f / 4
            else:
                smooth = (64 / wavelength - 1) / (4 - 1)
                want = (1 - smooth) * f / 4 + smooth * f
            assert abs(s - want) < 1e-12


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate):
    """Dimensions that turn 32 times and more over the original context are kept, those below once are divided by the
    factor, and those between change linearly with their number (Peng et al. 2023, equations 22 and 23)."""
    scaling = mj.RotaryScaling("yarn", 8.0, low_freq=1.0, high_freq=32.0, original_n_ctx=4096, truncate=truncate)
    plain, scaled = frequencies(mj.Rotary(dim=64)), frequencies(mj.Rotary(dim=64, scaling=scaling))
    turns = 4096 * plain / (2 * np.pi)
    share = (plain - scaled) / (plain - plain / 8)  # 0: kept, 1: divided
    edge = 1 if truncate else 0  # rounding outwards moves the first and the last dimension between
    assert np.allclose(share[turns >= 32][: -1 - edge], 0, atol=1e-12)
    assert np.allclose(share[turns <= 1][edge:], 1, atol=1e-12)
    between = np.diff(share[(share > 1e-9) & (share < 1 - 1e-9)])
    assert len(between) > 8 and np.allclose(between, between[0], atol=1e-9)
    slope = 2 * np.log(10_000.0) / (64 * np.log(32.0))  # of the exact bounds
    assert np.isclose(between[0], slope, rtol=0.15 if truncate else 1e-6)


def test_init_keeps_the_name_of_the_config():
    """Two configs that differ in their names are one to the compiler."""
    for name in ("first", "second"):
        config = dataclasses.replace(ARCHITECTURES["gpt2"], name=name)
        assert mj.init(config, jax.random.key(0)).config.name == name
