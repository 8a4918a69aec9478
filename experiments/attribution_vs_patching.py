"""How good is attribution patching, and where does it fail?

Attribution patching (Nanda 2023) estimates with two forward passes and one backward what activation patching measures
with a forward pass for every cell. On GPT-2 small, Nanda found it to fit well for what heads and most layers add, and
badly for the residual stream and for the first MLP. Here every cell is estimated and measured, on indirect object
identification and on capital cities: attribution patching, AtP* (attention recomputed for queries and keys, Kramar et al. 2024), and
integrated gradients along the inputs (Hanna et al. 2024), by site, with correlation and slope.

    python -m experiments.attribution_vs_patching --help
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import tyro
import xarray as xr

import mijax as mj
from experiments import capitals, ioi_prompts, record
from mijax import plots

METHODS: dict[str, Any] = {
    "AtP": mj.AtP(),
    "AtP*": mj.AtPStar(),
    "integrated gradients": mj.IntegratedGradients(5, along="inputs"),
}
HIDDEN = 0.01, 0.05
"""A cell is hidden from an estimate where this says less than the first and the exact effect is over the second."""


@dataclasses.dataclass(frozen=True)
class Settings(record.Study):
    """Estimated and exact effects of patching."""

    prompts: int = 16
    """How many prompts of each task; a multiple of 4."""
    seed: int = 0
    """Draws names, places and things."""
    probes: int = 16
    """Probes for the estimate's own error, at z; 0 for none."""
    out: Path = Path("results/attribution_vs_patching")
    """Where figure, data and the record go."""


class Task(NamedTuple):
    """A pair of batches, what is measured, and where the positions are that all prompts share."""

    clean: mj.Tokens
    corrupted: mj.Tokens
    metric: mj.metrics.Metric
    roles: dict[str, np.ndarray]


def main(settings: Settings) -> xr.Dataset:
    """Run the study, print what it finds, and write it all under `settings.out`."""
    started = time.perf_counter()
    model, tokenizer = record.load(settings.model)
    effects, summaries = {}, {}
    for name, task in tasks(model, tokenizer, settings).items():
        print(f"\n{name}: {len(task.clean.ids)} prompts", flush=True)
        effects[name], summaries[name] = compared(model, task, settings)
        print(table(effects[name], summaries[name]["seconds"]))
        print(summaries[name]["answer"])
    own_roles = lambda task, effect: effect.rename(pos=f"role in {task}") if "pos" in effect.dims else effect
    results = xr.Dataset(
        {
            f"{t}.{name}": own_roles(t, effect)
            for t, results_of_task in effects.items()
            for name, effect in results_of_task.items()
        }
    )
    results = results.assign_attrs(next(iter(effects.values())).attrs)
    draw(effects, settings)
    seconds = time.perf_counter() - started
    record.save(settings.out, settings, results, tasks=summaries, seconds=seconds)
    print(f"\nwrote {settings.out}/: attribution_vs_patching.png, results.nc, record.json ({seconds:.0f} s)")
    return results


def tasks(model: mj.Transformer, tokenizer: mj.Tokenizer, settings: Settings) -> dict[str, Task]:
    """Both tasks; each answer is compared with the corrupted prompt's."""
    ioi = ioi_prompts.make(tokenizer, settings.prompts, seed=settings.seed)
    facts = capitals.make(model, tokenizer, settings.prompts)
    return {
        "indirect objects": Task(ioi.clean, ioi.corrupted, mj.metrics.logit_diff(ioi.io, ioi.subject), ioi.roles),
        "capital cities": Task(
            facts.clean, facts.corrupted, mj.metrics.logit_diff(facts.correct, facts.wrong), facts.roles
        ),
    }


def grids(model: mj.Transformer, task: Task) -> dict[str, Any]:
    """Components by layer and role, what is in a head by layer and head."""
    roles = mj.grid(layer=range(model.config.n_layers), pos=task.roles)
    heads, kv_heads = ("layer", "head"), ("layer", "kv_head")
    by_role = dict.fromkeys(("resid_pre", "attn_out", "mlp_out"), roles)
    return by_role | {"z": heads, "q": heads, "k": kv_heads, "v": kv_heads, "pattern": heads}


def compared(model: mj.Transformer, task: Task, settings: Settings) -> tuple[xr.Dataset, dict[str, Any]]:
    """Normalised effects by `site.exact` and `site.<method>`, and what is said of them."""
    sides: dict[str, Any] = {
        "clean": task.clean,
        "corrupted": task.corrupted,
        "metric": task.metric,
        "memory": settings.memory,
    }
    sites, effects, seconds = grids(model, task), {}, {}
    clock = time.perf_counter()
    for site, over in sites.items():
        effects[f"{site}.exact"] = mj.normalise(mj.patch(model, site=site, over=over, **sides))
    seconds["exact"] = time.perf_counter() - clock
    attrs: dict[str, Any] = {}
    for name, method in METHODS.items():
        clock = time.perf_counter()
        estimate = mj.attribute(model, sites=sites, method=method, **sides)
        seconds[name] = time.perf_counter() - clock
        effects |= {f"{site}.{name}": mj.normalise(estimate[site]) for site in sites}
        attrs = {key: estimate.attrs[key] for key in ("metric", "model", "mijax", "jax", "device", "direction")}
    result = xr.Dataset({name: effect.drop_attrs() for name, effect in effects.items()}, attrs=attrs)
    summary = {"seconds": seconds, "answer": answer(result), "fit": fits(result)}
    if settings.probes:
        summary["error"] = error_told(model, task, settings, result)
        print(f"the size of AtP's error at z and what it says itself: rank correlation {summary['error']:.2f}")
    return result, summary


