"""The tokenizer of a GGUF file: a text's tokens are llama.cpp's (llama-vocab.cpp), written out by hand; what contradicts itself is refused."""

import pytest
from gguf import GGUFValueType as T

import mijax as mj
from mijax.checkpoints.gguf import GGUF
from tests.situations import refused
from tests.situations.folders import theirs
from tests.situations.gguf_files import END, PAD, TOKENS, write

TEXT = "hello hello 12345é<|end|>"
WHOLE = ["hello", "Ġhello", "Ġ", "123", "45", "Ã", "©", "<|end|>"]  # llama3: digits by three, a space apart from them
SPLIT = ["he", "l", "l", "o", "Ġ", "he", "l", "l", "o", "Ġ", *"12345", "Ã", "©", "<|end|>"]
CASES = {  # changes of the metadata, the tokens of TEXT
    "llama-bpe": ({}, ["<|begin|>", *WHOLE]),
    "llama3": ({"tokenizer.ggml.pre": "llama3"}, ["<|begin|>", *WHOLE]),
    "llama-v3": ({"tokenizer.ggml.pre": "llama-v3"}, ["<|begin|>", *WHOLE]),
    "llama-bpe, said not to begin": ({"tokenizer.ggml.add_bos_token": (False, T.BOOL)}, WHOLE),
    "llama-bpe, said to end": ({"tokenizer.ggml.add_eos_token": (True, T.BOOL)}, ["<|begin|>", *WHOLE, "<|end|>"]),
    "gpt-2": ({"tokenizer.ggml.pre": "gpt-2"}, SPLIT),
    "smollm": ({"tokenizer.ggml.pre": "smollm"}, SPLIT),
    "smollm, said to begin and to end": ({"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": (True, T.BOOL), "tokenizer.ggml.add_eos_token": (True, T.BOOL)},
                                         ["<|begin|>", *SPLIT, "<|end|>"]),
    "smollm, with merges of digits": ({"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["h e", "4 5"]}, SPLIT),
    "gpt-2, with merges of digits": ({"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["h e", "4 5"]}, [*SPLIT[:-5], "45", *SPLIT[-3:]]),
    "special tokens of the user": ({"tokenizer.ggml.token_type": [{"hello": 4}.get(t, 3 if t.startswith("<|") else 1) for t in TOKENS], "tokenizer.ggml.pre": "gpt-2"},
                                   ["hello", "Ġ", "hello", *SPLIT[9:]]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_text_has_the_tokens_that_llama_cpp_gives_it(tmp_path, case):
    changes, pieces = CASES[case]
    _, tokenizer = mj.load(write(tmp_path / "x.gguf", changes))
    tokenizer.save(tmp_path)
    for same in (tokenizer, mj.Tokenizer.from_folder(tmp_path)):
        assert [TOKENS[i] for i in same(TEXT).ids[0]] == pieces
        assert same.decode(same(TEXT, special=False).ids[0]) == TEXT


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_text_has_the_tokens_of_transformers_in_the_saved_folder(tmp_path, case):
    changes, pieces = CASES[case]
    GGUF(write(tmp_path / "x.gguf", changes)).tokenizer().save(tmp_path)
    assert [TOKENS[i] for i in theirs(tmp_path)(TEXT)["input_ids"]] == pieces


def test_names_and_ends_are_those_of_the_file(tmp_path):
    keys = {"padding": PAD, "eot": PAD, "unknown": 0}  # id 0 is "!", ordinary text: it is not cut out of texts
    _, tokenizer = mj.load(
        write(tmp_path / "x.gguf", {f"tokenizer.ggml.{n}_token_id": (i, T.UINT32) for n, i in keys.items()})
    )
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    assert tokenizer.end_tokens == (END, PAD)
    tokenizer.save(tmp_path)
    same = mj.Tokenizer.from_folder(tmp_path)
    assert same.special_tokens == tokenizer.special_tokens and same.end_tokens == (END, PAD)


def test_the_templates_of_a_file_are_known_by_name(tmp_path):
    changes = {"tokenizer.chat_template": ("d{{ bos_token }}", T.STRING), "tokenizer.chat_template.tool_use": ("t", T.STRING), "tokenizer.chat_templates": (["tool_use"], T.STRING)}  # fmt: skip
    _, tokenizer = mj.load(write(tmp_path / "x.gguf", changes))
    user = [{"role": "user", "content": ""}]
    assert tokenizer.render(user) == "d<|begin|>" and tokenizer.render(user, tools=[]) == "t"
    assert [TOKENS[i] for i in tokenizer.chat([user]).ids[0]] == ["d", "<|begin|>"]  # and no second one


LIST, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
WRONG = {
    "fewer tokens than rows": ({LIST: TOKENS[:-1]}, f"{LIST} has {len(TOKENS) - 1} entries, the model's vocabulary {len(TOKENS)}"),
    "more tokens than rows": ({LIST: [*TOKENS, "more"]}, f"{LIST} has {len(TOKENS) + 1} entries"),
    "fewer types": ({TYPES: [1, 1, 1]}, f"{TYPES} has 3 entries"),
    "fewer scores": ({"tokenizer.ggml.scores": ([0.0], T.FLOAT32)}, "tokenizer.ggml.scores has 1 entries"),
    "types of another kind": ({TYPES: [6] * len(TOKENS)}, f"{TYPES} must be an array of 1, 2, 3, 4 or 5, given .6."),
    "types as texts": ({TYPES: (["1"] * len(TOKENS), T.STRING)}, f"{TYPES} must be an array, each entry an integer"),
    "tokens as numbers": ({LIST: ([1, 2], T.INT32)}, f"{LIST} must be an array, each entry a text"),
    "a token twice": ({LIST: [*TOKENS[:-1], "he"]}, f"{LIST} has tokens more than once: .'he'."),
    "a merge of three": ({MERGES: ["h e l"]}, "merges must be two tokens each, .* given .'h e l'."),
    "a merge of one": ({MERGES: ["he"]}, "merges must be two tokens each, .* given .'he'."),
    "a merge of unknown pieces": ({MERGES: ["hell o"]}, "merges must be two tokens each"),
    "a merge to an unknown token": ({MERGES: ["l l"]}, "merges must be two tokens each, that give a third; given .'l l'."),
    "a merge twice": ({MERGES: ["h e", "h e"]}, "has the same merge more than once"),
    "a beginning outside": ({"tokenizer.ggml.bos_token_id": 999}, "tokenizer.ggml.bos_token_id is 999, outside the vocabulary of 264"),
    "an end outside": ({"tokenizer.ggml.eos_token_id": 264}, "eos_token_id is 264, outside the vocabulary of 264"),
    "a padding outside": ({"tokenizer.ggml.padding_token_id": (999, T.UINT32)}, "padding_token_id is 999, outside"),
    "a negative id": ({"tokenizer.ggml.unknown_token_id": (-1, T.INT32)}, "unknown_token_id must be an integer that is not negative, given -1"),
    "an id as a text": ({"tokenizer.ggml.bos_token_id": ("<|begin|>", T.STRING)}, "bos_token_id must be an integer"),
    "a beginning of ordinary text": ({"tokenizer.ggml.bos_token_id": 3}, "bos_token_id is 3, a token of ordinary text"),
    "a beginning without an id": ({"tokenizer.ggml.bos_token_id": None}, r"the key tokenizer.ggml.bos_token_id is missing, .* \(tokenizer.ggml.add_bos_token\)"),
    "an end without an id": ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.add_eos_token": (True, T.BOOL)}, "the key tokenizer.ggml.eos_token_id is missing"),
    "a number as a flag": ({"tokenizer.ggml.add_bos_token": (1, T.UINT32)}, "add_bos_token must be true or false, given 1"),
    "a leading space": ({"tokenizer.ggml.add_space_prefix": (True, T.BOOL)}, "add_space_prefix must be False, given True"),
    "an unknown splitting": ({"tokenizer.ggml.pre": "poro"}, "unsupported tokenizer 'gpt2' with splitting 'poro'"),
    "no splitting": ({"tokenizer.ggml.pre": None}, "with splitting None .tokenizer.ggml.pre."),
    "another tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "unsupported tokenizer 'rwkv'"),
    "a template that is not there": ({"tokenizer.chat_templates": (["rag"], T.STRING)}, "chat_templates names .'rag'., which the file lacks"),
    "a template of numbers": ({"tokenizer.chat_template.rag": (1, T.UINT32)}, "tokenizer.chat_template.rag must be a text, given 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_tokenizer_that_contradicts_itself_is_refused_by_its_key(tmp_path, fault, monkeypatch):
    """Before the weights are read, which takes minutes for a large model."""
    changes, message = WRONG[fault]
    path = write(tmp_path / "x.gguf", changes)
    monkeypatch.setattr(GGUF, "read", lambda *_: pytest.fail("weights were read"))
    with refused(ValueError, f"x.gguf: .*{message}"):
        mj.load(path)
