"""Where does a language model keep the answer to "When Mary and John went to the store, John gave a drink to"?

Indirect object identification (Wang et al. 2022, "Interpretability in the Wild"): the model should name
the indirect object (Mary), not the subject that is repeated (John). Each prompt is run beside one
whose answer differs, and activations are patched from one run into the other: the residual stream first, over layer x role
of the token (or position), then the output of each head, then what attention and MLPs add to the stream; with `--full` also
each head's queries, keys, values and pattern, and its output at each role, for twice as many prompts. The figure is drawn again
after every grid. The effect is normalised: 0 where patching changes nothing, 1 where it does as much as exchanging the prompts.

    python -m experiments.ioi_patching --help
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import xarray as xr

import mijax as mj
from experiments import record
from experiments.ioi_prompts import IOI, Counterfactual, make
from mijax import plots
from mijax.engine.pairs import Direction

PICTURE, PAGE = "ioi_patching.png", "ioi_patching.html"
DIRECTIONS: dict[Direction, str] = {
    "denoise": "denoising: clean into corrupted",
    "noise": "noising: corrupted into clean",
}


Patched = Mapping[str, Mapping[Direction, xr.DataArray]]
"""Metrics of patched runs by grid and direction."""


@dataclasses.dataclass(frozen=True)
class Settings(record.Study):
    """Activation patching of indirect object identification."""

    full: bool = False
    """The whole study: 64 prompts, and also `--projections` and `--heads-by-position`."""
    prompts: int = 0
    """How many prompts, a multiple of 4; by default 32, of the whole study 64."""
    counterfactual: Counterfactual = "flip"
    """Make the second subject the other name, or put three other names everywhere."""
    seed: int = 0
    """Draws names, places and things."""
    positions: bool = False
    """Patch at every position, instead of at the roles that all prompts share."""
    heads_by_position: bool = False
    """Patch each head's output at each role (or position) as well."""
    projections: bool = False
    """Patch each head's queries, keys, values and pattern as well (keys and values by key/value head)."""
    top: int = 10
    """How many heads to print."""
    out: Path = Path("results/ioi_patching")
    """Where figures, data and the record go."""
    save: Path | None = None
    """A folder to save finished chunks in: the same command then goes on after a crash."""


def main(settings: Settings) -> xr.Dataset:
    """Run the study, print what it finds, and write it all under `settings.out`."""
    started = time.perf_counter()
    settings = settled(settings)
    print(f"loading {settings.model} ...", flush=True)
    model, tokenizer = record.load(settings.model)
    loaded = time.perf_counter()
    ioi = make(tokenizer, settings.prompts, counterfactual=settings.counterfactual, seed=settings.seed)
    print(f"{len(ioi.texts)} prompts, such as {ioi.texts[0]!r} beside {ioi.corrupted_texts[0]!r}", flush=True)
    behaviour = baseline(model, ioi)
    print(
        f"indirect object above subject in {behaviour['accuracy']:.0%} of the prompts (first of all tokens in"
        f" {behaviour['top']:.0%}); mean logit difference {behaviour['logit_diff']:.2f}, corrupted"
        f" {behaviour['corrupted_logit_diff']:.2f}",
        flush=True,
    )
    patched = study(model, ioi, settings, started)
    results = as_dataset(patched, ioi)
    tested = {d: corrected(results["z"].sel(direction=d), ioi.pair) for d in DIRECTIONS}
    table = strongest(results["z"], tested, settings.top)
    significant = int((tested["denoise"] < 0.05).sum())
    print(
        f"\nThe {settings.top} strongest heads (z patched at all positions; 95 % intervals over prompts; of {tested['denoise'].size}"
        f" heads {significant} have p < 0.05, family-wise over all heads):\n\n{table}"
    )
    seconds = {"load": loaded - started, "all": time.perf_counter() - started}
    plots.save(plots.heatmap_page(panels(patched), title=title(settings, ioi), limit=1.0), settings.out / PAGE)
    summary = {"behaviour": behaviour, "seconds": seconds, "prompts": ioi.texts, "heads": table}
    record.save(settings.out, settings, results, **summary)
    print(f"\nwrote {settings.out}/: {PICTURE}, {PAGE}, results.nc, record.json ({seconds['all']:.0f} s)")
    return results


def settled(settings: Settings) -> Settings:
    """The settings with what `full` and `prompts` stand for."""
    settings = dataclasses.replace(settings, prompts=settings.prompts or (64 if settings.full else 32))
    return dataclasses.replace(settings, projections=True, heads_by_position=True) if settings.full else settings


def baseline(model: mj.Transformer, ioi: IOI) -> dict[str, float]:
    """What the model does with the prompts as they are."""
    difference, rank = mj.metrics.logit_diff(ioi.io, ioi.subject), mj.metrics.rank(ioi.io)
    clean, corrupted = mj.run(model, ioi.clean), mj.run(model, ioi.corrupted)
    values = np.asarray(difference(clean))
    return {
        "accuracy": float((values > 0).mean()),
        "top": float((np.asarray(rank(clean)) == 0).mean()),
        "logit_diff": float(values.mean()),
        "corrupted_logit_diff": float(np.mean(np.asarray(difference(corrupted)))),
    }


