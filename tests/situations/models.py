"""The small model of most situations, with weights large enough that every token matters."""

import jax
import numpy as np

import mijax as mj

CONFIG = mj.Config(n_layers=3, d_model=8, n_heads=2, d_vocab=11, n_ctx=16)
GQA = mj.Config(
    n_layers=2, d_model=8, n_heads=4, n_kv_heads=2, d_vocab=11, n_ctx=16, positions=mj.Rotary(), norm="rms", mlp="gated",
    activation="silu", attn_bias="", mlp_bias=False,
)  # fmt: skip


def model(config: mj.Config = CONFIG, seed: int = 0) -> mj.Transformer:
    return jax.tree.map(lambda a: 10 * a if a.ndim > 1 else a, mj.init(config, jax.random.key(seed)))


def logits(transformer, prompts, edits=None) -> np.ndarray:
    return np.asarray(mj.run(transformer, prompts, edits).logits)


def padded(side: str) -> mj.Tokens:
    """Prompts of four and two tokens, padded on one side."""
    ids = np.array([[1, 2, 3, 4], [5, 6, 0, 0]] if side == "right" else [[1, 2, 3, 4], [0, 0, 5, 6]])
    return mj.Tokens(ids, ids > 0)
