"""Where does a language model look up that the Eiffel Tower is in Paris?

Causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"): noise on the subject's token
embeddings takes a fact away; one place of the clean run is put back, and the probability of the answer says how much of
the fact comes back with it. Averaged over facts by the role of the token, for the hidden state and for what MLPs and
attention add to it in windows of layers; once more with the MLPs (or attention) of later layers severed at the
restored token; and token by token for a few facts. In GPT-2 XL the paper finds an early site at the subject's last
token, which is the MLPs', and a late one at the last token, which is attention's.

    python -m experiments.causal_tracing --help
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import tyro
import xarray as xr

import mijax as mj
from experiments import record
from experiments.facts import FACTS, Fact, Facts, make
from mijax import plots
from mijax.sweeps.trace import Severed

KINDS = {"hidden state": "resid_post", "MLPs": "mlp_out", "attention": "attn_out"}
SEVERED: dict[str, Severed] = {
    "hidden state, later MLPs severed": "mlp_out",
    "hidden state, later attention severed": "attn_out",
}


@dataclasses.dataclass(frozen=True)
class Settings(record.Study):
    """Causal tracing of facts."""

    facts: int = 12
    """How many facts to average over (of 72, relations in turn)."""
    single: int = 2
    """How many of them to trace token by token as well; each has a figure by role in any case."""
    draws: int = 10
    """Draws of the noise."""
    noise: float = 3.0
    """The noise's scale, in standard deviations of the subjects' token embeddings."""
    window: int = 6
    """Layers restored together where MLPs or attention are restored (the paper: 10 of 48)."""
    seed: int = 0
    """Draws the noise."""
    out: Path = Path("results/causal_tracing")
    """Where figures, data and the record go."""


def main(settings: Settings) -> xr.Dataset:
    """Run the study, print what it finds, and write it all under `settings.out`."""
    started = time.perf_counter()
    model, tokenizer = record.load(settings.model)
    chosen = known(model, tokenizer, settings.facts)
    facts = make(tokenizer, chosen)
    results = averaged(model, facts, settings)
    print(summary(results))
    draw_average(results, settings)
    for i in range(len(chosen)):
        draw_fact(results.isel(batch=i), settings, settings.out / f"fact_{i}.png")
    for i, fact in enumerate(chosen[: settings.single]):
        alone = make(tokenizer, [fact])
        trace = single(model, alone, settings)
        draw_tokens(trace, alone, settings, settings.out / f"fact_{i}_tokens.png")
        record.save(settings.out / f"fact_{i}_tokens", settings, trace)
    seconds = time.perf_counter() - started
    record.save(settings.out, settings, results, facts=results.fact.values.tolist(), seconds=seconds)
    print(
        f"\nwrote {settings.out}/: causal_tracing.png and .html, fact_*.png, results.nc, record.json ({seconds:.0f} s)"
    )
    return results


def known(model: mj.Transformer, tokenizer: mj.Tokenizer, count: int) -> list[Fact]:
    """The first facts to which the model gives the answer."""
    candidates = make(tokenizer, FACTS)
    rank = np.asarray(mj.metrics.rank(candidates.answer)(mj.run(model, candidates.tokens)))
    chosen = np.flatnonzero(rank == 0)[:count]
    if not len(chosen):
        raise SystemExit("the model knows none of the facts")
    print(f"the model gives the answer to {(rank == 0).sum()} of {len(FACTS)} facts; {len(chosen)} of these are traced")
    return [FACTS[i] for i in chosen]


def averaged(model: mj.Transformer, facts: Facts, settings: Settings) -> xr.Dataset:
    """Indirect effects [kind, layer, pos, batch] by role, and each fact's total effect."""
    traces = {}
    for kind, site in {**KINDS, **dict.fromkeys(SEVERED, "resid_post")}.items():
        print(f"restoring: {kind}", flush=True)
        traces[kind] = mj.trace(
            model, facts.tokens, subject=facts.spans, answer=facts.answer, site=site, pos=facts.roles,
            window=settings.window if site != "resid_post" else 1, severed=SEVERED.get(kind), noise=settings.noise,
            draws=settings.draws, seed=settings.seed, memory=settings.memory,
        )  # fmt: skip
    return _joined(traces).assign_coords(fact=("batch", [f"{t}{o}" for t, o in zip(facts.texts, facts.objects)]))


