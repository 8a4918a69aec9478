"""A batch of which one cell does not fit the memory runs in groups of prompts, to the numbers of one batch and of single prompts."""

import re
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.architectures import error
from tests.compilations import compilations
from tests.situations import refused
from tests.situations.prompts import ANSWERS, IDS, MASK, METRIC, OTHERS, bytes_of_one, prompts, small_model

HEADS = mj.grid(layer=[0, 2], head=[1, 3])
CALLS = {
    "patch": lambda model, **kw: mj.patch(
        model, clean=prompts(), corrupted=prompts(OTHERS), site="resid_mid", over=("layer", "pos"), metric=METRIC, **kw
    ),
    "patch of roles": lambda model, **kw: mj.patch(
        model, clean=prompts(), corrupted=prompts(OTHERS), site="k", metric=METRIC, direction="noise",
        over=mj.grid(layer=[1], pos={"early": [[i % 2] for i in range(7)], "two": [[0, -1]] * 7}), **kw,
    ),
    "ablation by the mean": lambda model, **kw: mj.ablate(
        model, prompts(), site="mlp_out", over=("layer", "pos"), kind="mean", metric=METRIC, **kw
    ),
    "ablation by other prompts": lambda model, **kw: mj.ablate(
        model, prompts(), site="z", over=("layer", "head"), kind="resample", draws=2, key=jax.random.key(0), metric=METRIC, **kw
    ),
    "doses": lambda model, **kw: mj.dose_response(
        model, prompts(), site="attn_out", over=("layer",), factors=(0.0, 2.0), metric=mj.metrics.cross_entropy(prompts()), **kw
    ),
    "knockout": lambda model, **kw: mj.knock_out(
        model, prompts(), {"back": (-1, 0), "own": ([[-1]] * 7, [[i % 3] for i in range(7)])}, METRIC, **kw
    ),
    "mediation": lambda model, **kw: mj.mediate(
        model, base=prompts(), source=prompts(OTHERS), site="z", over=("layer",), metric=METRIC, **kw
    ),
    "strongest": lambda model, **kw: mj.strongest(
        model, clean=prompts(), corrupted=prompts(OTHERS), site="post", over=("layer", "unit"), metric=METRIC, k=4, **kw
    ),
}  # fmt: skip


@pytest.fixture
def model(x64):
    return small_model()


def split_and_whole(model, call, together=3):
    """The same call with memory for some prompts' cell, and with memory for all."""
    memory = together * bytes_of_one(lambda memory: call(model, memory=memory, progress=False))
    part, whole = call(model, memory=memory, progress=False), call(model, progress=False)
    assert part.attrs["prompts_together"] == together and whole.attrs["prompts_together"] in (7, 14)
    assert part.attrs["memory_estimate"] <= memory
    return part, whole


def same(part, whole):
    """Equal to the rounding of float64, NaN at the same places."""
    for name in whole.data_vars if hasattr(whole, "data_vars") else [None]:
        array, other = (result if name is None else result[name] for result in (part, whole))
        assert array.dims == other.dims and array.dtype == other.dtype == np.float64
        for of in (lambda result: result, *(lambda r, c=c: r[c] for c in ("base", "source") if c in other.coords)):
            assert (np.isnan(of(array).values) == np.isnan(of(other).values)).all()
            assert error(np.nan_to_num(of(array).values), np.nan_to_num(of(other).values)) < 1e-10


@pytest.mark.parametrize("call", CALLS)
def test_groups_of_prompts_give_what_one_batch_gives(model, call):
    same(*split_and_whole(model, CALLS[call]))


def test_a_trace_of_groups_gives_what_one_batch_gives(model):
    known = np.asarray(mj.run(model, prompts()).readout.logits(pos=-1)).argmax(-1)
    call = lambda model, **kw: mj.trace(
        model, prompts(), subject=[[0, 1]] * 7, answer=known, draws=2, window=2, severed=None, site="mlp_out", **kw
    )
    prompt_bytes = bytes_of_one(lambda memory: call(model, memory=memory, progress=False))
    same(call(model, memory=4 * prompt_bytes, progress=False), call(model, progress=False))


def edited(value, vector):
    """Fixed edits and gridded ones whose arrays differ between examples in every way that there is."""
    late = MASK & (np.arange(5) > 2)
    return {
        "resid_pre": mj.Add(vector, mj.Where(layer=1, pos=late), axes=("batch", "unit")),
        "mlp_out": [mj.Scale(0.5, mj.Where(batch=[0, 3, 5])), mj.Scale(0.7, mj.Where(batch=np.arange(7) % 2 == 0))],
        "z": mj.Mix(0.5, value, mj.grid(layer=[0, 2], pos={"own": [[i % 3] for i in range(7)], "end": -1})),
        "attn_out": mj.Scale(0.5, mj.Where(pos=[[0, -1]] * 7, batch=-1)),
    }


