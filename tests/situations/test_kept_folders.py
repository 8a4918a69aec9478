"""A folder of a saved sweep that was damaged or mixed up is made good with a warning, and never trusted."""

import json
import shutil

import numpy as np
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.models import model

GRID = {"z": mj.Replace(0.5, mj.grid(layer=range(2), head=range(2), pos=range(3)))}


def sweep(folder, metric=None, **more):
    metric = metric or mj.metrics.logit(7, pos=-1)
    return mj.sweep(model(), [[1, 2, 3]], GRID, metric, memory=20_000, save=folder, progress=False, **more).values


@pytest.fixture
def kept(tmp_path):
    values = sweep(tmp_path / "sweep")
    assert len(list((tmp_path / "sweep").glob("chunk_*"))) > 1
    return tmp_path / "sweep", values


def test_a_chunk_under_anothers_name(kept):
    folder, values = kept
    (folder / "chunk_000000.npz").replace(folder / "chunk_000001.npz")
    with pytest.warns(UserWarning, match="chunk_000001.npz is damaged, or no chunk 1 of this job"):
        assert (sweep(folder) == values).all()


def test_a_chunk_of_another_folder(kept, tmp_path):
    folder, values = kept
    sweep(tmp_path / "other", mj.metrics.logit(8, pos=-1))
    shutil.copy(tmp_path / "other/chunk_000001.npz", folder / "chunk_000001.npz")
    with pytest.warns(UserWarning, match="no chunk 1 of this job"):
        assert (sweep(folder) == values).all()


@pytest.mark.parametrize("size", [0, 10, 40])
@pytest.mark.parametrize("name", ["job.json", "plan.npz"])
def test_a_file_cut_short(kept, name, size):
    folder, values = kept
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    with pytest.warns(UserWarning, match=f"{name} (cannot be read|is damaged)"):
        assert (sweep(folder) == values).all()
    assert (sweep(folder) == values).all()  # and is whole again


@pytest.mark.parametrize("name", ["plan.npz", "chunk_000000.npz"])
def test_a_flipped_bit(kept, name):
    folder, values = kept
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.warns(UserWarning, match=name):
        assert (sweep(folder) == values).all()


def test_a_plan_of_another_sweep(kept, tmp_path):
    folder, values = kept
    mj.sweep(
        model(),
        [[1, 2, 3]],
        {"z": mj.Replace(0.5, mj.grid(layer=[0, 1]))},
        mj.metrics.logit(7),
        save=tmp_path / "other",
        progress=False,
    )
    shutil.copy(tmp_path / "other/plan.npz", folder / "plan.npz")
    with pytest.warns(UserWarning, match="plan.npz is damaged"):
        assert (sweep(folder) == values).all()


def test_a_folder_of_another_version_of_mijax(kept):
    folder, _ = kept
    job = json.loads((folder / "job.json").read_text())
    job["identity"]["version of mijax"] = "0.0.0"
    (folder / "job.json").write_text(json.dumps(job))
    with refused(ValueError, "was begun with another version of mijax"):
        sweep(folder)


def test_another_precision(kept, x64):
    with refused(ValueError, "was begun with another .*precision"):
        sweep(kept[0])
    assert np.isfinite(kept[1]).all()
