"""Sweeps that are saved as they go: continued bit by bit after any end, refused where the job is another."""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import mijax as mj

SCRIPT = """
import sys, jax, numpy as np, mijax as mj
model = jax.tree.map(lambda x: 5 * x, mj.init(mj.Config(n_layers=4, d_model=32, n_heads=4, d_vocab=31, n_ctx=16), jax.random.key(0)))
ids = np.arange(48).reshape(4, 12) % 31
result = mj.patch(model, clean=ids, corrupted=(ids + 1) % 31, site="z", over=("layer", "head", "pos"), memory=int(sys.argv[2]),
                  metric=mj.metrics.logit_diff(3, 4), save=sys.argv[1], progress=False)
print(result.values.tobytes().hex())
"""


def test_a_sweep_killed_three_times_ends_in_the_same_bits(tmp_path):
    """Killed at random moments once it has begun; continued with another memory=, which its plan ignores."""
    arguments = lambda folder, memory: [sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(memory)]
    run = lambda *a: subprocess.run(arguments(*a), capture_output=True, text=True, check=True).stdout
    whole = run("whole", 600_000)
    assert len(list((tmp_path / "whole").glob("chunk_*"))) > 20
    done, chance = [], random.Random(0)
    for _ in range(3):
        before = len(list((tmp_path / "killed").glob("chunk_*")))
        process = subprocess.Popen(arguments("killed", 600_000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((tmp_path / "killed").glob("chunk_*"))) <= before + chance.randrange(
            3
        ):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        done.append(len(list((tmp_path / "killed").glob("chunk_*"))))
    assert 0 < done[0] < done[2] < len(list((tmp_path / "whole").glob("chunk_*")))
    assert run("killed", 10**8) == whole


@pytest.fixture
def job():
    model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    edits = {"z": mj.Scale(0.0, mj.grid(layer=[0, 1], head=[0, 1]))}
    given = {"model": model, "tokens": [[1, 2, 3], [4, 5, 6]], "interventions": edits, "metric": mj.metrics.logit(7)}
    return given, lambda **changed: mj.sweep(**{**given, **changed}, progress=False)


def test_a_folder_is_refused_to_another_job(job, tmp_path):
    given, run = job
    first = run(save=tmp_path / "sweep")
    record = json.loads((tmp_path / "sweep/job.json").read_text())
    assert record["labels"] == {"layer": [0, 1], "head": [0, 1]} and record["metrics"] == ["logit"]
    assert (run(save=tmp_path / "sweep").values == first.values).all()
    others = {
        "model": jax.tree.map(lambda x: 2 * x, given["model"]),
        "tokens": [[1, 2, 3], [4, 5, 7]],
        "interventions": {"z": mj.Scale(0.5, mj.grid(layer=[0, 1], head=[0, 1]))},
        "metric": mj.metrics.logit(8),
    }
    names = {"tokens": "prompts", "interventions": "grid of interventions"}
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"was begun with another {names.get(what, what)}: give another folder"):
            run(save=tmp_path / "sweep", **{what: other})
    run(save=tmp_path / "named", metric={"m": mj.metrics.logit(7)})
    with pytest.raises(ValueError, match="another metric"):
        run(save=tmp_path / "named", metric={"m": mj.metrics.prob(7)})
    moved = {"z": mj.Scale(0.0, mj.grid(layer=[0, 1], head=[1, 0]))}
    with pytest.raises(ValueError, match="another grid of interventions"):
        run(save=tmp_path / "sweep", interventions=moved)
    functions = [{"z": lambda x, site, layer, positions: 0 * x}, {"z": lambda x, site, layer, positions: 1 * x}]
    stacks = [{**f, "attn_out": mj.Scale(0.5, mj.grid(layer=[0]))} for f in functions]
    run(save=tmp_path / "function", interventions=stacks[0])
    with pytest.raises(ValueError, match="another grid of interventions"):
        run(save=tmp_path / "function", interventions=stacks[1])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("not a sweep")
    with pytest.raises(ValueError, match="is not empty and holds no job"):
        run(save=tmp_path / "notes")


def test_a_damaged_chunk_is_computed_again(job, tmp_path):
    _, run = job
    first = run(save=tmp_path)
    chunk = tmp_path / "chunk_000000.npz"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert (run(save=tmp_path).values == first.values).all()
    assert chunk.read_bytes() == whole
    with np.load(chunk) as saved:
        arrays = dict(saved)
    np.savez(chunk, **{**arrays, "logit": arrays["logit"] + 1})
    with pytest.warns(UserWarning, match="its checksum differs"):
        assert (run(save=tmp_path).values == first.values).all()
