"""A tap or a model of the user's own computes with what its code reads now, not with what it read at the first call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.compilations import compilations
from tests.situations.models import model

PROMPT, OTHER = [[1, 2, 3, 4]], [[1, 5, 3, 4]]
outer = {"factor": 1.0}


class Factor(mj.Tap):
    """Multiplies what MLPs write by a number that it reads outside."""

    sites = frozenset({"mlp_out"})

    def at(self, point, x, state):
        return x * outer["factor"], state


class Within(mj.Tap):
    inner: mj.Tap

    @property
    def sites(self):
        return self.inner.sites | {"mlp_out"}

    def at(self, point, x, state):
        x, state = mj.called(self.inner, point, x, state)
        return (x * outer["factor"] if point.site.name == "mlp_out" else x), state


class Around(mj.Wrapper):
    """A transformer in which that is done."""

    model: mj.Transformer

    @property
    def sites(self):
        return self.model.sites

    def around(self, tap):
        return Within(tap)


class Own(mj.Model):
    weight: jax.Array

    @property
    def sites(self):
        return {"y": mj.Site("y", ("batch", "unit"), "a product", "mlp", fixed=(("unit", 2),))}

    @property
    def dtype(self):
        return self.weight.dtype

    def forward(self, inputs, frame, tap, state):
        return mj.Visit(tap, self.sites, frame)("y", outer["factor"] * inputs.values @ self.weight, state)


METRIC = mj.metrics.logit(3)
BOTH = {"clean": OTHER, "corrupted": PROMPT, "metric": METRIC, "progress": False}
SCALED = lambda: {"mlp_out": mj.Scale(outer["factor"])}  # what a plain edit gives, with mijax's own function
CELLS = lambda: {**SCALED(), "z": mj.Scale(0.0, mj.grid(layer=range(2)))}
CALLS = {  # with the user's code, and without
    "run": (lambda: mj.run(model(), PROMPT, taps=[Factor()]).logits, lambda: mj.run(model(), PROMPT, SCALED()).logits),
    "run a wrapper": (lambda: mj.run(Around(model()), PROMPT).logits, lambda: mj.run(model(), PROMPT, SCALED()).logits),
    "sweep": (
        lambda: mj.sweep(Around(model()), PROMPT, {"z": mj.Scale(0.0, mj.grid(layer=range(2)))}, METRIC, progress=False).values,
        lambda: mj.sweep(model(), PROMPT, CELLS(), METRIC, progress=False).values,
    ),
    "gradients": (
        lambda: mj.gradients(Around(model()), PROMPT, METRIC, ("z",)).grads["z"],
        lambda: jax.grad(lambda add: METRIC(mj.run(model(), PROMPT, {**SCALED(), "z": mj.Add(add)}))[0])(
            jnp.zeros_like(mj.run(model(), PROMPT, capture=("z",)).acts["z"])
        ),
    ),
    "attribute": (
        lambda: mj.attribute(Around(model()), sites={"z": ("layer",)}, **BOTH).base.values,
        lambda: METRIC(mj.run(model(), PROMPT, SCALED())),
    ),
    "generate": (
        lambda: mj.generate(Around(model()), PROMPT, max_new_tokens=3, capture=("resid_post",)).acts["resid_post"],
        lambda: mj.generate(model(), PROMPT, SCALED(), max_new_tokens=3, capture=("resid_post",)).acts["resid_post"],
    ),
    "a model of one's own": (
        lambda: mj.run(Own(jnp.eye(2)), np.ones((1, 2), np.float32)).readout,
        lambda: jnp.full((1, 2), outer["factor"]),
    ),
    "a sweep of it": (
        lambda: mj.ablate(Own(jnp.eye(2)), np.ones((1, 2), np.float32), site="y", over=("unit",), metric=lambda out: out.readout[:, 0], progress=False).values,
        lambda: np.array([[0.0], [outer["factor"]]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_an_outer_variable_that_changes_between_calls(call):
    users, plain = CALLS[call]
    before = []
    for outer["factor"] in (1.0, 3.0, 0.5):
        given = np.asarray(users())
        assert np.allclose(given, plain(), rtol=1e-5, atol=1e-6)
        assert not any(np.allclose(given, other) for other in before) or call == "attribute"
        before.append(given)
    outer["factor"] = 1.0


@pytest.mark.parametrize("call", ["run", "run a wrapper", "sweep", "a model of one's own"])
def test_nothing_compiles_where_nothing_changed(call):
    users, _ = CALLS[call]
    first = users()
    users()
    with compilations() as seen:
        again = users()
    assert seen == [] and np.array_equal(first, again)
