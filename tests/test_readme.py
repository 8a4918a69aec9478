"""The README's example runs, and its commands and table are those of the code."""

import re
from pathlib import Path

import pytest

import mijax as mj

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.weights
def test_the_ten_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(code, scope)
    printed = capsys.readouterr().out
    patched, slope = scope["patched"], scope["jax"].grad(scope["patched"])(0.0, 23, 3)
    # what is printed means what the comments say
    before = scope["metric"](mj.run(scope["model"], scope["other"]))[0]
    assert abs(float(patched(0.0, 23, 3) - before)) < 1e-3 and float(patched(1.0, 23, 3)) > float(before) + 1
    assert float(slope) > 1 and "<xarray.DataArray 'logit_diff' (layer: 30, head: 9)>" in printed


def test_every_name_in_the_readme_exists():
    for name in set(re.findall(r"\bmj\.([a-zA-Z_.]+)", README)):
        found = mj
        for part in name.rstrip(".").split("."):
            found = getattr(found, part)
    for site in re.findall(r'site="(\w+)"', README):
        assert site in mj.SITES


def test_the_two_commands_are_one_line_each():
    commands = re.findall(r"<!-- (?:main|test) -->\n```sh\n(.*?)\n```", README, re.S)
    assert len(commands) == 2 and all("\n" not in c and c.startswith("python3 -m venv .venv && ") for c in commands)
