"""What the families share that are Llama with experts: names of tensors, and keys of the config."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import architectures
from mijax.checkpoints.table import Family, Weight, linear, norm
from mijax.model.config import Config
from mijax.model.routing import Experts
from mijax.rules import COUNT, FLAG, NATURAL, NULL, Rule, array, either


def expert_mlp(start: str, router: str, names: Mapping[str, str]) -> list[Weight]:
    """The tensors of a mixture of experts with one tensor for each map of each expert.

    Args:
        start: the start of their names.
        router: the name of the router's map.
        names: the names of each expert's maps, by `in`, `gate` and `out`.
    """
    table = linear(("blocks.experts.W_router", "blocks.experts.b_router"), start + router, ("n d -> d n", "n -> n"))
    for ours, theirs in names.items():
        table.append(Weight((f"blocks.experts.W_{ours}",), f"{start}experts.{{expert}}.{theirs}.weight", "o i -> i o"))
    return table


def read_experts(
    c: Mapping[str, Any], n: str, top_k: int, normalise: bool | None = None, shared: int = 0
) -> dict[str, Any]:
    """The field `experts`.

    Args:
        c: the contents of `config.json`.
        n: the key of the number of experts.
        top_k: the number of experts that a token uses, where the file gives none.
        normalise: whether their weights sum to one; by default the file's `norm_topk_prob`.
        shared: the neurons of an MLP with a gate, which all tokens use, where the file gives none; 0 for families
            without.
    """
    normalise = bool(c.get("norm_topk_prob", False) if normalise is None else normalise)
    sizes = {"n": c[n], "top_k": c.get("num_experts_per_tok", top_k)}
    if shared:
        sizes["shared"] = c.get("shared_expert_intermediate_size", shared)
    return {"experts": Experts(**sizes, normalise=normalise, shared_gate=bool(sizes.get("shared")))}


KEYS = {
    "num_experts": COUNT, "num_local_experts": COUNT, "num_experts_per_tok": COUNT, "norm_topk_prob": FLAG,
    "shared_expert_intermediate_size": NATURAL,
}  # fmt: skip
"""The keys of a `config.json` that `read_experts` reads, and what they may hold."""
_OF_ALL = {key: KEYS[key] for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob")}


def with_experts(
    name: str,
    architecture: str,
    *,
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]],
    write: Callable[[Config], dict[str, Any]] = lambda config: {},
    further: Mapping[str, Rule] | None = None,
    fixed: Mapping[str, Any],
    harmless: Mapping[str, Any],
    **arguments: Any,
) -> Family:
    """A family of Llama's descendants with experts, each in tensors of its own.

    Args:
        name: the `model_type`.
        architecture: the start of the names of transformers' classes.
        read: what `Family.read` reads beside positions.
        write: the entries beside those of positions and experts.
        further: the keys that are read beside those of positions and of the number of experts, and what they may hold.
        fixed: as in `Family`, beside those of a family without biases.
        harmless: as in `Family`, beside Llama's.
        **arguments: further arguments of `Family`.
    """

    def entries(config: Config) -> dict[str, Any] | None:
        e = config.experts
        if e is None:
            return None
        sizes = {"num_experts": e.n, "num_experts_per_tok": e.top_k, "norm_topk_prob": e.normalise}
        return {**llama_layout.write_as(f"{architecture}ForCausalLM", config), **sizes, **write(config)}

    layout = llama_layout.LAYOUT | {
        "weights": weights,
        "fixed": {**llama_layout.FIXED, **fixed},
        "further": {**llama_layout.LAYOUT["further"], **_OF_ALL, **(further or {})},
        "read": lambda c, fields: llama_layout.read_positions(c, fields) | read(c, fields),
    }
    names = architectures(f"{architecture}ForCausalLM", f"{architecture}Model")
    training = dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), lambda value, c: True)
    all_harmless = {**llama_layout.HARMLESS_KEYS, "architectures": names, **training, **harmless}
    return Family(name, write=entries, harmless=all_harmless, **layout, **arguments)


def weights(config: Config) -> list[Weight]:
    """The tensors of such a family, with those of an MLP that all tokens share, and of layers without experts.

    Args:
        config: the architecture.
    """
    h, maps = llama_layout.LAYER, {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        *llama_layout.attention(config),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        *llama_layout.gated_mlp(),
        *expert_mlp(h + "mlp.", "gate", maps),
        *llama_layout.gated_mlp(h + "mlp.shared_expert.", "blocks.experts.shared"),
        Weight(("blocks.experts.W_shared_gate",), h + "mlp.shared_expert_gate.weight", "1 d -> d"),
    ]


DENSE_KEYS = {
    "decoder_sparse_step": COUNT, "mlp_only_layers": either(array(NATURAL), NULL), "intermediate_size": COUNT,
    "moe_intermediate_size": COUNT,
}  # fmt: skip
"""The keys of a `config.json` that `read_dense` reads, and what they may hold."""


def read_dense(c: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `experts`, `dense_layers` and `d_mlp` of a family whose layers may be dense.

    Args:
        c: the contents of `config.json`.
        fields: the fields read so far, with `experts`.
    """
    step, listed, n = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or []), fields["n_layers"]
    width = c["moe_intermediate_size"]
    dense = tuple(layer for layer in range(n) if layer in listed or (layer + 1) % step)
    if not dense:
        return {"d_mlp": width}
    experts = None if len(dense) == n else dataclasses.replace(fields["experts"], d_mlp=width)
    return {"d_mlp": c["intermediate_size"], "experts": experts, "dense_layers": dense if experts else ()}


def write_dense(config: Config) -> dict[str, Any]:
    """The entries from which `read_dense` reads.

    Args:
        config: the config of a model with experts.
    """
    of_experts = {"moe_intermediate_size": config.d_expert}
    dense = {"mlp_only_layers": list(config.dense_layers), "intermediate_size": config.d_mlp}
    return of_experts | (dense if config.dense_layers else {})
