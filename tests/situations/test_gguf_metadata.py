"""GGUF's metadata: every key is read, harmless or refused by name, and a missing one means what it means in llama.cpp."""

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as T

import mijax as mj
from mijax.checkpoints import gguf_metadata, gguf_tokenizer
from mijax.checkpoints.gguf import GGUF
from mijax.model.rotary import frequencies
from tests.situations import refused
from tests.situations.gguf_files import BEGIN, END, PAD, TOKENS, write

TEXT = "hello hello 12345 <|end|>"


def outcome(path):
    """All that is made of the metadata: the config, and what the tokenizer does."""
    file = GGUF(path)
    tokenizer = file.tokenizer()
    template, user = tokenizer.chat_template, [{"role": "user", "content": "hi"}]
    names = template if isinstance(template, dict) else ["default"] if template else []
    rendered = {name: tokenizer.render(user, template=name) for name in names}
    return file.config, tokenizer(TEXT).ids.tolist(), tokenizer.special_tokens, tokenizer.end_tokens, rendered


# ---- every key

other = lambda tokens: [*tokens[:-1], "<|other|>"]
CHANGED = {
    "llama.block_count": (3, T.UINT32), "llama.context_length": (32, T.UINT32), "llama.embedding_length": (12, T.UINT32),
    "llama.feed_forward_length": (24, T.UINT32), "llama.attention.head_count": (4, T.UINT32), "llama.attention.head_count_kv": (1, T.UINT32),
    "llama.attention.layer_norm_rms_epsilon": (1e-6, T.FLOAT32), "llama.attention.key_length": (6, T.UINT32), "llama.attention.value_length": (6, T.UINT32),
    "llama.vocab_size": (3, T.UINT32), "llama.rope.dimension_count": (2, T.UINT32), "llama.rope.freq_base": (1e5, T.FLOAT32),
    "llama.rope.scaling.type": ("yarn", T.STRING), "llama.rope.scaling.factor": (2.0, T.FLOAT32), "llama.rope.scale_linear": (2.0, T.FLOAT32),
    "llama.attention.scale": (0.3, T.FLOAT32), "llama.attention.sliding_window": (4, T.UINT32), "llama.rope.scaling.attn_factor": (1.1, T.FLOAT32),
    "llama.attention.causal": (False, T.BOOL), "llama.attention.clamp_kqv": (8.0, T.FLOAT32), "llama.attention.max_alibi_bias": (8.0, T.FLOAT32),
    "llama.attn_logit_softcapping": (50.0, T.FLOAT32), "llama.final_logit_softcapping": (30.0, T.FLOAT32), "llama.logit_scale": (0.5, T.FLOAT32),
    "llama.residual_scale": (0.5, T.FLOAT32), "llama.embedding_scale": (12.0, T.FLOAT32), "llama.expert_count": (8, T.UINT32),
    "llama.expert_used_count": (2, T.UINT32), "llama.pooling_type": (1, T.UINT32), "llama.use_parallel_residual": (True, T.BOOL),
    "llama.tensor_data_layout": ("other", T.STRING), "general.architecture": ("gpt2", T.STRING), "general.type": ("adapter", T.STRING),
    "general.quantization_version": (1, T.UINT32), "split.no": (1, T.UINT16), "split.count": (2, T.UINT16), "split.tensors.count": (3, T.INT32),
    "tokenizer.ggml.model": ("llama", T.STRING), "tokenizer.ggml.pre": ("gpt-2", T.STRING), "tokenizer.ggml.tokens": (TOKENS[::-1], T.STRING),
    "tokenizer.ggml.token_type": ([3 if t == "hello" else 1 for t in TOKENS], T.INT32), "tokenizer.ggml.merges": (["h e", "4 5"], T.STRING),
    "tokenizer.ggml.bos_token_id": (END, T.UINT32), "tokenizer.ggml.eos_token_id": (PAD, T.UINT32), "tokenizer.ggml.eot_token_id": (PAD, T.UINT32),
    "tokenizer.ggml.eom_token_id": (PAD, T.UINT32), "tokenizer.ggml.unknown_token_id": (PAD, T.UINT32), "tokenizer.ggml.seperator_token_id": (PAD, T.UINT32),
    "tokenizer.ggml.padding_token_id": (PAD, T.UINT32), "tokenizer.ggml.cls_token_id": (PAD, T.UINT32), "tokenizer.ggml.mask_token_id": (PAD, T.UINT32),
    "tokenizer.ggml.add_bos_token": (False, T.BOOL), "tokenizer.ggml.add_eos_token": (True, T.BOOL), "tokenizer.ggml.add_sep_token": (True, T.BOOL),
    "tokenizer.ggml.add_space_prefix": (True, T.BOOL), "tokenizer.ggml.remove_extra_whitespaces": (True, T.BOOL),
    "tokenizer.chat_template": ("{{ messages[0].content }}", T.STRING), "tokenizer.chat_templates": (["rag"], T.STRING),
}  # fmt: skip


