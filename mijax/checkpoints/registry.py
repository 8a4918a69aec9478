"""The supported families of architectures."""

from collections.abc import Mapping
from typing import Any

from mijax.checkpoints.families.bloom import BLOOM
from mijax.checkpoints.families.falcon import FALCON
from mijax.checkpoints.families.gemma2 import GEMMA2
from mijax.checkpoints.families.gemma3 import GEMMA3
from mijax.checkpoints.families.gpt2 import GPT2
from mijax.checkpoints.families.gpt_neo import GPT_NEO
from mijax.checkpoints.families.gpt_neox import GPT_NEOX
from mijax.checkpoints.families.gpt_oss import GPT_OSS
from mijax.checkpoints.families.gptj import GPTJ
from mijax.checkpoints.families.llama import LLAMA
from mijax.checkpoints.families.mijax import MIJAX
from mijax.checkpoints.families.mistral import MISTRAL
from mijax.checkpoints.families.mixtral import MIXTRAL
from mijax.checkpoints.families.olmo2 import OLMO2
from mijax.checkpoints.families.olmoe import OLMOE
from mijax.checkpoints.families.opt import OPT
from mijax.checkpoints.families.phi import PHI
from mijax.checkpoints.families.phi3 import PHI3
from mijax.checkpoints.families.qwen2 import QWEN2
from mijax.checkpoints.families.qwen2_moe import QWEN2_MOE
from mijax.checkpoints.families.qwen3 import QWEN3
from mijax.checkpoints.families.qwen3_moe import QWEN3_MOE
from mijax.checkpoints.families.smollm3 import SMOLLM3
from mijax.checkpoints.table import Family
from mijax.rules import shown

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        GPT_NEOX,
        GPTJ,
        GPT_NEO,
        OPT,
        BLOOM,
        FALCON,
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        PHI,
        PHI3,
        OLMO2,
        SMOLLM3,
        MIXTRAL,
        QWEN3_MOE,
        QWEN2_MOE,
        OLMOE,
        GPT_OSS,
        MIJAX,
    )
}
"""The families by their `model_type`. `mijax.save` takes the first that expresses a model, so `mijax` comes last."""


ENCODERS = frozenset(
    """
    albert bart bert camembert deberta deberta-v2 distilbert electra longformer marian mbart modernbert mpnet mt5 pegasus
    roberta t5 umt5 vit wav2vec2 whisper xlm-roberta
    """.split()  # noqa: SIM905
)
"""Values of `model_type` that name no decoder-only language model."""


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family that a config's `model_type` names.

    Args:
        config: the contents of a `config.json`.
        source: the name of the checkpoint in the error message.

    Returns:
        The family.

    Raises:
        ValueError: where `model_type` is missing or not supported; with a hint for TransformerLens's configs and encoders.
    """
    kind = config.get("model_type")
    if kind is None and {"d_model", "n_ctx", "act_fn"} <= config.keys():
        raise ValueError(
            f"{source}: config.json is TransformerLens's: give it and the arrays to mijax.from_transformer_lens"
        )
    if not isinstance(kind, str):
        raise ValueError(f"{source}: config.json must name a model_type, given {shown(kind)}")
    if kind in ENCODERS:
        raise ValueError(
            f"{source}: model_type {kind!r} is no decoder: encoders and encoder-decoders are out of mijax's scope"
        )
    if kind not in FAMILIES:
        raise ValueError(f"{source}: unsupported model_type {shown(kind)}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