def single(model: mj.Transformer, fact: Facts, settings: Settings) -> xr.Dataset:
    """The same for one fact at every token, nothing severed."""
    traces = {}
    for kind, site in KINDS.items():
        traces[kind] = mj.trace(
            model, fact.tokens, subject=fact.spans, answer=fact.answer, site=site,
            window=settings.window if site != "resid_post" else 1, noise=settings.noise, draws=settings.draws,
            seed=settings.seed, memory=settings.memory,
        )  # fmt: skip
    return _joined(traces)


def _joined(traces: dict[str, xr.Dataset]) -> xr.Dataset:
    kinds = xr.Variable("kind", list(traces))
    indirect = xr.concat([trace.indirect for trace in traces.values()], kinds)
    first = next(iter(traces.values()))
    return (
        first[["clean", "corrupted", "total"]]
        .assign(indirect=indirect)
        .drop_attrs()
        .assign_attrs({k: v for k, v in first.attrs.items() if k not in ("site", "window", "severed")})
    )


def summary(results: xr.Dataset) -> str:
    """Where each kind's average indirect effect is largest, by role."""
    lost = f"clean probability {float(results.clean.mean()):.2f}, corrupted {float(results.corrupted.mean()):.3f}"
    rows = [f"{lost}; average total effect {float(results.total.mean()):.2f}\n"]
    rows += [
        "largest average indirect effect (and its layer) at the",
        f"{'':40}" + "".join(f"{r:>20}" for r in results.pos.values),
    ]
    for kind in results.kind.values:
        average = results.indirect.sel(kind=kind).mean("batch", skipna=False)
        best = average.max("layer"), average.argmax("layer")
        cells = (
            f"{float(best[0].sel(pos=r)):.3f} ({int(results.layer[best[1].sel(pos=r)])})" for r in results.pos.values
        )
        rows.append(f"{kind:40}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(rows)


def draw_average(results: xr.Dataset, settings: Settings) -> None:
    """The average indirect effect over layer and role: all kinds, and the severed ones beside the first."""
    average = results.indirect.mean("batch", skipna=False)
    panel = lambda kind: average.sel(kind=kind, drop=True)
    panels = {
        "restored": {kind: panel(kind) for kind in KINDS},
        "severed": {"hidden state": panel("hidden state"), **{kind.split(", ")[1]: panel(kind) for kind in SEVERED}},
    }
    title = f"{settings.model}: average indirect effect on p(answer), {results.sizes['batch']} facts, {settings.draws} draws of noise"
    for plot, suffix in ((plots.heatmaps, "png"), (plots.heatmap_page, "html")):
        plots.save(
            plot(panels, title=title, label="average indirect effect"), settings.out / f"causal_tracing.{suffix}"
        )


def draw_fact(fact: xr.Dataset, settings: Settings, path: Path) -> None:
    """One fact of those averaged over: all kinds, by role."""
    probabilities = f"p {float(fact.clean):.2f}, corrupted {float(fact.corrupted.mean()):.2f}"
    panels = {"indirect effect": {kind: fact.indirect.sel(kind=kind, drop=True) for kind in fact.kind.values}}
    title = f"{settings.model}: {fact.fact.item()} ({probabilities})"
    plots.save(plots.heatmaps(panels, title=title, label="indirect effect"), path)


def draw_tokens(trace: xr.Dataset, fact: Facts, settings: Settings, path: Path) -> None:
    """One fact, layer by token; the subject's tokens have a star."""
    assert fact.tokens.strings is not None
    words = [s.strip() for s, real in zip(fact.tokens.strings[0], np.asarray(fact.tokens.mask)[0]) if real]
    labels = [f"{word}*" if p in fact.spans[0] else word for p, word in enumerate(words)]
    effects = trace.indirect.mean("batch", skipna=False).assign_coords(pos=labels)
    panels = {"restored": {kind: effects.sel(kind=kind, drop=True) for kind in KINDS}}
    probabilities = f"p {float(trace.clean[0]):.2f}, corrupted {float(trace.corrupted.mean()):.2f}"
    title = f"{settings.model}: {fact.texts[0]}{fact.objects[0]} ({probabilities})"
    plots.save(plots.heatmaps(panels, title=title, label="indirect effect"), path)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
