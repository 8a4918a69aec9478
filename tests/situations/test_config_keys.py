"""A key of config.json is ignored: each is read, harmless at its value, or an error by name."""

import json

import jax
import pytest

import mijax as mj
from mijax.checkpoints.keys import HARMLESS
from mijax.checkpoints.registry import FAMILIES
from tests.architectures import error
from tests.reference.tiny_models import MODELS, STORED, inputs
from tests.situations import refused
from tests.situations.checkpoints import copy, logits, set_config, stored_logits

BASES = {"gpt2": "gpt2", "llama": "llama_gqa", "mistral": "mistral"}  # of each family, a stored checkpoint
_ROTARY = {
    "rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "original_max_position_embeddings": 8,
}  # fmt: skip
_MISTRAL = _ROTARY | {
    "num_hidden_layers": 2, "hidden_size": 20, "intermediate_size": 41, "num_attention_heads": 2, "num_key_value_heads": 4,
    "head_dim": 4, "vocab_size": 60, "max_position_embeddings": 8, "rms_norm_eps": 0.5, "hidden_act": "relu",
    "tie_word_embeddings": True,
}  # fmt: skip
READ = {  # of each key that is read, another value than the checkpoint's
    "gpt2": {
        "n_layer": 2, "n_embd": 48, "n_head": 4, "vocab_size": 60, "n_positions": 8, "n_inner": 30, "layer_norm_epsilon": 0.5,
        "activation_function": "relu", "tie_word_embeddings": False,
    },
    "llama": _MISTRAL | {"attention_bias": True, "mlp_bias": True},
    "mistral": _MISTRAL | {"sliding_window": 4},
}  # fmt: skip
EACH_READ = [(kind, key) for kind, keys in READ.items() for key in keys]


def test_every_key_that_is_read_is_tested_here():
    assert {kind: set(keys) for kind, keys in READ.items()} == {
        kind: {*FAMILIES[kind].keys, *FAMILIES[kind].further} for kind in READ
    }


@pytest.mark.parametrize("kind, key", EACH_READ, ids=lambda x: str(x))
def test_change_a_key(kind, key, tmp_path):
    """The logits change, or an error or a warning says that it does not fit the rest."""
    folder = set_config(copy(tmp_path, BASES[kind]), **{key: READ[kind][key]})
    try:
        changed = error(logits(mj.load(folder)[0]), stored_logits(BASES[kind]))
    except (ValueError, UserWarning):
        return
    assert changed > 1e-3


KEPT_OUT = {  # values of keys that mijax does not read, at which they would change what a model computes
    "gpt2": {
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_ctx": 8,
        "max_position_embeddings": 8, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    },
    "llama": {"pretraining_tp": 2, "rope_interleaved": True, "sliding_window": 4},
    "mistral": {"pretraining_tp": 2, "rope_interleaved": True, "attention_bias": True, "mlp_bias": True},
}  # fmt: skip
_EVERYWHERE = {
    "add_cross_attention": True, "is_causal": False, "is_encoder_decoder": True, "pruned_heads": {"0": [1]},
    "layer_types": ["full_attention", "sliding_attention", "full_attention"], "architectures": ["SomethingElse"],
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}, "cross_attention_hidden_size": 3, "tie_encoder_decoder": True,
    "quantization_config": {"bits": 4}, "compression_config": {"format": "pack-quantized"}, "attention_multiplier": 0.5,
    "per_layer_config": {"0": {"rms_norm_eps": 0.1}}, "logit_scale": 2.0, "some_new_key": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, key", [(kind, key) for kind in BASES for key in KEPT_OUT[kind] | _EVERYWHERE], ids=lambda x: str(x)
)
def test_set_a_key_that_is_not_read(kind, key, tmp_path):
    value = (KEPT_OUT[kind] | _EVERYWHERE)[key]
    folder = set_config(copy(tmp_path, BASES[kind]), **{key: value})
    with refused(ValueError, rf"config.json .*{key}={str(value)[:3].replace('[', '.')}"):
        mj.load(folder)


