"""Which tests are slow: those that `slow.txt` names, chosen by what they took.

`python -m pytest -m "not weights and not parity" -vv --durations=0 > LOG` and then `python tests/tiers.py LOG` write the list anew: of
each test the cases that fit the budget stay in the default tier, those first that try a parameter's value for the first time, and at
least one; tests of which one case takes very long are slow as a whole. A slow test that LOG does not mention stays slow, so that the log of the
default tier alone (without `-m`) serves to shorten it.
"""

import re
import sys
from pathlib import Path

BUDGET, LONG = 1.5, 5.0
"""Seconds of a test's cases in the default tier; seconds from which on a case is slow whatever it is (on a busy machine)."""
FILE = Path(__file__).with_name("slow.txt")


def slow() -> set[str]:
    """The names of the slow tests."""
    return set(FILE.read_text().splitlines()) if FILE.exists() else set()


def share(items: list, given: str) -> set:
    """Of pytest's items all that are not slow, and every N-th of the slow ones from the K-th on, given `"K/N"`."""
    first, every = map(int, given.split("/"))
    if not 0 <= first < every:
        raise ValueError(f"--share must be K/N with K from 0 to N - 1, given {given!r}")
    slow_items = [item for item in items if item.get_closest_marker("slow")]
    return {*items} - {*slow_items} | {*slow_items[first::every]}


def chosen(log: str) -> list[str]:
    """The slow tests by pytest's report of durations."""
    seconds: dict[str, float] = {}
    for line in log.splitlines():
        match = re.match(r"([0-9.]+)s (?:call|setup)\s+(\S.*)", line)
        if match:
            seconds[match[2].strip()] = seconds.get(match[2].strip(), 0.0) + float(match[1])
    tests: dict[str, list[str]] = {}
    for name in seconds:
        tests.setdefault(name.split("[")[0], []).append(name)
    names = []
    for cases in tests.values():
        seen: set[str] = set()
        spent, kept = 0.0, 0
        for case in sorted(cases, key=lambda case: (seconds[case], case)):
            values = set(re.split(r"[-\[\]]", case.partition("[")[2])) - {""}
            is_new = not values or not values <= seen
            fits = seconds[case] <= LONG and (not kept or spent + seconds[case] <= BUDGET * (1.0 if is_new else 0.5))
            if fits:
                spent, kept, seen = spent + seconds[case], kept + 1, seen | values
            else:
                names.append(case)
    return sorted({*names, *(name for name in slow() if name not in seconds)})


if __name__ == "__main__":
    FILE.write_text("\n".join(chosen(Path(sys.argv[1]).read_text())) + "\n")
