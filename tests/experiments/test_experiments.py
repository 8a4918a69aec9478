"""The studies, end to end, on a model small enough for a test; and the rules of the house."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
import xarray as xr

import mijax as mj
from experiments import (
    attribution_vs_patching,
    capitals,
    causal_tracing,
    facts,
    ioi_patching,
    ioi_prompts,
    pronouns,
    steering,
    train_tiny,
)


@pytest.fixture(autouse=True)
def settings_of_jax_stay(monkeypatch):
    """The studies ask for the compilation cache; these tests share their process with others."""
    monkeypatch.setattr(mj, "compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def tiny():
    """A model whose tokenizer knows every word of the prompts, and nothing else."""
    words = set(ioi_prompts.NAMES + ioi_prompts.PLACES + ioi_prompts.THINGS)
    rest = ["When", "After", "Afterwards", "Then", ",", ".", "and", "went", "to", "the", "gave", "a"]
    vocabulary = ["?", *sorted({w.strip() for w in words} | set(rest))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = mj.Config(n_layers=2, d_model=16, n_heads=2, d_vocab=len(vocabulary), n_ctx=32)
    model = jax.tree.map(lambda x: 20 * x, mj.init(config, jax.random.key(0)))
    return model, mj.Tokenizer(backend)


def test_prompts_are_balanced_and_their_roles_are_right(tiny):
    _, tokenizer = tiny
    for counterfactual in ("flip", "abc"):
        ioi = ioi_prompts.make(tokenizer, 32, counterfactual=counterfactual, seed=1)
        ids = np.asarray(ioi.clean.ids)
        at = lambda role, ids=ids, ioi=ioi: np.take_along_axis(ids, ioi.roles[role], 1)[:, 0]
        assert (at("IO") == ioi.io).all() and (at("S1") == ioi.subject).all() and (at("S2") == ioi.subject).all()
        assert (ioi.roles["end"][:, 0] == np.asarray(ioi.clean.lengths) - 1).all()
        assert len(set(ioi.texts)) == 32 and not set(ioi.texts) & set(ioi.corrupted_texts)
        assert sorted(ioi.io.tolist()) == sorted(ioi.subject.tolist())  # each name as often in either role
        assert (ioi.roles["IO"] < ioi.roles["S1"]).sum() == 16  # and in either order
        other = np.asarray(ioi.corrupted.ids)
        if counterfactual == "flip":
            assert (np.take_along_axis(other, ioi.roles["S2"], 1)[:, 0] == ioi.io).all()
            assert ((ids != other).sum(1) == 1).all()
        else:
            assert ((ids != other).sum(1) == 3).all()
            assert all({a, b}.isdisjoint(row) for a, b, row in zip(ioi.io, ioi.subject, other.tolist()))
    with pytest.raises(ValueError, match="positive multiple of 4"):
        ioi_prompts.make(tokenizer, 6)


def test_a_word_of_several_tokens_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(ioi_prompts, "NAMES", (*ioi_prompts.NAMES, " Mary and"))
    with pytest.raises(ValueError, match="' Mary and' is not a single token"):
        ioi_prompts.make(tiny[1], 4)


def test_ioi_patching_writes_figures_data_and_record(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mj, "load", lambda source: tiny)
    out, save = tmp_path / "results", tmp_path / "chunks"
    settings = ioi_patching.Settings(prompts=24, top=3, out=out, save=save, projections=True, heads_by_position=True)
    results = ioi_patching.main(settings)
    files = ["ioi_patching.html", "ioi_patching.png", "record.json", "results.nc"]
    assert sorted(p.name for p in out.iterdir()) == files
    saved = xr.load_dataset(out / "results.nc", engine="scipy")
    xr.testing.assert_identical(saved, results)
    assert dict(saved["z"].sizes) == {"direction": 2, "layer": 2, "head": 2, "batch": 24}
    assert dict(saved["resid_pre"].sizes) == {"direction": 2, "layer": 2, "pos": 5, "batch": 24}
    assert dict(saved["z_by_position"].sizes) == {"direction": 2, "layer": 2, "pos": 5, "head": 2, "batch": 24}
    assert {"q", "k", "v", "pattern"} <= set(saved)
    effect = saved["attn_out"] - saved["attn_out"].base
    assert (effect.sel(pos=["IO", "S1", "S1+1"]) == 0).all() and (effect.sel(pos="S2") != 0).any()
    whole = mj.normalise(saved["resid_pre"].sel(direction="denoise")).sel(layer=0, pos="S2")
    assert abs(float(whole) - 1) < 1e-4
    record = json.loads((out / "record.json").read_text())
    assert record["settings"]["prompts"] == 24 and {"jax", "mijax"} <= set(record["versions"])
    assert len(record["prompts"]) == 24 and (save / "z_noise/job.json").exists()
    page = (out / "ioi_patching.html").read_text()
    assert "Plotly" in page and "<script src=" not in page  # it needs no network
    printed = capsys.readouterr().out
    assert "indirect object above subject in" in printed and "95 % interval" in printed
    # the table is read from the results: its first row is the head of the largest effect
    effects = mj.normalise(saved["z"].sel(direction="denoise"))
    layer, head = np.unravel_index(np.abs(effects.values).argmax(), effects.shape)
    assert f"\n{layer:>3}.{head}" in printed


def word_tokenizer(texts):
    """Every word of the texts is a token."""
    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["?", *words])}, unk_token="?")
    )
    backend.pre_tokenizer = splitter
    config = mj.Config(n_layers=2, d_model=16, n_heads=2, d_vocab=len(words) + 1, n_ctx=32)
    return jax.tree.map(lambda x: 20 * x, mj.init(config, jax.random.key(0))), mj.Tokenizer(backend)


def test_causal_tracing_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    """The model's own answers stand in for the facts' objects, so that it knows all of them."""
    chosen = facts.FACTS[:4]
    model, tokenizer = word_tokenizer([fact.prompt + fact.object for fact in chosen])
    last = [mj.run(model, tokenizer([fact.prompt])).logits[0, -1] for fact in chosen]
    ids, rounding = [logits.argmax() for logits in last], 1e-6 * max(float(abs(logits).max()) for logits in last)
    known_facts = [fact._replace(object=" " + tokenizer.decode([int(i)])) for fact, i in zip(chosen, ids)]
    monkeypatch.setattr(mj, "load", lambda source: (model, tokenizer))
    monkeypatch.setattr(causal_tracing, "FACTS", known_facts)
    settings = causal_tracing.Settings(facts=3, single=1, draws=2, window=1, out=tmp_path / "out")
    results = causal_tracing.main(settings)
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"causal_tracing.png", "causal_tracing.html", "results.nc", "record.json", "fact_0.png", "fact_1.png",
                     "fact_2.png", "fact_0_tokens.png", "fact_0_tokens/results.nc", "fact_0_tokens/record.json"}  # fmt: skip
    assert dict(results.indirect.sizes) == {"kind": 5, "layer": 2, "pos": 4, "batch": 3}
    at_end = results.indirect.sel(kind="hidden state", layer=1, pos="last")
    assert np.allclose(at_end, results.total, atol=rounding)  # all of the answer is there
    severed = results.indirect.sel(kind="hidden state, later MLPs severed", layer=1)
    assert np.allclose(severed, results.indirect.sel(kind="hidden state", layer=1), atol=rounding)  # nothing is later
    assert "largest average indirect effect" in capsys.readouterr().out


def test_attribution_vs_patching_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    """One vocabulary for both tasks; the model's own answers stand in for the capitals."""
    countries = list(capitals.CAPITALS)
    texts = [capitals.TEMPLATE.format(country) for country in countries]
    words = [t.format(A="", B="", S="", place="", thing="") for t in ioi_prompts.TEMPLATES]
    model, tokenizer = word_tokenizer([*texts, *words, *ioi_prompts.NAMES, *ioi_prompts.PLACES, *ioi_prompts.THINGS])
    ids = [int(mj.run(model, tokenizer([text])).logits[0, -1].argmax()) for text in texts]
    monkeypatch.setattr(capitals, "CAPITALS", {c: tokenizer.decode([i]) for c, i in zip(countries, ids)})
    monkeypatch.setattr(mj, "load", lambda source: (model, tokenizer))
    settings = attribution_vs_patching.Settings(prompts=4, probes=2, out=tmp_path / "out")
    results = attribution_vs_patching.main(settings)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "attribution_vs_patching.png",
        "record.json",
        "results.nc",
    ]
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "out/results.nc", engine="scipy"), results)
    assert (
        abs(float(results["capital cities.resid_pre.exact"].sel({"layer": 0, "role in capital cities": "country"})) - 1)
        < 1e-4
    )
    record = json.loads((tmp_path / "out/record.json").read_text())
    fit = record["tasks"]["indirect objects"]["fit"]["z"]["AtP"]
    exact, estimate = (results[f"indirect objects.z.{which}"].values.ravel() for which in ("exact", "AtP"))
    assert abs(fit["r"] - np.corrcoef(exact, estimate)[0, 1]) < 1e-6
    assert abs(fit["slope"] - np.polyfit(exact, estimate, 1)[0]) < 1e-6
    assert "residual stream: r" in capsys.readouterr().out
    with pytest.raises(ValueError, match="of the 36 capitals"):
        capitals.make(model, tokenizer, 37)


