"""What studies share: the model that they begin with, and the data and the record that they leave behind."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import xarray as xr

import mijax as mj
from mijax.files import atomic


@dataclasses.dataclass(frozen=True)
class Study:
    """What can be set for every study that patches a model."""

    model: str = "smollm2-135m-instruct"
    """A name, a Hugging Face hub id, or a local path, as mijax.load takes it."""
    memory: int | None = None
    """Bytes that one chunk of cells may take; by default chosen for the device."""


def load(name: str) -> tuple[mj.Transformer, mj.Tokenizer]:
    """A model with its tokenizer, compiled programs being kept from now on."""
    mj.compilation_cache()
    model, tokenizer = mj.load(name)
    if tokenizer is None:
        raise SystemExit(f"{name} comes without a tokenizer, which this study needs")
    return model, tokenizer


def save(out: Path, settings: Any, results: xr.Dataset, **extra: Any) -> None:
    """Write `results.nc`, and `record.json` with the settings, the versions and `extra`."""
    with atomic(out / "results.nc") as scratch:
        results.to_netcdf(scratch, engine="scipy")
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(settings).items()
    }
    versions = {**results.attrs, "python": platform.python_version(), "platform": platform.platform()}
    with atomic(out / "record.json") as scratch:
        scratch.write_text(json.dumps({"settings": given, "versions": versions, **extra}, indent=2, default=str))
