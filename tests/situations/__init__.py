"""Situations that users met: what must come out right, or be refused with one clear error.

One file a kind of fault, `test_<kind>.py`; a test is named after what the user does, and its expected value comes from
an independent source (NumPy, a plain loop, transformers, a closed form). A fault reported from outside joins as a test here.
`python -m tests.situations` prints them as a table.
"""

import contextlib
import re

import pytest

REFUSED: set[str] = set()
"""The tests of this run in which an error was the right outcome (pytest's names)."""


@contextlib.contextmanager
def refused(kind, message):
    """The block raises an error of this kind whose text, on one line, matches `message`: one of ours, not one from below."""
    import os

    with pytest.raises(kind) as caught:
        yield
    assert re.search(message, str(caught.value).replace("\n", " ")), str(caught.value)
    REFUSED.add(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0])