def test_every_kind_of_edit_is_that_of_its_own_prompts(model):
    """Against one batch, and against each prompt swept alone."""
    value = mj.run(model, prompts(OTHERS), capture=("z",)).acts["z"]
    vector = np.random.default_rng(1).normal(size=(7, 12))
    call = lambda model, **kw: mj.sweep(model, prompts(), edited(value, vector), METRIC, **kw)
    part, whole = split_and_whole(model, call)
    same(part, whole)
    for i in range(7):  # what does not name this prompt is left out
        late = (MASK & (np.arange(5) > 2))[i : i + 1]
        for place, pos in enumerate([i % 3, -1]):
            edits = {
                "resid_pre": mj.Add(vector[i], mj.Where(layer=1, pos=late)),
                "mlp_out": [mj.Scale(0.5 if i in (0, 3, 5) else 1.0), mj.Scale(0.7 if i % 2 == 0 else 1.0)],
                "z": mj.Mix(0.5, value[:, i : i + 1], mj.Where(layer=2, pos=pos)),
                "attn_out": mj.Scale(0.5 if i == 6 else 1.0, mj.Where(pos=[0, -1])),
            }
            alone = mj.run(model, mj.Tokens(IDS[i : i + 1], MASK[i : i + 1]), edits).readout.logits(pos=-1)[0]
            expected = alone[ANSWERS[0, i]] - alone[ANSWERS[1, i]]
            assert abs(part.values[1, place, i] - expected) < 1e-10 * abs(expected)


def test_stacks_are_split_along_their_examples(model):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 7, 5, 12))
    choices = {
        "whole values": {i: {"resid_post": mj.Replace(values[i], mj.Where(layer=1))} for i in range(3)},
        "examples": {i: {"z": mj.Scale(0.0, mj.Where(batch=[i, -1]))} for i in range(3)},
        "masks": {i: {"attn_out": mj.Scale(0.0, mj.Where(pos=MASK & (np.arange(5) == 2 + i)))} for i in range(3)},
        "bases": {i: {"resid_mid": mj.Interchange(values[i], values[i, :2, 0], mj.Where(layer=2))} for i in range(3)},
    }
    for edits in choices.values():
        same(
            *split_and_whole(
                model,
                lambda model, edits=edits, **kw: mj.sweep(model, prompts(), mj.stack("choice", edits), METRIC, **kw),
            )
        )


class Share(eqx.Module):
    """A metric of one's own that can be split: each example's answer."""

    answers: jax.Array
    per_example = True

    def __call__(self, out):
        logits = jax.nn.log_softmax(out.readout.logits(pos=-1))
        return jnp.take_along_axis(logits, self.answers[:, None], axis=1)[:, 0]

    def take(self, examples):
        return Share(self.answers[examples])


def test_metrics_are_those_of_their_own_examples(model):
    out = mj.run(model, prompts(OTHERS))
    for metric in (
        {
            "kl": mj.metrics.kl(out.readout.logits(pos=-1)),
            "prob": mj.metrics.prob(ANSWERS[0], pos=[[i % 3] for i in range(7)]),
        },
        Share(jnp.asarray(ANSWERS[0])),
    ):
        same(
            *split_and_whole(
                model, lambda model, m=metric, **kw: mj.sweep(model, prompts(), {"z": mj.Scale(0.0, HEADS)}, m, **kw)
            )
        )


def test_a_split_metric_that_closes_over_all_answers_is_told_how_to_hold_them(model):
    answers = jnp.asarray(ANSWERS[0])
    share = lambda out: jnp.take_along_axis(out.readout.logits(pos=-1), answers[:, None], axis=1)[:, 0]
    metric = mj.metrics.Function(share, name="share", per_example=True)
    run = lambda metric=metric, **kw: mj.sweep(
        model, prompts(), {"z": mj.Scale(0.0, HEADS)}, metric, progress=False, **kw
    )
    with pytest.raises((TypeError, ValueError)) as caught:
        run(memory=3 * bytes_of_one(lambda memory: run(METRIC, memory=memory)))
    notes = " ".join(caught.value.__notes__)
    assert "of the examples: a metric that is `per_example` must work for any part of the batch" in notes
    assert run().attrs["prompts_together"] == 7


def test_what_cannot_be_split_says_why(model):
    edits = {"z": mj.Scale(0.0, HEADS)}
    of_all = mj.metrics.Function(lambda out: out.readout.logits(pos=-1)[:, 3], name="of_all")
    function = lambda x, site, layer, positions: x - x.mean(axis=0, keepdims=True)
    zipped = mj.Scale(0.5, mj.Where(batch=[0, 2], pos=[1, 2]))
    for interventions, metric, reason in (
        (edits, of_all, "metric 'of_all' does not say that it is per example"),
        (
            edits,
            {"a": METRIC, "b": lambda out: out.readout.logits(pos=-1)[:, 3]},
            "metric 'b' does not say that it is per example",
        ),
        (
            {**edits, "mlp_out": function},
            METRIC,
            "the edit at site 'mlp_out' is a function, which sees the whole batch",
        ),
        ({**edits, "mlp_out": zipped}, METRIC, "the edit at site 'mlp_out' zips its batch indices with other lists"),
    ):
        run = lambda i=interventions, m=metric, **kw: mj.sweep(model, prompts(), i, m, progress=False, **kw)
        with refused(ValueError, f"memory=9,000 allows none .the prompts run together: {re.escape(reason)}"):
            run(memory=9_000)
        assert run().attrs["prompts_together"] == 7


