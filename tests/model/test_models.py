"""What is run is a protocol: a wrapper that adds sites, and a model of the user's own, written with public names only."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, PADDINGS, batch, error, on_real, random_model
from tests.situations import refused

METRIC = mj.metrics.logit_diff([3, 5, 7], [4, 6, 8])


class Spliced(mj.Wrapper):
    """A transformer whose MLPs' outputs go, in some layers, through linear dictionaries; what these leave out is added."""

    model: mj.Transformer
    dictionaries: dict[int, tuple[jax.Array, jax.Array]]  # by layer: [d_model, feature], [feature, d_model]

    @property
    def sites(self):
        added = {}
        for layer, (encoder, _) in self.dictionaries.items():
            axes, fixed = ("batch", "pos", "feature"), (("feature", encoder.shape[1]),)
            meaning = f"features of the MLP's output in layer {layer}"
            added[f"features.{layer}"] = mj.Site(
                f"features.{layer}", axes, meaning, "mlp", layers=(layer,), fixed=fixed, half=int(self.has_halves)
            )
        return {**self.model.sites, **added}

    def around(self, tap):
        return Splice(tap, self)


class Splice(mj.Tap):
    """Calls the tap inside it at the features too."""

    inner: mj.Tap
    spliced: Spliced

    @property
    def sites(self):
        added = {name for name in self.inner.sites if name.startswith("features.")}
        return (self.inner.sites - added) | ({"mlp_out"} if added else set())

    def at(self, point, x, state):
        x, state = mj.called(self.inner, point, x, state)
        for layer, (encoder, decoder) in self.spliced.dictionaries.items() if point.site.name == "mlp_out" else ():
            there = point._replace(site=self.spliced.sites[f"features.{layer}"], layer=None)

            def through(x, state, encoder=encoder, decoder=decoder, there=there):
                features = jnp.einsum("...d,df->...f", x, encoder)
                left_out = x - jnp.einsum("...f,fd->...d", features, decoder)
                features, state = mj.called(self.inner, there, features, state)
                return jnp.einsum("...f,fd->...d", features, decoder) + left_out, state

            x, state = jax.lax.cond(point.layer == layer, through, lambda x, state: (x, state), x, state)
        return x, state


def spliced(name, widths=((0, 7), (2, 5))):
    """A model and the same with random dictionaries of different width in two layers."""
    model, rng = random_model(ARCHITECTURES[name]), np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 0.4, shape))
    return model, Spliced(model, {layer: (draw(12, width), draw(width, 12)) for layer, width in widths})


def by_hand(model, wrapped, tokens, layer, edit, capture=()):
    """The run in which the features of a layer are edited: what they change is added to the MLP's output, by a plain edit."""
    encoder, decoder = wrapped.dictionaries[layer]

    def moved(x, site, _, positions):
        features = jnp.einsum("bpd,df->bpf", x, encoder)
        return x + jnp.einsum("bpf,fd->bpd", edit(features) - features, decoder)

    return mj.run(model, tokens, {"mlp_out": mj.Apply(moved, mj.Where(layer=layer))}, capture=capture)


WITH_MLP = pytest.mark.parametrize("name", [n for n, c in ARCHITECTURES.items() if c.mlp != "none"])


@WITH_MLP
@pytest.mark.parametrize("padding", PADDINGS)
def test_12_a_spliced_dictionary_changes_nothing_and_its_features_are_captured(x64, name, padding):
    model, wrapped = spliced(name)
    tokens = batch(padding)
    plain = mj.run(model, tokens, capture=("mlp_out", "z"))
    out = mj.run(wrapped, tokens, capture=("features.0", "features.2", "mlp_out", "z"))
    assert error(on_real(out.logits, tokens), on_real(plain.logits, tokens)) < 1e-10
    for site in ("mlp_out", "z"):
        assert error(out.acts[site], plain.acts[site]) < 1e-10
    for layer, (encoder, _) in wrapped.dictionaries.items():
        expected = jnp.einsum("bpd,df->bpf", plain.acts["mlp_out"][layer], encoder)
        assert error(out.acts[f"features.{layer}"], expected) < 1e-10
    early = mj.run(wrapped, tokens, capture=("features.0",), readout=False)
    assert error(early.acts["features.0"], out.acts["features.0"]) < 1e-10
    assert list(mj.sites(wrapped, tokens))[-2:] == ["features.0", "features.2"]


