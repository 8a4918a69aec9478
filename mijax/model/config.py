"""What a transformer is made of, as one frozen and hashable value."""

import dataclasses
from typing import Literal

Positions = Literal["learned", "rotary", "none"]
NormKind = Literal["layer", "rms", "none"]
MLPKind = Literal["dense", "gated", "none"]
Activation = Literal["relu", "gelu", "gelu_new", "silu"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones only and
    interpolates between wavelengths `original_n_ctx / high_freq` and `original_n_ctx / low_freq`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_n_ctx: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of a decoder-only (or, with `causal=False`, encoder) transformer.

    Field names are TransformerLens's where it has the field. `n_kv_heads` below `n_heads` is
    grouped-query attention, 1 is multi-query. `rotary_dim` is how many of the `d_head` dimensions
    are rotated (all by default). `parallel` feeds attention and MLP the same stream. `name` is a
    label for results; it is no part of the architecture, so models that differ in it alone share
    their compiled code.

    Raises `ValueError`, naming every field that is off.

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
    positions: Positions = "learned"
    rotary_dim: int = 0  # 0: d_head
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    norm: NormKind = "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # LayerNorm only
    mlp: MLPKind = "dense"
    activation: Activation = "gelu_new"
    qkv_bias: bool = True
    attn_out_bias: bool = True
    mlp_bias: bool = True
    tied_unembed: bool = True
    unembed_bias: bool = False
    causal: bool = True
    parallel: bool = False
    attn_scale: float = 0.0  # 0: 1 / sqrt(d_head)
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        """Fill the derived fields and check all of them."""
        faults = []
        if not self.d_head:
            if self.n_heads > 0 and self.d_model % self.n_heads == 0:
                self._set("d_head", self.d_model // self.n_heads)
            else:
                faults.append(
                    f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; give d_head explicitly"
                )
        self._set("n_kv_heads", self.n_kv_heads or self.n_heads)
        self._set("rotary_dim", self.rotary_dim or self.d_head)
        self._set("attn_scale", self.attn_scale or self.d_head**-0.5 if self.d_head > 0 else 0.0)
        self._set("d_mlp", 0 if self.mlp == "none" else self.d_mlp or 4 * self.d_model)
        self._set("norm_bias", self.norm_bias and self.norm == "layer")
        positive = ("d_model", "n_heads", "n_kv_heads", "d_vocab", "n_ctx")
        faults += [f"{f}={getattr(self, f)} must be positive" for f in positive if getattr(self, f) <= 0]
        faults += [
            f"{f}={getattr(self, f)} must not be negative"
            for f in ("n_layers", "d_head", "d_mlp")
            if getattr(self, f) < 0
        ]
        if self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads:
            faults.append(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.positions == "rotary" and (self.rotary_dim % 2 or self.rotary_dim > self.d_head):
            faults.append(f"rotary_dim={self.rotary_dim} must be even and at most d_head={self.d_head}")
        for field, kinds in _CHOICES.items():
            if getattr(self, field) not in kinds.__args__:
                faults.append(f"{field}={getattr(self, field)!r} is none of {', '.join(map(repr, kinds.__args__))}")
        if faults:
            raise ValueError("invalid Config: " + "; ".join(faults))

    def _set(self, field: str, value):
        object.__setattr__(self, field, value)


_CHOICES = {"positions": Positions, "norm": NormKind, "mlp": MLPKind, "activation": Activation}