def test_the_table_of_changes_has_every_key_that_is_read():
    assert CHANGED.keys() == gguf_metadata.rules("llama")[0].keys() | gguf_tokenizer.KEYS.keys()


@pytest.mark.parametrize("key", CHANGED)
def test_a_changed_key_changes_what_is_loaded_or_is_refused(tmp_path, key):
    plain = {"tokenizer.ggml.pre": "gpt-2"} if key == "tokenizer.ggml.merges" else {}  # llama-bpe looks whole words up
    before = outcome(write(tmp_path / "plain.gguf", plain))
    changed = write(tmp_path / "changed.gguf", plain | {key: CHANGED[key]})
    try:
        after = outcome(changed)
    except ValueError as error:
        assert key in str(error) or "unsupported" in str(error)
    else:
        assert after != before


def names(section=gguf.Keys):
    """Every key of which the gguf package knows (llama.cpp's constants), for a Llama."""
    for value in vars(section).values():
        if isinstance(value, type):
            yield from names(value)
        elif isinstance(value, str) and "." in value and not value.startswith("gguf"):
            yield value.format(arch="llama", id=0, name="rag", dense="x")


KNOWN = {
    **gguf_metadata.rules("llama")[0],
    **gguf_metadata.rules("llama")[1],
    **gguf_tokenizer.KEYS,
    **gguf_tokenizer.HARMLESS,
}
UNKNOWN = sorted(k for k in {*names(), "llama.new_thing", "tokenizer.ggml.new_thing", "new.thing"} if k not in KNOWN and not k.startswith(("general.", "tokenizer.chat_template.")))  # fmt: skip


def test_there_are_many_keys_that_nobody_here_reads():
    assert len(UNKNOWN) > 100 and "llama.rope.scaling.yarn_beta_fast" in UNKNOWN and "llama.ssm.state_size" in UNKNOWN


@pytest.mark.parametrize("start", range(10))
def test_a_key_that_nobody_here_reads_is_refused_by_name(tmp_path, start):
    for key in UNKNOWN[start::10]:
        with refused(ValueError, f"the key {key} .* is not known"):
            outcome(write(tmp_path / "x.gguf", {key: (1, T.UINT32)}))


HARMLESS = {
    "general.name": ("x", T.STRING), "general.file_type": (3, T.UINT32), "general.languages": (["en"], T.STRING), "general.alignment": (64, T.UINT32),
    "quantize.imatrix.file": ("x", T.STRING), "llama.rope.scaling.original_context_length": (32, T.UINT32), "llama.rope.scaling.finetuned": (True, T.BOOL),
    "tokenizer.ggml.scores": ([0.5] * len(TOKENS), T.FLOAT32), "tokenizer.ggml.fim_pre_token_id": (PAD, T.UINT32), "llama.vocab_size": (len(TOKENS), T.UINT32),
    "llama.expert_count": (0, T.UINT32), "llama.attention.scale": (0.5, T.FLOAT32), "llama.rope.scaling.attn_factor": (1.0, T.FLOAT32),
    "llama.rope.scaling.type": ("linear", T.STRING), "llama.attention.sliding_window": (64, T.UINT32), "split.count": (1, T.UINT16),
}  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_without_effect_changes_nothing(tmp_path, key):
    before = outcome(write(tmp_path / "plain.gguf"))
    assert outcome(write(tmp_path / "changed.gguf", {key: HARMLESS[key]})) == before


