"""What the families share that are Llama with experts: names of tensors, and keys of the config."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from mijax.checkpoints import llama_layout
from mijax.checkpoints.keys import architectures, only
from mijax.checkpoints.table import Family, Weight, linear, norm
from mijax.model.config import Config
from mijax.model.fields import check_field
from mijax.model.routing import Experts


def expert_mlp(start: str, router: str, names: Mapping[str, str]) -> list[Weight]:
    """The tensors of a mixture of experts with one tensor for each map of each expert.

    Args:
        start: the start of their names.
        router: the name of the router's map.
        names: the names of each expert's maps, by `in`, `gate` and `out`.
    """
    table = linear(("blocks.mlp.W_router", "blocks.mlp.b_router"), start + router, ("n d -> d n", "n -> n"))
    for ours, theirs in names.items():
        table.append(Weight((f"blocks.mlp.W_{ours}",), f"{start}experts.{{expert}}.{theirs}.weight", "o i -> i o"))
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
    if normalise is None:
        normalise = bool(check_field(Experts, "normalise", c.get("norm_topk_prob", False), "norm_topk_prob"))
    sizes = {"n": c[n], "top_k": c.get("num_experts_per_tok", top_k)}
    if shared:
        sizes["shared"] = c.get("shared_expert_intermediate_size", shared)
    checked = {name: check_field(Experts, name, value, name) for name, value in sizes.items()}
    return {"experts": Experts(**checked, normalise=normalise, shared_gate=bool(checked.get("shared")))}


KEYS = frozenset({"num_experts", "num_experts_per_tok", "norm_topk_prob"})
"""The keys of a `config.json` that `with_experts` reads."""


def with_experts(
    name: str,
    architecture: str,
    *,
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]],
    write: Callable[[Config], dict[str, Any]] = lambda config: {},
    further: Collection[str] = (),
    fixed: Mapping[str, Any],
    harmless: Mapping[str, Any],
    **arguments: Any,
) -> Family:
    """A family of Llama's descendants with experts in every layer, each in tensors of its own.

    Args:
        name: the `model_type`.
        architecture: the start of the names of transformers' classes.
        read: what `Family.read` reads beside positions.
        write: the entries beside those of positions and experts.
        further: the keys that are read beside `KEYS` and those of positions.
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
        "further": llama_layout.LAYOUT["further"] | KEYS | frozenset(further),
        "read": lambda c, fields: llama_layout.read_positions(c, fields) | read(c, fields),
    }
    names = architectures(f"{architecture}ForCausalLM", f"{architecture}Model")
    training = dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), lambda value, c: True)
    all_harmless = {**llama_layout.HARMLESS_KEYS, "architectures": names, **training, **harmless}
    return Family(name, write=entries, harmless=all_harmless, **layout, **arguments)


def weights(config: Config) -> list[Weight]:
    """The tensors of such a family, with those of an MLP that all tokens share.

    Args:
        config: the architecture.
    """
    h, maps = llama_layout.LAYER, {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"}
    return [
        *llama_layout.ends(),
        *norm("blocks.ln1", h + "input_layernorm", bias=False),
        *llama_layout.attention(config),
        *norm("blocks.ln2", h + "post_attention_layernorm", bias=False),
        *expert_mlp(h + "mlp.", "gate", maps),
        *llama_layout.gated_mlp(h + "mlp.shared_expert.", "blocks.mlp.shared"),
        Weight(("blocks.mlp.W_shared_gate",), h + "mlp.shared_expert_gate.weight", "1 d -> d"),
    ]


ALL_LAYERS = {
    "decoder_sparse_step": only(1),
    "mlp_only_layers": only([], None),
    "intermediate_size": lambda value, c: True,
}
"""The `harmless` keys of families whose layers may be dense, where none is."""