@pytest.mark.parametrize("kind", BASES)
def test_every_harmless_key_at_once(kind, tmp_path):
    """Those that are harmless at any value, at strange ones: transformers' logits, to the bit as without them."""
    folder = copy(tmp_path, BASES[kind])
    before = logits(mj.load(folder)[0])
    strange = {key: 7 for key, harmless in HARMLESS.items() if harmless(object(), {})} | {"model_type": kind}
    set_config(folder, **strange, quantization_config=None, auto_map={"AutoTokenizer": "x.Y"}, unknown_and_absent=None)
    assert len(strange) > 60 and (logits(mj.load(folder)[0]) == before).all()
    assert error(before, stored_logits(BASES[kind])) < 1e-4


# ---- configs as they stand on the hub, with the sizes of our tiny checkpoints

HUB = {
    "openai-community/gpt2": ("gpt2", {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 24, "n_embd": 24, "n_head": 3, "n_layer": 3, "n_positions": 24, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 61,
    }),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama_mha", {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.041666666666666664, "intermediate_size": 40,
        "is_llama_config": True, "max_position_embeddings": 24, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 3, "num_key_value_heads": 4, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 10000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3", "use_cache": True,
        "vocab_size": 61,
    }),
    "huggyllama/llama-7b, before rope_theta": ("llama_gqa", {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "head_dim": 10, "hidden_act": "silu",
        "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 24,
        "max_sequence_length": 24, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 61,
    }),
    "meta-llama/Llama-3.1-8B": ("llama3_rope", {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02,
        "intermediate_size": 40, "max_position_embeddings": 24, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 2,
        "num_hidden_layers": 3, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 12,
                         "rope_type": "llama3"},
        "rope_theta": 100.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
        "use_cache": True, "vocab_size": 61,
    }),
    "mistralai/Mistral-7B-v0.1": ("mistral", {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "gelu", "hidden_size": 24,
        "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 24, "model_type": "mistral",
        "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
        "use_cache": True, "vocab_size": 61,
    }),
}  # fmt: skip


@pytest.mark.parametrize("hub_id", HUB)
def test_load_a_config_of_the_hub(hub_id, tmp_path):
    name, config = HUB[hub_id]
    folder = copy(tmp_path, name)
    (folder / "config.json").write_text(json.dumps(config))
    assert error(logits(mj.load(folder)[0]), stored_logits(name)) < 1e-4


# ---- rotary positions, which have an old and a new spelling


def test_say_the_rotary_base_twice_and_differently(tmp_path):
    folder = set_config(copy(tmp_path, "llama_gqa"), rope_theta=500.0)
    with refused(ValueError, "rope_theta is 500.0 in config.json, and 10000.0 elsewhere"):
        mj.load(folder)


def test_say_the_rotary_scaling_twice_and_differently(tmp_path):
    folder = set_config(copy(tmp_path, "llama3_rope"), rope_scaling={"type": "linear", "factor": 4.0})
    with refused(ValueError, "rope_type is 'linear' in rope_scaling, and 'llama3' elsewhere"):
        mj.load(folder)


def test_say_the_rotary_scaling_twice_and_alike(tmp_path):
    folder = copy(tmp_path, "llama3_rope")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    set_config(folder, rope_scaling=rope, rope_theta=100, original_max_position_embeddings=12)
    assert error(logits(mj.load(folder)[0]), stored_logits("llama3_rope")) < 1e-4


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "linear", "factor": 2.0, "attention_factor": 3.0}, "'linear' has no attention_factor=3.0"),
        ({"factor": 2.0}, "'default' has no factor=2.0"),
        ({"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}, "lacks the entry 'low_freq_factor'"),
        ({"full_attention": {"rope_type": "default"}}, "has no full_attention="),
        ("linear", "rope_parameters='linear' must be an object or null"),
        ({"rope_type": "su", "factor": 2.0}, "unsupported rotary scaling 'su'"),
        ({"rope_type": "yarn"}, "lacks the entry 'factor'"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}, "high_freq=0.5 must be above low_freq=1.0"),
    ],
)
def test_rotary_scaling_with_a_key_too_many_or_too_few(rope, message, tmp_path):
    with refused(ValueError, message):
        mj.load(set_config(copy(tmp_path, "llama_gqa"), rope_parameters=rope))


