"""The README's example runs, and its commands and table are those of the code."""

import re
from pathlib import Path

import pytest

import mijax as mj

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.weights
def test_the_ten_lines_run(capsys, monkeypatch):
    monkeypatch.setattr(mj, "compilation_cache", lambda: None)  # a setting of the whole process
    first, second = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(first, scope)
    exec(second, scope)
    printed = capsys.readouterr().out
    metric, run = scope["metric"], lambda which, *edits: mj.run(scope["model"], scope[which], *edits)
    clean, corrupted, patched = (float(metric(out)[0]) for out in (run("clean"), run("corrupted"), scope["patched"]))
    assert clean > 1 and corrupted < -1 and patched > corrupted + 1  # head 23.3 matters
    effects, effect = scope["effects"], scope["effect"]
    assert abs(float(effects.sel(layer=23, head=3)[0]) - patched) < 1e-3  # the sweep's cell is the single run
    assert abs(float(effect(0.0, 3)) - corrupted) < 1e-3 and abs(float(effect(1.0, 3)) - patched) < 1e-3
    slope = float(scope["jax"].grad(effect)(0.0, 3))
    estimate = scope["estimates"].z.sel(layer=23, head=3)[0]
    assert abs(slope - float(estimate - estimate.base)) < 1e-3 * abs(slope)  # what the last comment says
    assert "<xarray.DataArray" in printed and abs(float(printed.split()[-1]) - slope) < 1e-3


def test_every_name_in_the_readme_exists():
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    for name in {name for page in pages for name in re.findall(r"\bmj\.([a-zA-Z_.]+)", page)}:
        attribute = mj
        for part in name.rstrip(".").split("."):
            attribute = getattr(attribute, part)
    for site in re.findall(r'site="(\w+)"', README):
        assert site in mj.SITES


def test_the_two_commands_are_one_line_each():
    commands = re.findall(r"<!-- (?:main|test) -->\n```sh\n(.*?)\n```", README, re.S)
    assert len(commands) == 2 and all("\n" not in c and c.startswith("python3 -m venv .venv && ") for c in commands)
