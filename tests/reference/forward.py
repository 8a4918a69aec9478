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
    norm_of = lambda p, x, name: _norm(c, get(p.weight), get(p.bias), x, name, lambda s, v: hook(s, None, v))
    x = get(model.W_E)[ids] * c.embed_scale
    x = hook("embed", None, norm_of(model.ln_embed, x, "ln_embed") if c.embed_norm else x)
    if c.positions == "learned":
        x = x + hook("pos_embed", None, get(model.W_pos)[:n])
    for layer in range(c.n_layers):
        p = lambda value, layer=layer: None if value is None else get(value)[layer]
        at = lambda site, value, layer=layer: hook(site, layer, value)
        x = at("resid_pre", x)
        blocks = model.blocks
        mid = _added(c, p, at, x, _attention(c, blocks, p, at, x, layer), blocks.ln1_post, "ln1_post", "attn_out")
        if c.mlp == "none":
            x = at("resid_post", mid)
            continue
        mid = mid if c.parallel else at("resid_mid", mid)
        of_kind = [i for i in range(c.n_layers) if (i in c.dense_layers) == (layer in c.dense_layers)]
        read, place = _mlp_input(c, blocks, p, at, x if c.parallel else mid), of_kind.index(layer)
        kind = _mlp if c.experts is None or layer in c.dense_layers else _experts
        mlp_out = kind(c, blocks, lambda value, place=place: None if value is None else get(value)[place], at, read)
        x = at("resid_post", _added(c, p, at, mid, mlp_out, blocks.ln2_post, "ln2_post", "mlp_out"))
    x = hook("final_in", None, x)
    x = norm_of(model.ln_final, x, "ln_final") if c.final_norm else x
    logits = x @ get(model.W_E if model.W_U is None else model.W_U).T
    logits = logits if model.b_U is None else logits + get(model.b_U)
    return c.logits_cap * np.tanh(logits / c.logits_cap) if c.logits_cap else logits


def _added(c, p, at, x, out, norm, name, site):
    """The stream after attention's or the MLP's output is added."""
    apply = lambda x: _norm(c, p(norm.weight), p(norm.bias), x, name, at)
    if c.norm == "none" or c.norm_at == "input":
        return x + at(site, out)
    if c.norm_at == "stream":
        return apply(x + at(site, out))
    return x + at(site, apply(out))


def _norm(c, weight, bias, x, name, at):
    if c.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    scale = at(f"{name}.scale", np.sqrt((x**2).mean(-1) + c.norm_eps))
    x = at(f"{name}.normalized", x / scale[:, None]) * weight
    return x if bias is None else x + bias


