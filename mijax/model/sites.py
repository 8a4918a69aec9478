"""The named points of the forward pass: the one table of what each means, for every architecture."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mijax._types import ArrayLike
from mijax.model.config import Config
from mijax.model.tokens import Tokens, as_tokens

SELECTS = {
    "layer": "layer", "batch": "batch", "pos": "pos", "query": "query", "key": "key",
    "head": "head", "kv_head": "head", "d_model": "unit", "d_head": "unit", "d_mlp": "unit",
}  # fmt: skip
"""The field of `Where` that selects along an axis: `unit` is the last axis of vectors."""


def field_of(axis: str) -> str:
    """The field of `Where` that selects along an axis; any other axis than those known is one of a vector's units."""
    return SELECTS.get(axis, "unit")


Part = Literal["embedding", "attention", "mlp", "final"]
"""Where in the forward pass a site stands: before the layers, in the first or second half of one, or after them."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A named point of the forward pass: its axes, its exact meaning, and every other fact that a method needs of it.

    `exists` says which configs have it. In a model's table (`model.sites`), `fixed` are the sizes of the axes that do not
    depend on the prompts, and `half` is 1 where the site comes after attention, in the second half of its layer.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    part: Part
    exists: Callable[[Config], bool] = lambda config: True
    per_head: bool = (
        False  # a copy of d_model numbers for every head: only those of heads that are asked for are computed
    )
    product: bool = False  # computed by a product with parameters
    added: bool = False  # added to the residual stream as it is
    is_stream: bool = False  # the residual stream itself
    read_as: str | None = None  # of what attention reads: the site of it that attention takes products of
    zero_at_padding: bool = False  # whatever stands at the sites before
    masked: bool = False  # what a query may not see has no effect
    scale: float = 1.0  # by which the products that it is made of are multiplied
    layers: tuple[int, ...] | None = None  # at which it is there, where it stands in layers and has no axis of them
    fixed: tuple[tuple[str, int], ...] = ()
    half: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of axes that do not depend on the prompts."""
        return dict(self.fixed)

    @property
    def has_layer(self) -> bool:
        """Whether there is one per layer, or one per model."""
        return self.axes[0] == "layer"

    @property
    def is_inside(self) -> bool:
        """Whether it stands in the layers."""
        return self.part in ("attention", "mlp")

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """The axes inside one layer."""
        return self.axes[1:] if self.has_layer else self.axes

    @property
    def position_axes(self) -> tuple[str, ...]:
        """Those of its axes along which tokens stand."""
        return tuple(axis for axis in self.axes if axis in ("pos", "query", "key"))

    @property
    def seen_from(self) -> tuple[str, ...]:
        """The axes along which a change acts from its place on only, in a causal model."""
        return ("query", "key") if self.masked else tuple(axis for axis in ("pos", "query") if axis in self.axes)

    @property
    def head_axis(self) -> str | None:
        """Its axis of heads, or of key/value heads."""
        return next((axis for axis in self.axes if axis in ("head", "kv_head")), None)

    @property
    def has_vectors(self) -> bool:
        """Whether its last axis is that of vectors' units."""
        return field_of(self.axes[-1]) == "unit"

    def shape(self, batch: int, pos: int, keys: int | None = None) -> tuple[int, ...]:
        """The size of every axis, for so many prompts and tokens (which attend to so many `keys`, if not to themselves)."""
        tokens = {"batch": batch, "pos": pos, "query": pos, "key": pos if keys is None else keys}
        sizes = {**self.sizes, **tokens}
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
_gated = lambda config: config.mlp == "gated"

