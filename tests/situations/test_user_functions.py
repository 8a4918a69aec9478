"""What a user's function reads is what stands there at each call, as in a hook: in every driver, wherever it reads it from."""

import types
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mijax as mj
from mijax import superposition as sp
from tests.situations import refused
from tests.situations.models import logits, model

PROMPT, OTHER = [[1, 2, 3], [4, 5, 6]], [[1, 7, 3], [4, 8, 6]]
E = np.eye(8, dtype=np.float32)[:, None, None]
"""Directions of the stream, as [unit, 1, 1, d_model]."""
strength = 0.0
target = 3


def steer(x, site, layer, positions):
    return x + strength * E[0]


def wanted(out):
    return out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, target]


def close(given, expected) -> bool:
    return np.allclose(np.asarray(given), np.asarray(expected), atol=1e-4)


def added(values, where=None):
    return logits(model(), PROMPT, {"resid_post": mj.Add(values, where or mj.Where())})


# ---- edits


def test_a_function_reads_a_global(monkeypatch):
    for number in (0.0, 5.0, 0.0, -2.0):
        monkeypatch.setitem(globals(), "strength", number)
        assert close(logits(model(), PROMPT, {"resid_post": steer}), added(number * E[0, 0, 0]))


def test_a_closure_reads_a_list():
    doses = []
    edit = lambda x, site, layer, positions: x + sum(doses, 0.0) * E[1]
    for dose in (1.0, 2.0):
        doses.append(dose)
        assert close(logits(model(), PROMPT, {"resid_post": edit}), added(sum(doses) * E[1, 0, 0]))


def test_an_object_whose_attribute_is_changed():
    class Steering:
        vector = E[0]

        def edit(self, x, site, layer, positions):
            return x + self.vector

        def __call__(self, x, site, layer, positions):
            return self.edit(x, site, layer, positions)

    steering = Steering()
    for vector in (E[0], 3 * E[1]):
        steering.vector = vector
        for edit in (steering, steering.edit, mj.Apply(steering)):
            assert close(logits(model(), PROMPT, {"resid_post": edit}), added(vector[0, 0]))


def test_an_array_changed_in_place():
    vector = np.zeros((1, 1, 8), np.float32)
    edit = partial(lambda vector, x, site, layer, positions: x + vector, vector)
    for number in (1.0, 4.0):
        vector[:] = number
        assert close(logits(model(), PROMPT, {"resid_post": edit}), added(np.full(8, number, np.float32)))


def test_a_jitted_inner_function_over_arrays_of_one_shape():
    def edit(plus, minus):
        inner = jax.jit(lambda x: x + plus - minus)
        return lambda x, site, layer, positions: inner(x)

    for i, j in ((0, 1), (1, 0), (2, 5)):
        given = logits(model(), PROMPT, {"resid_post": edit(jnp.asarray(E[i]), jnp.asarray(E[j]))})
        assert close(given, added(E[i, 0, 0] - E[j, 0, 0]))


LOOPS = {
    "scan": lambda f, x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=3)[0],
    "while": lambda f, x: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, f(s[1])), (0, x))[1],
    "for": lambda f, x: jax.lax.fori_loop(0, 3, lambda i, x: f(x), x),
    "cond": lambda f, x: jax.lax.cond(x.size > 0, lambda x: f(f(f(x))), lambda x: x, x),
    "checkpoint": lambda f, x: jax.checkpoint(lambda x: f(f(f(x))))(x),
    "scan of jit": lambda f, x: jax.lax.scan(lambda x, _: (jax.jit(f)(x), None), x, None, length=3)[0],
    "scan over and of arrays": lambda f, x: jax.lax.scan(
        lambda x, y: (jax.jit(f)(x) + y, x), x, jnp.zeros((3, 1, 1, 1)), reverse=True
    )[0],
}


@pytest.mark.parametrize("loop", LOOPS)
def test_an_array_deep_in_a_loop(loop):
    for i in (0, 3):
        v = jnp.asarray(E[i])
        edit = lambda x, site, layer, positions, v=v: LOOPS[loop](lambda x: x + v, x)
        assert close(logits(model(), PROMPT, {"resid_post": edit}), added(3 * E[i, 0, 0]))


def test_one_function_at_sites_of_different_width():
    halve = lambda x, site, layer, positions: 0.5 * x
    for sites in (("z",), ("z", "post"), ("resid_pre", "post", "attn_scores")):
        edits = [{site: edit for site in sites} for edit in (halve, mj.Scale(0.5))]
        assert close(*(logits(model(), PROMPT, edit) for edit in edits))


