"""Users' functions under the user's own `jit`, `vmap`, `grad` and `shard_map`, with custom derivatives, and in stacks.

The expected value is that of mijax's own edits, or of the same function written without what it closes over.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mijax as mj
from mijax.programs.key import _written, key_of
from mijax.superposition.model import _backward, _forward, _written_out
from tests.situations.models import model

PROMPT = [[1, 2, 3], [4, 5, 6]]
VECTORS = np.random.default_rng(0).normal(size=(8, 1, 1, 8)).astype(np.float32)


def score(edit, site="resid_post"):
    return mj.run(model(), PROMPT, {site: edit}).logits[:, -1, 3]


def add(vector):
    return lambda x, site, layer, positions: x + vector


class Plus(eqx.Module):
    vector: jax.Array

    def __call__(self, x, site, layer, positions):
        return x + self.vector


def close(given, expected) -> bool:
    return np.allclose(np.asarray(given), np.asarray(expected), rtol=1e-4, atol=1e-4)


KINDS = {"closure": add, "module": Plus, "bound method": lambda v: Plus(v).__call__}


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_grad_over_what_a_function_closes_over(kind):
    values = jnp.asarray(VECTORS[:3])
    given = lambda v: score(KINDS[kind](v))
    expected = lambda v: score(mj.Add(v[0, 0]))
    assert close(jax.vmap(given)(values), jnp.stack([expected(v) for v in values]))
    assert close(jax.grad(lambda v: given(v).sum())(values[0]), jax.grad(lambda v: expected(v).sum())(values[0]))


def test_a_closure_and_a_module_that_compute_the_same():
    """One program's arrays are closed over, the other's are its inputs."""
    for edit in (add(jnp.asarray(VECTORS[0])), Plus(jnp.asarray(VECTORS[1])), add(jnp.asarray(VECTORS[2]))):
        vector = edit.vector if isinstance(edit, Plus) else edit.__closure__[0].cell_contents
        assert close(score(edit), score(mj.Add(vector[0, 0])))


@pytest.mark.parametrize(
    "inner",
    [
        lambda v: lambda x, *_: jax.lax.scan(lambda x, _: (x + v, None), x, None, length=3)[0],
        lambda v: lambda x, *_: jax.jit(lambda x: x + 3 * v)(x),
        lambda v: lambda x, *_: jax.checkpoint(lambda x: x + 3 * v)(x),
        lambda v: lambda x, s, layer, p: jax.lax.cond(layer >= 0, lambda x: x + 3 * v, lambda x: x, x),
    ],
)
def test_a_tracer_deep_inside(inner):
    given, expected = (lambda v: score(inner(v)).sum()), (lambda v: score(mj.Add(3 * v[0, 0])).sum())
    v = jnp.asarray(VECTORS[0])
    assert close(jax.grad(given)(v), jax.grad(expected)(v))
    assert close(jax.vmap(given)(jnp.asarray(VECTORS[:2])), [expected(v) for v in jnp.asarray(VECTORS[:2])])


def test_inside_the_users_jit_and_scan():
    values = jnp.asarray(VECTORS[:3])
    expected = jnp.stack([score(mj.Add(v[0, 0])) for v in values])
    assert close(jax.lax.scan(lambda c, v: (c, score(add(v))), 0, values)[1], expected)
    for factor in (1.0, 2.0):  # each jit is the user's own, and reads what stands there when it is traced
        assert close(
            jax.jit(lambda v, factor=factor: score(add(factor * v)))(values[0]), score(mj.Add(factor * values[0, 0, 0]))
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "edit",
    [
        lambda v: lambda x, s, layer, p: x + v,
        lambda v: lambda x, s, layer, p: jax.lax.scan(lambda x, _: (x + v, None), x, None, length=1)[0],
        lambda v: lambda x, s, layer, p: jnp.where((layer >= 0) & (p >= 0)[..., None], jax.nn.relu(x + v) - jax.nn.relu(-x - v), x),
    ],
)  # fmt: skip
def test_shard_map_over_what_a_function_closes_over(kind, edit):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    values = jax.device_put(VECTORS, NamedSharding(mesh, P("d")))
    sharded = lambda f: jax.shard_map(
        lambda v: jax.tree.map(lambda y: y[None], f(v[0])), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )  # fmt: skip
    loss = lambda make: jax.value_and_grad(lambda v: score(make(v)).sum())
    expected = jax.vmap(loss(lambda v: mj.Add(v[0, 0])))(jnp.asarray(VECTORS))
    assert all(map(close, sharded(loss(edit))(values), expected))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sweep_over_a_mesh_with_a_function_and_a_metric(kind):
    mesh = jax.make_mesh((4, 2), ("cells", "other"), axis_types=(kind, kind))
    vector = jnp.asarray(VECTORS[0])
    edits = lambda edit: {"resid_post": [mj.Scale(0.5, mj.grid(layer=range(3))), edit]}
    metric = lambda out: jax.nn.relu(out.readout.logits(pos=-1).reshape(2, -1)[:, 3]) * vector[0, 0, 0]
    given = mj.sweep(model(), PROMPT, edits(add(vector)), metric, mesh=mesh, progress=False)
    expected = mj.sweep(model(), PROMPT, edits(mj.Add(vector[0, 0])), mj.metrics.logit(3), progress=False)
    assert close(given, np.maximum(expected, 0) * VECTORS[0, 0, 0, 0])


# ---- custom derivatives

slope = 1.0


@jax.custom_jvp
def bent(x):
    """The identity, with a slope that is read when it is differentiated."""
    return x


bent.defjvp(lambda primals, tangents: (primals[0], slope * tangents[0]))


@jax.custom_vjp
def pulled(x):
    return x


pulled.defvjp(lambda x: (x, None), lambda kept, gradient: (slope * gradient,))


@pytest.mark.parametrize("function", [bent, pulled])
@pytest.mark.parametrize("where", ["alone", "in a scan"])
def test_a_rule_that_reads_a_global(function, where, monkeypatch):
    once = lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, None, length=1)[0]
    through = function if where == "alone" else once
    vector = jnp.asarray(VECTORS[0])
    value, plain = jax.value_and_grad(lambda v: score(mj.Add(v[0, 0], mj.Where(layer=2)), "resid_mid").sum())(vector)
    run = jax.value_and_grad(
        lambda v: score(mj.Apply(lambda x, *_: through(x + v), mj.Where(layer=2)), "resid_mid").sum()
    )
    for number in (1.0, 3.0, 0.0):
        monkeypatch.setitem(globals(), "slope", number)
        assert close(run(vector)[0], value) and close(run(vector)[1], number * plain)


def test_relu_in_an_edit():
    edit = lambda x, site, layer, positions: jax.nn.relu(x)
    by_hand = lambda x, site, layer, positions: jnp.where(x > 0, x, 0.0)
    for metric in (edit, by_hand):
        assert close(score(metric), score(by_hand))
    of = lambda e: jax.grad(lambda v: score(lambda x, *rest: e(x * v, *rest)).sum())(1.0)
    assert close(of(edit), of(by_hand))


# ---- stacks


def test_a_module_in_a_stack():
    values = VECTORS[:3]
    stacked = lambda make: mj.stack("which", {i: {"resid_post": make(v)} for i, v in enumerate(values)})
    given = mj.sweep(model(), PROMPT, stacked(lambda v: Plus(jnp.asarray(v))), mj.metrics.logit(3), progress=False)
    expected = [score(mj.Add(v[0, 0])) for v in values]
    assert given.dims == ("which", "batch") and close(given, expected)


def test_a_module_in_a_stack_of_places_and_grids():
    values = VECTORS[:2]
    stacked = lambda make: mj.stack(
        "which", {i: {"z": make(v[0, 0, 0], mj.grid(layer=range(3)))} for i, v in enumerate(values)}
    )
    scaled = stacked(lambda v, where: mj.Scale(v, where))
    applied = stacked(lambda v, where: mj.Apply(_Times(jnp.asarray(v)), where))
    given, expected = (mj.sweep(model(), PROMPT, s, mj.metrics.logit(3), progress=False) for s in (applied, scaled))
    assert given.dims == expected.dims and close(given, expected)


class _Times(eqx.Module):
    factor: jax.Array

    def __call__(self, x, site, layer, positions):
        return self.factor * x


def test_a_rule_of_a_library_is_known_by_its_name():
    """And any other by what it computes: a user's, and one that closes over a number."""
    user = jax.custom_jvp(lambda x: x)
    user.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scaled(number, x):
        return x

    scaled.defvjp(lambda number, x: (x, None), lambda number, _, g: (number * g,))

    def rules(function):
        (equation,) = jax.make_jaxpr(function)(jnp.ones((2, 2))).eqns
        return [_written(x) for x in equation.params.values() if hasattr(x, "transforms")]

    assert rules(lambda x: _written_out(x, x)) == [_forward, _backward]
    assert rules(user) == [None] and rules(lambda x: scaled(2.0, x)) == [None, None]
    key = lambda number: key_of(jax.make_jaxpr(lambda x: scaled(number, x))(jnp.ones(2)).jaxpr)
    assert key(2.0) == key(2.0) != key(3.0)
