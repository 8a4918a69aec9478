"""The named points of the forward pass: one table with the exact meaning of each, for every architecture."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mijax._types import ArrayLike
from mijax.model.config import Config
from mijax.model.scores import ScoreRule
from mijax.model.tokens import Tokens, as_tokens

SELECTS = {
    "layer": "layer", "batch": "batch", "pos": "pos", "query": "query", "key": "key",
    "head": "head", "kv_head": "head", "expert": "expert", "d_model": "unit", "d_head": "unit", "d_mlp": "unit", "d_shared": "unit",
}  # fmt: skip
"""The field of `Where` that selects along an axis: `unit` is the last axis of vectors."""


def field_of(axis: str) -> str:
    """The field of `Where` that selects along an axis.

    Args:
        axis: the name of an axis of a site.

    Returns:
        The name of the field; `"unit"` for an axis that is not in `SELECTS`, such as one of a user's model.

    >>> field_of("kv_head"), field_of("d_mlp")
    ('head', 'unit')
    """
    return SELECTS.get(axis, "unit")


Part = Literal["embedding", "attention", "mlp", "final"]
"""Where in the forward pass a site is: before the layers, in the first or second half of a layer, or after them."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A named point of the forward pass: its axes, its exact meaning, and all other facts that methods need.

    Args:
        name: the name of the site.
        axes: the names of its axes.
        meaning: what the activation is.
        part: where in the forward pass it is.
        exists: which configs have it.
        per_head: whether it is a copy of `d_model` numbers for every head, computed only for the heads that a tap asks
            for.
        product: whether it is computed by a product with parameters.
        added: whether it is added to the residual stream unchanged.
        is_stream: whether it is the residual stream itself.
        read_as: for queries, keys and values, the site at which attention reads them.
        zero_at_padding: whether it is zero at padding, whatever the sites before it hold there.
        masked: whether entries of keys that a query may not see have no effect.
        rule: how attention scores are computed from queries and keys.
        layers: the layers at which it exists, where it does not at all: a site inside the layers without a layer axis,
            or one of layers of one kind. Captured at all layers, the others are NaN.
        fixed: in a model's table (`model.sites`), the sizes of the axes that do not depend on the prompts.
        half: in a model's table, 1 where the site is in the second half of its layer, after attention.

    >>> SITES["pattern"].axes
    ('layer', 'batch', 'head', 'query', 'key')
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    part: Part
    exists: Callable[[Config], bool] = lambda config: True
    per_head: bool = False
    product: bool = False
    added: bool = False
    is_stream: bool = False
    read_as: str | None = None
    zero_at_padding: bool = False
    masked: bool = False
    rule: ScoreRule | None = None
    layers: tuple[int, ...] | None = None
    fixed: tuple[tuple[str, int], ...] = ()
    half: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of axes that do not depend on the prompts."""
        return dict(self.fixed)

    @property
    def has_layer(self) -> bool:
        """Whether the site has an axis of layers, the first."""
        return self.axes[0] == "layer"

    @property
    def is_inside(self) -> bool:
        """Whether the site is inside the layers."""
        return self.part in ("attention", "mlp")

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """The axes inside one layer."""
        return self.axes[1:] if self.has_layer else self.axes

    @property
    def position_axes(self) -> tuple[str, ...]:
        """The axes that index tokens."""
        return tuple(axis for axis in self.axes if axis in ("pos", "query", "key"))

    @property
    def seen_from(self) -> tuple[str, ...]:
        """The axes along which, in a causal model, a change acts at its index and later ones only."""
        return ("query", "key") if self.masked else tuple(axis for axis in ("pos", "query") if axis in self.axes)

    @property
    def head_axis(self) -> str | None:
        """The axis of heads, or of key/value heads; `None` where there is none."""
        return next((axis for axis in self.axes if axis in ("head", "kv_head")), None)

    @property
    def has_vectors(self) -> bool:
        """Whether the last axis indexes the units of vectors."""
        return field_of(self.axes[-1]) == "unit"

    def shape(self, batch: int, pos: int, keys: int | None = None) -> tuple[int, ...]:
        """The size of every axis.

        Args:
            batch: the number of prompts.
            pos: the number of computed positions.
            keys: the number of positions that may be attended to; by default `pos`.

        Returns:
            The sizes, in the order of `axes`.
        """
        tokens = {"batch": batch, "pos": pos, "query": pos, "key": pos if keys is None else keys}
        sizes = {**self.sizes, **tokens}
        return tuple(sizes[axis] for axis in self.axes)


_STREAM = ("layer", "batch", "pos", "d_model")
_HEADS = ("layer", "batch", "pos", "head", "d_head")
_KV_HEADS = ("layer", "batch", "pos", "kv_head", "d_head")
_SCORES = ("layer", "batch", "head", "query", "key")
_MLP = ("layer", "batch", "pos", "d_mlp")
_SHARED = ("layer", "batch", "pos", "d_shared")
_has_mlp = lambda config: config.mlp != "none"
_ln1 = lambda config: config.has_norm("input")
_ln1_post = lambda config: config.has_norm("output")
_ln2 = lambda config: config.has_norm("input") and _has_mlp(config)
_ln2_post = lambda config: config.has_norm("output") and _has_mlp(config)
_turned = lambda config: config.rotates or config.qk_norm != "none"
_neurons = lambda config: config.has_mlp
_gated = lambda config: config.has_mlp and config.mlp == "gated"
_experts = lambda config: config.experts is not None
_shared = lambda config: config.experts is not None and config.experts.shared > 0
_shared_gated = lambda config: _shared(config) and config.mlp == "gated"

SITES: Mapping[str, Site] = {
    site.name: site
    for site in (
        Site("ln_embed.scale", _STREAM[1:3], "as ln1.scale, for the norm of the token embedding", "embedding", lambda c: c.embed_norm),
        Site("ln_embed.normalized", _STREAM[1:], "as ln1.normalized, for the norm of the token embedding", "embedding", lambda c: c.embed_norm),
        Site("embed", _STREAM[1:], "token embedding as it is added to the stream: scaled, and after its norm", "embedding", added=True),
        Site("pos_embed", _STREAM[1:], "learned position embedding, added to embed", "embedding", lambda c: c.positions == "learned", added=True),
        Site("resid_pre", _STREAM, "residual stream that the layer reads", "attention", is_stream=True),
        Site("q_input", (*_STREAM[:3], "head", "d_model"), "resid_pre as each head's query alone sees it, before ln1", "attention", per_head=True),
        Site("k_input", (*_STREAM[:3], "kv_head", "d_model"), "resid_pre as each kv head's key alone sees it, before ln1", "attention", per_head=True),
        Site("v_input", (*_STREAM[:3], "kv_head", "d_model"), "resid_pre as each kv head's value alone sees it, before ln1", "attention", per_head=True),
        Site("ln1.scale", _STREAM[:3], "what ln1 divides by: root of variance (LayerNorm) or mean square (RMSNorm) + eps", "attention", _ln1),
        Site("ln1.normalized", _STREAM, "(centred, if LayerNorm) stream over ln1.scale, before weight and bias", "attention", _ln1),
        Site("q", _HEADS, "queries as projected, with bias", "attention", product=True, read_as="rot_q"),
        Site("k", _KV_HEADS, "keys as projected, with bias", "attention", product=True, read_as="rot_k"),
        Site("v", _KV_HEADS, "values as projected, with bias", "attention", product=True, read_as="v"),
        Site("rot_q", _HEADS, "queries as attention reads them: after their norm and rotary positions", "attention", _turned),
        Site("rot_k", _KV_HEADS, "keys as attention reads them: after their norm and rotary positions", "attention", _turned),
        Site("attn_scores", _SCORES, "scaled query-key products, capped and with ALiBi where the model has these, before the mask", "attention", masked=True),
        Site("pattern", _SCORES, "softmax of the masked scores over key", "attention", zero_at_padding=True),
        Site("z", _HEADS, "pattern-weighted sum of values", "attention", zero_at_padding=True),
        Site("result", (*_STREAM[:3], "head", "d_model"), "what each head writes, without bias and before a norm of the output", "attention", per_head=True, zero_at_padding=True),
        Site("ln1_post.scale", _STREAM[:3], "as ln1.scale, for the norm of attention's output, or of the stream after it", "attention", _ln1_post),
        Site("ln1_post.normalized", _STREAM, "as ln1.normalized, for the norm of attention's output, or of the stream after it", "attention", _ln1_post),
        Site("attn_out", _STREAM, "what attention adds to the stream: sum of result over heads, plus bias, after a norm of the output", "attention", product=True, added=True),
        Site("resid_mid", _STREAM, "residual stream between attention and MLP", "mlp", lambda c: _has_mlp(c) and not c.parallel, is_stream=True),
        Site("mlp_in", _STREAM, "the stream as the MLP alone sees it, before ln2", "mlp", _has_mlp),
        Site("ln2.scale", _STREAM[:3], "as ln1.scale, for the norm before the MLP", "mlp", _ln2),
        Site("ln2.normalized", _STREAM, "as ln1.normalized, for the norm before the MLP", "mlp", _ln2),
        Site("pre", _MLP, "neurons before the activation function (of the gate, where gated)", "mlp", _neurons, product=True),
        Site("pre_linear", _MLP, "the linear branch that a gated MLP multiplies in", "mlp", _gated, product=True),
        Site("post", _MLP, "neurons: activation(pre), times pre_linear where gated", "mlp", _neurons),
        Site("router_logits", (*_STREAM[:3], "expert"), "scores of the experts", "mlp", _experts, product=True),
        Site("expert_weights", (*_STREAM[:3], "expert"), "by what the experts' outputs are multiplied; zero for those that a token does not use", "mlp", _experts),
        Site("expert_out", (*_STREAM[:3], "expert", "d_model"), "output of every expert, with bias; computed where it is asked for", "mlp", _experts),
        Site("shared_pre", _SHARED, "as pre, of the MLP that all tokens share beside experts", "mlp", _shared, product=True),
        Site("shared_pre_linear", _SHARED, "as pre_linear, of the MLP that all tokens share beside experts", "mlp", _shared_gated, product=True),
        Site("shared_post", _SHARED, "as post, of the MLP that all tokens share beside experts", "mlp", _shared),
        Site("shared_out", _STREAM, "output of the MLP that all tokens share beside experts, after its gate", "mlp", _shared),
        Site("ln2_post.scale", _STREAM[:3], "as ln1.scale, for the norm of the MLP's output, or of the stream after it", "mlp", _ln2_post),
        Site("ln2_post.normalized", _STREAM, "as ln1.normalized, for the norm of the MLP's output, or of the stream after it", "mlp", _ln2_post),
        Site("mlp_out", _STREAM, "what the MLP adds to the stream, with bias, after a norm of the output", "mlp", _has_mlp, product=True, added=True),
        Site("resid_post", _STREAM, "residual stream that the layer leaves", "mlp", is_stream=True),
        Site("final_in", _STREAM[1:], "the stream as the last norm, and the unembedding behind it, see it", "final"),
        Site("ln_final.scale", _STREAM[1:3], "as ln1.scale, for the norm before the unembedding", "final", lambda c: c.final_norm),
        Site("ln_final.normalized", _STREAM[1:], "as ln1.normalized, for the norm before the unembedding", "final", lambda c: c.final_norm),
    )
}  # fmt: skip
"""The sites of all transformers; `model.sites` are those of one model, with their sizes."""


@functools.lru_cache(maxsize=256)
def transformer_sites(config: Config) -> Mapping[str, Site]:
    """The sites of the transformers of one config, with `fixed`, `rule`, `layers`, `half`, `product` and `read_as` filled in.

    Args:
        config: the architecture.

    Returns:
        The sites by name, read-only.
    """
    c = config
    fixed = (
        ("layer", c.n_layers), ("head", c.n_heads), ("kv_head", c.n_kv_heads),
        ("d_model", c.d_model), ("d_head", c.d_head), ("d_mlp", c.d_mlp),
        ("expert", c.experts.n if c.experts else 0), ("d_shared", c.experts.shared if c.experts else 0),
    )  # fmt: skip
    of_kinds = (((_neurons, _gated), c.mlp_layers), ((_experts, _shared, _shared_gated), c.expert_layers))
    layers_of = lambda site: next((layers for kinds, layers in of_kinds if site.exists in kinds), None)
    existing = {name: site for name, site in SITES.items() if site.exists(config)}
    return MappingProxyType(
        {
            name: dataclasses.replace(
                site,
                fixed=fixed,
                rule=ScoreRule.of(c) if name == "attn_scores" else None,
                product=site.product and not (site.added and c.has_norm("output") and c.norm_at != "stream"),
                layers=layers_of(site) if c.dense_layers else None,
                half=int(site.part == "mlp" and c.has_halves),
                read_as=name if site.read_as not in existing and site.read_as else site.read_as,
            )
            for name, site in existing.items()
        }
    )


def cached_sites(sites: Mapping[str, Site]) -> tuple[str, str]:
    """The sites of keys and values as attention reads them, which are cached for tokens that are not computed again.

    Args:
        sites: a model's table.

    Returns:
        The names of the two sites.
    """
    k, v = sites["k"].read_as, sites["v"].read_as
    assert k is not None and v is not None
    return k, v


def site_of(name: str, sites: Mapping[str, Site]) -> Site:
    """Look up a site in a model's table.

    Args:
        name: the name of the site.
        sites: the table.

    Returns:
        The site.

    Raises:
        ValueError: for a name that no site has, or a site that this model lacks.
    """
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
    """One row of `sites`: the array that capturing all of a site would give.

    Attributes:
        axes: its axes.
        shape: its shape.
        dtype: its dtype.
        bytes: its size.
        meaning: what the activation is.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    bytes: int
    meaning: str


class SiteTable(dict[str, SiteInfo]):
    """Rows by site name, shown as a table."""

    def __repr__(self) -> str:
        rows = [("site", "axes", "shape", "dtype", "MiB", "meaning")]
        rows += [
            (name, " ".join(i.axes), " ".join(map(str, i.shape)), str(i.dtype), f"{i.bytes / 2**20:.3g}", i.meaning)
            for name, i in self.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def sites(model: Any, tokens: Tokens | ArrayLike) -> SiteTable:
    """Every site of a model, with the axes, shape, dtype and bytes of its activation.

    Nothing is run.

    Args:
        model: any model that takes tokens.
        tokens: the batch, on which shapes depend.

    Returns:
        A mapping by site name, shown as a table; `capture=tuple(mj.sites(model, tokens))` captures all sites.

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
