"""Every bad input gets one error, before anything runs, that says what was given and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import mijax as mj
from tests.architectures import ARCHITECTURES, IDS, batch

MODEL = mj.init(ARCHITECTURES["llama_gqa"], jax.random.key(0))
PLAIN = mj.init(ARCHITECTURES["attention_only"], jax.random.key(0))
TOKENS = batch("left")
METRIC = mj.metrics.logit(3)
OTHER = batch("left", (IDS + 5) % 19)
SINGLE = mj.init(mj.Config(n_layers=1, d_model=12, n_heads=4, d_vocab=19, n_ctx=16), jax.random.key(0))
pytestmark = pytest.mark.usefixtures("as_a_user")
edit = lambda site, edit, model=MODEL: mj.run(model, TOKENS, {site: edit})
attribute = lambda model=MODEL, **given: mj.attribute(
    model, **{"clean": OTHER, "corrupted": TOKENS, "sites": ("z",), "metric": METRIC, **given}
)
replace = lambda site, value=0.0, **where: edit(site, mj.Replace(value, mj.Where(**where)))
patch = lambda **kw: mj.patch(
    MODEL, **({"clean": TOKENS, "corrupted": TOKENS, "site": "z", "over": ("head",), "metric": METRIC} | kw)
)

FAULTS = {
    "unknown site": (lambda: replace("resid_prr"), ValueError, r"unknown site 'resid_prr'; did you mean 'resid_pre'.*The sites are .*embed,"),
    "site the model lacks": (lambda: edit("mlp_out", mj.Scale(0.0), PLAIN), ValueError, r"no site 'mlp_out' .*; it has embed, resid_pre"),
    "captured site the model lacks": (lambda: mj.run(MODEL, TOKENS, capture=("pos_embed",)), ValueError, "no site 'pos_embed'"),
    "capture as one string": (lambda: mj.run(MODEL, TOKENS, capture="z"), TypeError, r"given the string 'z'; write \('z',\)"),
    "capture by a mask": (lambda: mj.run(MODEL, TOKENS, capture={"z": mj.Where(head=[True] * 4)}), ValueError, "a mask has no fixed size"),
    "axis the site lacks": (lambda: replace("resid_pre", head=1), ValueError, "'resid_pre' has no axis 'head'; its axes are layer, batch, pos, unit"),
    "pos of a pattern": (lambda: replace("pattern", pos=1), ValueError, "'pattern' has no axis 'pos'; its axes are layer, batch, head, query, key"),
    "layer out of range": (lambda: replace("z", layer=3), ValueError, "layer=3 is out of range at site 'z': the layer axis has 3 entries"),
    "negative layer out of range": (lambda: replace("z", layer=[0, -4]), ValueError, "layer=-4 is out of range"),
    "kv head out of range": (lambda: replace("k", head=2), ValueError, "head=2 is out of range at site 'k': the head axis has 2 entries"),
    "position of a short prompt": (lambda: replace("z", pos=5), ValueError, "pos=5 is out of range at site 'z': the pos axis of example 1 has 4 entries"),
    "position per example": (lambda: replace("z", pos=[[5], [3], [-6]]), ValueError, "pos=-6 .* of example 2 has 5 entries"),
    "huge index": (lambda: replace("z", layer=2**40), ValueError, "out of range"),
    "capture of something else": (
        lambda: mj.run(MODEL, TOKENS, capture={"z": mj.Where(layer=0), "q": True}),
        TypeError,
        "must map sites to a mijax.Where or None, given bool at site 'q'",
    ),
    "layers of each example": (
        lambda: mj.run(MODEL, TOKENS, capture={"z": mj.Where(layer=[[0], [1], [2]])}),
        ValueError,
        "keeps the same layers of every example",
    ),
    "no mapping": (lambda: mj.run(MODEL, TOKENS, mj.Scale(0.0)), TypeError, "must map sites to edits, given Scale"),
    "subclass of an edit": (lambda: edit("z", type("Twice", (mj.Scale,), {})(2.0)), TypeError, r"Twice at site 'z' is a subclass of mijax.Edit: give a function, or an Equinox module with __call__\(x, site, layer, positions\)"),
    "function of two arguments": (lambda: edit("z", lambda x, layer: x), TypeError, r"is called with \(x, site, layer, positions\); <lambda> at site 'z' takes \(x, layer\)"),
    "function of another shape": (lambda: edit("z", lambda x, site, layer, positions: x[:, :1]), ValueError, r"the callable edit at site 'z' returned float32\[3, 1, 4, 6\], expected float32\[3, 6, 4, 6\]"),
    "ragged prompts": (lambda: mj.run(MODEL, [[1, 2], [3]]), ValueError, "token ids must be .* a rectangular list"),
    "no prompts": (lambda: mj.run(MODEL, []), ValueError, "non-empty"),
    "mask of twos": (lambda: mj.Tokens(IDS, np.full((3, 6), 2)), ValueError, "a mask must be boolean, or 0 and 1"),
    "readout of another batch": (
        lambda: mj.run(MODEL, TOKENS).readout.logits(pos=[[0], [1]]),
        ValueError,
        "pos has indices for 2 examples, the batch has 3",
    ),
    "rank of no token": (lambda: mj.metrics.rank(99)(mj.run(MODEL, TOKENS)), IndexError, "token 99 is outside"),
    "grid over examples": (lambda: mj.grid(batch=[0]), ValueError, "a grid has no axis 'batch'"),
    "grid over a number": (lambda: mj.grid(layer=5), TypeError, "'layer' must be a list or a dictionary .*given 5"),
    "capture out of range": (lambda: mj.run(MODEL, TOKENS, capture={"z": mj.Where(layer=7)}), ValueError, "layer=7 is out of range"),
    "fractional index": (lambda: mj.Where(layer=1.5), TypeError, r"given 1.5.* must be integers, given dtype float64"),
    "ragged index": (lambda: mj.Where(pos=[[1], [1, 2]]), ValueError, r"given \[\[1\], \[1, 2\]\].* rectangular list"),
    "index of rank 3": (lambda: replace("z", pos=np.zeros((1, 1, 1), int)), ValueError, r"'pos' must be one index, .* given shape \(1, 1, 1\)"),
    "empty index": (lambda: replace("z", pos=np.zeros(0, int)), ValueError, r"'pos' must be one index, .* given shape \(0,\)"),
    "index for another batch": (lambda: replace("z", pos=[[1], [1]]), ValueError, "'pos' has indices for 2 examples, the batch has 3"),
    "lists of unequal length": (lambda: replace("z", pos=[0, 1], head=[0, 1, 2]), ValueError, "zipped and must be equally long, given .*mijax.grid"),
    "mask of another length": (lambda: replace("z", head=[True, False]), ValueError, r"a mask over 'head' must have shape \(4,\) .*given \(2,\)"),
    "value of another shape": (lambda: replace("z", np.zeros((3, 5))), ValueError, r"Replace's value has shape \(3, 5\), which does not broadcast to the shape of site 'z', layer batch pos head d_head = \(3, 3, 6, 4, 6\)"),
    "value of too high rank": (lambda: replace("z", np.zeros((1,) * 6)), ValueError, "does not broadcast"),
    "value of integers": (lambda: mj.Replace(np.zeros(3, int)), TypeError, "must be floating point, given dtype int64"),
    "complex value": (lambda: mj.Add(np.zeros(3, complex)), TypeError, "must be floating point, given dtype complex128"),
    "basis at a pattern": (lambda: edit("pattern", mj.Project(np.ones(6))), ValueError, "Project needs a site of vectors; .*'pattern'"),
    "basis of another size": (lambda: edit("z", mj.Project(np.ones(5))), ValueError, r"basis has shape \(1, 5\), expected \[k, 6\]"),
    "dependent basis": (lambda: mj.Project(np.ones((2, 6))), ValueError, "must be finite and linearly independent"),
    "basis not finite": (lambda: mj.Project(np.full((1, 6), np.nan)), ValueError, "must be finite and linearly independent"),
    "basis of columns": (lambda: mj.Project(np.eye(6)[:, :2]), ValueError, r"rows \[k, unit\] with k <= unit, given shape \(6, 2\)"),
    "no edit": (lambda: edit("z", 3.0), TypeError, "an edit must be one of mijax's or a callable, given 3.0 at site 'z'"),
    "callable of another shape": (lambda: edit("z", lambda x, *_: x[0]), ValueError, r"callable edit at site 'z' returned .*expected float32\[3, 6, 4, 6\]"),
    "a grid given to run": (lambda: edit("z", mj.Scale(0.0, mj.grid(layer=[0]))), TypeError, "given Grid; a grid goes to mijax.sweep"),
    "empty batch": (lambda: mj.run(MODEL, np.zeros((0, 4), int)), ValueError, r"non-empty \[batch, pos\].*given shape \(0, 4\)"),
    "no batch axis": (lambda: mj.run(MODEL, [1, 2, 3]), ValueError, r"\[batch, pos\].*given shape \(3,\)"),
    "tokens of floats": (lambda: mj.run(MODEL, [[1.0]]), TypeError, "token ids must be integers, given dtype float64"),
    "token outside the vocabulary": (lambda: mj.run(MODEL, [[1, 2], [3, 19]]), ValueError, r"token 19 \(example 1, column 1\) is outside the vocabulary of 19"),
    "negative token": (lambda: mj.run(MODEL, [[-1]]), ValueError, "token -1"),
    "huge token": (lambda: mj.run(MODEL, np.array([[2**33 + 1]])), ValueError, "outside the vocabulary"),
    "prompt longer than the context": (lambda: mj.run(MODEL, np.ones((1, 17), int)), ValueError, "the prompts have 17 tokens, the model's context 16"),
    "mask of another shape": (lambda: mj.Tokens(IDS, np.ones((3, 5))), TypeError, "a mask must be integers"),
    "mask of other tokens": (lambda: mj.Tokens(IDS, np.ones((3, 5), bool)), ValueError, r"mask has shape \(3, 5\), the token ids \(3, 6\)"),
    "all padding": (lambda: mj.run(MODEL, mj.Tokens([[1], [2]], [[True], [False]])), ValueError, "example 1 is all padding"),
    "position of a readout": (lambda: mj.run(MODEL, TOKENS).readout.logits(pos=4), IndexError, r"position 4 asked of example 1, which has 4 tokens"),
    "token of a readout": (lambda: mj.run(MODEL, TOKENS).readout.logits(tokens=[19]), IndexError, "token 19 is outside the vocabulary of 19"),
    "answers for another batch": (lambda: mj.metrics.logit([1, 2])(mj.run(MODEL, TOKENS)), ValueError, "the metric has 2 answers or positions, the batch 3"),
    "answers of rank 2": (lambda: mj.metrics.logit([[1, 2]]), ValueError, r"one per example, given shape \(1, 2\)"),
    "answers of floats": (lambda: mj.metrics.logit(1.0), TypeError, "must be integers, given dtype float64"),
    "one-token cross entropy": (lambda: mj.metrics.cross_entropy([[1]]), ValueError, "fewer than two tokens"),
    "kl of another shape": (lambda: mj.metrics.kl(np.zeros((3, 18)))(mj.run(MODEL, TOKENS)), ValueError, r"reference has shape \(3, 18\), the run's logits \(3, 19\)"),
    "kl of another rank": (lambda: mj.metrics.kl(np.zeros((3, 6, 19))), ValueError, "must be logits of rank 2"),
    "unknown axis of a grid": (lambda: mj.grid(layers=[1]), ValueError, "unknown axis 'layers'; the axes are layer, batch, pos"),
    "empty axis of a grid": (lambda: mj.grid(layer=[]), ValueError, "axis 'layer' of the grid has no choices"),
    "no axis of a grid": (lambda: mj.grid(), ValueError, "a grid needs at least one axis"),
    "masks in a grid": (lambda: mj.grid(head=[[True, False]]), TypeError, "must be indices, given a boolean mask"),
    "grid for different batches": (lambda: mj.grid(pos={"a": [[1]], "b": [[1], [2]]}), ValueError, r"different numbers of examples: \[1, 2\]"),
    "sweep without a grid": (lambda: mj.sweep(MODEL, TOKENS, {"z": mj.Scale(0.0)}, METRIC), ValueError, "needs a mijax.grid as the where of an edit, or a mijax.stack, given neither"),
    "empty stack": (lambda: mj.stack("dose", {}), ValueError, "the stack 'dose' is empty"),
    "stack out of range": (lambda: mj.sweep(MODEL, TOKENS, mj.stack("l", {i: {"z": mj.Scale(0.0, mj.Where(layer=i))} for i in (0, 7)}), METRIC), ValueError, "layer=7 is out of range"),
    "no memory for a cell": (lambda: mj.sweep(MODEL, TOKENS, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, METRIC, memory=100), ValueError, "one cell takes about .* bytes, memory=100 allows none"),
    "edge out of range": (lambda: mj.knock_out(MODEL, TOKENS, {"edge": (-1, 5)}, METRIC), ValueError, "key=5 is out of range at site 'attn_scores'"),
    "tracing without layers": (lambda: mj.trace(MODEL, TOKENS, subject=[[0]] * 3, answer=[1, 2, 3], site="embed"), ValueError, "a site of layers and positions, given 'embed'"),
    "tracing without a subject": (lambda: mj.trace(MODEL, TOKENS, subject=[[0], [], [0]], answer=[1, 2, 3]), ValueError, "prompt 1 has no subject"),
    "sweep out of range": (lambda: mj.sweep(MODEL, TOKENS, {"z": mj.Scale(0.0, mj.grid(layer=range(4)))}, METRIC), ValueError, "layer=3 is out of range"),
    "sweep over a missing position": (lambda: mj.sweep(MODEL, TOKENS, {"z": mj.Scale(0.0, mj.grid(pos={"x": [[5], [4], [1]]}))}, METRIC), ValueError, "pos=4 .* example 1"),
    "sweep over an axis the site lacks": (lambda: mj.sweep(MODEL, TOKENS, {"resid_pre": mj.Scale(0.0, mj.grid(head=[0]))}, METRIC), ValueError, "no axis 'head'"),
    "metric out of range": (lambda: mj.sweep(MODEL, TOKENS, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, mj.metrics.logit(3, pos=4)), ValueError, "metric 'logit' is nan on the base run of example 1: a position or an answer out of range"),
    "metric of another shape": (lambda: mj.sweep(MODEL, TOKENS, {"z": mj.Scale(0.0, mj.grid(layer=[0]))}, lambda r: r.readout.final.sum()), ValueError, r"one number per example, \[3\], given shape \(\)"),
    "clean and corrupted of different shape": (lambda: patch(corrupted=IDS[:, :5]), ValueError, r"must have one shape, given \(3, 6\) and \(3, 5\)"),
    "clean and corrupted padded differently": (lambda: patch(corrupted=batch("right")), ValueError, "padded alike: example 1 has tokens 4 from column 2 and 4 from column 0"),
    "patch over an unknown axis": (lambda: patch(over=("layer", "neuron")), ValueError, r"over must name axes of site 'z', some of layer, pos, head, unit; given \('layer', 'neuron'\)"),
    "patch in an unknown direction": (lambda: patch(direction="both"), ValueError, "direction must be 'denoise' or 'noise', given 'both'"),
    "patch at an unknown site": (lambda: patch(site="zz"), ValueError, "unknown site 'zz'"),
    "nothing to normalise": (lambda: mj.normalise(patch(progress=False)), ValueError, "they coincide"),
    "no source to normalise by": (lambda: mj.normalise(xr.DataArray([[1.0]], {"base": ("batch", [0.0])}, ("layer", "batch"))), ValueError, "no coordinate 'source'"),
    "bootstrap of one prompt": (lambda: mj.bootstrap(xr.DataArray([[1.0]], {"base": ("batch", [0.0]), "source": ("batch", [1.0])}, ("layer", "batch"))), ValueError, "needs at least two, given 1"),
    "attribution of a rank": (lambda: attribute(metric=mj.metrics.rank(3)), TypeError, "metric 'rank' has no gradient: .*ranks and accuracies count"),
    "attribution of an accuracy": (lambda: attribute(metric={"a": METRIC, "b": mj.metrics.accuracy(3)}), TypeError, "metric 'b' has no gradient"),
    "attribution of a metric out of range": (lambda: attribute(metric=mj.metrics.logit(3, pos=4)), ValueError, "metric 'logit' is nan on the base run of example 1"),
    "attribution at a number": (lambda: attribute(sites=(3,)), ValueError, "unknown site 3"),
    "attribution at one name": (lambda: attribute(sites="z"), ValueError, "sites must be some names of sites"),
    "attribution over an unknown axis": (lambda: attribute(sites={"z": ("neuron",)}), ValueError, "over must name axes of site 'z'"),
    "attribution out of range": (lambda: attribute(sites={"z": mj.grid(layer=range(4))}), ValueError, "layer=3 is out of range"),
    "attribution of different grids": (lambda: attribute(sites={"z": mj.grid(layer=[0]), "mlp_out": mj.grid(layer=[1])}), ValueError, "different grids along 'layer' must be asked for apart"),
    "attribution of other padding": (lambda: attribute(clean=batch("right", (IDS + 5) % 19)), ValueError, "padded alike"),
    "nothing to attribute": (lambda: attribute(clean=batch("left", np.where(np.arange(3)[:, None] == 1, IDS, (IDS + 5) % 19))), ValueError, "the same prompt in example 1: nothing to attribute"),
    "more to verify than there is": (lambda: attribute(sites={"z": ("layer",)}, verify=mj.Verify(4)), ValueError, "verify must be from 0 to the 3 cells of site 'z', given 4"),
    "verified baselines that coincide": (lambda: attribute(clean=batch("left", np.where(np.arange(6) == 3, 11, IDS)), metric=mj.metrics.logit(3, pos=0), verify=mj.Verify(1), progress=False), ValueError, "they coincide"),
    "attribution over heads of two kinds": (lambda: attribute(sites={"z": ("layer", "head"), "k": ("layer", "head")}), ValueError, "different grids along 'head'.*named 'kv_head'"),
    "attribution by a name": (lambda: attribute(method="atp"), TypeError, r"must be one such as mijax.AtP\(\), given 'atp'"),
    "attribution without a metric": (lambda: attribute(metric={}), ValueError, "there is no metric"),
    "attribution without layers": (lambda: attribute(model=mj.init(mj.Config(n_layers=0, d_model=12, n_heads=4, d_vocab=19, n_ctx=16), jax.random.key(0)), sites=("embed",)), ValueError, "without layers"),
    "attribution of a metric with a kink": (lambda: attribute(corrupted=None, clean=TOKENS, metric=lambda r: jnp.sqrt(METRIC(r) - jax.lax.stop_gradient(METRIC(r)))), ValueError, "the gradient of metric '<lambda>' at site 'z' is not finite in example 0"),
    "nothing to verify": (lambda: mj.Verify(0), ValueError, "verify some cells: k and sample are both 0"),
    "a negative sample": (lambda: mj.Verify(2, sample=-3), ValueError, "sample must be at least 0, given -3"),
    "a number of cells to verify": (lambda: attribute(verify=20), TypeError, r"verify must be a mijax.Verify, such as mijax.Verify.20., given 20"),
    "a concept out of range": (lambda: mj.concept(MODEL, positive=OTHER, negative=TOKENS, site="z", metric=METRIC, pos=[[-1], [5], [0]]), ValueError, "pos=5 is out of range .* example 1"),
    "a concept in the same prompts": (lambda: mj.concept(MODEL, positive=OTHER, negative=OTHER, site="z", metric=METRIC), ValueError, "the same prompt in example 0"),
    "one probe": (lambda: attribute(method=mj.AtP(probes=1)), ValueError, "at least two probes, given probes=1"),
    "no memory for a prompt": (lambda: attribute(memory=1000), ValueError, "one prompt take.* about .* bytes, memory=1,000 allows none"),
    "gradients along nothing": (lambda: mj.IntegratedGradients(along="depth"), ValueError, "along 'gate' or 'inputs'"),
    "gradients along the inputs to nothing": (lambda: attribute(corrupted=None, method=mj.IntegratedGradients(along="inputs")), ValueError, "need corrupted prompts"),
    "gradients dropped in one layer": (lambda: attribute(model=SINGLE, method=mj.AtPStar()), ValueError, "at least two layers"),
    "a concept without a direction": (lambda: mj.concept(MODEL, positive=OTHER, negative=TOKENS, site="pattern", metric=METRIC), ValueError, "a site of vectors; 'pattern' has the axes"),
    "a concept that counts": (lambda: mj.concept(MODEL, positive=OTHER, negative=TOKENS, site="z", metric=mj.metrics.rank(3)), TypeError, "no gradient"),
    "a probe of another shape": (lambda: mj.concept(MODEL, positive=OTHER, negative=TOKENS, site="resid_post", metric=METRIC, probe=np.ones(12)), ValueError, r"shape \(12,\), expected \(3, 12\)"),
    "gradients at a position of scores": (lambda: mj.gradients(MODEL, TOKENS, METRIC, ("pattern",), pos=0), ValueError, "'pattern' has no positions of its own"),
    "recomputed attention by unit": (lambda: attribute(sites={"q": ("layer", "unit")}, method=mj.AtPStar()), ValueError, r"whole queries and keys: it has no cells over units at 'q'; AtP\(\) has"),
    "recomputed attention at some units": (lambda: attribute(sites={"k": mj.grid(unit=[0, 2])}, method=mj.AtPStar()), ValueError, "no cells over units at 'k'"),
    "attribution of what is centred over the batch": (lambda: attribute(metric=lambda r: METRIC(r) - METRIC(r).mean()), ValueError, "metric '<lambda>' of an example depends on other examples"),
    "attribution of sums up to an example": (lambda: attribute(metric=lambda r: jnp.cumsum(METRIC(r))), ValueError, "depends on other examples"),
    "a concept of neighbours": (lambda: mj.concept(MODEL, positive=OTHER, negative=TOKENS, site="z", metric=lambda r: METRIC(r) * jnp.roll(METRIC(r), 1)), ValueError, "depends on other examples"),
    "attribution of a constant": (lambda: attribute(metric=lambda r: jax.lax.stop_gradient(METRIC(r))), TypeError, "has no gradient"),
    "attribution of whole numbers": (lambda: attribute(metric={"n": lambda r: jnp.round(METRIC(r)).astype(int)}), TypeError, "metric 'n' has no gradient"),
    "attribution of rounded numbers": (lambda: attribute(metric=lambda r: jnp.round(METRIC(r))), TypeError, "has no gradient"),
    "attribution of complex numbers": (lambda: attribute(metric=lambda r: jax.lax.complex(METRIC(r), METRIC(r))), TypeError, "metric '<lambda>' must give real numbers, given complex64"),
    "attribution of one number": (lambda: attribute(metric={"a": METRIC, "b": lambda r: r.readout.final.sum()}), ValueError, r"metric 'b' must give one number per example, \[3\], given shape \(\)"),
    "attribution of nothing": (lambda: attribute(metric=None), TypeError, "must be a function of a run's output, given None"),
    "metrics named by numbers": (lambda: attribute(metric={1: METRIC}), TypeError, "metrics are named by strings, given 1"),
    "attribution by a part of a probe": (lambda: attribute(method=mj.AtP(probes=2.5)), TypeError, "probes must be a whole number, given 2.5"),
    "attribution within half a byte": (lambda: attribute(memory=0.5j), TypeError, "memory must be a number of bytes, given 0.5j"),
    "a negative seed": (lambda: mj.Verify(1, seed=-1), ValueError, "seed must be at least 0, given -1"),
    "no threshold": (lambda: mj.Verify(1, threshold=float("nan")), ValueError, "threshold must be a part of source - base, over 0, given nan"),
    "attribution at the number of sites": (lambda: attribute(sites=3), ValueError, "sites must be some names of sites, .* given 3"),
    "attribution over a number": (lambda: attribute(sites={"z": 3}), ValueError, "over must name axes of site 'z'"),
    "an axis twice": (lambda: attribute(sites={"z": ("layer", "layer")}), ValueError, "an axis twice"),
    "an axis by both names": (lambda: attribute(sites={"k": ("head", "kv_head")}), ValueError, "an axis twice"),
    "attribution of other places with the same labels": (lambda: attribute(sites={"z": ("layer",), "mlp_out": mj.grid(layer=[[0], [0, 1], [0, 1, 2]])}), ValueError, "different grids along 'layer'"),
    "attribution of other roles of one name": (lambda: attribute(sites={"z": mj.grid(pos={"end": -1}), "mlp_out": mj.grid(pos={"end": [[3], [2], [-1]]})}), ValueError, "different grids along 'pos'"),
    "a second derivative that is infinite": (lambda: attribute(clean=TOKENS, corrupted=None, method=mj.AtP(probes=2), metric=lambda r: jnp.abs(METRIC(r) - jax.lax.stop_gradient(METRIC(r))) ** 1.5), ValueError, "the second derivative of metric '<lambda>' at site 'z' is not finite"),
    "gradients of a rank": (lambda: mj.gradients(MODEL, TOKENS, mj.metrics.rank(3), ("z",)), TypeError, "metric 'rank' has no gradient"),
    "gradients of a rank, compiled": (lambda: jax.jit(lambda m: mj.gradients(m, TOKENS, mj.metrics.rank(3), ("z",)).grads)(MODEL), TypeError, "metric 'rank' has no gradient"),
    "gradients of several metrics": (lambda: mj.gradients(MODEL, TOKENS, {"a": METRIC, "b": METRIC}, ("z",)), TypeError, "one metric is taken here, given several: 'a', 'b'"),
    "a probe of no number": (lambda: mj.concept(MODEL, positive=OTHER, negative=TOKENS, site="resid_post", metric=METRIC, probe=np.full((3, 12), np.nan)), ValueError, "direction of the probe at 'resid_post' is not finite"),
    "steps by name": (lambda: mj.IntegratedGradients("inputs"), ValueError, "given steps='inputs', along='gate'"),
    "config that does not fit": (lambda: mj.Config(n_layers=-1, d_model=8, n_heads=2, n_kv_heads=3, d_vocab=0, n_ctx=4, norm="batch"), ValueError, "n_layers=-1 must not be negative; d_vocab=0 must be positive; norm='batch' is none of 'layer', 'rms', 'none'; n_heads=2 is not a multiple of n_kv_heads=3"),
    "odd rotary dimensions": (lambda: mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=3, n_ctx=4, positions=mj.Rotary(dim=3)), ValueError, "rotary dim=3 must be even and at most d_head=4"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_message(fault):
    call, kind, message = FAULTS[fault]
    with pytest.raises(kind) as caught:
        call()
    assert re.search(message, str(caught.value).replace("\n", " ")), str(caught.value)


def test_static_faults_are_told_at_trace_time_too():
    with pytest.raises(ValueError, match="unknown site"):
        jax.jit(lambda ids: mj.run(MODEL, ids, {"nowhere": mj.Scale(0.0)}).logits)(jnp.asarray(IDS))
    with pytest.raises(ValueError, match="does not broadcast"):
        jax.vmap(lambda v: mj.run(MODEL, IDS, {"z": mj.Replace(v)}).logits)(jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="layer=9 is out of range"):  # a number known while tracing
        jax.jit(lambda ids: mj.run(MODEL, ids, {"z": mj.Scale(0.0, mj.Where(layer=9))}).logits)(jnp.asarray(IDS))


def test_a_dependent_basis_inside_a_trace_is_nan():
    project = jax.jit(lambda basis: mj.run(MODEL, IDS, {"z": mj.Project(basis, mj.Where(layer=1))}).logits)
    assert np.isfinite(project(jnp.eye(2, 6))).all()
    assert np.isnan(project(jnp.ones((2, 6)))).all()


def test_wide_integers_stay_out_of_range(x64):
    """2^32 + 5 is no 5, wherever the array is."""
    wide = jnp.asarray([[1, 2**32 + 5]])
    assert wide.dtype == jnp.int64
    with pytest.raises(ValueError, match="outside the vocabulary"):
        mj.run(MODEL, wide)
    assert np.isnan(jax.jit(lambda ids: mj.run(MODEL, ids).readout.final)(wide)).all()
    assert int(mj.Where(layer=jnp.uint32(2**32 - 1)).layer) == 2**31 - 1
