"""What a user's function costs: nothing is compiled, hashed or kept where nothing but arrays changed; what is kept is told."""

import functools
import gc
import types
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax.programs import convert as conversion
from mijax.programs.convert import convert
from tests.compilations import compilations
from tests.situations import refused
from tests.situations.models import logits, model

PROMPT = [[1, 2, 3]]
SMALL = model()
X = jax.ShapeDtypeStruct((1, 3, 8), jnp.float32)
GRID = {"z": mj.Replace(0.0, mj.grid(layer=range(2), head=range(2)))}


def run(edit, site="resid_post"):
    return logits(SMALL, PROMPT, {site: edit})


class Plus(eqx.Module):
    vector: object

    def __call__(self, x, site, layer, positions):
        return x + self.vector


def seen(x):
    """A callback at module level."""


def vector(i):
    return np.full((1, 1, 8), i, np.float32)


def over(function, *arrays):
    return lambda x, *_: function(x, *arrays)


EDITS = {
    "a lambda": lambda i: lambda x, *_: 2.0 * x,
    "over an array": lambda i: over(lambda x, v: x + v, jnp.asarray(vector(i))),
    "over a NumPy array": lambda i: over(lambda x, v: x + v, vector(i)),
    "a module": lambda i: Plus(jnp.asarray(vector(i))),
    "a module of NumPy arrays": lambda i: Plus(vector(i)),
    "a module of NumPy scalars": lambda i: Plus(np.float32(i)),
    "a random key": lambda i: over(lambda x, key: x + jax.random.normal(key, x.shape, x.dtype), jax.random.key(i)),
    "relu": lambda i: lambda x, *_: jax.nn.relu(x),
    "a network": lambda i: over(
        lambda x, net: jax.vmap(jax.vmap(net))(x), eqx.nn.MLP(8, 8, 4, 1, jax.nn.gelu, key=jax.random.key(i))
    ),
    "a loop of jit": lambda i: over(
        lambda x, v: jax.lax.scan(lambda x, _: (jax.jit(lambda x: x + v)(x), None), x, None, length=2)[0], vector(i)
    ),
    "a linear solver": lambda i: over(lambda x, a: jnp.linalg.solve(a, x[0].T).T[None], jnp.eye(8) * (i + 2.0)),
    "a printed value": lambda i: lambda x, *_: (jax.debug.print("", ordered=False), x)[1],
    "a callback": lambda i: lambda x, *_: (jax.debug.callback(seen, x), x)[1],
    "a callback made in the call": lambda i: lambda x, *_: (jax.debug.callback(lambda y: seen(y), x), x)[1],
    "a check of Equinox": lambda i: lambda x, *_: eqx.error_if(x, jnp.isnan(x).any(), "NaN"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_fresh_but_equal_function_compiles_nothing(kind):
    run(EDITS[kind](0))
    with compilations() as compiled:
        for i in (1, 2):
            run(EDITS[kind](i))
    assert not compiled


def test_a_fresh_but_equal_metric_compiles_nothing():
    metric = lambda i: over(lambda out, v: jnp.sum(out.readout.final * v, axis=(1, 2)), jnp.asarray(vector(i)))
    swept = [mj.sweep(SMALL, PROMPT, GRID, metric(0), progress=False)]
    with compilations() as compiled:
        swept += [mj.sweep(SMALL, PROMPT, GRID, metric(i), progress=False) for i in (1, 2)]
    assert not compiled
    assert np.allclose(swept[0], 0) and np.allclose(2 * swept[1], swept[2], rtol=1e-5)


def test_new_python_numbers_compile_and_say_so():
    edit = lambda number: lambda x, site, layer, positions: x * number - 0.125
    run(lambda x, site, layer, positions: x + 0.5)  # compiles what every run needs
    with compilations() as compiled:
        for number in range(1, 8):
            run(edit(float(number)))
    assert len(compiled) == 7
    with pytest.warns(UserWarning, match=r"<lambda> was compiled 8 times.*jax.numpy.asarray\(number\)"):
        run(edit(8.0))
    run(edit(9.0))  # said once


def test_the_numbers_of_the_readme_do_not_warn_where_they_are_arrays():
    edit = lambda number: lambda x, site, layer, positions: x * number - 0.25
    for number in range(10):
        run(edit(jnp.asarray(float(number))))


# ---- programs that differ


@pytest.mark.parametrize(
    "pair",
    [
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x * jnp.nan, lambda x: x * 1.0),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x + jnp.float32(1), lambda x: x + jnp.float32(2)),
        (lambda x: jnp.sum(x, 0), lambda x: jnp.sum(x, 1)[0]),
        (lambda x: x.astype(jnp.int32), lambda x: x.astype(jnp.int16)),
        (lambda x: (x, 2 * x), lambda x: [x, 2 * x]),
        (lambda x: {"a": x}, lambda x: {"b": x}),
        (lambda x: jax.lax.scan(lambda x, _: (x * 2, None), x, None, length=3)[0], lambda x: jax.lax.scan(lambda x, _: (x * 2, None), x, None, length=4)[0]),
        (lambda x: jax.jit(lambda x: x * 2)(x), lambda x: jax.jit(lambda x: x * 3)(x)),
        (lambda x: jax.lax.reduce(x, np.float32(0), lambda a, b: a + b, (0,)), lambda x: jax.lax.reduce(x, np.float32(0), lambda a, b: a * 0.5 + b, (0,))),
        (lambda x: (jax.debug.print("a"), x)[1], lambda x: (jax.debug.print("b"), x)[1]),
        (lambda x: (jax.debug.callback(seen, x), x)[1], lambda x: (jax.debug.callback(print, x), x)[1]),
        (lambda x: jax.random.normal(jax.random.key(0), x.shape), lambda x: jax.random.normal(jax.random.key(0, impl="rbg"), x.shape)),
        (jax.nn.relu, jax.nn.relu6),
        (jax.lax.stop_gradient, lambda x: x),
    ],
)  # fmt: skip
def test_programs_that_differ_are_two(pair):
    program, other = (convert(function, X).program for function in pair)
    assert program is not other and program is convert(pair[0], X).program


