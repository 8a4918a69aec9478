"""What a notebook shows of mijax's values."""

import re
import shutil

import jax
import numpy as np
import treescope

import mijax as mj
from tests.reference.tiny_models import STORED

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


def test_a_loaded_model_tells_what_was_read_and_what_was_not(tmp_path):
    import safetensors.numpy

    folder = tmp_path / "gpt2"
    shutil.copytree(STORED / "gpt2", folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 24, 24), np.float32)) for i in range(3)}
    safetensors.numpy.save_file(tensors | masks, folder / "model.safetensors")
    text = repr(mj.load(folder)[0])
    assert text.startswith("Transformer(gpt2: 23,760 parameters of float32, n_layers=3, ")
    assert "; loaded as gpt2, without effect: keys " in text and "transformers_version" in text
    assert "add_cross_attention" not in text  # has an effect where it is true, and is refused there
    assert text.endswith("; 3 buffers (h.0.attn.bias, h.1.attn.bias, ...))")
    again = mj.load(STORED / "gpt2")[0]
    assert again.config == mj.load(folder)[0].config  # what it was loaded from is no part of the architecture
