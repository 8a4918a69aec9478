"""Metrics that read activations: sweeps, attribution and every driver measure a probe, an attention weight or a norm in mid-model."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, batch, error, random_model
from tests.situations import refused

DIRECTION = np.random.default_rng(1).normal(size=12)
EACH = np.array([[2], [0], [-1]])  # a position of each prompt


def probe(direction, out):
    return out.acts["resid_post"][0, :, 0] @ direction


METRICS = {
    "weight": mj.metrics.Function(
        lambda out: out.acts["pattern"][0, :, 0, 0, 0],
        sites={"pattern": mj.Where(layer=1, head=1, query=-1, key=0)},
    ),
    "probe": mj.metrics.Function(
        jax.tree_util.Partial(probe, DIRECTION), sites={"resid_post": mj.Where(layer=-2, pos=EACH)}
    ),
    "norm": mj.metrics.Function(
        lambda out: jnp.linalg.norm(out.acts["attn_out"][1, :, 0], axis=-1) + out.readout.logits(pos=-1)[:, 3],
        sites={"attn_out": mj.Where(layer=[2, 0], pos=-1)},
    ),
    "all layers": mj.metrics.Function(
        lambda out: jnp.sum(out.acts["z"][:, :, -1] ** 2, axis=(0, 2, 3)) + jnp.sum(out.acts["q_input"][:, :, -2], (0, 2, 3)),
        sites=("z", "q_input"),
    ),
    "around": mj.metrics.Function(
        lambda out: jnp.sum(out.acts["final_in"][:, 0] * out.acts["embed"][:, 0], axis=1),
        sites={"final_in": mj.Where(pos=-1), "embed": mj.Where(pos=0)},
    ),
}  # fmt: skip


def value(model, tokens, metric, edits=None):
    """Of one run."""
    return metric(mj.run(model, tokens, edits, capture=metric.sites))


def edit(grid_or_where, site):
    return mj.Replace(0.3, grid_or_where) if site != "attn_scores" else mj.Scale(2.0, grid_or_where)


@pytest.mark.parametrize("name", ["llama_gqa", "parallel_mqa_partial_rotary", "bidirectional"])
@pytest.mark.parametrize(
    "site",
    [
        "embed",
        "resid_pre",
        "q_input",
        "k",
        "attn_scores",
        "pattern",
        "z",
        "result",
        "attn_out",
        "mlp_out",
        "resid_post",
        "final_in",
    ],
)
def test_5_a_sweep_of_activations_is_a_loop_of_runs(x64, name, site):  # fmt: skip
    """All metrics at once, from every cell's resumed run; prompts of several lengths."""
    model, tokens = random_model(ARCHITECTURES[name]), batch("left")
    axes = {"layer": range(3)} if mj.SITES[site].has_layer else {}
    axes |= {"query": [0, 2, -1]} if "query" in mj.SITES[site].axes else {"pos": [0, 2, -1]}
    swept = mj.sweep(model, tokens, {site: edit(mj.grid(**axes), site)}, METRICS, progress=False)
    changed = {metric: 0 for metric in METRICS}
    for cell in np.ndindex(*(len(choices) for choices in axes.values())):
        where = mj.Where(**{axis: choices[i] for (axis, choices), i in zip(axes.items(), cell)})
        for metric, function in METRICS.items():
            alone = value(model, tokens, function, {site: edit(where, site)})
            assert error(swept[metric].values[cell], alone) < 1e-10, (metric, cell)
            changed[metric] += bool(np.abs(swept[metric].values[cell] - swept[f"base.{metric}"].values).max() > 1e-6)
    assert all(changed.values()) or site in (
        "resid_post",
        "final_in",
        "mlp_out",
    )  # what stands after a metric does not move it


