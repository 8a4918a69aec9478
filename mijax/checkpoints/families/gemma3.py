"""Gemma 3 (text): norms of queries and keys, and two rotary bases."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints import gemma_layout, llama_layout
from mijax.checkpoints.keys import architectures, only
from mijax.checkpoints.rotary_keys import ROTARY_KEYS, rope_of, rotary_of
from mijax.checkpoints.table import Family
from mijax.model.config import Config
from mijax.rules import ANYTHING, COUNT, NULL, either, mapping, shown

_LOCAL, _FULL = "sliding_attention", "full_attention"
_THETAS = {_LOCAL: 10_000.0, _FULL: 1_000_000.0}
_OLD = {key: ROTARY_KEYS[key] for key in ("rope_theta", "rope_scaling")} | {
    "rope_local_base_freq": ROTARY_KEYS["rope_theta"]
}
_PATTERN = ("sliding_window_pattern", "_sliding_window_pattern")


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    n, pattern = fields["n_layers"], next((c[key] for key in _PATTERN if c.get(key) is not None), 6)
    kinds = c.get("layer_types") or [_FULL if (layer + 1) % pattern == 0 else _LOCAL for layer in range(n)]
    read = {"use_sliding_window": True, "sliding_window": 4096, **c, "layer_types": kinds}
    windows = llama_layout.read_windows(read, fields)
    rotaries = {kind: rotary_of(rope, c, theta=_THETAS[kind]) for kind, rope in _ropes(c).items()}
    return {
        **windows,
        "positions": tuple(rotaries[kind] for kind in kinds),
        **gemma_layout.read_scales(c, fields, (None, None)),
    }


def _ropes(c: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary entries of both kinds of layers; files of before transformers 5 give the two bases by other keys."""
    ropes = c.get("rope_parameters")
    if ropes is not None:
        if not {_LOCAL, _FULL} <= ropes.keys():
            raise ValueError(f"rope_parameters={shown(ropes)} must hold the entries {_LOCAL} and {_FULL}")
        twice = sorted(key for key in _OLD if c.get(key) is not None)
        if twice:
            raise ValueError(f"{', '.join(twice)} beside rope_parameters: one of the two must go")
        return {kind: dict(ropes[kind]) for kind in (_LOCAL, _FULL)}
    scaling = {"rope_type" if key == "type" else key: value for key, value in (c.get("rope_scaling") or {}).items()}
    return {
        _LOCAL: {"rope_theta": c["rope_local_base_freq"]} if c.get("rope_local_base_freq") is not None else {},
        _FULL: {**({"rope_theta": c["rope_theta"]} if c.get("rope_theta") is not None else {}), **scaling},
    }


def _write(config: Config) -> dict[str, Any] | None:
    rotaries = config.rotaries
    windows = {k: v for k, v in llama_layout.write_windows(config).items() if k != "use_sliding_window"}
    of_kind = {kind: rotary for kind, rotary in zip(windows["layer_types"], rotaries)}
    rotary = next(iter(of_kind.values()), None)
    if rotary is None or any(rotary is None for rotary in rotaries):
        return None
    ropes = {kind: rope_of(of_kind.get(kind) or rotary) for kind in (_LOCAL, _FULL)}
    windows["sliding_window"] = windows["sliding_window"] or config.n_ctx
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "rope_parameters": ropes,
        **windows,
        **gemma_layout.write_scales(config),
    }


_layout = llama_layout.LAYOUT | {
    "weights": gemma_layout.weights,
    "fixed": llama_layout.FIXED | {"norm_at": "both", "qk_norm": "head"},
    "further": {
        **llama_layout.WINDOW_KEYS,
        **{key: rule for key, rule in gemma_layout.FURTHER.items() if key != "attn_logit_softcapping"},
        **_OLD,
        "rope_parameters": either(mapping(mapping(ANYTHING)), NULL),
        **dict.fromkeys(_PATTERN, either(COUNT, NULL)),
    },
    "read": _read,
    "buffers": (),
}
_harmless = {
    **gemma_layout.HARMLESS_KEYS,
    "attn_logit_softcapping": only(None),
    "architectures": architectures("Gemma3ForCausalLM", "Gemma3TextModel"),
}
GEMMA3 = Family("gemma3_text", keys=gemma_layout.KEYS, write=_write, harmless=_harmless, **_layout)
