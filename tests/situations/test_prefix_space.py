"""`add_prefix_space` of tokenizer_config.json, which tokenizer.json may contradict."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

import mijax as mj
from tests.situations import refused
from tests.situations.folders import WORDS, backend, write

CONFIG = "tokenizer_config.json"
GPT2, LLAMA, MISTRAL = ({"config.json": {"model_type": kind}} for kind in ("gpt2", "llama", "mistral"))
settings = lambda **entries: {CONFIG: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>", **entries}}
OF_GPT2 = {"tokenizer_class": "GPT2Tokenizer"}

# files, add_prefix_space of tokenizer.json, and whether transformers 5.24's AutoTokenizer puts a space before "ab"
BYTE_LEVEL = {
    "gpt2, nothing said": (GPT2, False, False),
    "gpt2, the key is missing": (GPT2 | settings(), True, False),
    "gpt2, a space": (GPT2 | settings(add_prefix_space=True), False, True),
    "gpt2, no space": (GPT2 | settings(add_prefix_space=False), True, False),
    "gpt2, the class is named": (GPT2 | settings(**OF_GPT2, add_prefix_space=True), False, True),
    "llama of that class": (LLAMA | settings(**OF_GPT2, add_prefix_space=True), False, True),
    "llama of that fast class": (LLAMA | settings(tokenizer_class="GPT2TokenizerFast"), True, False),
    "llama, another class": (LLAMA | settings(tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=True), False, False),
    "llama, the class of sentencepiece": (LLAMA | settings(tokenizer_class="LlamaTokenizer", add_prefix_space=False), True, True),
    "llama, nothing said": (LLAMA | settings(), True, True),
    "mistral of that class": (MISTRAL | settings(**OF_GPT2), True, True),
    "gpt2, a class that reads the file": (GPT2 | settings(tokenizer_class="PreTrainedTokenizerFast"), True, True),
}  # fmt: skip


def byte_level(tmp_path, case):
    files, stored, expected = BYTE_LEVEL[case]
    folder = write(tmp_path / "model", files)
    built = backend()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=stored)
    built.save(str(folder / "tokenizer.json"))
    return folder, [WORDS.index(piece) for piece in (["Ġ"] if expected else []) + ["a", "b"]]


@pytest.mark.parametrize("case", BYTE_LEVEL)
def test_a_space_before_the_text(case, tmp_path):
    folder, ids = byte_level(tmp_path, case)
    tokenizer = mj.Tokenizer.from_folder(folder)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for same in (tokenizer, mj.Tokenizer.from_folder(tmp_path / "saved")):
        assert same("ab").ids.tolist() == [ids]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BYTE_LEVEL)
def test_a_space_before_the_text_is_that_of_transformers(case, tmp_path):
    import transformers

    folder, ids = byte_level(tmp_path, case)
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == ids


def test_a_space_that_is_no_boolean_or_lies_within_a_sequence(tmp_path):
    folder = write(tmp_path / "model", GPT2 | settings(add_prefix_space="false"))
    with refused(ValueError, "tokenizer_config.json: add_prefix_space must be true or false or null, given 'false'"):
        mj.Tokenizer.from_folder(folder)
    built = backend()
    parts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    built.pre_tokenizer = pre_tokenizers.Sequence(parts)
    built.save(str(folder / "tokenizer.json"))
    (folder / CONFIG).write_text("{}")
    with refused(
        ValueError, r"add_prefix_space is false \(the default of GPT2Tokenizer\), but tokenizer.json puts a space"
    ):
        mj.Tokenizer.from_folder(folder)
    (folder / CONFIG).write_text('{"add_prefix_space": true}')
    assert mj.Tokenizer.from_folder(folder)("ab").ids.tolist() == [[WORDS.index(piece) for piece in ("Ġ", "a", "b")]]


# ---- tokenizers that were converted from sentencepiece, as Llama 2's

PIECES = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁▁"]


def sentencepiece(prepends: bool, metaspace: bool = False):
    merges = [("▁", "a"), ("▁", "▁")]
    built = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(PIECES)}, merges, unk_token="<unk>"))
    if metaspace:
        scheme = "always" if prepends else "never"
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        first = [normalizers.Prepend("▁")] if prepends else []
        built.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.add_special_tokens(["<s>", "</s>"])
    return built


def llama2(tmp_path, *how, **entries):
    folder = write(tmp_path / "model", LLAMA | settings(tokenizer_class="LlamaTokenizer", **entries))
    sentencepiece(*how).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("entries", [{}, {"add_prefix_space": True}, {"legacy": False}], ids=str)
def test_llama2_puts_a_space_before_a_text_that_begins_with_one(entries, tmp_path):
    """sentencepiece's `add_dummy_prefix` puts one before every text, whatever it begins with, and so does tokenizer.json.
    (transformers 5 builds another tokenizer of the vocabulary, which puts none before a text with a space.)"""
    tokenizer = mj.Tokenizer.from_folder(llama2(tmp_path, True, **entries))
    pieces = {"a": ["▁a"], " a": ["▁", "▁a"], "  a": ["▁▁", "▁a"], "ab": ["▁a", "b"]}
    for text, expected in pieces.items():
        ids = tokenizer(text, special=False).ids[0].tolist()
        assert ids == [PIECES.index(piece) for piece in expected] and tokenizer.decode(ids) == text


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_llama2_with_files_that_contradict_each_other(stored, metaspace, tmp_path):
    folder = llama2(tmp_path, stored, metaspace, add_prefix_space=not stored)
    which = "a" if stored else "no"
    with refused(
        ValueError, f"add_prefix_space is {json.dumps(not stored)}, but tokenizer.json puts {which} space before"
    ):
        mj.Tokenizer.from_folder(folder)
    (folder / CONFIG).write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": stored}))
    first = "▁a" if stored else "a"
    assert mj.Tokenizer.from_folder(folder)("a").ids.tolist() == [[PIECES.index(first)]]
