"""The architecture of a transformer, as one frozen and hashable value."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np

from mijax.model.fields import check_fields
from mijax.model.rotary import Rotary
from mijax.model.routing import Experts

Positions: TypeAlias = Literal["learned", "alibi", "none"] | Rotary | tuple[Rotary | None, ...]
NormKind = Literal["layer", "rms", "none"]
NormPlace = Literal["input", "output", "both", "stream"]
QKNorm = Literal["none", "head", "all"]
MLPKind = Literal["dense", "gated", "none"]
Activation = Literal["relu", "gelu", "gelu_new", "silu", "clamped_swiglu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of a decoder-only (or, with `causal=False`, encoder) transformer.

    Field names are those of TransformerLens where it has the field. The fields also say exactly which parameters a
    model has; `check_parameters` compares the two.

    Types are checked as well as ranges, of configs written by hand and of configs read from files: `True` and 2.0 are
    no integers, `"false"` is no boolean, and no number may be NaN, infinite, or one of these in float32. (transformers takes any `norm_eps` and
    `rope_theta`, and computes NaN with a negative one.)

    Args:
        n_layers: number of layers.
        d_model: width of the residual stream.
        n_heads: number of query heads.
        d_vocab: number of tokens in the vocabulary.
        d_vocab_out: number of logits; 0 for `d_vocab`. A classifier of other size cannot generate.
        n_ctx: greatest number of tokens of a prompt.
        d_head: width of a head; 0 for `d_model / n_heads`.
        n_kv_heads: number of key/value heads; 0 for `n_heads`, fewer for grouped-query attention, 1 for multi-query.
        d_mlp: number of neurons of each MLP (and of each expert, where `experts` gives no other); 0 for `4 * d_model`
            (and none where `mlp` is `"none"`).
        positions: `"learned"` embeddings (parameter `W_pos`); a `Rotary`, or a tuple with one for each layer (`None` for
            layers without); `"alibi"` (Press et al. 2022), linear biases of the attention scores; or `"none"`.
        window: how many tokens a query sees, itself and those before it; 0 for all. A tuple has one for each layer.
        norm: LayerNorm, RMSNorm, or none.
        norm_eps: epsilon in the norms' roots.
        norm_bias: whether every LayerNorm has a bias.
        norm_at: where the norms are: at the `"input"` of attention and MLP (pre-norm), at their `"output"` before it
            is added to the stream (OLMo 2), at `"both"` (Gemma 2), or in the `"stream"` after each addition
            (post-norm, as in the original transformer).
        shared_norm: whether the MLP of a parallel block reads the stream by attention's norm, as in GPT-J.
        final_norm: whether there is a norm before the unembedding.
        qk_norm: RMSNorm of queries and keys before they are rotated: of each `"head"`, of `"all"` heads together, or
            `"none"`.
        mlp: dense, gated, or none.
        experts: the mixture of experts that stands in place of each MLP, or `None`.
        dense_layers: the layers that have an MLP all the same (as the first of some models, or every second).
        activation: activation function of the MLP; `"gelu_new"` is the tanh form of GPT-2, `"clamped_swiglu"` that of
            GPT-OSS's gated experts.
        attn_bias: which of `b_Q`, `b_K`, `b_V` and `b_O` there are: letters of `"qkvo"`.
        mlp_bias: whether there are all biases of the MLP, or none.
        tied_unembed: whether the unembedding is `W_E`; otherwise there is `W_U`.
        unembed_bias: whether there is `b_U`.
        causal: whether a token attends to no later ones.
        parallel: whether attention and MLP read the same stream.
        attn_scale: factor of the attention scores; 0 for `1 / sqrt(d_head)`.
        scores_cap: where above 0, scores `s` become `cap * tanh(s / cap)` (Gemma 2).
        logits_cap: the same for logits.
        sinks: whether each head has a further score (parameter `sinks`), which takes its share of the softmax and is then
            dropped, so that a pattern's row sums to less than one (GPT-OSS).
        embed_scale: factor of the token embeddings.
        embed_norm: whether token embeddings go through a norm (BLOOM).
        name: a label for results. It is no part of the architecture: models that differ only in it share compiled
            code.
        origin: what a model was loaded from, which its `repr` shows; no part of the architecture either.

    Raises:
        ValueError: naming every invalid field.

    >>> Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16, mlp="none").d_head
    4
    >>> Config(n_layers=2, d_model=8, n_heads=3, d_vocab=11, n_ctx=16, mlp="none")
    Traceback (most recent call last):
    ValueError: invalid Config: d_model=8 is not a multiple of n_heads=3; give d_head explicitly
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    n_ctx: int
    d_head: int = 0  # 0: d_model / n_heads
    n_kv_heads: int = 0  # 0: n_heads
    d_mlp: int = 0  # 0: 4 * d_model (and no MLP where mlp is "none")
    d_vocab_out: int = 0  # 0: d_vocab
    positions: Positions = "learned"
    window: int | tuple[int, ...] = 0  # 0: all tokens
    norm: NormKind = "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # LayerNorm only
    norm_at: NormPlace = "input"
    shared_norm: bool = False
    final_norm: bool = True
    qk_norm: QKNorm = "none"
    mlp: MLPKind = "dense"
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    activation: Activation = "gelu_new"
    attn_bias: str = "qkvo"
    mlp_bias: bool = True
    tied_unembed: bool = True
    unembed_bias: bool = False
    causal: bool = True
    parallel: bool = False
    attn_scale: float = 0.0  # 0: 1 / sqrt(d_head)
    scores_cap: float = 0.0  # 0: none
    logits_cap: float = 0.0  # 0: none
    sinks: bool = False
    embed_scale: float = 1.0
    embed_norm: bool = False
    name: str = dataclasses.field(default="", compare=False)
    origin: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check all fields, and fill in those whose 0 stands for a value derived from others."""
        field_faults = check_fields(self, "positions", "window", "dense_layers")
        faults = [
            *field_faults.values(),
            *self._misfits(field_faults),
            *self._unlayered(field_faults),
            *self._unmixed(field_faults),
        ]
        if faults:
            raise ValueError("invalid Config: " + "; ".join(faults))
        self._set("d_head", self.d_head or self.d_model // self.n_heads)
        self._set("n_kv_heads", self.n_kv_heads or self.n_heads)
        self._set("d_vocab_out", self.d_vocab_out or self.d_vocab)
        self._set("attn_scale", self.attn_scale or self.d_head**-0.5)
        self._set("d_mlp", 0 if self.mlp == "none" else self.d_mlp or 4 * self.d_model)
        if self.experts is not None:  # one way to say one width
            self._set("d_mlp", self.d_mlp if self.dense_layers else self.experts.d_mlp or self.d_mlp)
            width = self.experts.d_mlp if self.dense_layers and self.experts.d_mlp != self.d_mlp else 0
            self._set("experts", dataclasses.replace(self.experts, d_mlp=width))
        self._set("norm_bias", self.norm_bias and self.norm == "layer")
        self._set("final_norm", self.final_norm and self.norm != "none")
        self._set("embed_norm", self.embed_norm and self.norm != "none")
        self._set("attn_bias", "".join(letter for letter in "qkvo" if letter in self.attn_bias))
        full = lambda rotary: rotary and dataclasses.replace(rotary, dim=rotary.dim or self.d_head)
        if isinstance(self.positions, Rotary):
            self._set("positions", full(self.positions))
        elif isinstance(self.positions, tuple):
            self._set("positions", _shortened(tuple(map(full, self.positions)), "none"))
        if isinstance(self.window, tuple):
            self._set("window", _shortened(self.window, 0))

    @property
    def rotaries(self) -> tuple[Rotary | None, ...]:
        """The rotary positions of each layer; empty where no layer has any."""
        if isinstance(self.positions, Rotary):
            return (self.positions,) * self.n_layers
        return self.positions if isinstance(self.positions, tuple) else ()

    @property
    def rotates(self) -> bool:
        """Whether any layer has rotary positions."""
        return isinstance(self.positions, Rotary | tuple)

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer; empty where all see all tokens."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.n_layers if self.window else ()

    @property
    def has_mlp(self) -> bool:
        """Whether layers have an MLP, not all of them experts."""
        return self.mlp != "none" and (self.experts is None or bool(self.dense_layers))

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers with an MLP."""
        return self.dense_layers if self.experts else tuple(range(self.n_layers)) if self.has_mlp else ()

    @property
    def d_expert(self) -> int:
        """The number of neurons of each expert; 0 without experts."""
        return (self.experts.d_mlp or self.d_mlp) if self.experts else 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(i for i in range(self.n_layers) if i not in self.dense_layers) if self.experts else ()

    @property
    def has_halves(self) -> bool:
        """Whether a layer's MLP reads the sum of the stream and attention's output, so that a run can begin between."""
        return not self.parallel and self.norm_at != "stream"

    def differences(self) -> str:
        """The sizes, and the fields in which the architecture differs from GPT-2's, as `field=value, ...`.

        >>> Config(n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16, mlp_bias=False).differences()
        'n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=16, mlp_bias=False'
        """
        sizes = ("n_layers", "d_model", "n_heads", "d_vocab", "n_ctx")
        plain = Config(**{size: getattr(self, size) for size in sizes}, d_head=self.d_head)
        fields = [field.name for field in dataclasses.fields(self) if field.compare]
        shown = [name for name in fields if name in sizes or getattr(self, name) != getattr(plain, name)]
        if self.d_head * self.n_heads != self.d_model:
            shown.insert(len(sizes), "d_head")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    def has_norm(self, place: Literal["input", "output"]) -> bool:
        """Whether attention and MLP have a norm before them, or after them (of what they write, or of the stream).

        Args:
            place: which of the two.
        """
        places = {"input": ("input", "both"), "output": ("output", "both", "stream")}
        return self.norm != "none" and self.norm_at in places[place]

    def _misfits(self, invalid: Collection[str]) -> Iterator[str]:
        """What does not fit together among the fields that are not `invalid` by themselves."""
        valid = lambda *fields: not set(fields) & set(invalid)
        if valid("n_heads", "n_kv_heads") and self.n_kv_heads and self.n_heads % self.n_kv_heads:
            yield f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
        if valid("attn_bias") and (set(self.attn_bias) - set("qkvo") or len(set(self.attn_bias)) < len(self.attn_bias)):
            yield f"attn_bias={self.attn_bias!r} must be letters of 'qkvo'"
        if valid("shared_norm", "parallel", "norm_at") and self.shared_norm and not (
            self.parallel and self.norm_at == "input"
        ):  # fmt: skip
            yield "shared_norm=True needs parallel=True and norm_at='input'"
        if (
            valid("d_vocab", "d_vocab_out", "tied_unembed")
            and self.tied_unembed
            and self.d_vocab_out not in (0, self.d_vocab)
        ):
            yield f"d_vocab_out={self.d_vocab_out} needs tied_unembed=False"
        if valid("activation", "mlp") and self.activation == "clamped_swiglu" and self.mlp != "gated":
            yield "activation='clamped_swiglu' needs mlp='gated'"
        if valid("experts", "mlp") and self.experts and self.mlp == "none":
            yield f"mlp='none' does not go with experts={self.experts}"
        if valid("parallel", "norm_at") and self.parallel and self.norm_at == "stream":
            yield "parallel=True does not go with norm_at='stream'"
        if valid("causal") and not self.causal and (self.positions == "alibi" or self.window):
            yield f"causal=False does not go with positions={self.positions!r} and window={self.window!r}"
        if not valid("d_model", "n_heads", "d_head"):
            return
        if not self.d_head and self.d_model % self.n_heads:
            yield f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; give d_head explicitly"
            return
        d_head = self.d_head or self.d_model // self.n_heads
        rotaries = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        dims = {rotary.dim or d_head for rotary in rotaries if isinstance(rotary, Rotary)}
        yield from (
            f"rotary dim={dim} must be even and at most d_head={d_head}" for dim in dims if dim % 2 or dim > d_head
        )
        if len(dims) > 1:
            yield f"layers must rotate equally many dimensions, given {', '.join(map(str, sorted(dims)))}"

    def _unlayered(self, invalid: Collection[str]) -> Iterator[str]:
        """What is wrong with the fields that may have a value for each layer."""
        accepted = {
            "positions": (lambda p: p is None or isinstance(p, Rotary), "a Rotary or None"),
            "window": (lambda n: type(n) is int and n >= 0, "an integer of at least 0"),
        }
        for name, (accepts, noun) in accepted.items():
            value: Any = getattr(self, name)
            if isinstance(value, list | tuple | np.ndarray):
                self._set(name, value := tuple(x.item() if isinstance(x, np.integer) else x for x in value))
            elif isinstance(value, np.integer):
                self._set(name, value := value.item())
            if isinstance(value, tuple):
                yield from (f"{name}={v!r} must be {noun}" for v in value if not accepts(v))
                if "n_layers" not in invalid and len(value) != self.n_layers:
                    yield f"{name} has {len(value)} entries, expected one for each of {self.n_layers} layers"
            elif name == "window" and not accepts(value):
                yield f"window={value!r} must be {noun}, or one for each layer"
            elif name == "positions" and not (isinstance(value, Rotary) or value in ("learned", "alibi", "none")):
                yield f"positions={value!r} is none of 'learned', 'alibi', 'none', a Rotary, or one for each layer"

    def _unmixed(self, invalid: Collection[str]) -> Iterator[str]:
        """What is wrong with experts of other width than the MLPs, and with the layers that have these."""
        layers: Any = self.dense_layers
        if isinstance(layers, list | tuple | np.ndarray) and all(
            isinstance(i, int | np.integer) and not isinstance(i, bool) for i in layers
        ):
            self._set("dense_layers", layers := tuple(sorted(map(int, layers))))
        else:
            yield f"dense_layers={layers!r} must be a sequence of integers"
            return
        if {"n_layers", "experts", "d_mlp"} & set(invalid):
            return
        if len(set(layers)) < len(layers) or any(not 0 <= i < self.n_layers for i in layers):
            yield f"dense_layers={layers!r} must be different layers, of {self.n_layers}"
        elif layers and self.experts is None:
            yield f"dense_layers={layers!r} needs experts in the other layers"
        elif layers and len(layers) == self.n_layers:
            yield "dense_layers are all layers: leave out experts"
        elif self.experts and not layers and self.d_mlp and self.experts.d_mlp not in (0, self.d_mlp):
            yield f"d_mlp={self.d_mlp} does not go with experts of d_mlp={self.experts.d_mlp} in all layers"

    def _set(self, field: str, value):
        object.__setattr__(self, field, value)


def _shortened(by_layer: tuple[Any, ...], empty: Any) -> Any:
    """One value in place of equal values of all layers, so that equal architectures are equal configs."""
    if len(set(by_layer)) > 1:
        return by_layer
    return empty if not by_layer or by_layer[0] is None else by_layer[0]
