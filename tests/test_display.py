"""What a notebook shows of mijax's values."""

import re

import jax
import numpy as np
import treescope

import mijax as mj

CONFIG = mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16)


def test_models_edits_and_results_unfold_without_a_network():
    model = mj.init(CONFIG, jax.random.key(0))
    edit = mj.Add(np.ones(8, np.float32), mj.Where(layer=0))
    out = mj.run(model, [[1, 2, 3]], {"resid_mid": edit}, capture=("z",))
    shown = {"Transformer": model, "Add": edit, "AtP": mj.AtP(probes=4), "LogitDiff": mj.metrics.logit_diff(1, 2)}
    for name, value in shown.items():
        page = value._repr_html_()
        assert page.startswith("<script>") and not re.search(r"src=.?https?:|href=.?https?:", page)
        assert treescope.render_to_text(value).startswith(f"{name}(")
    assert out._repr_html_().startswith("<script>")
    assert "'z': <jax.Array float32(1, 1, 3, 2, 4)" in treescope.render_to_text(out._asdict())