def test_an_error_names_the_prompt_among_all(model):
    answers = ANSWERS[0].copy()
    answers[5] = 99
    run = lambda **kw: mj.patch(
        model,
        clean=prompts(),
        corrupted=prompts(OTHERS),
        site="z",
        over=("head",),
        metric=mj.metrics.logit(answers),
        **kw,
    )
    prompt_bytes = bytes_of_one(run)
    for memory in (3 * prompt_bytes, 100 * prompt_bytes):
        with refused(ValueError, "metric 'logit' is nan on the source run of example 5"):
            run(memory=memory, progress=False)


def test_groups_share_one_program(model, monkeypatch):
    """Four groups, the last of one prompt: one trace. New prompts, answers and values of the same shape compile nothing."""
    from mijax.engine import driver as module

    traces, original = [], module.run_chunk
    monkeypatch.setattr(module, "run_chunk", lambda *arguments: traces.append(1) or original(*arguments))

    def run(ids, answers, **kw):
        return mj.patch(model, clean=prompts(ids), corrupted=prompts(OTHERS), site="z", over=("layer", "head"),
                        metric=mj.metrics.log_prob(answers), progress=False, **kw)  # fmt: skip

    memory = 2 * bytes_of_one(lambda memory: run(IDS, ANSWERS[0], memory=memory))
    result = run(IDS, ANSWERS[0], memory=memory)
    assert result.attrs["prompts_together"] == 2 and traces == [1]
    with compilations() as seen:
        run(IDS[::-1] * MASK, ANSWERS[1], memory=memory)
    assert seen == [] and traces == [1]


def test_devices_share_the_cells_of_each_group(model):
    edits = {"z": mj.Replace(mj.run(model, prompts(OTHERS), capture=("z",)).acts["z"], HEADS)}
    run = lambda **kw: mj.sweep(model, prompts(), edits, METRIC, progress=False, **kw)
    memory = 3 * bytes_of_one(run)
    mesh = jax.make_mesh((2,), ("cells",), devices=jax.devices()[:2])
    same(run(memory=memory, mesh=mesh), run())


def test_a_folder_goes_on_with_the_groups_that_it_was_begun_with(model, tmp_path):
    call = lambda **kw: CALLS["patch"](model, progress=False, **kw)
    memory = 3 * bytes_of_one(call)
    first = call(memory=memory, save=tmp_path / "split")
    removed = sorted((tmp_path / "split").glob("*/chunk_*"))[1:]
    for chunk in removed:
        chunk.unlink()
    again = call(memory=10**9, save=tmp_path / "split")  # its plan stands
    assert again.attrs["prompts_together"] == 3 and again.equals(first)
    assert sorted((tmp_path / "split").glob("*/chunk_*"))[1:] == removed
    whole = call(save=tmp_path / "whole")
    small = call(memory=memory, save=tmp_path / "whole")
    assert small.attrs["prompts_together"] == 7 and small.equals(whole)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"job.json", "plan.npz", "chunk_000000.npz"}
    with refused(ValueError, "begun with another prompts"):
        mj.patch(model, clean=prompts((IDS + 1) % 19), corrupted=prompts(OTHERS), site="resid_mid", over=("layer", "pos"),
                 metric=METRIC, save=tmp_path / "split", memory=memory)  # fmt: skip


SCRIPT = """
import sys, jax, numpy as np, mijax as mj
model = jax.tree.map(lambda x: 5 * x, mj.init(mj.Config(n_layers=2, d_model=16, n_heads=4, d_vocab=31, n_ctx=16), jax.random.key(0)))
ids = np.arange(60).reshape(10, 6) % 31
result = mj.patch(model, clean=ids, corrupted=(ids + 1) % 31, site="z", over=("layer", "head", "pos"), memory=int(sys.argv[2]),
                  metric=mj.metrics.logit_diff(3, 4), save=sys.argv[1], progress=False)
print(result.attrs["prompts_together"], result.values.tobytes().hex())
"""


def test_groups_killed_half_way_end_in_the_same_bits(tmp_path):
    arguments = lambda folder, memory: [sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(memory)]
    run = lambda *a: subprocess.run(arguments(*a), capture_output=True, text=True, check=True).stdout
    chunks = lambda folder: len(list((tmp_path / folder).glob("prompts_*/chunk_*")))
    process = subprocess.Popen(arguments("killed", 60_000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and chunks("killed") < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done, whole = chunks("killed"), run("whole", 60_000)
    assert 0 < done < chunks("whole") and len(list((tmp_path / "whole").glob("prompts_*"))) > 1
    assert run("killed", 10**8) == whole and int(whole.split()[0]) < 10