@WITH_MLP
def test_2_and_7_features_are_edited_as_any_site_is(x64, name):
    model, wrapped = spliced(name)
    tokens = batch("left")
    reference = mj.run(wrapped, tokens, capture=("features.2",))
    same = mj.run(wrapped, tokens, {"features.2": mj.Replace(reference.acts["features.2"])})
    assert error(on_real(same.logits, tokens), on_real(reference.logits, tokens)) < 1e-10
    edits = {"features.0": mj.Scale(0.0, mj.Where(unit=[1, 3], pos=-1))}
    edited, captured = mj.run(wrapped, tokens, edits), mj.run(wrapped, tokens, edits, capture=("features.0",))
    last = np.asarray(tokens.positions) == np.asarray(tokens.lengths)[:, None] - 1
    off = last[..., None] & np.isin(np.arange(7), [1, 3])
    expected = by_hand(model, wrapped, tokens, 0, lambda f: jnp.where(off, 0.0, f))
    for out in (edited, captured):
        assert error(on_real(out.logits, tokens), on_real(expected.logits, tokens)) < 1e-10
    assert np.abs(np.asarray(captured.acts["features.0"])[off.nonzero()]).max() == 0


@WITH_MLP
def test_5_a_sweep_of_features_is_a_loop_of_runs(x64, name):
    model, wrapped = spliced(name)
    tokens = batch("right")
    metrics = {
        "logits": METRIC,
        "feature": mj.metrics.Function(
            lambda out: out.acts["features.2"][:, 0, 4], sites={"features.2": mj.Where(pos=-1)}
        ),
        "z": mj.metrics.Function(lambda out: jnp.sum(out.acts["z"], axis=(0, 2, 3, 4)), sites=("z",)),
    }
    grid = mj.grid(unit=range(7), pos=[0, -1])
    swept = mj.sweep(wrapped, tokens, {"features.0": mj.Add(0.7, grid)}, metrics, progress=False)
    for unit, (i, pos) in ((u, p) for u in range(7) for p in enumerate((0, -1))):
        edits = {"features.0": mj.Add(0.7, mj.Where(unit=unit, pos=pos))}
        out = mj.run(wrapped, tokens, edits, capture={"features.2": mj.Where(pos=-1), "z": None})
        for metric, function in metrics.items():
            assert error(swept[metric].values[unit, i], function(out)) < 1e-10
    other = batch("right", (IDS + 5) % 19)
    both = {"clean": other, "corrupted": tokens, "metric": METRIC, "progress": False}
    patched = mj.patch(wrapped, site="features.2", over=("unit",), **both)
    acts = mj.run(wrapped, other, capture=("features.2",)).acts["features.2"]
    for unit in range(5):
        alone = by_hand(model, wrapped, tokens, 2, lambda f, u=unit: f.at[..., u].set(acts[..., u]))
        assert error(patched[unit], METRIC(alone)) < 1e-10


