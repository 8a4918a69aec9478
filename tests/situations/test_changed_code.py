"""A folder that was begun with other code is refused, with what changed; the same code goes on, in any process."""

import importlib
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from mijax import superposition as sp
from tests.situations import refused
from tests.situations.models import model

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = [[1, 2, 3]]
GRID = mj.grid(layer=range(2), head=range(2))
CODE = """
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from mijax import superposition as sp

FACTOR = {factor}
VECTOR = jnp.full(8, {factor})


class Score(eqx.Module):
    token: int = 3

    def __call__(self, out):
        return {factor} * out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, self.token]


class Edit(eqx.Module):
    def __call__(self, x, site, layer, positions):
        return {factor} * x


def outer(out):
    def inner(scores):
        return {factor} * scores[:, 3]

    return inner(out.readout.logits(pos=-1).reshape(len(out.readout.final), -1))


def reads_a_global(out):
    return FACTOR * out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, 3]


def reads_an_array(out):
    return out.readout.final[:, -1] @ VECTOR


def in_a_loop(out):
    scores = out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, 3]
    return jax.lax.scan(lambda s, _: (jax.jit(lambda s: s * {factor})(s), None), scores, None, length=2)[0]


@jax.custom_jvp
def bent(x):
    return x


bent.defjvp(lambda primals, tangents: (primals[0], {factor} * tangents[0]))


def with_a_rule(out):
    return jax.nn.relu(bent(out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, 3]))


def toy():
    return sp.Toy(sp.relu_output(3, 2), sp.sparse(3, 0.5), importance={factor} * jnp.ones(3))


def optimizer():
    return optax.sgd(0.01 * {factor})


def norm(toy, params):
    return {factor} * jnp.linalg.norm(params["W"])
"""
METRICS = ("Score", "outer", "reads_a_global", "reads_an_array", "in_a_loop", "with_a_rule")


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes the user's module with a factor, and gives it as imported anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(factor: float):
        (tmp_path / "user_code.py").write_text(CODE.replace("{factor}", str(factor)))
        importlib.invalidate_caches()
        sys.modules.pop("user_code", None)
        return importlib.import_module("user_code")

    yield write
    sys.modules.pop("user_code", None)


def swept(metric, folder, edit=None):
    edits = {"z": mj.Replace(0.0, GRID)} | ({} if edit is None else {"resid_pre": edit})
    return mj.sweep(model(), PROMPT, edits, metric, save=folder, progress=False)


def metric_of(module, name):
    return module.Score() if name == "Score" else getattr(module, name)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_changed(name, code, tmp_path):
    before = swept(metric_of(code(1.0), name), tmp_path / "kept")
    assert swept(metric_of(code(1.0), name), tmp_path / "kept").equals(before)
    with refused(ValueError, "was begun with another metric: give another folder"):
        swept(metric_of(code(100.0), name), tmp_path / "kept")


def test_an_edit_that_changed(code, tmp_path):
    before = swept(mj.metrics.logit(3), tmp_path / "kept", code(1.0).Edit())
    assert swept(mj.metrics.logit(3), tmp_path / "kept", code(1.0).Edit()).equals(before)
    with refused(ValueError, "was begun with another grid of interventions"):
        swept(mj.metrics.logit(3), tmp_path / "kept", code(2.0).Edit())


@pytest.mark.parametrize("driver", ["patch", "attribute", "ablate"])
def test_a_metric_that_changed_in_another_driver(driver, code, tmp_path):
    both = {"clean": PROMPT, "corrupted": [[1, 4, 3]]}
    more = {"save": tmp_path / "kept", "progress": False}
    run = {
        "patch": lambda m: mj.patch(model(), site="z", over=("layer",), metric=m, **both, **more),
        "attribute": lambda m: mj.attribute(model(), sites=("z",), metric=m, **both, **more),
        "ablate": lambda m: mj.ablate(model(), PROMPT, site="z", over=("layer",), metric=m, **more),
    }[driver]
    before = run(code(1.0).Score())
    assert np.array_equal(run(code(1.0).Score()).base, before.base)
    with refused(ValueError, "was begun with another metric"):
        run(code(100.0).Score())


@pytest.mark.parametrize(("changed", "what"), [("toy", "toy"), ("optimizer", "optimizer"), ("norm", "log")])
def test_a_toy_an_optimizer_or_a_log_that_changed(changed, what, code, tmp_path):
    def run(factor):
        old, new = code(1.0), code(factor)
        of = lambda name: getattr(new if name == changed else old, name)
        return sp.train(
            of("toy"), {"seed": [0]}, optimizer=of("optimizer"), log={"norm": of("norm")}, steps=4, batch=8, judged_on=8,
            save=tmp_path / "kept", progress=False,
        )  # fmt: skip

    before = run(1.0)
    assert (run(1.0).W.values == before.W.values).all()
    with refused(ValueError, f"was begun with another .*{what}"):
        run(2.0)


