"""OPT-350m's layout: embeddings narrower than the stream, and the matrices between them, multiplied out when read."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mijax as mj
from tests.architectures import error

WIDTH, EMBEDDING, HEAD = 5, "model.decoder.embed_tokens.weight", "lm_head.weight"
IN, OUT = "model.decoder.project_in.weight", "model.decoder.project_out.weight"


@pytest.fixture
def folder(tmp_path):
    """A saved OPT with norms in the stream, whose embedding is replaced by a narrow one."""
    config = mj.Config(
        n_layers=2, d_model=8, n_heads=2, d_vocab=11, n_ctx=9, activation="relu", norm_at="stream", final_norm=False
    )
    saved = tmp_path / "opt"
    assert mj.save(mj.init(config, jax.random.key(0)), saved) == "opt"
    change(saved, {"word_embed_proj_dim": WIDTH}, narrow())
    return saved


def narrow():
    rng = np.random.default_rng(0)
    shapes = {EMBEDDING: (11, WIDTH), IN: (8, WIDTH), OUT: (WIDTH, 8)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def change(folder, keys, tensors):
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    kept = load_file(folder / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors")


def test_embedding_and_unembedding_are_the_products(folder):
    """float32 products of 5 numbers: 1e-6."""
    model, x = mj.load(folder)[0], narrow()
    assert error(model.W_E, x[EMBEDDING] @ x[IN].T) < 1e-6
    assert error(model.W_U, x[EMBEDDING] @ x[OUT]) < 1e-6 and not model.config.tied_unembed


def test_an_unembedding_of_its_own(folder):
    head = np.random.default_rng(1).normal(size=(11, WIDTH)).astype(np.float32)
    change(folder, {"tie_word_embeddings": False}, {HEAD: head})
    model, x = mj.load(folder)[0], narrow()
    assert error(model.W_U, head @ x[OUT]) < 1e-6
    assert error(model.W_E, x[EMBEDDING] @ x[IN].T) < 1e-6


def test_a_checkpoint_of_the_bare_model(folder):
    x = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in x.items()}, folder / "model.safetensors")
    assert error(mj.load(folder)[0].W_U, x[EMBEDDING] @ x[OUT]) < 1e-6


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({}, {IN: None}, "does not hold model.decoder.project_in.weight"),
        ({}, {IN: None, OUT: None}, "does not hold model.decoder.project_in.weight, model.decoder.project_out.weight"),
        ({"word_embed_proj_dim": 6}, {}, r"must be \[vocab, 6\]"),
        ({}, {OUT: np.zeros((8, WIDTH), np.float32)}, r"\(5, 8\)"),
        ({"word_embed_proj_dim": 8}, {}, "unexpected model.decoder.project_in.weight"),
        ({"word_embed_proj_dim": None}, {}, "unexpected model.decoder.project_in.weight"),
        ({"word_embed_proj_dim": True}, {}, "must be a positive integer"),
        ({"word_embed_proj_dim": 5.0}, {}, "must be a positive integer"),
    ],
)
def test_what_does_not_fit_together(folder, keys, tensors, message):
    change(folder, keys, tensors)
    with pytest.raises(ValueError, match=message):
        mj.load(folder)
