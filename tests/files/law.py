"""The law: reading a mutated file gives what a second reading gives, or one error that names the file, in bounded time and memory."""

import collections
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from tests.files.formats import FORMATS, UNKNOWN, Format, Unreadable, Value
from tests.files.limits import Cost, TooLong, measured

TOLERANCE = 1e-6
"""Of float32 numbers against a second reading, which may sum in float64: relative to the largest."""


class Mutation(NamedTuple):
    """What is done to the files of a format: a label, and new contents by name; `None` removes a file, a kind replaces it."""

    label: str
    files: dict[str, bytes | str | None]


class Outcome(NamedTuple):
    """What came of reading mutated files.

    Attributes:
        kind: `"equal"`, `"unknown"` (read, and no second reading to hold it against), `"refused"`, or the name of a fault:
            `"raw error"`, `"unnamed"`, `"silent"`, `"endless"`, `"costly"`, `"outside"` (it wrote beside the folder).
        place: of a fault, what tells it apart from others.
        text: of a refusal the message, of a fault what happened.
        cost: of the reading.
    """

    kind: str
    place: str
    text: str
    cost: Cost

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("equal", "unknown", "refused")


@st.composite
def mutation(draw: Any, format: Format) -> Mutation:
    """One or two changes of a format's files; now and then another thing stands in the place of a file."""
    changed: dict[str, bytes | str | None] = {}
    labels = []
    for name in draw(st.lists(st.sampled_from(sorted(format.mutated)), min_size=1, max_size=2, unique=True)):
        if draw(st.integers(0, 19)) == 0:
            thing = draw(st.sampled_from([None, "folder", "link to nothing", "link to itself", "not readable"]))
            changed[name] = thing
            labels.append(f"{name}: {thing or 'missing'}")
        else:
            label, changed[name] = draw(format.mutated[name](format.files[name]))
            labels.append(f"{name}: {label}")
    return Mutation("; ".join(labels), changed)


def written(folder: Path, format: Format, change: Mutation) -> Path:
    """The files of a format in a new folder, with the changes."""
    contents: Mapping[str, Any] = {**format.files, **change.files}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content == "link to nothing":
            path.symlink_to("nothing")
        elif content == "link to itself":
            path.symlink_to(path.name)
        elif content == "not readable":
            path.write_bytes(format.files[name])
            path.chmod(0)
    return folder


def judged(format: Format, change: Mutation) -> Outcome:
    """Read mutated files, and judge what comes of it."""
    base = Path(tempfile.mkdtemp(prefix="files-"))
    try:
        folder = written(base / "given", format, change)
        return _judged(format, folder)
    finally:
        for path in base.rglob("*"):
            if path.is_file():
                path.chmod(0o600)
        shutil.rmtree(base)


def _judged(format: Format, folder: Path) -> Outcome:
    value, caught = None, None
    with warnings.catch_warnings(), measured() as cost:
        warnings.simplefilter("ignore")
        try:
            value = format.read(folder)
        except TooLong as error:
            return Outcome("endless", _place(error), str(error), cost)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            caught = error
    beside = [path.name for path in folder.parent.iterdir() if path != folder]
    if beside:
        return Outcome("outside", ", ".join(beside), f"it wrote {beside} beside the folder", cost)
    if caught is not None:
        text = f"{type(caught).__name__}: {caught}"
        if not isinstance(caught, ValueError | FileNotFoundError) or isinstance(caught, UnicodeError):
            return Outcome("raw error", _place(caught), text, cost)
        if str(folder) not in str(caught):
            return Outcome("unnamed", _place(caught), text, cost)
        if cost.excess:
            return Outcome("costly", _place(caught), f"{cost.excess}, then {text}", cost)
        return Outcome("refused", "", text, cost)
    if cost.excess:
        return Outcome("costly", "", cost.excess, cost)
    with warnings.catch_warnings(), measured():  # jinja2 computes constants of ten gigabytes when it compiles
        warnings.simplefilter("ignore")
        try:
            expected = format.expected(folder)
        except (TooLong, MemoryError):
            return Outcome("unknown", "", "", cost)
        except Unreadable as error:
            return Outcome(
                "silent", f"read, though {str(error)[:60]}", f"read, though a second reading refuses: {error}", cost
            )
    if expected is UNKNOWN:
        return Outcome("unknown", "", "", cost)
    differing = difference(value, expected)
    return Outcome("silent" if differing else "equal", differing, differing, cost)


def difference(value: Value, expected: Value, path: str = "") -> str:
    """Where two values differ first; empty where they do not."""
    if isinstance(value, dict) and isinstance(expected, dict):
        if value.keys() != expected.keys():
            return f"{path} has {sorted(map(str, value.keys() ^ expected.keys()))} more or less"
        found = (difference(value[key], expected[key], f"{path}.{key}") for key in value)
        return next((text for text in found if text), "")
    if isinstance(value, np.ndarray):
        other = np.asarray(expected)
        if value.shape != other.shape:
            return f"{path} has another shape"
        a, b = (np.asarray(x, np.float64) for x in (value, other))
        equal = np.allclose(
            a, b, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, float(np.abs(b).max(initial=0))), equal_nan=True
        )
        return "" if equal else f"{path} has other numbers"
    if type(value) is float and type(expected) in (int, float):
        return "" if value == float(expected) else f"{path} differs"
    return "" if type(value) is type(expected) and value == expected else f"{path} differs"


def _place(error: BaseException) -> str:
    """The kind of an error and the innermost line of mijax that it passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/mijax/" in frame.filename]
    where = f"{frames[-1].filename.rpartition('/mijax/')[2]}:{frames[-1].name}" if frames else "outside mijax"
    return f"{type(error).__name__} in {where}"


def faults(outcomes: list[Outcome]) -> collections.Counter[str]:
    """Faults told apart by where they happen, with their number."""
    return collections.Counter(f"{o.kind}: {o.place}" for o in outcomes if o.is_fault)


__all__ = ["FORMATS", "Mutation", "Outcome", "faults", "judged", "mutation"]