# ---- positions


def scaled(tmp_path, **changes):
    keys = {"kind": "type", "factor": "scaling.factor", "old": "scale_linear"}
    types = {str: T.STRING, float: T.FLOAT32}
    fields = {
        f"llama.rope.{keys[k] if k != 'kind' else 'scaling.type'}": (v, types[type(v)]) for k, v in changes.items()
    }
    return frequencies(mj.load(write(tmp_path / "x.gguf", fields), tokenizer=False)[0].config.positions)


@pytest.mark.parametrize("changes, factor", [
    ({}, 1), ({"old": 4.0}, 4), ({"factor": 4.0}, 4), ({"kind": "linear", "factor": 4.0}, 4), ({"kind": "linear"}, 1),
    ({"kind": "none", "factor": 4.0}, 1), ({"kind": "linear", "old": 4.0}, 4), ({"factor": 4.0, "old": 4.0}, 4),
])  # fmt: skip
def test_rotary_frequencies_are_divided_as_llama_cpp_does(tmp_path, changes, factor):
    """llama-model.cpp: the type is linear unless given; the factor has an older name; `none` never scales."""
    expected = np.array([1.0, 10_000 ** (-2 / 4)]) / factor
    assert np.allclose(scaled(tmp_path, **changes), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "key", ["llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv"]
)
def test_an_entry_for_each_layer_is_read_where_all_are_equal(tmp_path, key):
    value = {"llama.feed_forward_length": 16}.get(key, 2)
    plain = outcome(write(tmp_path / "plain.gguf", {key: (value, T.UINT32)}))
    assert outcome(write(tmp_path / "x.gguf", {key: ([value] * 2, T.UINT32)})) == plain
    for entries in ([value, value + 2], [value], [value] * 3):
        with refused(ValueError, f"{key} must be the same in each of the layers"):
            GGUF(write(tmp_path / "x.gguf", {key: (entries, T.UINT32)}))


# ---- values

