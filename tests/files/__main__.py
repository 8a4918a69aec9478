"""Prints the figures of files from strangers: `python -m tests.files [--mutations N] [--format NAME]`.

For each format: how many mutations were read as a second reading reads them, how many were refused by one error that names
the file, faults, and the most time and memory. (`python -m benchmarks.files --against PYTHON` compares two commits.)
"""

import argparse
import json
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.files.law import FORMATS, Outcome, faults, judged, mutation


def outcomes(name: str, mutations: int) -> list[tuple[str, Outcome]]:
    """The outcomes of so many mutations of a format, with their labels; the same at each call."""
    format = FORMATS[name]()
    results: list[tuple[str, Outcome]] = []

    @settings(max_examples=mutations, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def run(data: st.DataObject):
        change = data.draw(mutation(format))
        results.append((change.label, judged(format, change)))

    run()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=200, help="of each format")
    parser.add_argument("--format", action="append", choices=FORMATS, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    arguments = parser.parse_args()
    names, table, report = arguments.format or list(FORMATS), [], {}
    print(
        f"{'format':<25}{'read':>6}{'refused':>9}{'faults':>8}{'kinds':>7}{'s, most':>9}{'MB, most':>10}{'s, all':>8}"
    )
    for name in names:
        started = time.perf_counter()
        results = outcomes(name, arguments.mutations)
        only = [outcome for _, outcome in results]
        kinds = faults(only)
        read = sum(o.kind in ("equal", "unknown") for o in only)
        refused = sum(o.kind == "refused" for o in only)
        seconds, megabytes = max(o.cost.seconds for o in only), max(o.cost.megabytes for o in only)
        print(
            f"{name:<25}{read:>6}{refused:>9}{sum(kinds.values()):>8}{len(kinds):>7}{seconds:>9.2f}{megabytes:>10.0f}"
            f"{time.perf_counter() - started:>8.0f}",
            flush=True,
        )
        table.append(kinds)
        examples = {f"{o.kind}: {o.place}": (label, o.text) for label, o in reversed(results) if o.is_fault}
        report[name] = examples
        for kind, number in kinds.most_common():
            label, text = examples[kind]
            print(f"    {number:>4} {kind}\n         {label}\n         {text[:300]}", flush=True)
    total = sum(len(kinds) for kinds in table)
    print(f"kinds of faults: {total}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
