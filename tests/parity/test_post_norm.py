"""The original transformer's layer, norms in the stream, against `torch.nn.TransformerEncoderLayer(norm_first=False)`."""

import numpy as np
import pytest

import mijax as mj
from tests.architectures import error, random_model

pytestmark = pytest.mark.parity
CONFIG = mj.Config(
    n_layers=2, d_model=12, n_heads=3, d_vocab=19, n_ctx=16, d_mlp=20, activation="relu", norm_at="stream", final_norm=False,
    positions="none",
)  # fmt: skip


def layer(block, i: int):
    """One layer of torch's with mijax's parameters."""
    import torch

    c = CONFIG
    made = torch.nn.TransformerEncoderLayer(c.d_model, c.n_heads, c.d_mlp, 0.0, "relu", c.norm_eps, batch_first=True)
    attn, mlp = block.attn, block.mlp
    at = lambda x: np.asarray(x[i], np.float64)
    qkv = [at(W).reshape(c.d_model, -1).T for W in (attn.W_Q, attn.W_K, attn.W_V)]
    values = {
        "self_attn.in_proj_weight": np.concatenate(qkv),
        "self_attn.in_proj_bias": np.concatenate([at(b).reshape(-1) for b in (attn.b_Q, attn.b_K, attn.b_V)]),
        "self_attn.out_proj.weight": at(attn.W_O).reshape(-1, c.d_model).T,
        "self_attn.out_proj.bias": at(attn.b_O),
        "linear1.weight": at(mlp.W_in).T, "linear1.bias": at(mlp.b_in), "linear2.weight": at(mlp.W_out).T, "linear2.bias": at(mlp.b_out),
        "norm1.weight": at(block.ln1_post.weight), "norm1.bias": at(block.ln1_post.bias),
        "norm2.weight": at(block.ln2_post.weight), "norm2.bias": at(block.ln2_post.bias),
    }  # fmt: skip
    made = made.double().eval()
    made.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return made


def test_post_norm_is_that_of_torch(x64):
    """float64: both streams of both layers, to 1e-10."""
    import torch

    model, ids = random_model(CONFIG), np.random.default_rng(0).integers(0, 19, (3, 9))
    acts = mj.run(model, ids, capture=("embed", "resid_post")).acts
    x = torch.tensor(np.array(acts["embed"]))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    for i in range(CONFIG.n_layers):
        with torch.no_grad():
            x = layer(model.blocks, i)(x, src_mask=causal)
        assert error(acts["resid_post"][i], x.numpy()) < 1e-10, i
