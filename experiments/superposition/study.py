"""What the studies of superposition share: their settings, and the claims that their records hold beside what was found."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from experiments import record


@dataclasses.dataclass(frozen=True)
class Study:
    """What can be set for every study."""

    scale: Literal["small", "paper"] = "small"
    """The sizes: minutes on two cores, or the paper's own."""
    save: Path | None = None
    """A folder for what is finished, from which an interrupted run goes on."""
    out: Path = Path()
    """Where figure, data and record go; by default results/superposition/<study>."""

    @property
    def paper(self) -> bool:
        """Whether the sizes are the paper's."""
        return self.scale == "paper"

    @property
    def folder(self) -> Path:
        """Where results go."""
        name = sys.modules[type(self).__module__].__file__ or "study"
        return Path("results/superposition") / Path(name).stem if self.out == Path() else self.out

    def saving(self, part: str) -> Path | None:
        """The folder of one training's chunks."""
        return None if self.save is None else self.save / part


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says, which number it gives or theory expects, what was found, and whether that is within `expected`."""

    claim: str
    expected: str
    found: float
    holds: bool


def finish(settings: Study, results: xr.Dataset, claims: list[Claim]) -> xr.Dataset:
    """Write data and record beside the figure, print the claims, and give the results back."""
    record.save(settings.folder, settings, results, claims=[dataclasses.asdict(c) for c in claims])
    for c in claims:
        print(f"{'yes' if c.holds else 'NO '}  {c.claim}: expected {c.expected}, found {c.found:.4g}")
    print(f"wrote {settings.folder}")
    return results


def near(claim: str, expected: float, actual: Any, tolerance: float) -> Claim:
    """A claim of one number."""
    value = float(actual)
    return Claim(claim, f"{expected:g} +- {tolerance:g}", value, bool(abs(value - expected) <= tolerance))


def at_least(claim: str, expected: float, actual: Any) -> Claim:
    """A claim of a lower bound."""
    return Claim(claim, f"at least {expected:g}", float(actual), bool(float(actual) >= expected))


def at_most(claim: str, expected: float, actual: Any) -> Claim:
    """A claim of an upper bound."""
    return Claim(claim, f"at most {expected:g}", float(actual), bool(float(actual) <= expected))