@WITH_MLP
@pytest.mark.parametrize("site", ["features.0", "features.2"])
def test_6_features_are_attributed(x64, name, site):
    model, wrapped = spliced(name)
    base, source, layer = batch("left"), batch("left", (IDS + 5) % 19), int(site[-1])
    both = {"clean": source, "corrupted": base, "metric": METRIC, "progress": False}
    result = mj.attribute(wrapped, sites={site: ("pos", "unit"), "z": ("layer", "head")}, **both)
    acts = mj.run(wrapped, source, capture=(site,)).acts[site]
    moved = lambda gate: by_hand(model, wrapped, base, layer, lambda f: f + gate * (acts - f))
    slope = jax.grad(lambda gate: jnp.sum(METRIC(moved(gate))))(jnp.zeros(acts.shape))
    for example, n in enumerate(np.asarray(base.lengths)):
        given = result[site].values[:n, :, example] - result.base.values[example]
        assert np.abs(given - slope[example, -n:]).max() < 1e-10 * np.abs(slope).max()
    plain = mj.attribute(model, sites={"z": ("layer", "head")}, **both)
    assert error(result.z, plain.z) < 1e-10
    whole = mj.attribute(wrapped, sites={site: ("pos",)}, method=mj.IntegratedGradients(8), **both)
    replaced = METRIC(mj.run(wrapped, base, {site: mj.Replace(acts)}))
    total = (whole[site] - whole.base).sum(
        "pos"
    )  # all gates together: replacing every feature, but for the gap that it tells
    assert error(total - whole.gap, np.asarray(replaced) - whole.base) < 1e-10


def test_generation_with_features(x64):
    model, wrapped = spliced("llama_gqa")
    steer = {"features.2": mj.Add(3.0, mj.Where(unit=1))}
    done = mj.generate(wrapped, IDS[:, :4], steer, max_new_tokens=4, capture=("features.2",))
    out = mj.run(wrapped, mj.Tokens(done.ids), steer, capture=("features.2",))
    assert error(done.acts["features.2"], out.acts["features.2"]) < 1e-10
    assert (np.asarray(out.logits).argmax(-1)[:, 3:-1] == np.asarray(done.ids)[:, 4:]).all()
    plain = mj.generate(wrapped, IDS[:, :4], max_new_tokens=4)
    assert (np.asarray(plain.ids) == np.asarray(mj.generate(model, IDS[:, :4], max_new_tokens=4).ids)).all()