@pytest.mark.parametrize("padding", ["none", "right"])
def test_a_patch_and_a_stack_and_a_function_of_the_whole_batch(x64, padding):
    model, tokens, source = random_model(ARCHITECTURES["gpt2"]), batch(padding), batch(padding, (IDS + 5) % 19)
    acts = mj.run(model, source, capture=("z",)).acts["z"]
    patched = mj.patch(
        model, clean=source, corrupted=tokens, site="z", over=("layer", "head"), metric=METRICS, progress=False
    )
    mean = lambda x, site, layer, positions: x - jnp.mean(x, axis=0, keepdims=True)
    swept = mj.sweep(model, tokens, {"z": mj.Apply(mean, mj.grid(layer=range(3)))}, METRICS, progress=False)
    doses = mj.stack("dose", {f: {"embed": mj.Scale(f, mj.Where(pos=-1))} for f in (0.5, 2.0)})
    scaled = mj.sweep(model, tokens, doses, METRICS, progress=False)
    for metric, function in METRICS.items():
        assert error(patched[f"base.{metric}"], value(model, tokens, function)) < 1e-10
        assert error(patched[f"source.{metric}"], value(model, source, function)) < 1e-10
        for layer, head in np.ndindex(3, 4):
            alone = value(model, tokens, function, {"z": mj.Replace(acts, mj.Where(layer=layer, head=head))})
            assert error(patched[metric].values[layer, head], alone) < 1e-10
        for layer in range(3):
            alone = value(model, tokens, function, {"z": mj.Apply(mean, mj.Where(layer=layer))})
            assert error(swept[metric].values[layer], alone) < 1e-10
        for i, factor in enumerate((0.5, 2.0)):
            alone = value(model, tokens, function, {"embed": mj.Scale(factor, mj.Where(pos=-1))})
            assert error(scaled[metric].values[i], alone) < 1e-10


def test_cells_are_resumed_and_not_run_whole(monkeypatch):
    """Counted: rows times layers that the block really computed."""
    module, computed = sys.modules["mijax.model.walk"], []
    block = module.block

    def counted(config, params, x, *rest):
        jax.debug.callback(lambda: computed.append(x.shape[0] * x.shape[1]))
        return block(config, params, x, *rest)

    model = mj.init(mj.Config(n_layers=7, d_model=12, n_heads=4, d_vocab=19, n_ctx=16, d_mlp=10), jax.random.key(0))
    grid = mj.grid(layer=range(7), pos=range(9))
    sweep = lambda metric: mj.sweep(
        model, np.arange(9)[None], {"resid_pre": mj.Scale(0.0, grid)}, metric, progress=False, memory=10**6
    )
    monkeypatch.setattr(module, "block", counted)
    counts = []
    for metric in (
        mj.metrics.Function(METRICS["probe"].function, sites={"resid_post": mj.Where(layer=3, pos=-1)}, pos=-1),
        lambda out: out.readout.logits()[:, -1, 3],  # that reads no activation, and may read any position
    ):
        jax.clear_caches()
        computed.clear()
        sweep(metric)
        jax.effects_barrier()
        counts.append(sum(computed))
    whole, needed = 63 * 7 * 9, sum((7 - layer) * (9 - pos) for layer in range(7) for pos in range(9))
    assert counts[0] == counts[1] and needed < counts[0] < 0.6 * whole
    jax.clear_caches()


@pytest.mark.parametrize("name", ["llama_gqa", "parallel_mqa_partial_rotary"])
@pytest.mark.parametrize("method", [mj.AtP(), mj.IntegratedGradients(3), mj.IntegratedGradients(2, along="inputs")])
def test_6_attribution_of_activations_is_the_gradient_of_a_gate(x64, name, method):
    model, base, source = random_model(ARCHITECTURES[name]), batch("left"), batch("left", (IDS + 5) % 19)
    sites = ("embed", "q", "z", "mlp_out")
    both = {"clean": source, "corrupted": base, "metric": METRICS, "progress": False}
    result = mj.attribute(model, sites={site: ("pos",) for site in sites}, method=method, **both)
    acts = mj.run(model, source, capture=sites).acts
    for metric, function in METRICS.items():
        at_base = value(model, base, function)
        assert (
            error(result.base.sel(metric=metric), at_base) < 1e-10
            and error(result.source.sel(metric=metric), value(model, source, function)) < 1e-10
        )
        if not isinstance(method, mj.AtP):
            continue

        def moved(gates, function=function):
            edits = {site: mj.Mix(gate, acts[site]) for site, gate in gates.items()}
            return jnp.sum(value(model, base, function, edits))

        shape = lambda site: (
            (1,) * mj.SITES[site].has_layer + base.ids.shape + (1,) * (acts[site].ndim - 2 - mj.SITES[site].has_layer)
        )
        slopes = jax.grad(moved)({site: jnp.zeros(shape(site)) for site in sites})
        for site in sites:
            slope = slopes[site].reshape(base.ids.shape)
            for example, n in enumerate(np.asarray(base.lengths)):
                expected = np.asarray(slope)[example, -n:]
                given = result[site].sel(metric=metric).values[:n, example] - np.asarray(at_base)[example]
                assert np.abs(given - expected).max() < 1e-10 * max(1.0, np.abs(expected).max()), (metric, site)


