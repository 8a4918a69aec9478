"""Small random models of TransformerLens 2.18, with their logits and activations: what `stored/transformer_lens` holds.

    python3.11 -m venv .venv-tl2 && .venv-tl2/bin/pip install "pip>=25.1" && .venv-tl2/bin/pip install --group peer-tl2
    .venv-tl2/bin/python tests/reference/transformer_lens_models.py write    # the stored models anew
    .venv-tl2/bin/python tests/reference/transformer_lens_models.py check FOLDER    # models that mijax wrote there

Without mijax: its pins clash with TransformerLens's. `tests/checkpoints/test_transformer_lens.py` reads what is stored.
"""

import json
import sys
from pathlib import Path

import numpy as np

STORED = Path(__file__).parent / "stored" / "transformer_lens"
SIZES = {
    "n_layers": 2,
    "d_model": 8,
    "n_ctx": 7,
    "d_head": 4,
    "n_heads": 2,
    "d_vocab": 11,
    "d_mlp": 12,
    "init_weights": False,
}
CONFIGS = {
    "gpt2": {"act_fn": "gelu_new"},
    "folded": {"act_fn": "gelu", "normalization_type": "LNPre"},
    "classifier": {"act_fn": "relu", "normalization_type": None, "attention_dir": "bidirectional", "d_vocab_out": 3, "use_attn_scale": False},
    "attention_only": {"attn_only": True, "normalization_type": None, "positional_embedding_type": "alibi", "act_fn": None, "d_mlp": None},
    "llama": {
        "act_fn": "silu", "normalization_type": "RMS", "final_rms": True, "gated_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 4,
        "rotary_base": 50, "n_key_value_heads": 1, "eps": 0.01,
    },
    "gemma": {
        "act_fn": "gelu_pytorch_tanh", "normalization_type": "RMSPre", "gated_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 2,
        "use_normalization_before_and_after": True, "attn_scores_soft_cap": 1.5, "output_logits_soft_cap": 2.0, "n_key_value_heads": 2,
        "use_qk_norm": True, "attn_scale": 3.0,
    },
    "neo": {"act_fn": "gelu_new", "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"], "parallel_attn_mlp": True, "post_embedding_ln": True},
}  # fmt: skip
IDS = np.array([[1, 2, 3, 4, 5, 6, 10], [7, 8, 9, 10, 0, 1, 2]])
SITES = {
    "resid_pre": "hook_resid_pre", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "pattern": "attn.hook_pattern", "z": "attn.hook_z",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "post": "mlp.hook_post", "resid_post": "hook_resid_post",
}  # fmt: skip


def built(entries):
    """A `HookedTransformer` of a config."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(HookedTransformerConfig.from_dict(dict(entries)))


def write():
    """Draw every parameter, and store the state dict, the config, the logits and the activations."""
    import torch

    STORED.mkdir(parents=True, exist_ok=True)
    for number, (name, arguments) in enumerate(CONFIGS.items()):
        model = built(SIZES | arguments)
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.data = 0.1 + 0.5 * torch.randn(parameter.shape, generator=generator)
        logits, cache = model.run_with_cache(torch.tensor(IDS))
        acts = {}
        for site, hook in SITES.items():
            if f"blocks.0.{hook}" in cache:
                acts[site] = torch.stack([cache[f"blocks.{layer}.{hook}"] for layer in range(2)]).detach().numpy()
        state = {f"state.{key}": value.numpy() for key, value in model.state_dict().items()}
        np.savez(
            STORED / f"{name}.npz", logits=logits.detach().numpy(), **{f"acts.{k}": v for k, v in acts.items()}, **state
        )
        (STORED / f"{name}.json").write_text(json.dumps(model.cfg.to_dict(), default=str, indent=1))


def check(folder):
    """Load state dicts that mijax wrote, strictly, and compare logits."""
    import torch

    for file in sorted(Path(folder).glob("*.npz")):
        arrays = np.load(file)
        model = built(json.loads(file.with_suffix(".json").read_text()))
        state = {key[6:]: torch.tensor(arrays[key]) for key in arrays if key.startswith("state.")}
        model.load_state_dict(state, strict=True)
        logits = model(torch.tensor(IDS)).detach().numpy()
        print(file.stem, float(np.abs(logits - arrays["logits"]).max() / np.abs(logits).max()))


if __name__ == "__main__":
    write() if sys.argv[1] == "write" else check(sys.argv[2])
