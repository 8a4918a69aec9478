"""What a user waits for before the first number, in fresh processes without compiled programs: `python -m benchmarks.cold_start`.

On a toy (2 layers, width 16, where compilation is everything) the first call of each function, in CPU seconds: beside `init`, which all need
first, each in a process of its own. With `--model`, the first run on SmolLM2: import, load from the cache, run.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys

import tyro

TOY = """
import json, time
start = time.process_time()
import jax, jax.numpy as jnp, mijax as mj
seconds = {"import": time.process_time() - start}

def timed(name, call):
    start = time.process_time()
    jax.block_until_ready(jax.tree.leaves(call()))
    seconds[name] = time.process_time() - start

config = mj.Config(n_layers=2, d_model=16, n_heads=2, d_vocab=50, n_ctx=32)
key = jax.random.key(0)
timed("init", lambda: globals().update(model=mj.init(config, key)))
clean, other = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 3, 4], [5, 10, 7, 8]]
both = dict(clean=clean, corrupted=other, metric=mj.metrics.logit_diff(3, 4), progress=False)
asked = {
    "run": [lambda: mj.run(model, clean).logits],
    "patch": [lambda: mj.patch(model, site="resid_pre", over=("layer", "pos"), **both).values],
    "patch, a second site": [
        lambda: mj.patch(model, site="resid_pre", over=("layer", "pos"), **both).values,
        lambda: mj.patch(model, site="z", over=("layer", "head"), **both).values,
    ],
    "ablate": [lambda: mj.ablate(model, clean, site="z", over=("layer", "head"), metric=both["metric"], progress=False).values],
    "attribute": [lambda: [v.values for v in mj.attribute(model, sites=("z", "mlp_out"), **both).values()]],
    "generate": [lambda: mj.generate(model, clean, max_new_tokens=4).ids],
}[NAME]
for call in asked:
    timed(NAME, call)  # of several, the last one's stays
print(json.dumps({"jax": jax.__version__, "device": jax.devices()[0].device_kind, "seconds": seconds}))
"""

MODEL = """
import json, time
t = [time.perf_counter()]
import mijax as mj
t.append(time.perf_counter())
model, tokenizer = mj.load("smollm2-135m-instruct")
import jax
jax.block_until_ready([a for a in jax.tree.leaves(model)])
t.append(time.perf_counter())
tokens = tokenizer(["When Mary and John went to the store, John gave a drink to"])
first = mj.run(model, tokens).readout.logits(pos=-1).block_until_ready()
t.append(time.perf_counter())
mj.run(model, tokens).readout.logits(pos=-1).block_until_ready()
t.append(time.perf_counter())
names = ("import", "load from the cache", "first run, compiled", "second run")
print(json.dumps({"jax": jax.__version__, "device": jax.devices()[0].device_kind,
                  "seconds": dict(zip(names, (b - a for a, b in zip(t, t[1:]))))}))
"""

CALLS = ("run", "patch", "patch, a second site", "ablate", "attribute", "generate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """First calls in fresh processes."""

    model: bool = False
    """The first run on SmolLM2 instead of a toy's first calls."""
    repeats: int = 5
    """Processes of each kind, whose median is printed."""


def main(settings: Settings) -> None:
    """Print the median of each stage."""
    scripts = [MODEL] if settings.model else [f"NAME = {name!r}\n{TOY}" for name in CALLS]
    if settings.model:
        _run(MODEL)  # fills the caches of files
    results = [_run(script) for _ in range(settings.repeats) for script in scripts]
    first = results[0]
    unit = "s" if settings.model else "CPU s"
    print(
        f"jax {first['jax']} on {first['device']}, {os.cpu_count()} cores, {platform.machine()}, {settings.repeats} processes"
    )
    stages: dict[str, list[float]] = {}
    for result in results:
        for stage, seconds in result["seconds"].items():
            stages.setdefault(stage, []).append(seconds)
    for stage, seconds in stages.items():
        print(f"{stage:24} {statistics.median(seconds):6.2f} {unit}")


def _run(script: str) -> dict:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
