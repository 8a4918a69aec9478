"""Activation patching by the loops of TransformerLens's own `patching` module: 2.x or 4.x, whichever is installed.

`with_transformer_lens.py FOLDER [frozen]`: without `frozen`, parameters ask for gradients, as they come.
"""

# pyright: reportMissingImports=false

import sys
from functools import partial
from importlib.metadata import version
from typing import Any

from torch_worker import Case, Run, serve, since
from worker import Told, filled

HEADS = {letter: f"attn_head_{name}_all_pos" for letter, name in
         {"q": "q", "k": "k", "v": "v", "z": "out", "p": "pattern"}.items()}  # fmt: skip
GRIDS = {
    "resid_pre": ["resid_pre"],
    "z_head": [HEADS["z"]],
    "z_head_pos": ["attn_head_out_by_pos"],
    "qkvzp": [HEADS[letter] for letter in "qkvzp"],
    "qzp": [HEADS[letter] for letter in "qzp"],  # with grouped queries, of which k and v have fewer heads
    "k_head": [HEADS["k"]],
    "v_head": [HEADS["v"]],
}
"""The `get_act_patch_*` that make up each grid, stacked where there are several."""

FROZEN = sys.argv[2:] == ["frozen"]
ATTRIBUTED = ("resid_pre", "z", "mlp_out", "attn_out", "q", "k", "v", "pattern")


def load(case: Case) -> Run:
    """The model, and the function that runs a grid on it."""
    model = hooked(case) if version("transformer_lens").startswith("2.") else bridge(case)
    return partial(run, model.requires_grad_(not FROZEN), case)


def hooked(case: Case) -> Any:
    """A `HookedTransformer` (2.x) as `from_pretrained_no_processing` makes it, of a checkpoint on disk."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    c = case.config
    shared = {name: c[name] for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")}
    families: dict[str, tuple[Any, dict[str, Any]]] = {
        "gpt2": (convert_gpt2_weights, {"act_fn": "gelu_new", "normalization_type": "LN"}),
        "llama": (convert_llama_weights, {
            "act_fn": "silu", "normalization_type": "RMS", "final_rms": True, "gated_mlp": True,
            "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "rotary_dim": c["d_head"],
            "rotary_base": c["positions"]["base"] if isinstance(c["positions"], dict) else None,
            "n_ctx": min(c["n_ctx"], 2048),  # as TransformerLens caps Llama: each layer keeps a mask of n_ctx squared
            "n_key_value_heads": c["n_kv_heads"] if c["n_kv_heads"] != c["n_heads"] else None,
        }),
    }  # fmt: skip
    convert, options = families[c["family"]]
    config = HookedTransformerConfig(
        **(shared | options), eps=c["norm_eps"], device=str(case.device), init_weights=False
    )
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert(case.huggingface(), config),
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return model.eval()


def bridge(case: Case) -> Any:
    """A `TransformerBridge` (4.x): `boot_transformers` without its tokenizer, which it would fetch."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = case.huggingface(attn_implementation="eager")  # as boot_transformers has it, for attention patterns
    return build_bridge_from_module(model, model.config.architectures[0], hf_config=model.config).eval()


def run(model: Any, case: Case, grid: str, limit: int | None) -> tuple[Any, Told]:
    """The values of a grid, and what the clean run took of it."""
    from transformer_lens import patching

    if grid == "forward":
        return case.metric(model(case.corrupted)).cpu().numpy(), {}
    if grid == "attribution":
        return attribution(model, case)
    functions = [getattr(patching, f"get_act_patch_{name}") for name in GRIDS[grid]]
    sites = [function.keywords["activation_name"] for function in functions]
    shapes = {shape(model, case, function) for function in functions}
    if len(shapes) > 1:
        raise ValueError(f"the parts of {grid} differ in shape: {shapes}")
    sizes = shapes.pop()

    start = case.seconds()
    names = [patching.utils.get_act_name(site, layer) for site in sites for layer in range(model.cfg.n_layers)]
    _, clean = model.run_with_cache(case.clean, names_filter=names)
    details = since(case, start)

    kept = []

    def metric(logits):
        """What `patching` wants is one number; each example's is kept beside it."""
        kept.append(case.metric(logits).cpu().numpy())
        return kept[-1].mean()

    for function in functions:
        axes = function.keywords["index_axis_names"]
        cells = patching.make_df_from_ranges(sizes, axes)
        if limit is not None:
            cells = cells.head(limit - len(kept))
        if len(cells):
            function(model, case.corrupted, clean, metric, index_axis_names=None, index_df=cells)
    return filled(kept, sizes if len(functions) == 1 else (len(functions), *sizes)), details


def attribution(model: Any, case: Case) -> tuple[Any, Told]:
    """Attribution patching as its author's notebook has it (Nanda 2023): the clean run kept, the corrupted run kept with
    the gradients at the same hooks, and the sum over units of difference times gradient."""
    import torch

    model.zero_grad()
    names = {model_name(site, layer): site for site in ATTRIBUTED for layer in range(model.cfg.n_layers)}
    kept, slopes = {}, {}
    with torch.inference_mode(False), torch.enable_grad():
        model.reset_hooks()
        with torch.no_grad():
            _, clean = model.run_with_cache(case.clean.clone(), names_filter=lambda name: name in names)

        def keep(x, name):
            kept[name] = x.detach()

        def slope(x, name):
            slopes[name] = x.detach()

        hooks = lambda function: [(name, partial(lambda x, hook, name: function(x, name), name=name)) for name in names]
        begin = lambda x, hook: x.detach().requires_grad_()  # where parameters are frozen, the graph begins here
        first = [(model_name("resid_pre", 0), begin)]
        with model.hooks(fwd_hooks=[*(first if FROZEN else []), *hooks(keep)], bwd_hooks=hooks(slope)):
            value = case.metric(model(case.corrupted.clone()))
            value.sum().backward()
    terms = {}
    for site in ATTRIBUTED:
        hook_names = [name for name, of in names.items() if of == site]
        term = torch.stack([(clean[name] - kept[name]) * slopes[name] for name in hook_names])
        terms[site] = term if site == "pattern" else term.sum(dim=-1)
    batch_last = lambda x: x.movedim(1, -1).reshape(-1, x.shape[1])
    values = torch.cat([batch_last(terms[site]) for site in ATTRIBUTED]) + value.detach()
    return values.detach().cpu().numpy(), {"clean": 0.0, "clean_cpu": 0.0}


def model_name(site: str, layer: int) -> str:
    """TransformerLens's name of a hook."""
    from transformer_lens import patching

    return patching.utils.get_act_name(site, layer)


def shape(model: Any, case: Case, function: Any) -> tuple[int, ...]:
    """How many cells a `get_act_patch_*` has along each of its axes."""
    cfg, site = model.cfg, function.keywords["activation_name"]
    heads = cfg.n_heads if site not in ("k", "v") else getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    sizes = {"layer": cfg.n_layers, "pos": case.corrupted.shape[1], "head": heads, "head_index": heads}
    return tuple(sizes[axis] for axis in function.keywords["index_axis_names"])


if __name__ == "__main__":
    grids = ("forward", "attribution", *(() if FROZEN else GRIDS))
    serve("transformer_lens" + ", frozen" * FROZEN, grids, load)