@pytest.mark.parametrize(
    ("site", "where"),
    [
        ("resid_post", mj.Where(layer=1)),
        ("z", mj.Where(layer=[0, 2], head=1)),
        ("resid_pre", mj.Where(pos=[[0], [2]])),
        ("attn_scores", mj.Where(head=0, query=2)),
        ("embed", mj.Where(pos=1)),
    ],
)
def test_apply_at_a_place(site, where):
    edit = mj.Apply(lambda x, site, layer, positions: 3.0 * x, where)
    expected = logits(model(), PROMPT, {site: mj.Scale(3.0, where)})
    assert close(logits(model(), PROMPT, {site: edit}), expected)
    assert not close(expected, logits(model(), PROMPT))


def test_apply_with_a_grid_in_its_where(monkeypatch):
    for number in (2.0, 0.5):
        monkeypatch.setitem(globals(), "strength", number)
        edit = lambda x, site, layer, positions: strength * x
        edits = [
            {"z": e(mj.grid(layer=range(3), head=range(2)))}
            for e in (partial(mj.Apply, edit), partial(mj.Scale, number))
        ]
        given, expected = (mj.sweep(model(), PROMPT, e, mj.metrics.logit(3), progress=False) for e in edits)
        assert given.dims == expected.dims and close(given, expected)


def test_apply_with_a_grid_over_roles_of_unequal_place():
    roles = mj.grid(layer=[0, 1], pos={"first": [[0], [1]], "last": [[2], [1]]})
    edits = [{"resid_post": e} for e in (mj.Apply(lambda x, *_: -x, roles), mj.Scale(-1.0, roles))]
    assert close(*(mj.sweep(model(), PROMPT, e, mj.metrics.logit(3), progress=False) for e in edits))


def test_generation_under_a_function_that_reads_a_global(monkeypatch):
    texts = []
    for number in (0.0, 80.0):
        monkeypatch.setitem(globals(), "strength", number)
        texts.append(mj.generate(model(), PROMPT, {"resid_post": steer}, max_new_tokens=3).ids)
        expected = mj.generate(model(), PROMPT, {"resid_post": mj.Add(number * E[0, 0, 0])}, max_new_tokens=3).ids
        assert (np.asarray(texts[-1]) == np.asarray(expected)).all()
    assert (np.asarray(texts[0]) != np.asarray(texts[1])).any()


def test_x64_switched_on_between_calls():
    edit = lambda x, site, layer, positions: x / 3
    for enabled in (False, True, False):
        with jax.enable_x64(enabled):
            wide = jax.tree.map(lambda a, to=np.float64 if enabled else np.float32: a.astype(to), model())
            given, expected = (logits(wide, PROMPT, {"resid_post": e}) for e in (edit, mj.Scale(1 / 3)))
        assert given.dtype == (np.float64 if enabled else np.float32)
        assert np.allclose(given, expected, rtol=1e-12 if enabled else 1e-5)


def test_a_random_key_that_changes():
    for seed in (0, 1):
        key = jax.random.key(seed)
        edit = lambda x, site, layer, positions, key=key: x + jax.random.normal(key, x.shape, x.dtype)
        noise = jax.random.normal(key, (2, 3, 8), jnp.float32)
        assert close(logits(model(), PROMPT, {"resid_post": edit}), added(noise[None]))


# ---- metrics


SMALL = mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16)


DRIVERS = ("sweep", "patch", "ablate", "knock_out", "attribute", "gradients", "concept")


def drivers():
    small = model(SMALL)
    both = {"clean": PROMPT, "corrupted": OTHER, "progress": False}
    heads = {"z": mj.Replace(0.0, mj.grid(layer=range(2), head=range(2)))}
    return {
        "sweep": lambda m: mj.sweep(small, PROMPT, heads, m, progress=False).values,
        "patch": lambda m: mj.patch(small, site="z", over=("layer", "head"), metric=m, **both).values,
        "ablate": lambda m: mj.ablate(small, PROMPT, site="z", over=("layer",), metric=m, progress=False).values,
        "knock_out": lambda m: mj.knock_out(small, PROMPT, {"first": (-1, 0)}, m, progress=False).values,
        "attribute": lambda m: mj.attribute(small, sites=("mlp_out",), metric=m, **both).mlp_out.values,
        "gradients": lambda m: mj.gradients(small, PROMPT, m, ("resid_post",)).grads["resid_post"],
        "concept": lambda m: mj.concept(
            small, positive=PROMPT, negative=OTHER, site="resid_post", metric=m
        ).direction.sel(kind="gradient"),
    }


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_metric_reads_a_global(driver, monkeypatch):
    measured = drivers()[driver]
    for token in (3, 5):
        monkeypatch.setitem(globals(), "target", token)
        assert close(measured(wanted), measured(mj.metrics.logit(token)))