def test_gradients_and_prompts_apart(x64):
    model, tokens = random_model(ARCHITECTURES["llama_gqa"]), batch("left")
    probe = METRICS["probe"]
    gradients = mj.gradients(model, tokens, probe, ("resid_pre",))
    along = np.random.default_rng(0).normal(size=gradients.acts["resid_pre"].shape)
    step = lambda h: value(model, tokens, probe, {"resid_pre": mj.Add(h * along)})
    finite = (step(1e-6) - step(-1e-6)) / 2e-6
    slope = jnp.einsum("lbpd,lbpd->b", gradients.grads["resid_pre"], along)
    assert error(slope, finite) < 1e-6
    split = mj.metrics.Function(probe.function, probe.sites, per_example=True)
    swept = lambda metric, **how: mj.sweep(
        model, tokens, {"z": mj.Scale(0.0, mj.grid(layer=range(3)))}, metric, progress=False, **how
    )
    whole = swept(split)
    apart = swept(split, memory=int(whole.attrs["memory_estimate"] / 5))
    assert apart.attrs["prompts_together"] < 3 and error(apart, whole) < 1e-10 and error(whole, swept(probe)) < 1e-10


class Share(eqx.Module):
    """A module of a user's own, with attributes as `Metric` tells of."""

    head: int
    per_example = True
    sites = ("pattern",)

    def __call__(self, out):
        return out.acts["pattern"][1, :, self.head, -1, 0]

    def take(self, examples):
        return self


def test_a_users_own_module_and_a_subclass(x64):
    class Own(mj.metrics.Metric):
        name = "own"
        sites = ("pattern",)

        def __call__(self, out):
            return out.acts["pattern"][1, :, 2, -1, 0]

    model, tokens = random_model(ARCHITECTURES["gpt2"]), batch("none")
    for metric, name in ((Share(2), "Share"), (Own(), "own")):
        swept = mj.sweep(model, tokens, {"z": mj.Scale(0.0, mj.grid(layer=range(3)))}, metric, progress=False)
        alone = mj.run(model, tokens, {"z": mj.Scale(0.0, mj.Where(layer=0))}, capture=("pattern",)).acts["pattern"]
        assert swept.name == name and error(swept[0], alone[1, :, 2, -1, 0]) < 1e-10


WRONG = {
    "an unknown site": ({"resid_mdi": None}, ValueError, "the sites of metric 'm': unknown site 'resid_mdi'; did you mean 'resid_mid'"),
    "a site that the model lacks": (("rot_k",), ValueError, "the sites of metric 'm': this model has no site 'rot_k'"),
    "a layer that does not exist": ({"z": mj.Where(layer=3)}, ValueError, "the sites of metric 'm': layer=3 is out of range at site 'z'"),
    "some of the examples": ({"z": mj.Where(batch=[0, 1])}, ValueError, "the sites of metric 'm': a metric reads all examples at site 'z'"),
    "a mask": ({"z": mj.Where(pos=[True] * 6)}, ValueError, "the sites of metric 'm': capture at site 'z' must be narrowed by indices"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("driver", ["sweep", "attribute", "gradients"])
def test_a_metric_that_reads_what_is_not_there_is_refused(what, driver):
    sites, kind, message = WRONG[what]
    model, tokens = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32), batch("none")
    metric = mj.metrics.Function(lambda out: pytest.fail("it was called"), sites=sites, name="m")
    other = batch("none", (IDS + 5) % 19)
    with refused(kind, message):
        if driver == "sweep":
            mj.sweep(model, tokens, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, metric)
        elif driver == "attribute":
            mj.attribute(model, clean=other, corrupted=tokens, sites=("z",), metric=metric)
        else:
            mj.gradients(model, tokens, metric, ("z",))


def test_a_metric_that_reads_what_it_does_not_name():
    model, tokens = random_model(ARCHITECTURES["gpt2"], dtype=jnp.float32), batch("none")
    with pytest.raises(KeyError, match="z") as caught:
        mj.sweep(model, tokens, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, lambda out: out.acts["z"][0, :, 0, 0, 0])
    assert "called with a run's output" in caught.value.__notes__[-1]
