"""The named points of the forward pass: the one table of what each means, for every architecture."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from mijax._types import Array, ArrayLike, Int
from mijax.model.config import Config
from mijax.model.numerics import accumulator
from mijax.model.tokens import Tokens, as_tokens

SELECTS = {
    "layer": "layer", "batch": "batch", "pos": "pos", "query": "query", "key": "key",
    "head": "head", "kv_head": "head", "d_model": "unit", "d_head": "unit", "d_mlp": "unit",
}  # fmt: skip
"""The field of `Where` that selects along an axis: `unit` is the last axis of vectors."""

UNITS = tuple(axis for axis, field in SELECTS.items() if field == "unit")
"""The last axes of sites of vectors."""


class Site(NamedTuple):
    """A named point of the forward pass: its axes, exact meaning, and which configs have it."""

    name: str
    axes: tuple[str, ...]
    meaning: str
    exists: Callable[[Config], bool] = lambda config: True

    @property
    def has_layer(self) -> bool:
        """Whether there is one per layer, or one per model."""
        return self.axes[0] == "layer"

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """The axes inside one layer."""
        return self.axes[1:] if self.has_layer else self.axes

    def shape(self, config: Config, tokens: Tokens) -> tuple[int, ...]:
        """The size of every axis."""
        batch, pos = tokens.ids.shape
        sizes = {
            "layer": config.n_layers, "batch": batch, "pos": pos, "query": pos, "key": pos,
            "head": config.n_heads, "kv_head": config.n_kv_heads,
            "d_model": config.d_model, "d_head": config.d_head, "d_mlp": config.d_mlp,
        }  # fmt: skip
        return tuple(sizes[axis] for axis in self.axes)


_STREAM = ("layer", "batch", "pos", "d_model")
_HEADS = ("layer", "batch", "pos", "head", "d_head")
_KV_HEADS = ("layer", "batch", "pos", "kv_head", "d_head")
_SCORES = ("layer", "batch", "head", "query", "key")
_MLP = ("layer", "batch", "pos", "d_mlp")
_has_norm = lambda config: config.norm != "none"
_has_mlp = lambda config: config.mlp != "none"
_has_ln2 = lambda config: _has_norm(config) and _has_mlp(config)
_rotary = lambda config: config.positions == "rotary"

SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("embed", _STREAM[1:], "token embedding"),
        Site("pos_embed", _STREAM[1:], "learned position embedding, added to embed", lambda c: c.positions == "learned"),
        Site("resid_pre", _STREAM, "residual stream that the layer reads"),
        Site("q_input", (*_STREAM[:3], "head", "d_model"), "resid_pre as each head's query alone sees it, before ln1"),
        Site("k_input", (*_STREAM[:3], "kv_head", "d_model"), "resid_pre as each kv head's key alone sees it, before ln1"),
        Site("v_input", (*_STREAM[:3], "kv_head", "d_model"), "resid_pre as each kv head's value alone sees it, before ln1"),
        Site("ln1.scale", _STREAM[:3], "what ln1 divides by: root of variance (LayerNorm) or mean square (RMSNorm) + eps", _has_norm),
        Site("ln1.normalized", _STREAM, "(centred, if LayerNorm) stream over ln1.scale, before weight and bias", _has_norm),
        Site("q", _HEADS, "queries as projected, with bias"),
        Site("k", _KV_HEADS, "keys as projected, with bias"),
        Site("v", _KV_HEADS, "values as projected, with bias"),
        Site("rot_q", _HEADS, "queries after rotary positions", _rotary),
        Site("rot_k", _KV_HEADS, "keys after rotary positions", _rotary),
        Site("attn_scores", _SCORES, "scaled query-key products, before the causal and padding mask"),
        Site("pattern", _SCORES, "softmax of the masked scores over key"),
        Site("z", _HEADS, "pattern-weighted sum of values"),
        Site("result", (*_STREAM[:3], "head", "d_model"), "what each head adds to the stream, without bias"),
        Site("attn_out", _STREAM, "what attention adds to the stream: sum of result over heads, plus bias"),
        Site("resid_mid", _STREAM, "residual stream between attention and MLP", lambda c: _has_mlp(c) and not c.parallel),
        Site("mlp_in", _STREAM, "the stream as the MLP alone sees it, before ln2", _has_mlp),
        Site("ln2.scale", _STREAM[:3], "as ln1.scale, for the norm before the MLP", _has_ln2),
        Site("ln2.normalized", _STREAM, "as ln1.normalized, for the norm before the MLP", _has_ln2),
        Site("pre", _MLP, "neurons before the activation function (of the gate, where gated)", _has_mlp),
        Site("pre_linear", _MLP, "the linear branch that a gated MLP multiplies in", lambda c: c.mlp == "gated"),
        Site("post", _MLP, "neurons: activation(pre), times pre_linear where gated", _has_mlp),
        Site("mlp_out", _STREAM, "what the MLP adds to the stream, with bias", _has_mlp),
        Site("resid_post", _STREAM, "residual stream that the layer leaves"),
        Site("ln_final.scale", _STREAM[1:3], "as ln1.scale, for the norm before the unembedding", _has_norm),
        Site("ln_final.normalized", _STREAM[1:], "as ln1.normalized, for the norm before the unembedding", _has_norm),
    )
}  # fmt: skip

PER_HEAD_COPIES = ("q_input", "k_input", "v_input", "result")
"""Sites with d_model numbers for every head: only the heads that are asked for are ever computed."""


@runtime_checkable
class Tap(Protocol):
    """What the forward pass calls at every site: it edits the activation and may keep it."""

    def __call__(self, site: str, x: Array, heads: Int[Array, " k"] | None = None) -> Array:
        """Return the edited `x`; its head axis holds `heads` only, where they are given."""
        ...

    def edited(self, site: str, x: Array) -> Array:
        """Return the edited `x` without keeping it."""
        ...

    def heads(self, site: str) -> Int[Array, " k"] | None:
        """The heads of a per-head copy that must be computed; `None` where it is not touched."""
        ...

    def at(self, frame: Any) -> "Tap":
        """The same for another frame."""
        ...


def site_of(name: str, config: Config) -> Site:
    """Look a site up; `ValueError` where it does not exist or this architecture lacks it."""
    if name not in SITES:
        import difflib

        short = str(name).rpartition("hook_")[2]  # TransformerLens's blocks.0.attn.hook_z
        close = [short] if short in SITES else difflib.get_close_matches(str(name), SITES, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(f"unknown site {name!r}{hint} The sites are {', '.join(SITES)}")
    if not SITES[name].exists(config):
        has = ", ".join(n for n, s in SITES.items() if s.exists(config))
        raise ValueError(f"this model has no site {name!r} ({SITES[name].meaning}); it has {has}")
    return SITES[name]


class SiteInfo(NamedTuple):
    """One row of `sites`: what capturing all of a site would give."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    bytes: int
    meaning: str


