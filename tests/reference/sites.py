"""Which activations of which family are verified, and how far they are off: the table of docs/verification.md.

`python -m tests.reference.sites` (extra `parity`) compares every family, in all variants of `families.py`, and writes the table.
"""

import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mijax as mj
from tests.architectures import existing
from tests.reference.captures import Recorded
from tests.reference.families import CASES, make
from tests.reference.tiny_models import inputs

PAGE = Path(__file__).parents[2] / "docs" / "verification.md"
CAPTURED, IDENTITY = "", "="
"""How a site is known: the tensor that transformers computes, or an equation of tensors of which that is true."""


def compared(family, theirs, ours) -> dict[str, tuple[str, float]]:
    """How each site of `ours` is known, and the largest difference over the largest value, on prompts padded on the left."""
    ids, mask = inputs("left")
    recorded = Recorded(family, theirs, ours, ids, mask)
    acts = mj.run(ours, mj.Tokens(ids, mask), capture=tuple(ours.sites)).acts
    acts = {name: np.asarray(existing(ours, name, x), np.float64) for name, x in acts.items()}
    seen = {name: _seen(ours.sites[name].axes, mask, acts, x.shape) for name, x in acts.items()}
    rows = {}
    for name, given in acts.items():
        reference = recorded.site(name)
        kind = CAPTURED if reference is not None else IDENTITY
        if reference is None:
            given, reference = _identity(name, acts, ours, recorded)
            where = np.broadcast_to(mask.astype(bool)[None, ..., None], given.shape)
        elif (
            name == "attn_scores" and ours.config.positions == "alibi"
        ):  # of which transformers adds a number to each query's
            relative = lambda x: x - np.diagonal(x, axis1=-2, axis2=-1)[..., None]
            given, reference, where = relative(given), relative(reference), seen[name]
        else:
            where = seen[name]
        assert given.shape == reference.shape, (name, given.shape, reference.shape)
        rows[name] = kind, _error(given[where], reference[where])
    for name, (given, reference) in _laws(acts, ours).items():
        where = np.broadcast_to(mask.astype(bool).reshape(1, *mask.shape, *(1,) * (given.ndim - 3)), given.shape)
        assert _error(given[where], reference[where]) < 1e-4, name
    return rows


def _error(given, reference):
    assert np.isfinite(given).all() and np.isfinite(reference).all()
    return float(np.max(np.abs(given - reference)) / max(np.max(np.abs(reference)), 1e-30))


def _seen(axes, mask, acts, shape):
    """Where an activation has a meaning: at tokens, and at keys that a query sees."""
    where = np.broadcast_to(True, shape)
    for axis in ("pos", "query", "key"):
        if axis in axes:
            sizes = {"batch": mask.shape[0], axis: mask.shape[1]}
            where = where & mask.astype(bool).reshape([sizes.get(a, 1) for a in axes])
    return where & (acts["pattern"] > 0) if "key" in axes else where


def _identity(name, acts, ours, recorded):
    """A sum over what transformers has no tensor of, and that sum as it computes it."""
    attn, layers = ours.blocks.attn, range(ours.n_layers)
    if name == "result":
        bias = 0.0 if attn.b_O is None else np.asarray(attn.b_O)[:, None, None]
        written = [recorded.outputs[recorded.module("blocks.attn.W_O", layer)] for layer in layers]
        return acts["result"].sum(-2) + bias, np.stack(written).reshape(acts["attn_out"].shape)
    assert name == "expert_out"
    blocks = [recorded.module("blocks.experts.W_router", i).rpartition(".")[0] for i in ours.config.expert_layers]
    written = [recorded.outputs[block] for block in blocks]
    written = np.stack([w[0] if isinstance(w, tuple) else w for w in written])
    written = written.reshape(-1, *acts["mlp_out"].shape[1:])
    return np.einsum("lbpe,lbped->lbpd", acts["expert_weights"], acts["expert_out"]) + acts.get(
        "shared_out", 0.0
    ), written


