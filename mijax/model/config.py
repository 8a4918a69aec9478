"""What a transformer is made of, as one frozen and hashable value."""

import dataclasses
import math
import numbers
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args, get_origin

import numpy as np

Positions = Literal["learned", "rotary", "none"]
NormKind = Literal["layer", "rms", "none"]
MLPKind = Literal["dense", "gated", "none"]
Activation = Literal["relu", "gelu", "gelu_new", "silu"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones only and
    interpolates between wavelengths `original_n_ctx / high_freq` and `original_n_ctx / low_freq`.

    Raises `ValueError`, naming every field that is off: all numbers must be positive and finite, and `high_freq`
    above `low_freq`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_n_ctx: int = 8192

    def __post_init__(self):
        """Check all fields."""
        faults = list(_check_fields(self).values())
        if not faults and self.high_freq <= self.low_freq:
            faults.append(f"high_freq={self.high_freq} must be above low_freq={self.low_freq}")
        if faults:
            raise ValueError("invalid RotaryScaling: " + "; ".join(faults))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of a decoder-only (or, with `causal=False`, encoder) transformer.

    Field names are TransformerLens's where it has the field. `n_kv_heads` below `n_heads` is
    grouped-query attention, 1 is multi-query. `rotary_dim` is how many of the `d_head` dimensions
    are rotated (all by default). `parallel` feeds attention and MLP the same stream. `name` is a
    label for results; it is no part of the architecture, so models that differ in it alone share
    their compiled code.

    The fields also say which parameters a model has, no more and no fewer (`check_parameters` holds it to that):
    `qkv_bias` all three of `b_Q`, `b_K`, `b_V`; `attn_out_bias` `b_O`; `mlp_bias` all biases of the MLP; `norm_bias`
    those of every LayerNorm; `unembed_bias` `b_U`; `tied_unembed=False` `W_U`.

    Types are checked as well as ranges, by hand-written and by read configs alike: `True` is no integer, 2.0 is none,
    `"false"` is no boolean, and no number may be NaN or infinite. (transformers takes any `norm_eps` and `rope_theta`,
    and computes NaN with a negative one.)

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
        """Check all fields, and fill those that are derived."""
        off = _check_fields(self)
        faults = [*off.values(), *self._misfits(off)]
        if faults:
            raise ValueError("invalid Config: " + "; ".join(faults))
        self._set("d_head", self.d_head or self.d_model // self.n_heads)
        self._set("n_kv_heads", self.n_kv_heads or self.n_heads)
        self._set("rotary_dim", self.rotary_dim or self.d_head)
        self._set("attn_scale", self.attn_scale or self.d_head**-0.5)
        self._set("d_mlp", 0 if self.mlp == "none" else self.d_mlp or 4 * self.d_model)
        self._set("norm_bias", self.norm_bias and self.norm == "layer")

    def _misfits(self, off: Collection[str]) -> Iterator[str]:
        """What does not fit together, of the fields that are not off by themselves."""
        sound = lambda *fields: not set(fields) & set(off)
        if sound("n_heads", "n_kv_heads") and self.n_kv_heads and self.n_heads % self.n_kv_heads:
            yield f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
        if not sound("d_model", "n_heads", "d_head"):
            return
        if not self.d_head and self.d_model % self.n_heads:
            yield f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; give d_head explicitly"
            return
        d_head = self.d_head or self.d_model // self.n_heads
        rotary_dim = self.rotary_dim or d_head if sound("rotary_dim") else 0
        if self.positions == "rotary" and (rotary_dim % 2 or rotary_dim > d_head):
            yield f"rotary_dim={rotary_dim} must be even and at most d_head={d_head}"

    def _set(self, field: str, value):
        object.__setattr__(self, field, value)


# Where zero stands for what the other fields give, it is allowed.
_POSITIVE = {"d_model", "n_heads", "d_vocab", "n_ctx", "rotary_base"}
_POSITIVE |= {"factor", "low_freq", "high_freq", "original_n_ctx"}
_NOT_NEGATIVE = {"n_layers", "d_head", "n_kv_heads", "d_mlp", "rotary_dim", "norm_eps", "attn_scale"}


def check_field(owner: type, name: str, value: Any, label: str = "") -> Any:
    """The value of a field of `Config` or `RotaryScaling`, as the Python type that the field has.

    Raises `ValueError` that calls it `label` (by default its own name) where its type or its range is wrong.

    >>> check_field(Config, "norm_eps", -1.0, "rms_norm_eps")
    Traceback (most recent call last):
    ValueError: rms_norm_eps=-1.0 must not be negative
    """
    label = label or name
    kind: Any = next(field.type for field in dataclasses.fields(owner) if field.name == name)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{label}={value!r} is none of {', '.join(map(repr, get_args(kind)))}")
        return value
    if kind not in _TYPES:
        if not isinstance(value, kind):
            raise ValueError(f"{label}={value!r} must be {kind}")
        return value
    accepted, noun = _TYPES[kind]
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{label}={value!r} must be {noun}, given {type(value).__name__}")
    if kind is float and not _is_finite(value):
        raise ValueError(f"{label}={value!r} must be finite")
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{label}={value!r} must be positive")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{label}={value!r} must not be negative")
    return kind(value)


_TYPES: dict[type, tuple[Any, str]] = {
    bool: ((bool, np.bool_), "a boolean"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _check_fields(owner: Any) -> dict[str, str]:
    """Give every field its own Python type; returns what is wrong with those that cannot have it."""
    off = {}
    for field in dataclasses.fields(owner):
        try:
            object.__setattr__(owner, field.name, check_field(type(owner), field.name, getattr(owner, field.name)))
        except ValueError as error:
            off[field.name] = str(error)
    return off
