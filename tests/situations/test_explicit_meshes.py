"""Meshes as `jax.make_mesh` makes them: numbers are those of one device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mijax as mj
from tests.situations.models import CONFIG, model

IDS = np.arange(32).reshape(8, 4) % 11
KINDS = {"explicit": None, "auto": (AxisType.Auto,) * 2}


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("cells", "model"), **({} if KINDS[kind] is None else {"axis_types": KINDS[kind]}))


def spread(mesh, tree):
    """Parameters over the axis `model` where their last axis divides, as a user shards them."""
    spec = lambda a: PartitionSpec(*[None] * (a.ndim - 1), "model") if a.shape[-1] % 4 == 0 else PartitionSpec()
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec(a))), tree)


def over_cells(mesh, ids):
    return jax.device_put(jnp.asarray(ids), NamedSharding(mesh, PartitionSpec("cells")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["batch", "parameters", "both"])
@pytest.mark.parametrize("how", [lambda f: f, jax.jit])
def test_a_run(kind, what, how):
    mesh, plain = mesh_of(kind), mj.run(model(), IDS, capture=("z",))
    ids = IDS if what == "parameters" else over_cells(mesh, IDS)
    transformer = model() if what == "batch" else spread(mesh, model())
    edits = {"z": [mj.Scale(1.0, mj.Where(pos=-1)), lambda x, site, layer, positions: x * 1.0]}

    def logits_and_z(transformer, ids):
        out = mj.run(transformer, ids, edits, capture=("z",))
        return out.logits, out.acts["z"], mj.metrics.logit_diff(3, 4)(out)

    given = how(logits_and_z)(transformer, ids)
    for mine, other in zip(given, (plain.logits, plain.acts["z"], mj.metrics.logit_diff(3, 4)(plain))):
        assert np.allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient(kind):
    mesh = mesh_of(kind)
    loss = lambda m, ids: jnp.sum(mj.metrics.cross_entropy(IDS)(mj.run(m, ids)))
    given, plain = jax.jit(jax.grad(loss))(spread(mesh, model()), over_cells(mesh, IDS)), jax.grad(loss)(model(), IDS)
    chex.assert_trees_all_close(jax.device_get(given), jax.device_get(plain), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_context_of_the_mesh(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        given = mj.run(spread(mesh, model()), over_cells(mesh, IDS)).logits
    assert np.allclose(given, mj.run(model(), IDS).logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind):
    mesh = mesh_of(kind)
    done = mj.generate(spread(mesh, model()), over_cells(mesh, IDS), max_new_tokens=2, capture=("z",))
    assert (np.asarray(done.ids) == np.asarray(mj.generate(model(), IDS, max_new_tokens=2).ids)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drive", [
    lambda m, ids, **kw: mj.patch(m, clean=ids, corrupted=(ids + 1) % 11, site="z", over=("layer", "head"), metric=mj.metrics.logit(3), progress=False, **kw),
    lambda m, ids, **kw: mj.sweep(m, ids, {"mlp_out": mj.Scale(0.0, mj.grid(layer=range(3), pos=[0, -1]))}, mj.metrics.logit(3), progress=False, **kw),
], ids=["patch", "sweep"])  # fmt: skip
def test_a_sweep_over_devices_with_sharded_parameters_and_prompts(kind, drive):
    mesh, plain = mesh_of(kind), drive(model(), IDS)
    assert np.allclose(drive(spread(mesh, model()), IDS, mesh=mesh), plain, atol=1e-4)
    assert np.allclose(drive(model(), over_cells(mesh, IDS)), plain, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_attribution_of_a_sharded_model(kind):
    sites = {"sites": ("z", "mlp_out"), "metric": mj.metrics.logit(3), "progress": False}
    run = lambda m, ids: mj.attribute(m, clean=ids, corrupted=(ids + 1) % 11, **sites)
    mesh, plain = mesh_of(kind), run(model(), IDS)
    for given in (run(spread(mesh, model()), IDS), run(model(), over_cells(mesh, IDS))):
        assert np.allclose(given.z, plain.z, atol=1e-4) and np.allclose(given.mlp_out, plain.mlp_out, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "metric", [mj.metrics.logit(3), lambda out: jnp.sum(out.readout.final[:, -1], axis=-1)], ids=["own", "users"]
)
def test_a_shard_map_of_gradients(kind, metric):
    """Each example's own, as without devices."""
    mesh, sites = mesh_of(kind), ("resid_post", "z", "embed")
    whole = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec())), model())
    out = {
        site: PartitionSpec(*("cells" if axis == "batch" else None for axis in mj.SITES[site].axes)) for site in sites
    }
    grads = lambda m, ids: mj.gradients(m, ids, metric, sites).grads
    given = jax.shard_map(grads, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("cells")), out_specs=out)(
        whole, over_cells(mesh, IDS)
    )
    plain = grads(model(), IDS)
    assert all(np.allclose(given[site], plain[site], atol=1e-4) for site in sites)


def test_a_shard_map_of_runs():
    mesh = mesh_of("explicit")
    whole = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec())), model(CONFIG))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("cells")), "out_specs": PartitionSpec("cells")}
    given = jax.shard_map(lambda m, ids: mj.run(m, ids).logits, mesh=mesh, **specs)(whole, over_cells(mesh, IDS))
    assert np.allclose(given, mj.run(model(), IDS).logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["batch", "parameters", "both"])
def test_gradients_and_attribution(kind, what):
    """`mijax.gradients` outside and inside the user's `jit`; attribution moves to automatic axes."""
    mesh, metric = mesh_of(kind), mj.metrics.logit_diff(3, 4)
    ids = IDS if what == "parameters" else over_cells(mesh, IDS)
    transformer = model() if what == "batch" else spread(mesh, model())
    get = lambda m, ids: mj.gradients(m, ids, metric, ("resid_post", "z"), pos=-1)
    plain = jax.device_get(get(model(), IDS))
    for how in (lambda f: f, jax.jit):
        chex.assert_trees_all_close(jax.device_get(how(get)(transformer, ids)), plain, rtol=1e-4, atol=1e-3)
    attribute = lambda m, ids: (
        mj.attribute(m, clean=ids, corrupted=(ids + 1) % 11, sites={"z": ("layer", "head")}, metric=metric).z
    )
    assert np.allclose(attribute(transformer, ids), attribute(model(), IDS), atol=1e-3)