def test_llama3_scaling_without_its_original_context(tmp_path):
    """transformers then takes the whole context, here 24."""
    said, unsaid = (copy(tmp_path / name, "llama3_rope") for name in ("said", "unsaid"))
    rope = json.loads((said / "config.json").read_text())["rope_parameters"] | {"original_max_position_embeddings": 24}
    set_config(said, rope_parameters=rope)
    del rope["original_max_position_embeddings"]
    set_config(unsaid, rope_parameters=rope)
    assert (logits(mj.load(said)[0]) == logits(mj.load(unsaid)[0])).all()


@pytest.mark.parametrize("name", ["llama_gqa", "mistral"])
@pytest.mark.parametrize("place", ["config.json", "rope_parameters", "rope_scaling"])
def test_rotate_part_of_each_head(place, name, tmp_path):
    """transformers ignores the key in these families: all of a head is rotated, or the file is refused."""
    for share, good in ((1, True), (1.0, True), (0.4, False)):
        part = {"partial_rotary_factor": share}
        rope = {"rope_type": "default", "rope_theta": 10000.0} | (part if place != "config.json" else {})
        entries = part if place == "config.json" else {place: rope}
        folder = set_config(copy(tmp_path, name), **entries)
        if good:
            assert error(logits(mj.load(folder)[0]), stored_logits(name)) < 1e-4
            continue
        with refused(ValueError, r"partial_rotary_factor=0.4 must be 1: this family rotates all dimensions of a head"):
            mj.load(folder)


def test_a_window_that_is_left_out_is_that_of_transformers(tmp_path):
    """4096 in a Mistral config: nothing for a context of 24, but not for one of 8192."""
    folder = set_config(copy(tmp_path, "mistral"), remove=("sliding_window",))
    assert error(logits(mj.load(folder)[0]), stored_logits("mistral")) < 1e-4
    set_config(folder, max_position_embeddings=8192)
    assert mj.load(folder)[0].config.window == 4096
    set_config(folder, sliding_window=8192)
    assert mj.load(folder)[0].config.window == 0
    for nonsense in (0, -1, 2.0, True, "4096"):
        with refused(ValueError, "must be a positive integer or null"):
            mj.load(set_config(folder, sliding_window=nonsense))


def test_an_unknown_key_in_our_own_layout(tmp_path):
    model = mj.init(mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=11, n_ctx=16, parallel=True), jax.random.key(0))
    with pytest.warns(UserWarning, match="own format"):
        mj.save(model, tmp_path / "model")
    set_config(tmp_path / "model", paralel=False)
    with refused(ValueError, "unsupported mijax config: paralel=False"):
        mj.load(tmp_path / "model")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_all_keys_that_transformers_writes_are_known(name, tmp_path):
    """Also those that it leaves out of its files."""
    import transformers

    kind, _ = MODELS[name]
    written = getattr(transformers, kind).from_pretrained(STORED / name).to_dict()
    folder = copy(tmp_path, name)
    (folder / "config.json").write_text(json.dumps(written, default=str))
    assert error(logits(mj.load(folder)[0]), stored_logits(name)) < 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, key", EACH_READ, ids=lambda x: str(x))
def test_change_a_key_for_transformers(kind, key, tmp_path):
    """Where both load the changed checkpoint they agree."""
    import transformers

    from tests.reference.tiny_models import outputs

    folder = set_config(copy(tmp_path, BASES[kind]), **{key: READ[kind][key]})
    try:
        ours, _ = mj.load(folder)
        with_both = logits(ours)
    except ValueError:
        pytest.skip("refused")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    ).eval()
    assert error(with_both, outputs(theirs, *inputs("none"))["logits"]) < 1e-4
