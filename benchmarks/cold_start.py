"""What a user waits for before the first number: import, load from the cache, first run on SmolLM2.

Each in a fresh process, without any compilation cache: `python -m benchmarks.cold_start`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys

SCRIPT = """
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


def main(repeats: int = 5) -> None:
    """Print the median of each stage."""
    run = lambda: subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    run()  # fills the caches of files
    found = [json.loads(run()) for _ in range(repeats)]
    print(
        f"jax {found[0]['jax']} on {found[0]['device']}, {os.cpu_count()} cores, {platform.machine()}, {repeats} processes"
    )
    for stage in found[0]["seconds"]:
        print(f"{stage:24} {statistics.median(f['seconds'][stage] for f in found):6.2f} s")


if __name__ == "__main__":
    main()
