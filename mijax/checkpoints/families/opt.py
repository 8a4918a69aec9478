"""OPT, with norms before attention and MLP or in the stream.

OPT-350m's embeddings are narrower than its stream, with a matrix from the one to the other and one back before the
unembedding. Both are multiplied into the embedding and the unembedding, which then are two matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mijax.checkpoints.contents import Lookup, Made, Tensors, derived
from mijax.checkpoints.keys import ACTIVATIONS, BIASES, HARMLESS, Key, architectures, only
from mijax.checkpoints.llama_layout import attention
from mijax.checkpoints.table import Convert, Family, Weight, dense_mlp, norm
from mijax.model.config import Config
from mijax.rules import COUNT, FLAG, NULL, either

KEYS = {
    "num_hidden_layers": Key(("n_layers",)),
    "hidden_size": Key(("d_model",)),
    "num_attention_heads": Key(("n_heads",)),
    "ffn_dim": Key(("d_mlp",)),
    "vocab_size": Key(("d_vocab",)),
    "max_position_embeddings": Key(("n_ctx",)),
    "activation_function": Key(("activation",), "relu", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), True),
    "enable_bias": Key(("attn_bias",), True, BIASES),
    "do_layer_norm_before": Key(("norm_at",), True, {True: "input", False: "stream"}),
}
OFFSET = 2
"""The number of rows before that of position 0 in the table of positions, of which no real token reads any."""


def _read(c: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    removed = c.get("_remove_final_layer_norm", False)
    read = {"mlp_bias": fields["attn_bias"] != "", "final_norm": fields["norm_at"] == "input" and not removed}
    return read | ({"tied_unembed": False} if _is_narrow(c) else {})


def _is_narrow(c: Mapping[str, Any]) -> bool:
    """Whether embeddings have another size than the stream."""
    return c.get("word_embed_proj_dim") not in (None, c["hidden_size"])


def _write(config: Config) -> dict[str, Any]:
    removed = config.norm_at == "input" and not config.final_norm
    return {"architectures": ["OPTForCausalLM"], "_remove_final_layer_norm": removed}


def _without_offset(x: np.ndarray, _: Config) -> list[np.ndarray]:
    return [x[OFFSET:]]


def _with_offset(parts: Sequence[np.ndarray], _: Config) -> np.ndarray:
    return np.concatenate([np.zeros_like(parts[0][:OFFSET]), parts[0]])


def _weights(config: Config) -> list[Weight]:
    h, norms = (
        "model.decoder.layers.{layer}.",
        ("ln1", "ln2") if config.norm_at == "input" else ("ln1_post", "ln2_post"),
    )
    positions = Convert(_without_offset, _with_offset)
    return [
        Weight(("W_E",), "model.decoder.embed_tokens.weight", "vocab d -> vocab d"),
        Weight(("W_pos",), "model.decoder.embed_positions.weight", "ctx d -> ctx d", positions),
        *norm(f"blocks.{norms[0]}", h + "self_attn_layer_norm"),
        *attention(config, h + "self_attn.", "out_proj"),
        *norm(f"blocks.{norms[1]}", h + "final_layer_norm"),
        *dense_mlp(h + "fc1", h + "fc2"),
        *norm("ln_final", "model.decoder.final_layer_norm"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


_EMBEDDING, _HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
_MATRICES = ("model.decoder.project_in.weight", "model.decoder.project_out.weight")


def _decode(tensors: Tensors, c: Mapping[str, Any], source: str) -> Tensors:
    """The embedding and the unembedding as wide as the stream, `[vocab, d_model]`."""
    if not _is_narrow(c):
        return tensors
    lookup = Lookup("model.", tensors.stored)
    names = {name: lookup(name) for name in (_EMBEDDING, *_MATRICES)}
    missing = [name for name, stored in names.items() if stored is None]
    if missing:
        raise ValueError(
            f"{source} says word_embed_proj_dim={c['word_embed_proj_dim']}, and does not hold {', '.join(missing)}"
        )
    embedding, project_in, project_out = map(str, names.values())
    head = _HEAD if _HEAD in tensors.stored else embedding
    hidden, width = c["hidden_size"], c["word_embed_proj_dim"]

    def product(of: str, by: str, shape: tuple[int, int]) -> Made:
        table, matrix = tensors.stored[of].shape, tensors.stored[by].shape
        if table[1:] != (width,) or matrix != shape:
            raise ValueError(f"{source}: {of} {table} must be [vocab, {width}], and {by} {matrix} {shape}")

        def read() -> np.ndarray:
            x, matrix = (np.asarray(tensors.read(name), np.float32) for name in (of, by))
            return x @ (matrix.T if by == project_in else matrix)

        return Made((table[0], hidden), read)

    computed = {
        embedding: product(embedding, project_in, (hidden, width)),
        _HEAD: product(head, project_out, (width, hidden)),
    }
    return derived(tensors, computed, (project_in, project_out))


OPT = Family(
    "opt",
    _weights,
    KEYS,
    {"positions": "learned", "norm": "layer", "norm_eps": 1e-5},
    {"_remove_final_layer_norm": FLAG, "word_embed_proj_dim": either(COUNT, NULL)},
    _read,
    _write,
    {**HARMLESS, "architectures": architectures("OPTForCausalLM", "OPTModel"), "layer_norm_elementwise_affine": only(True),
     **dict.fromkeys(("dropout", "activation_dropout", "layerdrop", "init_std"), lambda value, c: True)},
    prefix="model.",
    head="lm_head.weight",
    decode=_decode,
)  # fmt: skip
