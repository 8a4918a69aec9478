"""A user's subclass of one of mijax's own classes is the user's code: read anew at each call, and in no folder unknown."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.compilations import compilations
from tests.situations import refused
from tests.situations.models import model
from tests.situations.prompts import bytes_of_one

PROMPTS, OTHERS = [[1, 2, 3, 4], [2, 3, 4, 5]], [[1, 5, 3, 4], [2, 6, 4, 5]]
HEADS = mj.grid(layer=[0, 2], head=[0, 1])
outer = {"factor": 1.0}


class Difference(mj.metrics.logit_diff):
    def __call__(self, out):
        return outer["factor"] * super().__call__(out)


class Steered(mj.Transformer):
    def embed(self, ids, frame, tap, state):
        x, state = super().embed(ids, frame, tap, state)
        return x.at[:, :, 0].add(outer["factor"]), state


class Halved(mj.AtP):
    def __call__(self, measured, gates, sites, examples):
        estimates = super().__call__(measured, gates, sites, examples)
        return estimates._replace(terms=jax.tree.map(lambda x: outer["factor"] * x, estimates.terms))


class Scaled(mj.Wrapper):
    model: mj.Transformer

    @property
    def sites(self):
        return self.model.sites

    def around(self, tap):
        return tap


@pytest.fixture(autouse=True)
def fresh():
    outer["factor"] = 1.0


CALLS = {
    "sweep": lambda metric, **kw: mj.sweep(model(), PROMPTS, {"z": mj.Replace(0.0, HEADS)}, metric, **kw).values,
    "patch": lambda metric, **kw: mj.patch(model(), clean=PROMPTS, corrupted=OTHERS, site="z", over=HEADS, metric=metric, **kw).values,
    "attribute": lambda metric, **kw: mj.attribute(model(), clean=PROMPTS, corrupted=OTHERS, sites={"z": ("layer", "head")}, metric=metric, **kw).z.values,
    "gradients": lambda metric: np.asarray(mj.gradients(model(), PROMPTS, metric, ("z",)).grads["z"]),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_metric_that_inherits_from_one_of_mijax(call):
    metric = Difference([3, 4], [5, 6])
    once = CALLS[call](metric)
    outer["factor"] = 100.0
    assert np.allclose(CALLS[call](metric), 100 * once, rtol=1e-3, atol=1e-3)
    with compilations() as compiled:
        CALLS[call](metric)
    assert compiled == []


def test_a_folder_of_such_a_metric(tmp_path):
    keep = {"save": tmp_path / "patch", "progress": False}
    CALLS["patch"](Difference([3, 4], [5, 6]), **keep)
    outer["factor"] = 100.0
    with refused(ValueError, "metric"):
        CALLS["patch"](Difference([3, 4], [5, 6]), **keep)


def steered() -> mj.Transformer:
    plain = model()
    inherited = object.__new__(Steered)
    for name, value in vars(plain).items():
        object.__setattr__(inherited, name, value)
    return inherited


def test_a_model_that_inherits_from_the_transformer(tmp_path):
    by_hand = lambda: np.asarray(
        mj.run(model(), PROMPTS, {"embed": mj.Add(outer["factor"] * np.eye(8, dtype=np.float32)[0])}).logits
    )
    for factor in (1.0, 5.0):
        outer["factor"] = factor
        assert np.allclose(mj.run(steered(), PROMPTS).logits, by_hand(), atol=1e-4)
    with refused(TypeError, "save writes a mijax.Transformer, given Steered"):
        mj.save(steered(), tmp_path / "steered")


@pytest.mark.parametrize("what", [steered, lambda: Scaled(model())])
def test_attribution_of_such_a_model_in_a_folder(what, tmp_path):
    with refused(TypeError, "save= is for a mijax.Transformer: whether the code of .* changes"):
        mj.attribute(
            what(),
            clean=PROMPTS,
            corrupted=OTHERS,
            sites={"z": ("layer",)},
            metric=mj.metrics.logit(3),
            save=tmp_path / "a",
        )


def test_a_method_that_inherits_from_one_of_mijax(tmp_path):
    call = lambda **kw: CALLS["attribute"](mj.metrics.logit(3), method=Halved(), **kw)
    base = np.asarray(mj.metrics.logit(3)(mj.run(model(), OTHERS)))
    once = call() - base
    outer["factor"] = 0.5
    assert np.allclose(call() - base, 0.5 * once, atol=1e-5)
    with refused(TypeError, "save= is for mijax's own methods"):
        call(save=tmp_path / "a")


class Probes(mj.metrics.Metric):
    """The mean of several directions: an array that has no examples."""

    directions: jax.Array
    per_example = True

    def __call__(self, out):
        return (out.readout.final[:, -1] @ self.directions.T).mean(-1)


def of_the_mean(out):
    logits = out.readout.logits(pos=-1)[:, 3]
    return logits - logits.mean()


def weighted(out):
    logits = out.readout.logits(pos=-1)[:, 3]
    return logits * jnp.arange(1.0, 9.0)[: len(logits)]


EIGHT = np.random.default_rng(0).integers(1, 11, (8, 4)).tolist()


@pytest.mark.parametrize("metric", [
    *(Probes(jnp.asarray(np.random.default_rng(1).normal(size=(n, 8)), jnp.float32)) for n in (4, 8, 16)),
    mj.metrics.Function(of_the_mean, per_example=True), mj.metrics.Function(weighted, per_example=True),
])  # fmt: skip
def test_a_metric_that_is_not_per_example_though_it_says_so(metric):
    """Told where it would matter: where the memory splits the prompts, or in a gradient of all examples together."""
    how = {"metric": metric, "progress": False}
    sweep = lambda **kw: mj.sweep(model(), EIGHT, {"resid_mid": mj.Replace(0.0, mj.grid(layer=[0, 1]))}, **how, **kw)
    whole = sweep()
    assert whole.prompts_together == 8
    with refused(ValueError, "says that it is per example, and gives other numbers for a part of the batch"):
        sweep(memory=4 * bytes_of_one(sweep))
    for layer in range(2):
        edit = {"resid_mid": mj.Replace(0.0, mj.Where(layer=layer))}
        assert np.allclose(whole.sel(layer=layer), metric(mj.run(model(), EIGHT, edit)), atol=1e-4)


@pytest.mark.parametrize("call", [CALLS["attribute"], CALLS["gradients"]])
def test_the_gradient_of_a_metric_that_mixes_examples(call):
    for metric in (of_the_mean, mj.metrics.Function(of_the_mean, per_example=True)):
        with refused(ValueError, "depends on other examples"):
            call(metric)


class Taking(mj.metrics.Metric):
    weight: jax.Array
    per_example = True

    def __call__(self, out):
        return self.weight * out.readout.logits(pos=-1)[:, 3]

    def take(self, examples):
        return Taking(outer["factor"] * self.weight[examples])


def test_a_folder_from_before_take_was_mended(tmp_path):
    call = lambda: mj.sweep(
        model(), EIGHT, {"z": mj.Replace(0.0, HEADS)}, Taking(jnp.ones(8)), save=tmp_path / "s", progress=False
    )
    call()
    outer["factor"] = 10.0
    with refused(ValueError, "metric"):
        call()


DRIVERS = {
    "patch": lambda m: mj.patch(m, clean=PROMPTS, corrupted=OTHERS, site="z", over=HEADS, metric=mj.metrics.logit(3)).values,
    "ablate": lambda m: mj.ablate(m, PROMPTS, site="z", over=HEADS, metric=mj.metrics.logit(3), kind="mean").values,
    "attribute": lambda m: mj.attribute(m, clean=PROMPTS, corrupted=OTHERS, sites={"z": ("layer",)}, metric=mj.metrics.logit(3)).z.values,
    "concept": lambda m: mj.concept(m, positive=PROMPTS, negative=OTHERS, site="resid_post", metric=mj.metrics.logit(3)).direction.values,
    "trace": lambda m: mj.trace(m, PROMPTS, subject=[[1], [1]], answer=[3, 3]).indirect.values,
    "strongest": lambda m: mj.strongest(m, clean=PROMPTS, corrupted=OTHERS, site="z", over=HEADS, metric=mj.metrics.logit(3), k=1).values,
}  # fmt: skip


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("how", [jax.jit, lambda f: lambda m: eqx.filter_vmap(f)(jax.tree.map(lambda a: a[None], m))])
def test_a_driver_inside_a_transformation(driver, how):
    with refused(TypeError, "plans its runs by values, which are not known inside jax.jit, vmap, grad"):
        how(lambda m: jnp.asarray(DRIVERS[driver](m)))(model())


@pytest.mark.parametrize("subject, expected", [
    ([[False, True, True, False], [True, False, False, False]], [[1, 2], [0]]), (np.array([[1, 2], [0, 1]]), [[1, 2], [0, 1]]),
])  # fmt: skip
def test_the_subject_as_a_mask_or_an_array(subject, expected):
    answer = np.asarray(mj.run(model(), PROMPTS).logits[:, -1].argmax(-1))
    trace = lambda subject: mj.trace(
        model(), PROMPTS, subject=subject, answer=answer, draws=2, pos={"last": -1}, progress=False
    )
    assert np.array_equal(trace(subject).corrupted, trace(expected).corrupted)


@pytest.mark.parametrize("subject, error, message", [
    ([[2.7], [3.2]], TypeError, "the subject of prompt 0 must be integers"), ([1, 2], ValueError, "the subject of prompt 0 must be a list"),
    ([[7], [1]], ValueError, r"prompt 0 has no positions \[7\]"), ([[1], []], ValueError, "prompt 1 has no subject"),
    ([[True, False], [True, False]], ValueError, "a list of positions or a mask over 4 columns"),
])  # fmt: skip
def test_a_subject_that_is_none(subject, error, message):
    with refused(error, message):
        mj.trace(model(), PROMPTS, subject=subject, answer=[1, 2])


@pytest.mark.parametrize("how", [
    lambda f: jax.jit(f)(model(), jnp.asarray(PROMPTS)), lambda f: jax.jit(lambda ids: f(model(), ids))(jnp.asarray(PROMPTS)),
    lambda f: jax.lax.scan(lambda _, ids: (0, f(model(), ids)), 0, jnp.asarray([PROMPTS]))[1][0],
])  # fmt: skip
def test_gradients_of_a_users_metric_inside_a_transformation(how):
    of_each = lambda out: out.readout.logits(pos=-1)[:, 3]
    get = lambda metric: lambda m, ids: mj.gradients(m, ids, metric, ("z",)).grads["z"]
    assert np.allclose(how(get(of_each)), get(of_each)(model(), PROMPTS), atol=1e-4)
    with refused(ValueError, "depends on other examples"):
        how(get(of_the_mean))


def test_noise_does_not_depend_on_padding():
    answer = np.asarray(mj.run(model(), PROMPTS).logits[:, -1].argmax(-1))
    trace = lambda tokens: (
        mj.trace(model(), tokens, subject=[[1], [1]], answer=answer, draws=2, progress=False).indirect
    )
    padded = mj.Tokens([[0, *row, 0] for row in PROMPTS], [[0, 1, 1, 1, 1, 0]] * 2)
    assert np.allclose(trace(padded), trace(PROMPTS), atol=1e-5)
