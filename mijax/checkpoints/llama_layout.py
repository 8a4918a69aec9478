"""What the families that descend from Llama share: names of tensors, keys of the config, and buffers."""

from collections.abc import Collection, Mapping
from typing import Any

from mijax.checkpoints.buffers import rotary_buffers
from mijax.checkpoints.keys import ACTIVATIONS, HARMLESS, Key, architectures, only, windows_of
from mijax.checkpoints.rotary_keys import ROTARY_KEYS, read_rotary, write_rotary
from mijax.checkpoints.table import Family, Weight, linear, norm
from mijax.model.config import Config
from mijax.rules import COUNT, FLAG, NATURAL, NULL, TEXT, array, either

LAYER = "model.layers.{layer}."
"""The start of the names of a layer's tensors."""
KEYS: dict[str, Key] = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "intermediate_size": Key(("d_mlp",)),
    "num_attention_heads": Key(("n_heads",)),
    "num_key_value_heads": Key(("n_kv_heads",), None),
    "head_dim": Key(("d_head",), None),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "rms_norm_eps": Key(("norm_eps",), 1e-6),
    "hidden_act": Key(("activation",), "silu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), False),
}
FIXED = {"norm": "rms", "mlp": "gated", "attn_bias": "", "mlp_bias": False}
"""The fields of a family without biases."""
HARMLESS_KEYS = {**HARMLESS, "pretraining_tp": only(1, None), "rope_interleaved": only(False)}
HEAD = "lm_head.weight"