def test_names_and_unused_arrays_make_no_other_program():
    def first(x):
        y = 2 * x
        return y

    second = lambda values: 2 * values
    assert convert(first, X).program is convert(second, X).program


def test_a_callback_calls_what_its_own_call_was_given():
    def edit():
        values = []
        return values, lambda x, *_: (jax.debug.callback(lambda y: values.append(y), x), x)[1]

    for _ in range(2):
        values, function = edit()
        run(function)
        jax.effects_barrier()
        assert len(values) == 3  # one for each layer


def test_threefry_of_two_kinds():
    edit = lambda x, *_: x + jax.random.normal(jax.random.key(0), x.shape, x.dtype)
    given = []
    for kind in (True, False):
        with jax.threefry_partitionable(kind):
            given.append(run(edit) - run(mj.Add(jax.random.normal(jax.random.key(0), (1, 3, 8), jnp.float32)[None])))
    assert np.allclose(given, 0, atol=1e-4)


# ---- what is kept


@pytest.mark.parametrize("keep", ["list", "attribute", "closure", "layer", "mean", "relu"])
def test_a_function_that_keeps_what_it_saw(keep):
    kept = []

    def edit(x, site, layer, positions):
        kept.append({"closure": lambda: x, "layer": layer, "mean": jnp.mean(x), "relu": jax.nn.relu(x)}.get(keep, x))
        return jax.nn.relu(x) if keep == "relu" else x

    if keep == "attribute":
        edit = _Keeps()
    with refused(TypeError, "keeps an array beyond its call .* kept by capture="):
        run(edit)


class _Keeps:
    def __call__(self, x, site, layer, positions):
        self.last = x
        return x


def test_functions_that_keep_no_activation():
    kept, made = [], jnp.ones((1, 1, 8))

    def edit(x, site, layer, positions):
        kept.append((x.shape, x.dtype, site, np.ones(3), made, jax.ShapeDtypeStruct(x.shape, x.dtype)))
        return jax.lax.scan(lambda x, _: (jax.nn.relu(x) * made, None), x, None, length=2)[0]

    @functools.lru_cache
    def table(size):
        return np.ones((1, 1, size), np.float32)

    for function in (edit, lambda x, *_: x + table(8), lambda x, *_: jax.nn.gelu(x) + jax.nn.softmax(x)):
        for _ in range(2):
            assert np.isfinite(run(function)).all()


def test_a_cycle_that_is_garbage_is_nothing_kept():
    def edit(x, site, layer, positions):
        cycle = [x]
        cycle.append(cycle)
        return 2.0 * x

    assert np.allclose(run(edit), run(mj.Scale(2.0)), atol=1e-4)


@pytest.mark.parametrize("make", [lambda v: lambda x, *_: x + v, lambda v: lambda x, *_: jax.nn.relu(x) + v, Plus])
def test_an_array_is_let_go_with_its_function(make):
    array = jnp.ones((1, 1, 8)) * 3
    gone = weakref.ref(array)
    run(make(array))
    run(make(jnp.zeros((1, 1, 8))))  # JAX keeps the last trace of a function
    del array
    gc.collect()
    assert gone() is None


def test_tables_do_not_grow_with_calls():
    sizes = lambda: [len(table) for table in (conversion._interned, conversion._variants, conversion._without_kept)]
    edit = lambda i: over(lambda x, v: jax.nn.relu(x + v) * 7.0, jnp.asarray(vector(i)))
    run(edit(0))
    before = sizes()
    for i in range(5):
        run(edit(i))
    gc.collect()
    assert [a <= b for a, b in zip(sizes(), before)] == [True] * 3


def test_large_arrays_are_not_read_without_save(monkeypatch):
    def refuse(*_):
        raise AssertionError("an array was hashed")

    large = jnp.ones((1, 1, 8))
    edit = lambda x, *_: jax.lax.scan(lambda x, _: (jax.jit(lambda x: x + large)(x), None), x, None, length=2)[0]
    metric = lambda out: jnp.sum(jax.nn.relu(out.readout.final * large), axis=(1, 2))
    for module in ("programs.key", "chunks"):
        monkeypatch.setattr(f"mijax.{module}.hashlib", types.SimpleNamespace(sha256=refuse))
    run(edit)
    mj.sweep(SMALL, PROMPT, GRID | {"resid_pre": edit}, metric, progress=False)


def test_a_metric_is_measured_before_anything_runs():
    with (
        compilations() as compiled,
        refused(ValueError, r"metric 'final' must give one number per example, \[1\], given"),
    ):
        mj.sweep(SMALL, PROMPT, GRID, {"final": lambda out: out.readout.final}, progress=False)
    assert not compiled