def test_pronouns_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    from experiments.pronoun_prompts import FEMALE, MALE, TEMPLATES

    words = [t.format(w) for t in TEMPLATES[:1] for w in (*FEMALE, *MALE, "man", "woman")]
    monkeypatch.setattr(mj, "load", lambda source: word_tokenizer([*words, "she", "he"]))
    results = pronouns.main(pronouns.Settings(templates=1, top=2, out=tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "pronouns.html",
        "pronouns.png",
        "record.json",
        "results.nc",
    ]
    saved = xr.load_dataset(tmp_path / "out/results.nc", engine="scipy")
    xr.testing.assert_identical(saved, results)
    whole = saved["z.indirect"].sizes
    assert whole["layer"] == 2 and whole["head"] == 2 and set(saved.stereotype.values) == {"female", "male"}
    assert "family-wise p" in capsys.readouterr().out


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ioi_patching", "--help"], capture_output=True, text=True, check=True
    )
    assert "--counterfactual" in done.stdout and "multiple of 4" in done.stdout


TRAIN = """
import hashlib, jax, numpy as np, sys
from pathlib import Path
from experiments.train_tiny import Settings, main
small = dict(d_model=16, vocab=16, length=16, shortest_period=4, longest_period=7, batch=8, steps=30, save_every=5)
model, log = main(Settings(**small, out=Path(sys.argv[1])))
print([line["step"] for line in log], hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(model))).hexdigest())
"""