def test_a_variable_around_a_metric(tmp_path):
    read = {"token": 3}
    metric = lambda out: out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, read["token"]]
    for token in (3, 5):
        read["token"] = token
        given = swept(metric, tmp_path / f"kept{token}")
        assert np.allclose(given, swept(mj.metrics.logit(token), None), atol=1e-5)
    with refused(ValueError, "another metric"):
        swept(metric, tmp_path / "kept3")


DRAWN = lambda key: jax.random.normal(key, (8,))
CONSTANTS = {
    "a key": (jax.random.key, DRAWN),
    "an old key": (jax.random.PRNGKey, DRAWN),
    "an array": (lambda n: np.full(8, n, np.float32), jnp.asarray),
    "an array of bfloat16": (lambda n: jnp.full(8, n, jnp.bfloat16), lambda x: x.astype(jnp.float32)),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_an_array_or_key_that_changed(kind, tmp_path):
    make, vector = CONSTANTS[kind]
    metric = lambda value: lambda out: out.readout.final[:, -1] @ vector(value)
    before = swept(metric(make(1)), tmp_path / "kept")
    assert swept(metric(make(1)), tmp_path / "kept").equals(before)
    with refused(ValueError, "another metric"):
        swept(metric(make(2)), tmp_path / "kept")


SCRIPT = """
import sys
import numpy as np
import mijax as mj
from mijax import chunks
from tests.situations.models import model
from user_code import Edit, Score, in_a_loop, with_a_rule

def refuse(*_):
    raise SystemExit("computed again")

mj.engine.driver._chunk = refuse
metrics = {"a": Score(), "b": in_a_loop, "c": with_a_rule}
edits = {"z": mj.Replace(0.0, mj.grid(layer=range(2), head=range(2))), "resid_pre": Edit()}
print(repr(mj.sweep(model(), [[1, 2, 3]], edits, metrics, save=sys.argv[1], progress=False).a.values.tolist()))
"""


def test_the_same_code_goes_on_in_another_process(code, tmp_path):
    user = code(1.5)
    metrics = {"a": user.Score(), "b": user.in_a_loop, "c": user.with_a_rule}
    before = swept(metrics, tmp_path / "kept", user.Edit())
    path = os.pathsep.join(map(str, (ROOT, tmp_path)))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "7"}
    run = lambda: subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), tmp_path / "kept"], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    resumed = run()
    assert resumed.stdout.strip() == repr(before.a.values.tolist()), resumed.stderr
    code(2.5)
    changed = run()
    assert "was begun with another grid of interventions, another metric" in changed.stderr


# ---- functions that cannot be gone on with


def test_functions_that_draw_numbers_are_refused_with_save(tmp_path):
    rng = np.random.default_rng(0)
    noisy = lambda out: out.readout.final[:, -1] @ jnp.asarray(rng.normal(size=8), jnp.float32)
    dropped = lambda x, site, layer, positions: x * float(rng.integers(2, 1000))
    both = {"clean": PROMPT, "corrupted": [[1, 4, 3]], "progress": False}
    refusing = lambda: refused(ValueError, "differs from call to call .numbers are drawn.*jax.random")
    with refusing():
        swept(noisy, tmp_path / "a")
    with refusing():
        swept(mj.metrics.logit(3), tmp_path / "b", dropped)
    with refusing():
        mj.patch(model(), site="z", over=("layer",), metric=noisy, save=tmp_path / "c", **both)
    with refusing():
        mj.attribute(model(), sites=("z",), metric=noisy, save=tmp_path / "d", **both)
    with refused(ValueError, "gives something else at each call .it draws numbers.*jax.random"):
        toy = lambda: sp.Toy(sp.relu_output(3, 2), sp.sparse(3, 0.5), importance=rng.uniform(size=3))
        sp.train(toy, {"seed": [0]}, steps=2, batch=8, judged_on=8, save=tmp_path / "e", progress=False)
    assert not list(tmp_path.glob("*/*"))  # before anything is written
    first, second = (swept(noisy, None).values for _ in range(2))  # without save= each call draws, as a hook would
    assert (first != second).any()


def test_a_callback_is_refused_with_save(tmp_path):
    def metric(out):
        scores = out.readout.logits(pos=-1).reshape(len(out.readout.final), -1)[:, 3]
        return jax.pure_callback(lambda y: np.asarray(y), scores, scores, vmap_method="sequential")

    with refused(TypeError, "metric 'metric' holds a Python function that no checksum can tell .*leave `save=` out"):
        swept(metric, tmp_path / "kept")
    assert np.allclose(swept(metric, None), swept(mj.metrics.logit(3), None), atol=1e-5)