EPS, BASE = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
WRONG = {
    **{f"{key} missing": ({key: None}, f"the key {key} is missing") for key in (
        "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count", EPS,
        "tokenizer.ggml.tokens", "tokenizer.ggml.merges")},
    **{f"{key} of zero": ({key: (0, T.UINT32)}, f"{key} must be a positive integer, given 0") for key in (
        "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count",
        "llama.attention.head_count_kv", "llama.attention.key_length", "llama.vocab_size", "llama.rope.dimension_count")},
    "eps of -1": ({EPS: -1.0}, f"{EPS} must be a number that is not negative, given -1.0"),
    "eps of NaN": ({EPS: float("nan")}, f"{EPS} must be .*, given nan"),
    "eps of infinity": ({EPS: float("inf")}, f"{EPS} must be .*, given inf"),
    "eps as a text": ({EPS: ("1e-5", T.STRING)}, f"{EPS} must be .*, given '1e-5'"),
    "a base of zero": ({BASE: (0.0, T.FLOAT32)}, f"{BASE} must be a positive number, given 0.0"),
    "a negative base": ({BASE: (-1e4, T.FLOAT32)}, f"{BASE} must be a positive number"),
    "a base of NaN": ({BASE: (float("nan"), T.FLOAT32)}, f"{BASE} must be a positive number, given nan"),
    "a factor of zero": ({"llama.rope.scaling.factor": (0.0, T.FLOAT32)}, "scaling.factor must be a positive number, given 0.0"),
    "a negative factor of old": ({"llama.rope.scale_linear": (-1.0, T.FLOAT32)}, "scale_linear must be a positive number"),
    "two factors": ({"llama.rope.scale_linear": (2.0, T.FLOAT32), "llama.rope.scaling.factor": (4.0, T.FLOAT32)}, "rope.scale_linear must be rope.scaling.factor's 4.0, given 2.0"),
    "longrope": ({"llama.rope.scaling.type": ("longrope", T.STRING)}, "rope.scaling.type must be 'none' or 'linear' or 'yarn', given 'longrope'"),
    "heads as a text": ({"llama.attention.head_count": ("2", T.STRING)}, "head_count must be a positive integer, given '2'"),
    "layers as a number with a point": ({"llama.block_count": (2.0, T.FLOAT32)}, "block_count must be a positive integer, given 2.0"),
    "layers as a truth value": ({"llama.block_count": (True, T.BOOL)}, "block_count must be a positive integer, given True"),
    "part of a head rotated": ({"llama.rope.dimension_count": (2, T.UINT32)}, "rope.dimension_count must be the head's size 4, given 2"),
    "values of another length": ({"llama.attention.value_length": (8, T.UINT32)}, "value_length must be the key's length 4, given 8"),
    "heads that do not divide": ({"llama.attention.head_count": 3}, "embedding_length must be a multiple of 3 heads, given 8"),
    "another scale": ({"llama.attention.scale": (1.0, T.FLOAT32)}, r"attention.scale must be 1 / sqrt\(4\), given 1.0"),
    "a window": ({"llama.attention.sliding_window": (16, T.UINT32)}, "sliding_window must not be below the context's 64, given 16"),
    "another vocabulary": ({"llama.vocab_size": (7, T.UINT32)}, f"llama.vocab_size is 7, the file has {len(TOKENS)}"),
    "experts without their number for a token": ({"llama.expert_count": (8, T.UINT32)}, "llama.expert_used_count must be from 1 to expert_count, 8, given None"),
    "experts of a token and none in all": ({"llama.expert_used_count": (2, T.UINT32)}, "llama.expert_count must be above 0"),
    "more layers than tensors": ({"llama.block_count": 4_000_000_000}, "block_count is 4000000000, the file has 20 tensors"),
    "a part of a model": ({"split.count": (3, T.UINT16)}, "split.count must be 1 or 0, given 3"),
    "an adapter": ({"general.type": ("adapter", T.STRING)}, "general.type must be 'model', given 'adapter'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_value_that_cannot_be_is_refused_by_its_key(tmp_path, fault):
    changes, message = WRONG[fault]
    with refused(ValueError, f"x.gguf: .*{message}"):
        mj.load(write(tmp_path / "x.gguf", changes))


@pytest.mark.parametrize(
    "name",
    ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_gate_exps.weight", "cls.weight", "model.norm.weight"],
)
def test_a_tensor_that_nobody_uses_is_refused_by_name(tmp_path, name):
    with refused(ValueError, name):
        mj.load(write(tmp_path / "x.gguf", more={name: np.ones(4, np.float32)}))


def test_a_file_without_embeddings_says_so(tmp_path):
    path = write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight", b"blk.0.attn_q.bias"))
    with refused(ValueError, "x.gguf: the tensor token_embd.weight is missing"):
        mj.load(path)


def test_every_fault_is_told_at_once(tmp_path):
    changes = {EPS: None, BASE: (0.0, T.FLOAT32), "llama.new": (1, T.UINT32)}
    with refused(ValueError, f"the key {EPS} is missing; the key llama.new .1. is not known; {BASE} must be"):
        GGUF(write(tmp_path / "x.gguf", changes))


def test_the_weights_of_a_file_load_without_its_tokenizer(tmp_path):
    changes = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.add_space_prefix": (True, T.BOOL),
        "tokenizer.ggml.new": (1, T.UINT32),
    }
    path = write(tmp_path / "x.gguf", changes)
    with refused(ValueError, r"unsupported tokenizer 'bert' .* mijax.load\(path, tokenizer=False\)"):
        mj.load(path)
    model, tokenizer = mj.load(path, tokenizer=False)
    assert tokenizer is None and np.isfinite(mj.run(model, [[BEGIN, 1, 2]]).logits).all()
