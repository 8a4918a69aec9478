"""Print what becomes of every situation: right, an error that says so, or wrong."""

import pathlib
import sys

import pytest

from tests.situations import REFUSED


class _Table:
    """Collects the outcome of each test."""

    def __init__(self):
        self.rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            outcome = "wrong" if report.failed else "error" if report.nodeid in REFUSED else "right"
            file, _, name = report.nodeid.partition("::")
            kind = pathlib.PurePath(file).stem.removeprefix("test_")
            self.rows.append((kind.replace("_", " "), name.removeprefix("test_").replace("_", " "), outcome))


if __name__ == "__main__":
    table = _Table()
    here = str(pathlib.Path(__file__).parent)
    code = pytest.main(
        [here, "-m", "", "-n", "0", "-q", "--no-header", "--tb=no", "--show-capture=no", *sys.argv[1:]], plugins=[table]
    )
    widths = [max((len(row[i]) for row in table.rows), default=0) for i in range(2)]
    for kind, situation, outcome in table.rows:
        print(f"{kind:{widths[0]}}  {situation:{widths[1]}}  {outcome}")
    counts = {outcome: sum(row[2] == outcome for row in table.rows) for outcome in ("right", "error", "wrong")}
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    sys.exit(code)
