"""Through which heads does "nurse" become "she"?

Causal mediation analysis (Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis"): in
"The nurse was late because", the profession is replaced by "man" (and "farmer" by "woman"), and the total effect on the log
odds of the anti-stereotypical pronoun is split: the natural indirect effect of a mediator (the new input's activations
put into the old run) and the natural direct effect (the new input with the mediator held at its old value). Mediators are
attention heads, and what attention and MLPs add at the profession and at the end.

    python -m experiments.pronouns --help
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import tyro
import xarray as xr

import mijax as mj
from experiments import record
from experiments.pronoun_prompts import FEMALE, TEMPLATES, Pronouns, make
from mijax import plots

EFFECTS = ("indirect", "direct")


@dataclasses.dataclass(frozen=True)
class Settings(record.Study):
    """Direct and indirect effects of a profession's gender on the pronoun."""

    templates: int = 2
    """How many templates (of six), each with all professions."""
    top: int = 8
    """How many heads to print."""
    out: Path = Path("results/pronouns")
    """Where figures, data and the record go."""


def main(settings: Settings) -> xr.Dataset:
    """Run the study, print what it finds, and write it all under `settings.out`."""
    started = time.perf_counter()
    model, tokenizer = record.load(settings.model)
    pronouns = make(tokenizer, templates=TEMPLATES[: settings.templates])
    results = study(model, pronouns, settings.memory)
    summary = table(results, settings.top)
    print(
        f"{settings.model}: {len(pronouns.texts)} prompts, such as {pronouns.texts[0]!r} beside {pronouns.source_texts[0]!r}"
    )
    print(f"\n{summary}")
    draw(results, settings)
    seconds = time.perf_counter() - started
    record.save(settings.out, settings, results, prompts=pronouns.texts, table=summary, seconds=seconds)
    print(f"\nwrote {settings.out}/: pronouns.png, pronouns.html, results.nc, record.json ({seconds:.0f} s)")
    return results


def study(model: mj.Transformer, pronouns: Pronouns, memory: int | None = None) -> xr.Dataset:
    """Effects on the log odds of the anti-stereotypical pronoun, per prompt: of heads, and of components by role."""
    roles = mj.grid(layer=range(model.config.n_layers), pos=pronouns.roles)
    metric, effects = mj.metrics.logit_diff(pronouns.anti, pronouns.stereotypical), {}
    for site, over in (("z", ("layer", "head")), ("attn_out", roles), ("mlp_out", roles)):
        split = mj.mediate(
            model, base=pronouns.base, source=pronouns.source, site=site, over=over, metric=metric, memory=memory
        )
        effects |= {f"{site}.{effect}": split[effect] for effect in EFFECTS} | {"total": split.total}
        attrs = split.attrs
    kind = ["female" if profession in FEMALE else "male" for profession in pronouns.professions]
    coords = {
        "profession": ("batch", pronouns.professions),
        "stereotype": ("batch", kind),
        "prompt": ("batch", pronouns.texts),
    }
    kept = {
        name: value
        for name, value in attrs.items()
        if name not in ("sites", "memory_peak", "memory_estimate", "prompts_together")
    }
    return xr.Dataset(effects, attrs=kept).assign_coords(coords)


def table(results: xr.Dataset, top: int) -> str:
    """Total effects, and the heads of the largest indirect effect, with their family-wise p."""
    rows = ["total effect on the log odds (median factor of the odds, less one):"]
    for kind in ("female", "male"):
        total = results.total[results.stereotype.values == kind]
        rows.append(f"  stereotypically {kind:6} {float(total.mean()):6.2f}   ({np.expm1(float(total.median())):.1f})")
    indirect, direct = results["z.indirect"], results["z.direct"]
    tested = mj.sign_flips(
        indirect.assign_coords(base=("batch", np.zeros(indirect.sizes["batch"]))), clusters=results.profession.values
    )
    mean = indirect.mean("batch", skipna=False)
    rows += ["", "head      indirect   of the total   total - direct   family-wise p"]
    for layer, head in zip(*np.unravel_index(np.argsort(-np.abs(mean.values), axis=None)[:top], mean.shape)):
        at = {"layer": layer, "head": head}
        effect, held = float(mean.isel(at)), float((results.total - direct).mean("batch", skipna=False).isel(at))
        share = effect / float(results.total.mean())
        rows.append(
            f"{layer:>3}.{head:<5} {effect:>8.3f} {share:>13.1%} {held:>14.3f} {float(tested.p.isel(at)):>15.4f}"
        )
    return "\n".join(rows)


def draw(results: xr.Dataset, settings: Settings) -> None:
    """Mean indirect effects over layer x head and layer x role, for each stereotype."""
    panels = {}
    for kind in ("female", "male"):
        group = results.isel(batch=np.flatnonzero(results.stereotype.values == kind))
        share = lambda name, group=group: (
            group[name].mean("batch", skipna=False) / group.total.mean("batch", skipna=False)
        )
        panels[f"stereotypically {kind}"] = {s: share(f"{s}.indirect") for s in ("z", "attn_out", "mlp_out")}
    title = f"{settings.model}: indirect effects as parts of the total"
    for plot, suffix in ((plots.heatmaps, "png"), (plots.heatmap_page, "html")):
        plots.save(plot(panels, title=title, label="indirect / total effect"), settings.out / f"pronouns.{suffix}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