def study(model: mj.Transformer, ioi: IOI, settings: Settings, started: float) -> Patched:
    """Patch each grid in both directions, and draw the figure after each."""
    metric = mj.metrics.logit_diff(ioi.io, ioi.subject)
    patched: dict[str, dict[Direction, xr.DataArray]] = {}
    wanted: list[tuple[str, Direction]] = [
        (name, direction) for name in grids(model, ioi, settings) for direction in DIRECTIONS
    ]
    print(f"{len(wanted)} grids; {settings.out / PICTURE} is drawn after each", flush=True)
    for number, (name, direction) in enumerate(wanted, 1):
        site, over = grids(model, ioi, settings)[name]
        began = time.perf_counter()
        patched.setdefault(name, {})[direction] = mj.patch(
            model,
            clean=ioi.clean,
            corrupted=ioi.corrupted,
            site=site,
            over=over,
            metric=metric,
            direction=direction,
            memory=settings.memory,
            save=None if settings.save is None else settings.save / f"{name}_{direction}",
        )
        plots.save(plots.heatmaps(panels(patched), title=title(settings, ioi), limit=1.0), settings.out / PICTURE)
        now = time.perf_counter()
        print(
            f"[{number}/{len(wanted)}] {name}, {DIRECTIONS[direction]}: {now - began:.0f} s, {now - started:.0f} s in all;"
            f" drawn in {settings.out / PICTURE}",
            flush=True,
        )
    return patched


def as_dataset(patched: Patched, ioi: IOI) -> xr.Dataset:
    """One variable per grid, `direction` in front."""
    along = xr.Variable("direction", list(DIRECTIONS))
    joined = {
        name: xr.concat([by[d] for d in DIRECTIONS], along, combine_attrs="drop_conflicts", join="exact")
        for name, by in patched.items()
    }
    of_each = ("sites", "memory_estimate", "memory_peak", "prompts_together")
    results = xr.Dataset(joined, attrs={k: v for k, v in joined["z"].attrs.items() if k not in of_each})
    return results.assign_coords(prompt=("batch", ioi.texts))


def grids(model: mj.Transformer, ioi: IOI, settings: Settings) -> dict[str, tuple[str, Any]]:
    """What is patched, by the name of the result: a site, and a grid over it."""
    c, heads, kv_heads = model.config, ("layer", "head"), ("layer", "kv_head")
    roles = mj.grid(layer=range(c.n_layers), pos=ioi.roles)
    places = ("layer", "pos") if settings.positions else roles
    wanted: dict[str, tuple[str, Any]] = {"resid_pre": ("resid_pre", places), "z": ("z", heads)}
    wanted |= {"attn_out": ("attn_out", places), "mlp_out": ("mlp_out", places)}
    if settings.projections:
        wanted |= {"q": ("q", heads), "k": ("k", kv_heads), "v": ("v", kv_heads), "pattern": ("pattern", heads)}
    if settings.heads_by_position:
        by_role = mj.grid(layer=range(c.n_layers), pos=ioi.roles, head=range(c.n_heads))
        wanted["z_by_position"] = ("z", ("layer", "pos", "head") if settings.positions else by_role)
    return wanted


def corrected(patched: xr.DataArray, pair: np.ndarray) -> xr.DataArray:
    """Family-wise p-values over pairs of names; NaN for fewer than the six pairs that a test needs."""
    if pair.max() < 5:
        return xr.full_like(patched.isel(batch=0, drop=True), np.nan)
    return mj.sign_flips(patched, clusters=pair).p


def strongest(patched: xr.DataArray, tested: dict[str, xr.DataArray], count: int) -> str:
    """A table of the heads with the largest denoising effects, and the noising effects beside them."""
    columns = {}
    for direction in DIRECTIONS:
        result = patched.sel(direction=direction)
        columns[direction] = mj.normalise(result), mj.bootstrap(result), tested[direction]
    first = columns["denoise"][0]
    order = np.argsort(-np.abs(first.values), axis=None)[:count]
    rows = ["head     " + "".join(f"{d:>8}   95 % interval         p    " for d in DIRECTIONS).rstrip()]
    for layer, head in zip(*np.unravel_index(order, first.shape)):
        row = f"{layer:>3}.{head:<5}"
        for effect, bounds, p in columns.values():
            low, high = bounds.values[:, layer, head]
            row += f"{effect.values[layer, head]:>8.3f}   [{low:6.3f}, {high:6.3f}] {p.values[layer, head]:8.4f}    "
        rows.append(row.rstrip())
    return "\n".join(rows)


def panels(patched: Patched) -> plots.Panels:
    """Normalised effects of what has been patched so far: a row for each direction, a panel for each grid."""
    effects = lambda direction: {
        name: _strongest_head(mj.normalise(by[direction])) for name, by in patched.items() if direction in by
    }
    return {DIRECTIONS[d]: effects(d) for d in DIRECTIONS if effects(d)}


def title(settings: Settings, ioi: IOI) -> str:
    """The figure's."""
    return f"{settings.model}: patching indirect object identification ({len(ioi.texts)} prompts, {settings.counterfactual})"


def _strongest_head(effects: xr.DataArray) -> xr.DataArray:
    """Of effects by layer, position and head, the largest over heads, with its sign: what a flat figure can show."""
    if effects.ndim < 3:
        return effects
    return effects.isel(head=abs(effects).fillna(0).argmax("head"))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