def read_positions(c: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The field `positions` of a family that rotates all dimensions of a head.

    Args:
        c: the contents of `config.json`.
        fields: the fields read so far.
    """
    del fields
    return {"positions": read_rotary(c)}


def read_window(c: Mapping[str, Any], fields: Mapping[str, Any], default: int | None) -> dict[str, Any]:
    """The field `window` of a family whose layers all have the window `sliding_window`.

    Args:
        c: the contents of `config.json`.
        fields: the fields read so far.
        default: the window where the file gives none.
    """
    window = c.get("sliding_window", default)
    return {"window": 0 if window is None or window >= fields["n_ctx"] else window}  # of no effect beyond


ONE_WINDOW = {"sliding_window": either(COUNT, NULL)}
"""The key of a `config.json` that `read_window` reads, and what it may hold."""
WINDOW_KEYS = {
    "layer_types": either(array(TEXT), NULL),
    "sliding_window": either(NATURAL, NULL),  # 0 where no layer has one: `windows_of` looks at it where a layer has
    "use_sliding_window": FLAG,
    "max_window_layers": NATURAL,
}
"""The keys of a `config.json` that `read_windows` reads, and what they may hold."""


def read_windows(
    c: Mapping[str, Any], fields: Mapping[str, Any], local: Collection[int] | None = None
) -> dict[str, Any]:
    """The field `window` of a family whose layers have sliding windows or not.

    Args:
        c: the contents of `config.json`.
        fields: the fields read so far.
        local: the layers with windows where the file has no `layer_types`; by default those from `max_window_layers` on.
    """
    n, window = fields["n_layers"], c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    kinds = c.get("layer_types")
    if kinds is None:
        local = range(c.get("max_window_layers", 28), n) if local is None else local
        kinds = ["sliding_attention" if window is not None and i in local else "full_attention" for i in range(n)]
    windows = windows_of(kinds, window, n)
    return {"window": tuple(0 if window >= fields["n_ctx"] else window for window in windows)}  # of no effect beyond


def write_windows(config: Config) -> dict[str, Any]:
    """The entries from which `read_windows` reads.

    Args:
        config: the config; where its layers have several windows, the entries are read as another config.
    """
    windows = config.windows or (0,) * config.n_layers
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    largest = max(windows, default=0)
    return {"layer_types": kinds, "sliding_window": largest or None, "use_sliding_window": bool(largest)}


def write_as(architecture: str, config: Config) -> dict[str, Any]:
    """The entries of such a family beside its keys.

    Args:
        architecture: the name of transformers' class.
        config: the config.
    """
    return {"architectures": [architecture], **write_rotary(config.positions)}


def weights(config: Config) -> list[Weight]:
    """The tensors of Llama, with the norms of queries and keys that some descendants have.

    Args:
        config: the architecture.
    """
    return [*ends(), *norm("blocks.ln1", LAYER + "input_layernorm", bias=False), *attention(config), *gated_mlp(),
            *norm("blocks.ln2", LAYER + "post_attention_layernorm", bias=False)]  # fmt: skip


def ends() -> list[Weight]:
    """The tensors of embedding, last norm and unembedding."""
    return [
        Weight(("W_E",), "model.embed_tokens.weight", "vocab d -> vocab d"),
        *norm("ln_final", "model.norm", bias=False),
        Weight(("W_U",), HEAD, "vocab d -> vocab d"),
    ]


def attention(config: Config, start: str = LAYER + "self_attn.", out: str = "o_proj") -> list[Weight]:
    """The tensors of attention.

    Args:
        config: the architecture.
        start: the start of their names.
        out: the name of the output's map.
    """
    maps = (("Q", "q_proj", "head"), ("K", "k_proj", "kv_head"), ("V", "v_proj", "kv_head"))
    table = linear(("blocks.attn.W_O", "blocks.attn.b_O"), start + out, ("d (head e) -> head e d", "d -> d"))
    for ours, theirs, heads in maps:
        axes = (f"({heads} e) d -> d {heads} e", f"({heads} e) -> {heads} e")
        table += linear((f"blocks.attn.W_{ours}", f"blocks.attn.b_{ours}"), start + theirs, axes)
    for ours, heads in (("q_norm", "head"), ("k_norm", "kv_head")):
        axes = f"({heads} e) -> {heads} e" if config.qk_norm == "all" else "(one e) -> one e"
        table.append(Weight((f"blocks.attn.{ours}",), f"{start}{ours}.weight", axes))
    return table


def gated_mlp(start: str = LAYER + "mlp.", path: str = "blocks.mlp") -> list[Weight]:
    """The tensors of a gated MLP.

    Args:
        start: the start of their names.
        path: where the MLP is in `Transformer`.
    """
    table = []
    for ours, theirs in (("in", "up_proj"), ("gate", "gate_proj"), ("out", "down_proj")):
        table += linear((f"{path}.W_{ours}", f"{path}.b_{ours}"), start + theirs, ("o i -> i o", "o -> o"))
    return table


BUFFERS = rotary_buffers(LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
LAYOUT: dict[str, Any] = {
    "weights": weights, "fixed": FIXED, "further": ROTARY_KEYS, "read": read_positions, "prefix": "model.",
    "buffers": BUFFERS, "head": HEAD,
}  # fmt: skip
"""The arguments of `Family` for one that has Llama's tensors and rotates all dimensions of a head."""


def with_windows(name: str, architecture: str, **arguments: Any) -> Family:
    """A family that rotates all dimensions of a head, and whose layers have sliding windows or not.

    Args:
        name: the `model_type`.
        architecture: the start of the names of transformers' classes.
        **arguments: further arguments of `Family`; `fixed` beside those of all such families.
    """
    fixed = FIXED | arguments.pop("fixed")
    read = lambda c, fields: read_positions(c, fields) | read_windows(c, fields)
    return Family(
        name,
        **{**LAYOUT, "fixed": fixed, "further": {**ROTARY_KEYS, **WINDOW_KEYS}, "read": read, **arguments},
        write=lambda config: write_as(f"{architecture}ForCausalLM", config) | write_windows(config),
        harmless={
            **HARMLESS_KEYS,
            "architectures": architectures(f"{architecture}ForCausalLM", f"{architecture}Model"),
        },
    )
