"""The table of docs/verification.md has a column for each family, and a row for each site (its cells: `tests/parity/test_families.py`)."""

from mijax.checkpoints.registry import FAMILIES
from mijax.model.sites import SITES
from tests.reference.sites import read


def test_every_family_and_every_site():
    table = read()
    assert {*table} == {*FAMILIES} - {"mijax"}
    assert {site for cells in table.values() for site in cells} == {*SITES}
    assert all(float(cell.removeprefix("=")) < 1e-4 for cells in table.values() for cell in cells.values())