def test_training_ends_in_the_same_parameters_after_kill_9(tmp_path, monkeypatch):
    for setting in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):  # optax promotes ranks
        monkeypatch.delenv(setting)
    train = lambda name: [sys.executable, "-c", TRAIN, str(tmp_path / name)]
    whole = subprocess.run(train("whole"), capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    folder = tmp_path / "killed/2_layers/checkpoints"
    with subprocess.Popen(train("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(p.name.isdigit() for p in folder.glob("*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(train("killed"), capture_output=True, text=True, check=True).stdout
    assert "going on from step" in done and done.splitlines()[-1] == whole
    assert whole.startswith(str(list(range(5, 31, 5))))
    other = TRAIN.replace("batch=8", "batch=4")
    refused = subprocess.run(
        [sys.executable, "-c", other, str(tmp_path / "killed")], capture_output=True, text=True, check=False
    )
    assert "was begun with other settings" in refused.stderr


def test_training_data_repeats_with_its_period():
    settings = train_tiny.Settings()
    ids, period = map(np.asarray, train_tiny.sequences(settings, jax.random.key(0)))
    assert (
        period.min() >= settings.shortest_period and period.max() <= settings.longest_period and len(set(period)) > 10
    )
    assert all((row[p:] == row[:-p]).all() for row, p in zip(ids, period))
    assert len(np.unique(ids)) == settings.vocab


def test_steering_writes_what_it_measures(tmp_path, monkeypatch):
    vocabulary = ["?", "good", "bad", "Overall", ",", "it", "was", "is", "the", "I", "and"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = mj.Config(n_layers=2, d_model=16, n_heads=2, d_vocab=len(vocabulary), n_ctx=64)
    model = jax.tree.map(lambda x: 20 * x, mj.init(config, jax.random.key(0)))
    monkeypatch.setattr(mj, "load", lambda source: (model, mj.Tokenizer(backend)))
    settings = steering.Settings(
        layer=0,
        new_tokens=4,
        out=tmp_path / "out",
        doses=(-1.0, 0.0, 1.0),
        positive=("it is good",),
        negative=("it is bad",),
    )
    results = steering.main(settings)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.nc", "samples.json", "steering.png"]
    at_zero = results.sel(dose=0.0)
    assert (at_zero.text[0] == at_zero.text[1]).all() and (at_zero.verdict[0] == at_zero.verdict[1]).all()
    assert (results.text.sel(dose=1.0) != at_zero.text).any()
    tokens = mj.Tokenizer(backend)(settings.prompts)  # at dose 0 the texts are plain continuations
    plain = mj.generate(model, tokens, max_new_tokens=4)
    assert at_zero.text.values[0, 0] == backend.decode(
        np.asarray(plain.ids[0])[np.asarray(plain.mask[0])].tolist(), skip_special_tokens=False
    )


def test_compiled_programs_are_kept_for_the_next_process(tmp_path):
    script = """
import sys, jax, mijax as mj
folder = mj.compilation_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
mj.run(model, [[1, 2, 3]]).logits.block_until_ready()
print(len(hits), len(list(folder.iterdir())))
"""
    run = lambda: subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    (first, kept), (second, same) = (map(int, run().stdout.split()) for _ in range(2))
    assert first == 0 and kept > 0 and second > 0 and same <= 2 * kept


def test_importing_changes_no_setting_and_loads_nothing_heavy():
    """What a user may never need is imported where it is used."""
    script = """
import jax, sys
before = dict(jax.config.values)
import mijax
assert dict(jax.config.values) == before
heavy = {"xarray", "pandas", "matplotlib", "plotly", "torch", "flax", "optax", "gguf", "huggingface_hub", "tqdm", "tyro", "scipy.optimize", "scipy.stats"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