def error_told(model: mj.Transformer, task: Task, settings: Settings, result: xr.Dataset) -> float:
    """Rank correlation, over cells, of the size of the second-order term with that of the actual error."""
    estimate = mj.attribute(
        model, clean=task.clean, corrupted=task.corrupted, metric=task.metric, sites={"z": ("layer", "head")},
        method=mj.AtP(probes=settings.probes), memory=settings.memory,
    )  # fmt: skip
    actual, predicted = result["z.exact"] - result["z.AtP"], estimate["z.error"].mean("batch", skipna=False)
    ranked: Any = scipy.stats.spearmanr(np.abs(predicted.values).ravel(), np.abs(actual.values).ravel())
    return float(ranked.statistic)


def sites_of(result: xr.Dataset) -> list[str]:
    """The sites, in order."""
    return [str(name).removesuffix(".exact") for name in result if str(name).endswith(".exact")]


def fit(exact: xr.DataArray, estimate: xr.DataArray) -> dict[str, float]:
    """Correlation, slope of the estimate over the exact effect, and how many large effects the estimate hides."""
    x, y = exact.values.ravel(), estimate.transpose(*exact.dims).values.ravel()
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"r": float("nan"), "slope": float("nan"), "hidden": 0}
    line: Any = scipy.stats.linregress(x, y)
    hidden = int(((np.abs(y) < HIDDEN[0]) & (np.abs(x) > HIDDEN[1])).sum())
    return {"r": float(line.rvalue), "slope": float(line.slope), "hidden": hidden}


def fits(result: xr.Dataset) -> dict[str, dict[str, dict[str, float]]]:
    """By site and method."""
    return {s: {m: fit(result[f"{s}.exact"], result[f"{s}.{m}"]) for m in METHODS} for s in sites_of(result)}


def table(result: xr.Dataset, seconds: dict[str, float]) -> str:
    """Correlation and slope by site and method."""
    rows = [
        f"{'':10}{'cells':>6}" + "".join(f"{name:>24}" for name in METHODS),
        f"{'':16}" + f"{'r  slope  hidden':>24}" * 3,
    ]
    for site, fits_of_site in fits(result).items():
        cells = "".join(f"{f['r']:>13.3f}{f['slope']:>7.2f}{f['hidden']:>4}" for f in fits_of_site.values())
        rows.append(f"{site:10}{result[f'{site}.exact'].size:>6}{cells}")
    rows.append(", ".join(f"{name} {t:.0f} s" for name, t in seconds.items()) + ", compilation included")
    return "\n".join(rows)


def answer(result: xr.Dataset) -> str:
    """Does attribution patching fail on the residual stream and on the first MLP?"""
    first = {which: result[f"mlp_out.{which}"].isel(layer=0) for which in ("exact", "AtP")}
    role = str(first["exact"].pos.values[np.abs(first["exact"].values).argmax()])
    mlp = {which: float(effect.sel(pos=role)) for which, effect in first.items()}
    rest = fit(result["mlp_out.exact"].isel(layer=slice(1, None)), result["mlp_out.AtP"].isel(layer=slice(1, None)))
    stream = fit(result["resid_pre.exact"], result["resid_pre.AtP"])
    written = fit(result["attn_out.exact"], result["attn_out.AtP"])
    return (
        f"residual stream: r {stream['r']:.2f}, slope {stream['slope']:.2f} (what attention adds: r {written['r']:.2f}, slope"
        f" {written['slope']:.2f}); first MLP at {role!r}: exact {mlp['exact']:.2f}, estimated {mlp['AtP']:.2f} (later MLPs: r"
        f" {rest['r']:.2f}, slope {rest['slope']:.2f})"
    )


def draw(results: dict[str, xr.Dataset], settings: Settings) -> None:
    """Estimate over exact effect: a row for each task and method, a column for each site."""
    pairs, notes = {}, {}
    for task, result in results.items():
        for method in METHODS:
            row = f"{task}\n{method}"
            pairs[row] = {s: (result[f"{s}.exact"], result[f"{s}.{method}"]) for s in sites_of(result)}
            for site, (exact, estimate) in pairs[row].items():
                line = fit(exact, estimate)
                notes[row, site] = f"r {line['r']:.2f}\nslope {line['slope']:.2f}"
    title = (
        f"{settings.model}: estimated and exact normalised effects of patching (denoising, {settings.prompts} prompts)"
    )
    plots.save(plots.scatter(pairs, title=title, notes=notes), settings.out / "attribution_vs_patching.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