def _attention(c, blocks, p, at, x, layer):
    a, n = blocks.attn, len(x)
    has_ln1 = c.norm != "none" and c.norm_at in ("input", "both")
    ln1 = lambda x: _norm(c, p(blocks.ln1.weight), p(blocks.ln1.bias), x, "ln1", at) if has_ln1 else x
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
            head_input = normed if np.array_equal(copies[:, h], x) else ln1(copies[:, h])
            per_head.append(head_input @ p(W)[:, h] + (0 if b is None else p(b)[h]))
        projected[name] = at(name, np.stack(per_head, axis=1))
    q, k, v = projected["q"], projected["k"], projected["v"]
    if c.qk_norm != "none":
        axes = -1 if c.qk_norm == "head" else (-2, -1)
        rms = lambda x: x / np.sqrt((x**2).mean(axes, keepdims=True) + c.norm_eps)
        q, k = rms(q) * p(a.q_norm), rms(k) * p(a.k_norm)
    rotary = c.positions[layer] if isinstance(c.positions, tuple) else c.positions
    rotary = None if isinstance(rotary, str) else rotary
    if rotary is not None:
        q, k = _rotate(rotary, q), _rotate(rotary, k)
    if c.qk_norm != "none" or not isinstance(c.positions, str):
        q, k = at("rot_q", q), at("rot_k", k)
    group = c.n_heads // c.n_kv_heads
    scores = np.stack([q[:, h] @ k[:, h // group].T * c.attn_scale for h in range(c.n_heads)])
    if c.scores_cap:
        scores = c.scores_cap * np.tanh(scores / c.scores_cap)
    distance = np.arange(n)[:, None] - np.arange(n)
    if c.positions == "alibi":  # 2^(-8/n), 2^(-16/n), ... for n heads, a power of two
        scores = scores - 2.0 ** (-8 / c.n_heads * np.arange(1, c.n_heads + 1))[:, None, None] * distance
    scores = at("attn_scores", scores)
    window = c.window[layer] if isinstance(c.window, tuple) else c.window
    seen = (distance >= 0 if c.causal else distance == distance) & (distance < (window or n))
    scores = np.where(seen, scores, -np.inf)
    sinks = p(a.sinks)[:, None, None] if c.sinks else np.full((c.n_heads, 1, 1), -np.inf)
    largest = np.maximum(scores.max(-1, keepdims=True), sinks)
    e = np.exp(scores - largest)
    total = e.sum(-1, keepdims=True) + np.exp(sinks - largest)
    pattern = at("pattern", e / total)
    z = at("z", np.stack([pattern[h] @ v[:, h // group] for h in range(c.n_heads)], axis=1))
    result = at("result", np.stack([z[:, h] @ p(a.W_O)[h] for h in range(c.n_heads)], axis=1))
    return result.sum(1) + (0 if a.b_O is None else p(a.b_O))


def _rotate(rotary, x):
    out, half = x.copy(), rotary.dim // 2
    for pos in range(len(x)):
        for i in range(half):
            angle = pos * rotary.base ** (-2 * i / rotary.dim)
            a, b = x[pos, :, i], x[pos, :, i + half]
            out[pos, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[pos, :, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def _mlp(c, blocks, p, at, x):
    return _mlp_output(c, {name: p(getattr(blocks.mlp, name)) for name in WEIGHTS}, x, at)


def _experts(c, blocks, p, at, x):
    """All experts for every token, and the sum of those that it uses."""
    m = blocks.experts
    logits = at("router_logits", x @ p(m.W_router) + (0 if m.b_router is None else p(m.b_router)))
    weights = np.zeros_like(logits)
    for token, row in enumerate(logits):
        best = np.argsort(-row, kind="stable")[: c.experts.top_k]
        e = np.exp(row - row.max())
        weights[token, best] = e[best] / (e[best] if c.experts.normalise else e).sum()
    weights = at("expert_weights", weights)
    per_expert = lambda i: {name: None if p(getattr(m, name)) is None else p(getattr(m, name))[i] for name in WEIGHTS}
    out = np.stack([_mlp_output(c, per_expert(i), x, lambda _, v: v) for i in range(c.experts.n)], axis=1)
    out = (weights[..., None] * at("expert_out", out)).sum(1)
    if m.shared is None:
        return out
    of_shared = lambda site, value: at(f"shared_{site}", value)
    shared = _mlp_output(c, {name: p(getattr(m.shared, name)) for name in WEIGHTS}, x, of_shared)
    gate = 1 if m.W_shared_gate is None else 1 / (1 + np.exp(-(x @ p(m.W_shared_gate))))[:, None]
    return out + at("shared_out", gate * shared)


WEIGHTS = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")


def _mlp_input(c, blocks, p, at, x):
    x, norm = at("mlp_in", x), blocks.ln1 if c.shared_norm else blocks.ln2
    if c.norm != "none" and c.norm_at in ("input", "both"):
        return _norm(c, p(norm.weight), p(norm.bias), x, "ln2", at)
    return x


def _mlp_output(c, m, x, at):
    act = {
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
        "gelu_new": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "clamped_swiglu": lambda x: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
    }[c.activation]
    bias = lambda name: 0 if m[name] is None else m[name]
    linear = x @ m["W_in"] + bias("b_in")
    if c.mlp == "gated":
        gate, linear = act(at("pre", x @ m["W_gate"] + bias("b_gate"))), at("pre_linear", linear)
        post = gate * (np.clip(linear, -7, 7) + 1 if c.activation == "clamped_swiglu" else linear)
    else:
        post = act(at("pre", linear))
    return at("post", post) @ m["W_out"] + bias("b_out")