class TwoLayers(mj.Model):
    """A classifier of vectors."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    @property
    def sites(self):
        site = lambda name, size, part: mj.Site(name, ("batch", name), f"the {name} layer", part, fixed=((name, size),))
        return {"hidden": site("hidden", 8, "mlp"), "classes": site("classes", 3, "final")}

    @property
    def dtype(self):
        return self.first.weight.dtype

    def forward(self, inputs, frame, tap, state):
        visit = mj.Visit(tap, self.sites, frame)
        x, state = visit("hidden", jax.nn.relu(jax.vmap(self.first)(inputs.values)), state)
        return visit("classes", jax.vmap(self.second)(x), state)


@pytest.fixture
def two_layers():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0))
        model = TwoLayers(eqx.nn.Linear(5, 8, key=keys[0], dtype=float), eqx.nn.Linear(8, 3, key=keys[1], dtype=float))
        yield model, np.random.default_rng(0).normal(size=(6, 5))


def by_numpy(model, x, edit=lambda h: h):
    hidden = np.maximum(x @ np.asarray(model.first.weight).T + np.asarray(model.first.bias), 0)
    return hidden, edit(hidden) @ np.asarray(model.second.weight).T + np.asarray(model.second.bias)


def without(unit, value=0.0):
    return lambda h: np.where(np.arange(8) == unit, value, h)


def test_a_model_of_ones_own_is_run(two_layers):
    model, x = two_layers
    hidden, classes = by_numpy(model, x)
    out = mj.run(model, x, capture=("hidden", "classes"))
    assert error(out.acts["hidden"], hidden) < 1e-12 and error(out.readout, classes) < 1e-12
    edited = mj.run(model, x, {"hidden": mj.Scale(0.0, mj.Where(unit=3, batch=[0, 1]))})
    off = np.where(np.arange(6)[:, None] < 2, by_numpy(model, x, without(3))[1], classes)
    assert error(edited.readout, off) < 1e-12
    gate = lambda g: jnp.sum(mj.run(model, x, {"hidden": mj.Mix(g, np.zeros(8))}).readout[:, 0])
    assert abs(jax.grad(gate)(0.0) - np.sum(-hidden @ np.asarray(model.second.weight)[0])) < 1e-10
    each = jax.vmap(lambda unit: mj.run(model, x, {"hidden": mj.Scale(0.0, mj.Where(unit=unit))}).readout)(
        jnp.arange(8)
    )
    assert error(each[5], by_numpy(model, x, without(5))[1]) < 1e-12
    assert np.isnan(jax.jit(lambda u: mj.run(model, x, {"hidden": mj.Scale(0.0, mj.Where(unit=u))}).readout)(8)).all()


def test_a_model_of_ones_own_is_ablated_and_swept(two_layers):
    model, x = two_layers
    hidden, classes = by_numpy(model, x)
    first = lambda out: out.readout[:, 0]
    zero = mj.ablate(model, x, site="hidden", over=("unit",), metric=first, progress=False)
    mean = mj.ablate(
        model, x, site="hidden", over=("unit",), metric={"a": first, "b": lambda out: out.readout[:, 2]}, kind="mean"
    )
    assert error(zero.base, classes[:, 0]) < 1e-12
    for unit in range(8):
        assert error(zero[unit], by_numpy(model, x, without(unit))[1][:, 0]) < 1e-12
        meant = by_numpy(model, x, without(unit, hidden[:, unit].mean()))[1]
        assert error(mean.a[unit], meant[:, 0]) < 1e-12 and error(mean.b[unit], meant[:, 2]) < 1e-12
    seen = mj.metrics.Function(lambda out: out.acts["classes"][:, 1], sites=("classes",))
    factors = mj.dose_response(model, x, site="hidden", over=mj.grid(unit=[2, 4]), factors=(0.5, 2.0), metric=seen)
    for i, factor in enumerate((0.5, 2.0)):
        for j, unit in enumerate((2, 4)):
            expected = by_numpy(model, x, lambda h, u=unit, f=factor: np.where(np.arange(8) == u, f * h, h))[1]
            assert error(factors[i, j], expected[:, 1]) < 1e-12
    small = mj.ablate(
        model,
        x,
        site="hidden",
        over=("unit",),
        metric=first,
        memory=2 * int(zero.attrs["memory_estimate"] / 8),
        progress=False,
    )
    assert error(small, zero) < 1e-12
    patched = mj.patch(model, clean=x, corrupted=x[::-1], site="hidden", over=("unit",), metric=first, progress=False)
    for unit in range(8):
        put = by_numpy(model, x[::-1], lambda h, u=unit: np.where(np.arange(8) == u, hidden, h))[1]
        assert error(patched[unit], put[:, 0]) < 1e-12


REFUSED = {
    "attributed": (lambda m, x: mj.attribute(m, clean=x, corrupted=x + 1, sites=("hidden",), metric=lambda out: out.readout[:, 0]), TypeError, "attribution walks the layers of a model"),
    "asked to generate": (lambda m, x: mj.generate(m, x, max_new_tokens=1), TypeError, "generation takes a model of tokens, given TwoLayers"),
    "edited elsewhere": (lambda m, x: mj.run(m, x, {"hiden": mj.Scale(0.0)}), ValueError, "unknown site 'hiden'; did you mean 'hidden'"),
    "edited at a site of transformers": (lambda m, x: mj.run(m, x, {"z": mj.Scale(0.0)}), ValueError, "this model has no site 'z'"),
    "edited at a position": (lambda m, x: mj.run(m, x, {"hidden": mj.Scale(0.0, mj.Where(pos=0))}), ValueError, "site 'hidden' has no axis 'pos'; its axes are batch, unit"),
    "saved": (lambda m, x: mj.ablate(m, x, site="hidden", over=("unit",), metric=lambda out: out.readout[:, 0], save="/tmp/never"), TypeError, "save= is for a mijax.Transformer"),
    "given no batch": (lambda m, x: mj.run(m, np.float64(1.0)), ValueError, "a batch has the examples in front"),
}  # fmt: skip


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_model_of_ones_own_cannot_be(what, two_layers):
    call, kind, message = REFUSED[what]
    with refused(kind, message):
        call(*two_layers)


def test_a_model_without_a_method_cannot_be_made():
    class Incomplete(mj.Model):
        sites = frozenset()

    with pytest.raises(TypeError, match="forward"):
        Incomplete()
