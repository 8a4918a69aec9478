"""What GPT-2 and GPT-J share: keys of the config and their other names."""

from mijax.checkpoints.keys import ACTIVATIONS, HARMLESS, Key, only

KEYS = {
    "n_layer": Key(("n_layers",)),
    "n_embd": Key(("d_model",)),
    "n_head": Key(("n_heads",)),
    "vocab_size": Key(("d_vocab",)),
    "n_positions": Key(("n_ctx",)),
    "n_inner": Key(("d_mlp",), None),
    "layer_norm_epsilon": Key(("norm_eps",), 1e-5),
    "activation_function": Key(("activation",), "gelu_new", ACTIVATIONS),
    "tie_word_embeddings": Key(("tied_unembed",), True),
}
HARMLESS_KEYS = {**HARMLESS, "scale_attn_weights": only(True)}
ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
