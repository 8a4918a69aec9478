"""A model whose parameters do not fit its config is refused where it is used."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.models import model

IDS, OTHER, METRIC = [[1, 2, 3, 9]], [[4, 2, 3, 9]], mj.metrics.logit(3)
WRONG = {
    "W_pos of two rows": (lambda m: m.W_pos, lambda w: w[:2], r"W_pos has shape \(2, 8\), expected \(16, 8\)"),
    "W_E of five rows": (lambda m: m.W_E, lambda w: w[:5], r"W_E has shape \(5, 8\)"),
    "W_O with its axes exchanged": (lambda m: m.blocks.attn.W_O, lambda w: jnp.swapaxes(w, 2, 3), "blocks.attn.W_O has shape"),
    "a bias that broadcasts": (lambda m: m.blocks.mlp.b_in, lambda b: b[:, :1], r"blocks.mlp.b_in has shape \(3, 1\)"),
}  # fmt: skip
USES = {
    "run": lambda m: mj.run(m, IDS),
    "run inside jit": lambda m: jax.jit(lambda m: mj.run(m, IDS).readout.final)(m),
    "generate": lambda m: mj.generate(m, IDS, max_new_tokens=2),
    "patch": lambda m: mj.patch(m, clean=IDS, corrupted=OTHER, site="z", over=("layer",), metric=METRIC),
    "sweep": lambda m: mj.sweep(m, IDS, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, METRIC),
    "ablate": lambda m: mj.ablate(m, IDS, site="z", over=("layer",), metric=METRIC, kind="mean"),
    "attribute": lambda m: mj.attribute(m, clean=IDS, corrupted=OTHER, sites=("z",), metric=METRIC),
    "gradients": lambda m: mj.gradients(m, IDS, METRIC, ("z",)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fault", WRONG)
def test_a_parameter_of_another_shape(use, fault, as_a_user):
    place, change, message = WRONG[fault]
    with refused(ValueError, f"the model's parameters do not fit its config: {message}"):
        USES[use](eqx.tree_at(place, model(), replace_fn=change))


@pytest.mark.parametrize("use", USES)
def test_several_models_stacked(use, as_a_user):
    models = jax.vmap(lambda key: mj.init(model().config, key))(jax.random.split(jax.random.key(0), 4))
    with refused(ValueError, "all parameters have a leading axis of 4: vmap over the model"):
        USES[use](models)