SITES: Mapping[str, Site] = {
    site.name: site
    for site in (
        Site("embed", _STREAM[1:], "token embedding", "embedding", added=True),
        Site("pos_embed", _STREAM[1:], "learned position embedding, added to embed", "embedding", lambda c: c.positions == "learned", added=True),
        Site("resid_pre", _STREAM, "residual stream that the layer reads", "attention", is_stream=True),
        Site("q_input", (*_STREAM[:3], "head", "d_model"), "resid_pre as each head's query alone sees it, before ln1", "attention", per_head=True),
        Site("k_input", (*_STREAM[:3], "kv_head", "d_model"), "resid_pre as each kv head's key alone sees it, before ln1", "attention", per_head=True),
        Site("v_input", (*_STREAM[:3], "kv_head", "d_model"), "resid_pre as each kv head's value alone sees it, before ln1", "attention", per_head=True),
        Site("ln1.scale", _STREAM[:3], "what ln1 divides by: root of variance (LayerNorm) or mean square (RMSNorm) + eps", "attention", _has_norm),
        Site("ln1.normalized", _STREAM, "(centred, if LayerNorm) stream over ln1.scale, before weight and bias", "attention", _has_norm),
        Site("q", _HEADS, "queries as projected, with bias", "attention", product=True, read_as="rot_q"),
        Site("k", _KV_HEADS, "keys as projected, with bias", "attention", product=True, read_as="rot_k"),
        Site("v", _KV_HEADS, "values as projected, with bias", "attention", product=True, read_as="v"),
        Site("rot_q", _HEADS, "queries after rotary positions", "attention", _rotary),
        Site("rot_k", _KV_HEADS, "keys after rotary positions", "attention", _rotary),
        Site("attn_scores", _SCORES, "scaled query-key products, before the causal and padding mask", "attention", masked=True),
        Site("pattern", _SCORES, "softmax of the masked scores over key", "attention", zero_at_padding=True),
        Site("z", _HEADS, "pattern-weighted sum of values", "attention", zero_at_padding=True),
        Site("result", (*_STREAM[:3], "head", "d_model"), "what each head adds to the stream, without bias", "attention", per_head=True, zero_at_padding=True),
        Site("attn_out", _STREAM, "what attention adds to the stream: sum of result over heads, plus bias", "attention", product=True, added=True),
        Site("resid_mid", _STREAM, "residual stream between attention and MLP", "mlp", lambda c: _has_mlp(c) and not c.parallel, is_stream=True),
        Site("mlp_in", _STREAM, "the stream as the MLP alone sees it, before ln2", "mlp", _has_mlp),
        Site("ln2.scale", _STREAM[:3], "as ln1.scale, for the norm before the MLP", "mlp", _has_ln2),
        Site("ln2.normalized", _STREAM, "as ln1.normalized, for the norm before the MLP", "mlp", _has_ln2),
        Site("pre", _MLP, "neurons before the activation function (of the gate, where gated)", "mlp", _has_mlp, product=True),
        Site("pre_linear", _MLP, "the linear branch that a gated MLP multiplies in", "mlp", _gated, product=True),
        Site("post", _MLP, "neurons: activation(pre), times pre_linear where gated", "mlp", _has_mlp),
        Site("mlp_out", _STREAM, "what the MLP adds to the stream, with bias", "mlp", _has_mlp, product=True, added=True),
        Site("resid_post", _STREAM, "residual stream that the layer leaves", "mlp", is_stream=True),
        Site("final_in", _STREAM[1:], "the stream as the last norm, and the unembedding behind it, see it", "final"),
        Site("ln_final.scale", _STREAM[1:3], "as ln1.scale, for the norm before the unembedding", "final", _has_norm),
        Site("ln_final.normalized", _STREAM[1:], "as ln1.normalized, for the norm before the unembedding", "final", _has_norm),
    )
}  # fmt: skip
"""The sites of all transformers; `model.sites` are those of one, with their sizes."""


@functools.lru_cache(maxsize=256)
def transformer_sites(config: Config) -> Mapping[str, Site]:
    """The sites of the transformers of one config."""
    c = config
    fixed = (
        ("layer", c.n_layers), ("head", c.n_heads), ("kv_head", c.n_kv_heads),
        ("d_model", c.d_model), ("d_head", c.d_head), ("d_mlp", c.d_mlp),
    )  # fmt: skip
    there = {name: site for name, site in SITES.items() if site.exists(config)}
    return MappingProxyType(
        {
            name: dataclasses.replace(
                site,
                fixed=fixed,
                scale=c.attn_scale if name == "attn_scores" else 1.0,
                half=int(site.part == "mlp" and not c.parallel),  # in a parallel layer the MLP waits for nothing
                read_as=name if site.read_as not in there and site.read_as else site.read_as,
            )
            for name, site in there.items()
        }
    )


def cached_sites(sites: Mapping[str, Site]) -> tuple[str, str]:
    """The sites of the keys and values as attention reads them: what is kept of tokens that are not computed again."""
    k, v = sites["k"].read_as, sites["v"].read_as
    assert k is not None and v is not None
    return k, v


def site_of(name: str, sites: Mapping[str, Site]) -> Site:
    """Look a site up in a model's table; `ValueError` where it does not exist or this architecture lacks it."""
    if name in sites:
        return sites[name]
    if name in SITES:
        raise ValueError(f"this model has no site {name!r} ({SITES[name].meaning}); it has {', '.join(sites)}")
    import difflib

    known = {**SITES, **sites}
    short = str(name).rpartition("hook_")[2]  # TransformerLens's blocks.0.attn.hook_z
    close = [short] if short in known else difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    raise ValueError(f"unknown site {name!r}{hint} The sites are {', '.join(known)}")


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
    tokens, table = as_tokens(tokens), SiteTable()
    for site in model.sites.values():
        shape = site.shape(*tokens.ids.shape)
        table[site.name] = SiteInfo(
            site.axes, shape, model.dtype, math.prod(shape) * model.dtype.itemsize, site.meaning
        )
    return table
