"""GPT-2."""

from mijax.checkpoints import gpt2_layout
from mijax.checkpoints.buffers import masks
from mijax.checkpoints.keys import architectures, only, same_as
from mijax.checkpoints.table import FUSED, Family, Weight, norm
from mijax.model.config import Config

_harmless = {
    **gpt2_layout.HARMLESS_KEYS,
    "architectures": architectures("GPT2LMHeadModel", "GPT2Model"),
    "scale_attn_by_inverse_layer_idx": only(False),
    "reorder_and_upcast_attn": only(False),
    "n_ctx": same_as("n_positions"),
}


def _weights(config: Config) -> list[Weight]:
    h = "transformer.h.{layer}."
    qkv = ("blocks.attn.{}_Q", "blocks.attn.{}_K", "blocks.attn.{}_V")
    fused = lambda kind: tuple(path.format(kind) for path in qkv)
    return [
        Weight(("W_E",), "transformer.wte.weight", "vocab d -> vocab d"),
        Weight(("W_pos",), "transformer.wpe.weight", "ctx d -> ctx d"),
        *norm("blocks.ln1", h + "ln_1"),
        Weight(fused("W"), h + "attn.c_attn.weight", "d (three head e) -> three d head e", FUSED),
        Weight(fused("b"), h + "attn.c_attn.bias", "(three head e) -> three head e", FUSED),
        Weight(("blocks.attn.W_O",), h + "attn.c_proj.weight", "(head e) d -> head e d"),
        Weight(("blocks.attn.b_O",), h + "attn.c_proj.bias", "d -> d"),
        *norm("blocks.ln2", h + "ln_2"),
        Weight(("blocks.mlp.W_in",), h + "mlp.c_fc.weight", "d m -> d m"),
        Weight(("blocks.mlp.b_in",), h + "mlp.c_fc.bias", "m -> m"),
        Weight(("blocks.mlp.W_out",), h + "mlp.c_proj.weight", "m d -> m d"),
        Weight(("blocks.mlp.b_out",), h + "mlp.c_proj.bias", "d -> d"),
        *norm("ln_final", "transformer.ln_f"),
        Weight(("W_U",), "lm_head.weight", "vocab d -> vocab d"),
    ]


GPT2 = Family(
    "gpt2",
    _weights,
    gpt2_layout.KEYS,
    {"positions": "learned", "norm": "layer"},
    write=lambda config: {"architectures": ["GPT2LMHeadModel"]},
    harmless=_harmless,
    aliases=gpt2_layout.ALIASES,
    prefix="transformer.",
    buffers=masks("transformer.h.{layer}.attn."),
    head="lm_head.weight",
    inputs_first=True,
)
