"""One page of all studies of superposition: each figure with the claims, what was expected and what was found.

    python -m experiments.superposition.overview            # of the studies that were run
    python -m experiments.superposition.overview --run      # runs those that were not, one after another

The page is a single file that needs no network. Numbers are read from the studies' records.
"""

import base64
import dataclasses
import html
import importlib
import json
from pathlib import Path

import tyro

from mijax.files import atomic

STUDIES = (
    "basic", "phase_diagrams", "uniform", "polytopes", "correlated", "dynamics", "adversarial", "privileged", "computation",
    "double_descent", "transitions",
)  # fmt: skip
"""In the order of the papers."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The overview."""

    folder: Path = Path("results/superposition")
    """Where the studies' results are."""
    run: bool = False
    """Run the studies that have no record there yet."""


def main(settings: Settings) -> Path:
    """Write `overview.html` and give its path."""
    parts = []
    for name in STUDIES:
        module = importlib.import_module(f"experiments.superposition.{name}")
        folder = settings.folder / name
        if settings.run and not (folder / "record.json").exists():
            module.main(module.Settings(out=folder))
        if (folder / "record.json").exists():
            parts.append(section(name, module.__doc__ or "", folder))
    if not parts:
        raise SystemExit(f"{settings.folder} holds no study's record: run one, or give --run")
    page = settings.folder / "overview.html"
    with atomic(page) as scratch:
        scratch.write_text(PAGE.format(body="\n".join(parts)))
    print(f"wrote {page}: {len(parts)} of {len(STUDIES)} studies")
    return page


def section(name: str, about: str, folder: Path) -> str:
    """A study: its docstring, its claims, its figures."""
    record = json.loads((folder / "record.json").read_text())
    text = "\n".join(line for line in about.splitlines() if not line.strip().startswith("python -m"))
    title, _, rest = text.strip().partition("\n")
    rows = "".join(
        f"<tr><td>{html.escape(c['claim'])}</td><td>{html.escape(c['expected'])}</td><td>{c['found']:.4g}</td>"
        f"<td class={'yes' if c['holds'] else 'no'}>{'yes' if c['holds'] else 'no'}</td></tr>"
        for c in record["claims"]
    )
    images = "".join(
        f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in sorted(folder.glob("*.png"))
    )
    return (
        f"<section id={name}><h2>{html.escape(title)}</h2><p>{html.escape(rest.strip())}</p>"
        f"<table><tr><th>claim</th><th>expected</th><th>found</th><th>holds</th></tr>{rows}</table>{images}"
        f"<p class=scale>{name}, scale {html.escape(record['settings']['scale'])}</p></section>"
    )


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Superposition in toy models</title>
<style>body{{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}}img{{max-width:100%}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{border-bottom:1px solid #ccc;padding:.2rem .8rem;text-align:left}}
.yes{{color:#197a2b}}.no{{color:#b00020;font-weight:bold}}.scale{{color:#777;font-size:.85rem}}</style>
<h1>Superposition in toy models</h1>
{body}
</html>
"""


if __name__ == "__main__":
    main(tyro.cli(Settings))
