"""The architectures that every law is tested on: a new one joins by a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj

_small = {"n_layers": 3, "d_model": 12, "n_heads": 4, "d_vocab": 19, "n_ctx": 16, "d_mlp": 10}
ARCHITECTURES = {
    "gpt2": mj.Config(**_small),
    "llama_gqa": mj.Config(
        **_small, n_kv_heads=2, d_head=6, positions=mj.Rotary(), norm="rms", mlp="gated", activation="silu",
        attn_bias="", mlp_bias=False, tied_unembed=False,
    ),
    "gemma": mj.Config(
        **_small, n_kv_heads=2, d_head=6, positions=(mj.Rotary(), None, mj.Rotary(500.0)), window=(3, 0, 3), norm="rms",
        norm_at="both", qk_norm="head", scores_cap=2.0, logits_cap=3.0, embed_scale=1.5, mlp="gated", attn_bias="",
    ),
    "experts": mj.Config(
        **_small, n_kv_heads=2, d_head=6, positions=mj.Rotary(), window=(0, 4, 0), norm="rms", mlp="gated", activation="clamped_swiglu",
        experts=mj.Experts(4, top_k=2, router_bias=True, shared=6, shared_gate=True, d_mlp=7), dense_layers=(1,), sinks=True,
    ),
    "experts_of_softmax": mj.Config(
        **_small, experts=mj.Experts(5, top_k=3, normalise=False, shared=6, shared_gate=True), mlp_bias=False, norm_bias=False
    ),
    "parallel_mqa_partial_rotary": mj.Config(
        **_small, n_kv_heads=1, d_head=6, positions=mj.Rotary(dim=4), parallel=True, shared_norm=True, mlp="gated",
        activation="gelu", tied_unembed=False, unembed_bias=True,
    ),
    "parallel_two_norms": mj.Config(**_small, d_head=4, positions=mj.Rotary(), parallel=True, attn_bias="qk"),
    "attention_only": mj.Config(
        **{**_small, "d_mlp": 0}, mlp="none", norm="none", positions="alibi", attn_bias="qkv", sinks=True
    ),
    "output_norms": mj.Config(
        **_small, n_kv_heads=2, d_head=6, norm="rms", norm_at="output", qk_norm="all", window=4, positions=mj.Rotary(), attn_bias="v"
    ),
    "post_norm": mj.Config(**_small, norm_at="stream", final_norm=False, mlp="gated", window=4),
    "normless": mj.Config(
        **_small, norm="none", positions="none", activation="relu", attn_bias="o", mlp_bias=False,
        experts=mj.Experts(3, top_k=2, shared=5, shared_gate=True),
    ),
    "bidirectional": mj.Config(
        **_small, causal=False, activation="relu", attn_scale=0.3, norm_at="stream", embed_norm=True, final_norm=False
    ),
}  # fmt: skip
COVERING = {
    "bidirectional": "right",
    "llama_gqa": "left",
    "gemma": "right",
    "experts": "none",
    "parallel_mqa_partial_rotary": "none",
    "attention_only": "left",
}
"""Architectures that have every mechanism between them, each with a padding: what the default tier runs the laws on."""

IDS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0], [3, 1, 18, 2, 4, 0]])
LENGTHS = np.array([6, 4, 5])
PADDINGS = ("none", "left", "right")


def cases(*paddings: str) -> pytest.MarkDecorator:
    """All architectures with these paddings, as parameters `name` and `padding`; those that do not cover are slow."""
    by_default = {name: padding if padding in paddings else paddings[0] for name, padding in COVERING.items()}
    marks = lambda name, padding: () if by_default.get(name) == padding else pytest.mark.slow
    return pytest.mark.parametrize(
        ("name", "padding"),
        [pytest.param(name, padding, marks=marks(name, padding)) for name in ARCHITECTURES for padding in paddings],
    )


def batch(padding: str, ids: np.ndarray = IDS) -> mj.Tokens:
    """Three prompts: all of one length, or of several, padded (with a token that is no zero)."""
    if padding == "none":
        return mj.Tokens(ids)
    rows, masks = np.full(ids.shape, 11), np.zeros(ids.shape, bool)
    for row, mask, prompt, n in zip(rows, masks, ids, LENGTHS):
        place = slice(len(row) - n, None) if padding == "left" else slice(n)
        row[place], mask[place] = prompt[:n], True
    return mj.Tokens(rows, masks)


def random_model(config: mj.Config, seed: int = 0, dtype=jnp.float64) -> mj.Transformer:
    """A model of which every parameter matters: no bias is zero, no norm's weight one."""
    empty = jax.eval_shape(lambda key: mj.init(config, key, dtype), jax.random.key(0))
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(empty)
    draw = lambda leaf: jnp.asarray(rng.normal(0.1, 0.5, leaf.shape), leaf.dtype)
    return jax.tree.unflatten(treedef, [draw(leaf) for leaf in leaves])


def real(tokens: mj.Tokens, i: int) -> np.ndarray:
    """The columns of an example's real tokens."""
    return np.flatnonzero(np.asarray(tokens.mask)[i])


def on_real(logits, tokens: mj.Tokens) -> np.ndarray:
    """`[token, ...]`: at the columns of real tokens (logits at padding are NaN)."""
    return np.asarray(logits)[np.asarray(tokens.mask)]


def example(acts, site: str, tokens: mj.Tokens, i: int) -> np.ndarray:
    """One example of a captured site, without its padding: `[layer?, *axes]`."""
    axes, x, columns = mj.SITES[site].axes, np.asarray(acts), real(tokens, i)
    x = np.take(x, i, axis=axes.index("batch"))
    left = [axis for axis in axes if axis != "batch"]
    for axis in ("pos", "query", "key"):
        if axis in left:
            x = np.take(x, columns, axis=left.index(axis))
    return x


def existing(model: mj.Transformer, site: str, x):
    """`[layer, ...]` at the layers that have the site."""
    layers = model.sites[site].layers
    return x if layers is None else x[np.asarray(layers)]


def error(given, reference) -> float:
    """max|difference| / max|reference|."""
    given, reference = np.asarray(given, np.float64), np.asarray(reference, np.float64)
    assert given.shape == reference.shape, (given.shape, reference.shape)
    assert np.isfinite(given).all()
    return float(np.max(np.abs(given - reference)) / np.max(np.abs(reference)))
