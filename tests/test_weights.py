"""On the real SmolLM2-135M-Instruct: what it knows, what patching finds, how it loads."""

import os
import subprocess
import sys

import numpy as np
import pytest

import mijax as mj
from experiments.ioi_prompts import make

pytestmark = pytest.mark.weights


def test_it_knows_what_it_is_known_to_know(smollm2):
    model, tokenizer = smollm2
    capitals = {"France": " Paris", "Germany": " Berlin", "Italy": " Rome"}
    tokens = tokenizer([f"The capital of {country} is" for country in capitals])
    best = np.asarray(mj.run(model, tokens).readout.logits(pos=-1)).argmax(-1)
    assert [tokenizer.decode(i) for i in best] == list(capitals.values())


def test_ioi_baseline(smollm2):
    """Known of this file: it names the indirect object, by a mean logit difference of about 5."""
    model, tokenizer = smollm2
    ioi = make(tokenizer, 16)
    difference = np.asarray(mj.metrics.logit_diff(ioi.io, ioi.subject)(mj.run(model, ioi.clean)))
    assert (difference > 0).all() and 4.5 < difference.mean() < 6
    # the counterfactual flips the answer, and only the token S2 differs
    flipped = np.asarray(mj.metrics.logit_diff(ioi.io, ioi.subject)(mj.run(model, ioi.corrupted)))
    assert flipped.mean() < -4
    changed = np.asarray(ioi.clean.ids != ioi.corrupted.ids)
    assert (changed.sum(1) == 1).all() and (changed.argmax(1) == ioi.roles["S2"][:, 0]).all()


def test_ioi_cells_before_the_only_token_that_differs_are_exactly_zero(smollm2):
    model, tokenizer = smollm2
    ioi = make(tokenizer, 4)
    grid = mj.grid(layer=[0, 17, 29], pos=ioi.roles)
    for direction in ("denoise", "noise"):
        for site in ("resid_pre", "attn_out", "mlp_out"):
            r = mj.patch(model, clean=ioi.clean, corrupted=ioi.corrupted, site=site, over=grid, direction=direction,
                         metric=mj.metrics.logit_diff(ioi.io, ioi.subject), progress=False)  # fmt: skip
            assert ((r - r.base).sel(pos=["IO", "S1", "S1+1"]) == 0).all()
            assert ((r - r.base).sel(pos="S2", layer=0) != 0).all()
        if site == "resid_pre":
            assert np.allclose(mj.normalise(r).sel(layer=0, pos="S2"), 1, atol=1e-4)


LOAD = """
import threading, time
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import mijax as mj, jax.numpy, safetensors, tokenizers
jax.numpy.zeros(1).block_until_ready()  # JAX's own memory is not the loader's
peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); before = anonymous(); thread.start()
model, _ = mj.load("smollm2-135m-instruct")
running = False; thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")  # noqa: PTH110
def test_loading_holds_the_weights_once_and_needs_no_network(smollm2):
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
    weights = 4 * 134_515_008
    # Once: 1.09 with what JAX and the allocator hold besides. (The largest weight, a fifth of all, comes first; later tensors are
    # small beside what is not read yet.)
    assert weights * 0.9 < int(done.stdout) < weights * 1.2