def _laws(acts, ours):
    """Equations that hold between our own activations: by name, both sides `[layer, batch, pos, ...]`."""
    c, blocks = ours.config, ours.blocks
    v = np.repeat(acts["v"], c.n_heads // c.n_kv_heads, axis=-2)
    laws = {"z is the pattern times v": (acts["z"], np.einsum("lbhqk,lbkhe->lbqhe", acts["pattern"], v))}
    total = np.moveaxis(acts["pattern"].sum(-1), 2, 3)
    share = np.zeros_like(total)
    if c.sinks:
        scores = np.where(acts["pattern"] > 0, acts["attn_scores"], -np.inf)
        sink = np.asarray(blocks.attn.sinks, np.float64)[:, None, :, None]
        share = np.moveaxis(1 / (1 + np.exp(scores - sink[..., None]).sum(-1)), 2, 3)
    laws["a pattern sums to one, less the sink's share"] = (total, 1 - share)
    stream = lambda x, name: x if c.norm_at != "stream" else _normed(x, c, getattr(blocks, name))
    middle = stream(acts["resid_pre"] + acts["attn_out"], "ln1_post")
    if "resid_mid" in acts:
        laws["what attention writes adds up"] = (acts["resid_mid"], middle)
    laws["what the layer writes adds up"] = (acts["resid_post"], stream(middle + acts["mlp_out"], "ln2_post"))
    if c.has_mlp and c.norm_at in ("input", "stream"):
        bias = 0.0 if blocks.mlp.b_out is None else np.asarray(blocks.mlp.b_out)[:, None, None]
        down = np.einsum("lbpm,lmd->lbpd", acts["post"], np.asarray(blocks.mlp.W_out, np.float64)) + bias
        laws["the MLP writes the neurons through W_out"] = (acts["mlp_out"][list(c.mlp_layers)], down)
    return laws


def _normed(x, c, norm):
    x = x - x.mean(-1, keepdims=True) if c.norm == "layer" else x
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * np.asarray(norm.weight)[:, None, None]
    return x if norm.bias is None else x + np.asarray(norm.bias)[:, None, None]


def moved(ours) -> dict[str, float]:
    """By how much adding noise to a site, at all its layers, moves the logits: the largest change over the largest logit."""
    ids, names = jnp.asarray(inputs("none")[0]), tuple(ours.sites)
    shape = {name: ours.sites[name].shape(*ids.shape) for name in names}
    noise = {name: np.abs(np.random.default_rng(1).normal(size=shape[name])).astype(np.float32) for name in names}

    def logits(amounts):
        edits = {name: mj.Add(amounts[i] * noise[name]) for i, name in enumerate(names)}
        return mj.run(ours, ids, edits).logits

    changed = jax.jit(jax.vmap(logits))(jnp.concatenate([jnp.zeros((1, len(names))), 0.5 * jnp.eye(len(names))]))
    changed = np.asarray(changed)
    assert np.isfinite(changed).all()
    return {name: _error(x, changed[0]) for name, x in zip(names, changed[1:])}


def read() -> dict[str, dict[str, str]]:
    """The table of the page: the cells by family and site."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    head, *rest = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    return {
        family: {re.sub("`", "", row[0]): row[i] for row in rest if row[0].startswith("`") and row[i] != "."}
        for i, family in enumerate(head)
        if i
    }


def write(rows: dict[str, dict[str, tuple[str, float]]]) -> None:
    """Write the page, given the worst row of each family."""
    from mijax.model.sites import SITES

    text = PAGE.read_text()
    start = text.index("| site |") if "| site |" in text else len(text)
    head = "| site | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows) + "\n"
    cell = lambda row: "." if row is None else f"{row[0]}{row[1]:.0e}".replace("e-0", "e-")
    lines = [f"| `{site}` | " + " | ".join(cell(rows[family].get(site)) for family in rows) + " |\n" for site in SITES]
    PAGE.write_text(text[:start] + head + "".join(lines))


def main() -> None:
    """Compare all families, and write the page."""
    worst: dict[str, dict[str, tuple[str, float]]] = {}
    for family, variant in CASES:
        theirs = make(family, variant)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours, _ = mj.load(folder)
        rows = worst.setdefault(family, {})
        for site, (kind, error) in compared(family, theirs, ours).items():
            rows[site] = kind, max(error, rows.get(site, (kind, 0.0))[1])
        print(family, variant, max(error for _, error in rows.values()), flush=True)
    write(worst)


if __name__ == "__main__":
    main()