class SiteTable(dict[str, SiteInfo]):
    """Rows by site name, shown as a table."""

    def __repr__(self):
        rows = [("site", "axes", "shape", "dtype", "MiB", "meaning")]
        rows += [
            (name, " ".join(i.axes), " ".join(map(str, i.shape)), str(i.dtype), f"{i.bytes / 2**20:.3g}", i.meaning)
            for name, i in self.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def sites(model: Any, tokens: Tokens | ArrayLike) -> SiteTable:
    """Every site that `model` has, with the axes, shape, dtype and bytes that capturing it would take.

    Nothing is run. The result is a mapping: `capture=tuple(mj.sites(model, tokens))` captures all.

    >>> import jax, mijax as mj
    >>> model = mj.init(mj.Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16), jax.random.key(0))
    >>> mj.sites(model, [[1, 2, 3]])["z"][:4]
    (('layer', 'batch', 'pos', 'head', 'd_head'), (2, 1, 3, 2, 4), dtype('float32'), 192)
    """
    tokens, dtype = as_tokens(tokens), accumulator(model.W_E.dtype)
    table = SiteTable()
    for site in SITES.values():
        if site.exists(model.config):
            shape = site.shape(model.config, tokens)
            size = dtype.itemsize
            for n in shape:
                size *= n
            table[site.name] = SiteInfo(site.axes, shape, jnp.dtype(dtype), size, site.meaning)
    return table
