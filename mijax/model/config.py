"""The architecture of a transformer, as one frozen and hashable value."""

import dataclasses
import math
import numbers
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypeAlias, get_args, get_origin

import numpy as np

Positions = Literal["learned", "rotary", "none"]
NormKind = Literal["layer", "rms", "none"]
MLPKind = Literal["dense", "gated", "none"]
Activation = Literal["relu", "gelu", "gelu_new", "silu"]
FieldValue: TypeAlias = Any
"""The value of one field of a config: of the type that the field has."""


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    Args:
        kind: `"linear"` divides every frequency by `factor`. `"llama3"` divides the low ones only, and interpolates
            between the wavelengths `original_n_ctx / high_freq` and `original_n_ctx / low_freq`.
        factor: by what frequencies are divided.
        low_freq: turns over the original context up to which a frequency is low (`"llama3"`).
        high_freq: turns over the original context from which on a frequency is kept (`"llama3"`).
        original_n_ctx: the context length, in tokens, before stretching (`"llama3"`).

    Raises:
        ValueError: naming every invalid field; all numbers must be positive and finite, and `high_freq` above
            `low_freq`.

    >>> RotaryScaling("linear", factor=4.0)
    RotaryScaling(kind='linear', factor=4.0, low_freq=1.0, high_freq=4.0, original_n_ctx=8192)
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_n_ctx: int = 8192

    def __post_init__(self) -> None:
        """Check all fields."""
        faults = list(_check_fields(self).values())
        if not faults and self.high_freq <= self.low_freq:
            faults.append(f"high_freq={self.high_freq} must be above low_freq={self.low_freq}")
        if faults:
            raise ValueError("invalid RotaryScaling: " + "; ".join(faults))


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
        n_ctx: greatest number of tokens of a prompt.
        d_head: width of a head; 0 for `d_model / n_heads`.
        n_kv_heads: number of key/value heads; 0 for `n_heads`, fewer for grouped-query attention, 1 for multi-query.
        d_mlp: number of neurons; 0 for `4 * d_model` (and none where `mlp` is `"none"`).
        positions: learned embeddings (parameter `W_pos`), rotary, or none.
        rotary_dim: how many of the `d_head` dimensions are rotated; 0 for all.
        rotary_base: base of the rotary frequencies.
        rotary_scaling: how they are stretched for long contexts.
        norm: LayerNorm, RMSNorm, or none.
        norm_eps: epsilon in the norm's root.
        norm_bias: whether every LayerNorm has a bias.
        mlp: dense, gated, or none.
        activation: activation function of the MLP; `"gelu_new"` is the tanh form of GPT-2.
        qkv_bias: whether there are `b_Q`, `b_K` and `b_V`: all three, or none.
        attn_out_bias: whether there is `b_O`.
        mlp_bias: whether there are all biases of the MLP, or none.
        tied_unembed: whether the unembedding is `W_E`; otherwise there is `W_U`.
        unembed_bias: whether there is `b_U`.
        causal: whether a token attends to no later ones.
        parallel: whether attention and MLP read the same stream.
        attn_scale: factor of the attention scores; 0 for `1 / sqrt(d_head)`.
        name: a label for results. It is no part of the architecture: models that differ only in it share compiled
            code.

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

    def __post_init__(self) -> None:
        """Check all fields, and fill in those whose 0 stands for a value derived from others."""
        field_faults = _check_fields(self)
        faults = [*field_faults.values(), *self._misfits(field_faults)]
        if faults:
            raise ValueError("invalid Config: " + "; ".join(faults))
        self._set("d_head", self.d_head or self.d_model // self.n_heads)
        self._set("n_kv_heads", self.n_kv_heads or self.n_heads)
        self._set("rotary_dim", self.rotary_dim or self.d_head)
        self._set("attn_scale", self.attn_scale or self.d_head**-0.5)
        self._set("d_mlp", 0 if self.mlp == "none" else self.d_mlp or 4 * self.d_model)
        self._set("norm_bias", self.norm_bias and self.norm == "layer")

    def _misfits(self, invalid: Collection[str]) -> Iterator[str]:
        """What does not fit together among the fields that are not `invalid` by themselves."""
        valid = lambda *fields: not set(fields) & set(invalid)
        if valid("n_heads", "n_kv_heads") and self.n_kv_heads and self.n_heads % self.n_kv_heads:
            yield f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
        if not valid("d_model", "n_heads", "d_head"):
            return
        if not self.d_head and self.d_model % self.n_heads:
            yield f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; give d_head explicitly"
            return
        d_head = self.d_head or self.d_model // self.n_heads
        rotary_dim = self.rotary_dim or d_head if valid("rotary_dim") else 0
        if self.positions == "rotary" and (rotary_dim % 2 or rotary_dim > d_head):
            yield f"rotary_dim={rotary_dim} must be even and at most d_head={d_head}"

    def _set(self, field: str, value):
        object.__setattr__(self, field, value)


# Zero is allowed where it stands for a value derived from other fields.
_POSITIVE = {"d_model", "n_heads", "d_vocab", "n_ctx", "rotary_base"}
_POSITIVE |= {"factor", "low_freq", "high_freq", "original_n_ctx"}
_NOT_NEGATIVE = {"n_layers", "d_head", "n_kv_heads", "d_mlp", "rotary_dim", "norm_eps", "attn_scale"}


def check_field(owner: type, name: str, value: Any, label: str = "") -> FieldValue:
    """Check the value of one field of a config, and convert it to the field's Python type.

    Args:
        owner: `Config` or `RotaryScaling`.
        name: the field's name.
        value: the value to check.
        label: what messages call the field; by default `name`.

    Returns:
        The value as the Python type of the field (a NumPy integer as `int`, ...).

    Raises:
        ValueError: for a wrong type, or a value out of range.

    >>> check_field(Config, "norm_eps", -1.0, "rms_norm_eps")
    Traceback (most recent call last):
    ValueError: rms_norm_eps=-1.0 must not be negative
    """
    label = label or name
    field_type: Any = next(field.type for field in dataclasses.fields(owner) if field.name == name)
    if get_origin(field_type) is Literal:
        if value not in get_args(field_type):
            raise ValueError(f"{label}={value!r} is none of {', '.join(map(repr, get_args(field_type)))}")
        return value
    if field_type not in _TYPES:
        if not isinstance(value, field_type):
            raise ValueError(f"{label}={value!r} must be {field_type}")
        return value
    accepted, noun = _TYPES[field_type]
    if not isinstance(value, accepted) or (field_type is not bool and isinstance(value, bool)):
        raise ValueError(f"{label}={value!r} must be {noun}, given {type(value).__name__}")
    if field_type is float and not _is_finite(value):
        raise ValueError(f"{label}={value!r} must be finite")
    if field_type is float and value and not _SMALLEST <= abs(float(value)) <= _LARGEST:
        raise ValueError(
            f"{label}={value!r} is outside float32, which would make it {'0' if abs(value) < 1 else 'infinite'}"
        )
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{label}={value!r} must be positive")
    if name in _NOT_NEGATIVE and value < 0:
        raise ValueError(f"{label}={value!r} must not be negative")
    return field_type(value)


_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
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
    """Convert every field to its Python type in place; returns messages for the fields that are invalid, by name."""
    faults = {}
    for field in dataclasses.fields(owner):
        try:
            object.__setattr__(owner, field.name, check_field(type(owner), field.name, getattr(owner, field.name)))
        except ValueError as error:
            faults[field.name] = str(error)
    return faults
