"""The forward pass once more, for one unpadded prompt, in NumPy float64, one head at a time.

Written from the papers and the sites table, sharing no code with mijax. `hook(site, layer, x)` is called at
every site with the activation (no batch axis) and returns what takes its place.
"""

import math

import numpy as np
from scipy.special import erf


def forward(model, ids, hook=lambda site, layer, x: x):
    """Logits `[pos, vocab]` of the prompt `ids`."""
    c = model.config
    get = lambda x: None if x is None else np.asarray(x, np.float64)
    n = len(ids)
    x = hook("embed", None, get(model.W_E)[ids])
    if c.positions == "learned":
        x = x + hook("pos_embed", None, get(model.W_pos)[:n])
    for layer in range(c.n_layers):
        p = lambda value, layer=layer: None if value is None else get(value)[layer]
        at = lambda site, value, layer=layer: hook(site, layer, value)
        x = at("resid_pre", x)
        attn_out = _attention(c, model.blocks, p, at, x)
        if c.mlp == "none":
            x = at("resid_post", x + attn_out)
            continue
        mid = x + attn_out if c.parallel else at("resid_mid", x + attn_out)
        mlp_out = _mlp(c, model.blocks, p, at, x if c.parallel else mid)
        x = at("resid_post", mid + mlp_out)
    x = hook("final_in", None, x)
    x = _norm(c, get(model.ln_final.weight), get(model.ln_final.bias), x, "ln_final", lambda s, v: hook(s, None, v))
    logits = x @ get(model.W_E if model.W_U is None else model.W_U).T
    return logits if model.b_U is None else logits + get(model.b_U)


def _norm(c, weight, bias, x, name, at):
    if c.norm == "none":
        return x
    if c.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    scale = at(f"{name}.scale", np.sqrt((x**2).mean(-1) + c.norm_eps))
    x = at(f"{name}.normalized", x / scale[:, None]) * weight
    return x if bias is None else x + bias


def _attention(c, blocks, p, at, x):
    a, n = blocks.attn, len(x)
    ln1 = lambda x: _norm(c, p(blocks.ln1.weight), p(blocks.ln1.bias), x, "ln1", at)
    normed = ln1(x)
    projected = {}
    for name, W, b, heads in (
        ("q", a.W_Q, a.b_Q, c.n_heads),
        ("k", a.W_K, a.b_K, c.n_kv_heads),
        ("v", a.W_V, a.b_V, c.n_kv_heads),
    ):
        copies = at(f"{name}_input", np.repeat(x[:, None], heads, axis=1))
        per_head = []
        for h in range(heads):
            own = normed if np.array_equal(copies[:, h], x) else ln1(copies[:, h])
            per_head.append(own @ p(W)[:, h] + (0 if b is None else p(b)[h]))
        projected[name] = at(name, np.stack(per_head, axis=1))
    q, k, v = projected["q"], projected["k"], projected["v"]
    if c.positions == "rotary":
        q, k = at("rot_q", _rotate(c, q)), at("rot_k", _rotate(c, k))
    group = c.n_heads // c.n_kv_heads
    scores = np.stack([q[:, h] @ k[:, h // group].T * c.attn_scale for h in range(c.n_heads)])
    scores = at("attn_scores", scores)
    if c.causal:
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    pattern = at("pattern", e / e.sum(-1, keepdims=True))
    z = at("z", np.stack([pattern[h] @ v[:, h // group] for h in range(c.n_heads)], axis=1))
    result = at("result", np.stack([z[:, h] @ p(a.W_O)[h] for h in range(c.n_heads)], axis=1))
    return at("attn_out", result.sum(1) + (0 if a.b_O is None else p(a.b_O)))


def _rotate(c, x):
    out, half = x.copy(), c.rotary_dim // 2
    for pos in range(len(x)):
        for i in range(half):
            angle = pos * c.rotary_base ** (-2 * i / c.rotary_dim)
            a, b = x[pos, :, i], x[pos, :, i + half]
            out[pos, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[pos, :, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def _mlp(c, blocks, p, at, x):
    m = blocks.mlp
    act = {
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
        "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    }[c.activation]
    bias = lambda b: 0 if b is None else p(b)
    x = _norm(c, p(blocks.ln2.weight), p(blocks.ln2.bias), at("mlp_in", x), "ln2", at)
    linear = x @ p(m.W_in) + bias(m.b_in)
    if c.mlp == "gated":
        post = act(at("pre", x @ p(m.W_gate) + bias(m.b_gate))) * at("pre_linear", linear)
    else:
        post = act(at("pre", linear))
    return at("mlp_out", at("post", post) @ p(m.W_out) + bias(m.b_out))
