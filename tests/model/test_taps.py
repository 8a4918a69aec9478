"""Taps of a user's own: pure values that see every site, compose, and carry what they keep."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import mijax as mj
from mijax.model.tap import Nothing
from tests.architectures import ARCHITECTURES, IDS, PADDINGS, batch, error, on_real, random_model, real
from tests.situations import refused

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])


class Keep(mj.Tap):
    """Keeps one site of every layer, and doubles it."""

    site: str = eqx.field(static=True)
    factor: jax.Array

    @property
    def sites(self):
        return frozenset({self.site})

    def at(self, point, x, state):
        return x * self.factor, x

    def close(self, state):
        return None, state


@each_architecture
@pytest.mark.parametrize("site", ["resid_pre", "q_input", "k", "pattern", "result", "resid_post"])
def test_a_tap_sees_what_stands_after_edits_and_before_captures(x64, name, site):
    model, tokens = random_model(ARCHITECTURES[name]), batch("left")
    edits = {site: mj.Scale(0.5, mj.Where(layer=[0, 2]))}
    keep = Keep(site, jnp.float64(2))
    out = mj.run(model, tokens, edits, capture=(site,), taps=(keep,))
    plain = mj.run(model, tokens, {site: (*edits.values(), mj.Scale(2.0))}, capture=(site,))
    assert error(on_real(out.logits, tokens), on_real(plain.logits, tokens)) < 1e-10
    assert error(out.taps[0] * 2, plain.acts[site]) < 1e-10 and error(out.acts[site], plain.acts[site]) < 1e-10


def test_a_null_tap_gives_the_same_program_as_none():
    model, tokens = random_model(ARCHITECTURES["llama_gqa"], dtype=jnp.float32), batch("left")
    edits, program = {"z": mj.Scale(0.5)}, lambda taps: str(jax.make_jaxpr(
        lambda model: mj.run(model, tokens, edits, capture=("k",), taps=taps).logits
    )(model))  # fmt: skip
    assert program((Nothing(),)) == program(()) == program((Nothing(), Nothing()))


def test_taps_compose_in_their_order(x64):
    class Plus(mj.Tap):
        value: jax.Array
        sites = frozenset({"mlp_out"})

        def at(self, point, x, state):
            return x + self.value, state

    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("right")
    first, second = Keep("mlp_out", jnp.float64(3)), Plus(jnp.float64(0.2))
    scale, add = mj.Scale(3.0), mj.Add(0.2)
    for taps, edits in (((first, second), (scale, add)), ((second, first), (add, scale))):
        given, expected = mj.run(model, tokens, taps=taps).logits, mj.run(model, tokens, {"mlp_out": edits}).logits
        assert error(on_real(given, tokens), on_real(expected, tokens)) < 1e-10


def test_a_tap_works_in_vmap_grad_jit_and_shard_map(x64):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("none")

    def value(factor, ids=IDS):
        out = mj.run(model, ids, taps=(Keep("z", factor),))
        return METRIC_ONE(out), jnp.sum(out.taps[0] ** 2, axis=(0, 2, 3, 4))

    factors = jnp.array([0.5, 1.0, 2.0])
    loop = [value(f) for f in factors]
    many = jax.jit(jax.vmap(value))(factors)
    for i in range(2):
        assert error(many[i], jnp.stack([pair[i] for pair in loop])) < 1e-10
    slope = jax.grad(lambda f: jnp.sum(value(f)[0]))(jnp.float64(1.0))
    finite = (jnp.sum(value(jnp.float64(1 + 1e-6))[0]) - jnp.sum(value(jnp.float64(1 - 1e-6))[0])) / 2e-6
    assert abs(slope - finite) < 1e-6 * abs(finite)
    mesh = jax.make_mesh((3,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    apart = jax.shard_map(
        lambda ids: value(jnp.float64(2.0), ids),
        mesh=mesh,
        in_specs=PartitionSpec("batch"),
        out_specs=PartitionSpec("batch"),
    )
    for given, expected in zip(apart(jnp.asarray(tokens.ids, jnp.int32)), loop[2]):
        assert error(given, expected) < 1e-10


METRIC_ONE = mj.metrics.logit_diff(3, 4)


class Largest(mj.Tap):
    """The largest size of the stream so far, of each token: a state that goes from layer to layer."""

    sites = frozenset({"embed", "resid_post"})

    def init(self, sites, frame, zero):
        return jax.lax.full_like(zero, 0, shape=frame.positions.shape)

    def at(self, point, x, state):
        return x, jnp.maximum(state, jnp.linalg.norm(x, axis=-1))

    def result(self, state, stacked):
        return state


@each_architecture
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_state_goes_through_the_whole_run(x64, name, padding):
    model, tokens = random_model(ARCHITECTURES[name]), batch(padding)
    out = mj.run(model, tokens, capture=("embed", "resid_post"), taps=(Largest(),))
    streams = jnp.concatenate([out.acts["embed"][None], out.acts["resid_post"]])
    assert error(out.taps[0], jnp.max(jnp.linalg.norm(streams, axis=-1), axis=0)) < 1e-12


class Edges(mj.Tap):
    """Adds to what each receiver reads what the senders before it differ by from another run, as far as a mask says.

    Senders are the embedding, every head and every MLP; receivers every head's query, key and value, every MLP and the
    final norm. `mask[site]` is [layer, head, sender] (or [layer, sender], or [sender]).
    """

    source: dict
    W_O: jax.Array
    mask: dict

    @property
    def sites(self):
        return frozenset({*self.mask, *self.source})

    def init(self, sites, frame, zero):
        return {name: jnp.zeros_like(x) for name, x in self.source.items()}

    def at(self, point, x, state):
        name, layer = point.site.name, point.layer
        if name == "embed":
            return x, {**state, name: self.source[name] - x}
        if name in self.source:
            return x, {**state, name: state[name].at[layer].set(self.source[name][layer] - x)}
        heads = jnp.einsum("lbphe,lhed->lhbpd", state["z"], self.W_O)
        senders = [state["embed"][None], heads.reshape(-1, *heads.shape[2:]), state.get("mlp_out", heads[:0, 0])]
        mask = self.mask[name] if layer is None else self.mask[name][layer]
        added = jnp.einsum("...s,sbpd->bp...d", mask, jnp.concatenate(senders))
        return x + added, state


def edges(name):
    """A model, prompts, another run, and a function from masks to the run of the edges."""
    model, tokens, other = random_model(ARCHITECTURES[name]), batch("left"), batch("left", (IDS + 5) % 19)
    c, mlps = model.config, () if model.config.mlp == "none" else ("mlp_out",)
    source = mj.run(model, other, capture=("embed", "z", *mlps))
    senders = 1 + c.n_layers * (c.n_heads + bool(mlps))
    shapes = {
        "q_input": (c.n_layers, c.n_heads),
        "k_input": (c.n_layers, c.n_kv_heads),
        "v_input": (c.n_layers, c.n_kv_heads),
    }
    shapes |= {"mlp_in": (c.n_layers,)} if mlps else {}
    shapes |= {"final_in": ()}
    masks = lambda draw: {site: draw((*shape, senders)) for site, shape in shapes.items()}
    run = lambda mask: mj.run(model, tokens, taps=(Edges(source.acts, model.blocks.attn.W_O, mask),))
    return model, tokens, source, masks, run


@pytest.mark.parametrize("name", [name for name, config in ARCHITECTURES.items() if config.norm_at != "stream"])
def test_a_tap_that_patches_edges_leads_from_the_base_run_to_the_source(x64, name):
    """Mask 0 is the base run, 1 everywhere the source run; its gradient is that of finite differences.

    (With norms in the stream, the stream is no sum of what is written to it.)
    """
    model, tokens, source, masks, run = edges(name)
    base = mj.run(model, tokens)
    assert error(on_real(run(masks(jnp.zeros)).logits, tokens), on_real(base.logits, tokens)) < 1e-10
    assert error(on_real(run(masks(jnp.ones)).logits, tokens), on_real(source.logits, tokens)) < 1e-10

    rng = np.random.default_rng(0)
    mask, along = (masks(lambda shape: jnp.asarray(rng.uniform(0.2, 0.8, shape))) for _ in range(2))
    value = jax.jit(lambda mask: jnp.sum(METRIC(run(mask))))
    slope = sum(jnp.sum(g * along[site]) for site, g in jax.grad(value)(mask).items())
    step = lambda sign: value(jax.tree.map(lambda m, a: m + sign * 1e-5 * a, mask, along))
    finite = (step(1) - step(-1)) / 2e-5
    assert abs(slope - finite) < 1e-7 * abs(finite)


def test_one_edge_is_a_patch_of_what_its_receiver_reads(x64):
    """A head of the first layer, read by one query head of the last: the same by `run` alone."""
    model, tokens, source, masks, run = edges("gpt2")
    mask = masks(jnp.zeros)
    sender = 1 + 2  # head 2 of layer 0
    mask["q_input"] = mask["q_input"].at[2, 1, sender].set(1.0)
    base = mj.run(model, tokens, capture=("z", "q_input"))
    added = jnp.einsum(
        "bpe,ed->bpd", source.acts["z"][0, :, :, 2] - base.acts["z"][0, :, :, 2], model.blocks.attn.W_O[0, 2]
    )
    patched = mj.run(model, tokens, {"q_input": mj.Add(added[None, :, :, None], mj.Where(layer=2, head=1))})
    assert error(on_real(run(mask).logits, tokens), on_real(patched.logits, tokens)) < 1e-10
    assert abs(run(mask).logits[0, real(tokens, 0)[-1]] - base.logits[0, real(tokens, 0)[-1]]).max() > 1e-4


class Wide(mj.Tap):
    sites = frozenset({"mlp_out"})

    def at(self, point, x, state):
        return x.astype(jnp.float16), state


class Growing(mj.Tap):
    sites = frozenset({"mlp_out"})

    def init(self, sites, frame, zero):
        return ()

    def at(self, point, x, state):
        return x, (*state, jnp.sum(x))


class Unpaired(Wide):
    def at(self, point, x, state):
        return x


class Elsewhere(Wide):
    sites = frozenset({"mlp_outt"})


WRONG = {
    "one tap alone": (lambda: Nothing(), TypeError, "taps must be a sequence of mijax.Tap, given Nothing"),
    "a function": (lambda: (lambda x: x,), TypeError, r"a tap is a mijax.Tap, a module with `sites` and `at\(point, x, state\)`, given function"),
    "an unknown site": (lambda: (Elsewhere(),), ValueError, "unknown site 'mlp_outt'; did you mean 'mlp_out'"),
    "another dtype": (lambda: (Wide(),), ValueError, r"Wide at site 'mlp_out' returned float16\[3, 6, 12\], expected float32\[3, 6, 12\]"),
    "no state": (lambda: (Unpaired(),), TypeError, "Unpaired.at must return the activation and the state"),
    "a state that grows": (lambda: (Growing(),), ValueError, "the state of Growing must have one structure whenever a layer begins"),
}  # fmt: skip


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("what", WRONG)
def test_a_tap_that_cannot_be_one_is_refused(what):
    taps, kind, message = WRONG[what]
    model = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32)
    with refused(kind, message):
        mj.run(model, batch("left"), taps=taps())


@pytest.mark.parametrize("missing", ["at", "sites"])
def test_a_tap_without_a_method_cannot_be_made(missing):
    there = {"at": lambda self, point, x, state: (x, state), "sites": frozenset({"z"})}
    incomplete = type("Incomplete", (mj.Tap,), {name: value for name, value in there.items() if name != missing})
    with pytest.raises(TypeError, match=missing):
        incomplete()