class Own(eqx.Module):
    """A metric that says how it splits, with answers as an array and a factor as a Python number."""

    answers: jax.Array
    factor: float = 1.0
    pos: int = -1
    per_example: bool = True

    def take(self, examples):
        return Own(self.answers[examples], self.factor)

    def __call__(self, out):
        scores = out.readout.logits(pos=self.pos).reshape(len(out.readout.final), -1)
        return self.factor * jnp.take_along_axis(scores, self.answers[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_attribution_in_chunks_of_prompts(factor):
    ids, answers = np.random.default_rng(0).integers(0, 11, (6, 4)), np.array([1, 2, 3, 4, 5, 6])
    other = ids.copy()
    other[:, 1] = (ids[:, 1] + 1) % 11
    run = lambda metric, **more: mj.attribute(
        model(), clean=ids, corrupted=other, sites=("z", "mlp_out"), metric=metric, progress=False, **more
    )
    whole = run(mj.metrics.logit(answers))
    parts = run(Own(jnp.asarray(answers), factor), memory=60_000)
    assert parts.attrs["prompts_together"] < 6 == whole.attrs["prompts_together"]
    for name in ("z", "mlp_out", "base", "source"):
        assert close(parts[name], factor * whole[name])


def test_a_metric_of_a_part_of_a_readout_or_of_another_shape():
    with refused(ValueError, "metric 'wrong' must give one number per example"):
        mj.sweep(
            model(),
            PROMPT,
            {"z": mj.Scale(0.0, mj.grid(layer=range(3)))},
            {"wrong": lambda r: r.readout.final},
            progress=False,
        )
    given = mj.sweep(
        model(), PROMPT, {"z": mj.Scale(0.0, mj.grid(layer=range(3)))}, {"a": wanted, "b": lambda r: -wanted(r)}, progress=False
    )  # fmt: skip
    assert close(given.a, -given.b)


# ---- toys


def trained(**given):
    toy = given.pop("toy", lambda: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, 0.5)))
    return sp.train(toy, {"seed": [0, 1]}, steps=20, batch=32, judged_on=64, progress=False, **given)


def test_a_toy_whose_importance_and_target_change():
    read = types.SimpleNamespace(importance=np.ones(3, np.float32), factor=1.0)
    toy = lambda: sp.Toy(
        sp.relu_output(3, 2), sp.sparse(3, 0.5), importance=read.importance, target=lambda x: read.factor * x
    )
    for importance, factor in ((np.ones(3), 1.0), (np.array([1.0, 0, 0]), 0.5)):
        read.importance, read.factor = importance.astype(np.float32), factor
        fresh = sp.Toy(
            sp.relu_output(3, 2), sp.sparse(3, 0.5), importance=read.importance, target=lambda x, f=factor: f * x
        )
        given, expected = trained(toy=toy), trained(toy=lambda fresh=fresh: fresh)
        assert (given.W.values == expected.W.values).all() and (given.loss.values == expected.loss.values).all()


def test_an_optimizer_that_reads_a_rate_and_a_log_that_reads_a_factor():
    read = types.SimpleNamespace(rate=0.0, factor=1.0)
    log = {"norm": lambda toy, params: read.factor * jnp.linalg.norm(params["W"])}
    norms = []
    for read.rate, read.factor in ((0.0, 1.0), (0.1, 1.0), (0.1, 3.0)):
        norms.append(trained(optimizer=lambda: optax.sgd(read.rate), log=log))
    start, moved, scaled = norms
    assert (start.W.values != moved.W.values).any() and (moved.W.values == scaled.W.values).all()
    for result, factor in ((start, 1.0), (moved, 1.0), (scaled, 3.0)):
        assert close(result.norm, factor * np.linalg.norm(result.W.values, axis=(-2, -1)))


def test_a_sampler_that_reads_an_object():
    read = types.SimpleNamespace(scale=1.0)
    sample = lambda key, batch, scale=None: (scale or read.scale) * jax.random.uniform(key, (3, batch))
    toy = lambda: sp.Toy(sp.relu_output(3, 2), sp.Data(3, sample))
    for read.scale in (1.0, 0.25):
        fresh = sp.Toy(sp.relu_output(3, 2), sp.Data(3, partial(sample, scale=read.scale)))
        assert (trained(toy=toy).loss.values == trained(toy=lambda fresh=fresh: fresh).loss.values).all()


class Multiplies:
    """A callback whose `==` says nothing of its number."""

    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return isinstance(other, Multiplies)

    def __hash__(self):
        return 0

    def __call__(self, x):
        return np.asarray(x) * np.float32(self.number)


def test_a_callback_with_an_equality_of_its_own():
    for number in (1.0, 3.0):
        edit = lambda x, *point, number=number: jax.pure_callback(
            Multiplies(number), jax.ShapeDtypeStruct(x.shape, x.dtype), x
        )
        called, scaled = (mj.run(model(), [[1, 2, 3]], {"mlp_out": e}).logits for e in (edit, mj.Scale(number)))
        assert np.allclose(called, scaled, atol=1e-4)
