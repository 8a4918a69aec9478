"""Where does a language model keep the answer to "When Mary and John went to the store, John gave a drink to"?

Indirect object identification (Wang et al. 2022, "Interpretability in the Wild"): the model should name
the indirect object (Mary), not the subject that is repeated (John). Each prompt is run beside one
whose answer differs, and activations are patched from one run into the other: the residual stream, and what
attention and MLPs add to it, over layer x role of the token; and the output of each head. The effect
is normalised: 0 where patching changes nothing, 1 where it does as much as exchanging the prompts.

    python -m experiments.ioi_patching --help
"""

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import xarray as xr

import mijax as mj
from experiments.ioi_prompts import IOI, Counterfactual, make
from mijax.files import atomic
from mijax.plots import save_heatmaps, save_page
from mijax.sweeps.patch import Direction

COMPONENTS = ("resid_pre", "attn_out", "mlp_out")
DIRECTIONS: dict[Direction, str] = {
    "denoise": "denoising: clean into corrupted",
    "noise": "noising: corrupted into clean",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Activation patching of indirect object identification."""

    model: str = "smollm2-135m-instruct"
    """A name, a Hugging Face hub id, or a local path, as mijax.load takes it."""
    prompts: int = 16
    """How many prompts; a multiple of 4."""
    counterfactual: Counterfactual = "flip"
    """Make the second subject the other name, or put three other names everywhere."""
    seed: int = 0
    """Draws names, places and things."""
    top: int = 10
    """How many heads to print."""
    out: Path = Path("results/ioi_patching")
    """Where figures, data and the record go."""
    memory: int | None = None
    """Bytes that one batch of cells may take; by default chosen for the device."""


def main(settings: Settings) -> xr.Dataset:
    """Run the study, print what it finds, and write it all under `settings.out`."""
    started = time.perf_counter()
    model, tokenizer = mj.load(settings.model)
    if tokenizer is None:
        raise SystemExit(f"{settings.model} comes without a tokenizer, which this study needs")
    loaded = time.perf_counter()
    ioi = make(tokenizer, settings.prompts, counterfactual=settings.counterfactual, seed=settings.seed)
    behaviour = baseline(model, ioi)
    print(f"{settings.model}: {len(ioi.texts)} prompts, such as {ioi.texts[0]!r} beside {ioi.corrupted_texts[0]!r}")
    print(
        f"indirect object above subject in {behaviour['accuracy']:.0%} of the prompts (first of all tokens in"
        f" {behaviour['top']:.0%}); mean logit difference {behaviour['logit_diff']:.2f}, corrupted"
        f" {behaviour['corrupted_logit_diff']:.2f}"
    )
    results = study(model, ioi, settings.memory)
    effects = {d: {s: mj.normalise(results[s].sel(direction=d)) for s in results} for d in DIRECTIONS}
    table = strongest(results["z"], settings.top)
    print(f"\nThe {settings.top} strongest heads (z patched at all positions; 95 % intervals over prompts):\n\n{table}")
    seconds = {"load": loaded - started, "all": time.perf_counter() - started}
    write(
        settings, results, effects, {"behaviour": behaviour, "seconds": seconds, "prompts": ioi.texts, "heads": table}
    )
    print(
        f"\nwrote {settings.out}/: ioi_patching.png, ioi_patching.html, results.nc, record.json ({seconds['all']:.0f} s)"
    )
    return results


def baseline(model: mj.Transformer, ioi: IOI) -> dict[str, float]:
    """What the model does with the prompts as they are."""
    difference, rank = mj.metrics.logit_diff(ioi.io, ioi.subject), mj.metrics.rank(ioi.io)
    clean, corrupted = mj.run(model, ioi.clean).readout, mj.run(model, ioi.corrupted).readout
    values = np.asarray(difference(clean))
    return {
        "accuracy": float((values > 0).mean()),
        "top": float((np.asarray(rank(clean)) == 0).mean()),
        "logit_diff": float(values.mean()),
        "corrupted_logit_diff": float(np.mean(np.asarray(difference(corrupted)))),
    }


def study(model: mj.Transformer, ioi: IOI, memory: int | None = None) -> xr.Dataset:
    """Patch everything in both directions: one variable per site, `direction` in front."""
    roles = mj.grid(layer=range(model.config.n_layers), pos=ioi.roles)
    grids: dict[str, Any] = {**dict.fromkeys(COMPONENTS, roles), "z": ("layer", "head")}
    metric, found = mj.metrics.logit_diff(ioi.io, ioi.subject), {}
    for site, over in grids.items():
        patched = [
            mj.patch(
                model, clean=ioi.clean, corrupted=ioi.corrupted, site=site, over=over, metric=metric,
                direction=direction, memory=memory,
            )
            for direction in DIRECTIONS
        ]  # fmt: skip
        found[site] = xr.concat(
            patched, xr.Variable("direction", list(DIRECTIONS)), combine_attrs="drop_conflicts", join="exact"
        )
    results = xr.Dataset(found, attrs={k: v for k, v in found["z"].attrs.items() if k != "sites"})
    return results.assign_coords(prompt=("batch", ioi.texts))


def strongest(patched: xr.DataArray, count: int) -> str:
    """A table of the heads with the largest denoising effects, and the noising effects beside them."""
    columns = {}
    for direction in DIRECTIONS:
        own = patched.sel(direction=direction)
        columns[direction] = mj.normalise(own), mj.bootstrap(own)
    first = columns["denoise"][0]
    order = np.argsort(-np.abs(first.values), axis=None)[:count]
    rows = ["head     " + "".join(f"{d:>8}   95 % interval    " for d in DIRECTIONS)]
    for layer, head in zip(*np.unravel_index(order, first.shape)):
        row = f"{layer:>3}.{head:<5}"
        for effect, bounds in columns.values():
            low, high = bounds.values[:, layer, head]
            row += f"{effect.values[layer, head]:>8.3f}   [{low:6.3f}, {high:6.3f}] "
        rows.append(row.rstrip())
    return "\n".join(rows)


def write(settings: Settings, results: xr.Dataset, effects: dict, record: dict) -> None:
    """Figures, labelled data and a record of what was done with what."""
    out = settings.out
    title = f"{settings.model}: patching indirect object identification ({len(results.batch)} prompts, {settings.counterfactual})"
    panels = {DIRECTIONS[d]: own for d, own in effects.items()}
    save_heatmaps(panels, out / "ioi_patching.png", title=title, limit=1.0)
    save_page(panels, out / "ioi_patching.html", title=title, limit=1.0)
    with atomic(out / "results.nc") as scratch:
        results.to_netcdf(scratch, engine="scipy")
    told = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(settings).items()
    }
    versions = {**results.attrs, "python": platform.python_version(), "platform": platform.platform()}
    with atomic(out / "record.json") as scratch:
        scratch.write_text(json.dumps({"settings": told, "versions": versions, **record}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
