"""What every study leaves behind: labelled data, and a record of what was done with what."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import xarray as xr

from mijax.files import atomic


def save(out: Path, settings: Any, results: xr.Dataset, **told: Any) -> None:
    """Write `results.nc`, and `record.json` with the settings, the versions and whatever else is told."""
    with atomic(out / "results.nc") as scratch:
        results.to_netcdf(scratch, engine="scipy")
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(settings).items()
    }
    versions = {**results.attrs, "python": platform.python_version(), "platform": platform.platform()}
    with atomic(out / "record.json") as scratch:
        scratch.write_text(json.dumps({"settings": given, "versions": versions, **told}, indent=2, default=str))
