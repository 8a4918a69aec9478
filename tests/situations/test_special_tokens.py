"""Special tokens: names and tokens of a text are those that transformers reads of the same folder."""

import jax
import numpy as np
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.folders import WORDS, theirs, write

CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
token = lambda text, **flags: {"content": text, "lstrip": False, "rstrip": False, "single_word": False, **flags}
decoder = lambda i, text, **flags: {
    "added_tokens_decoder": {str(i): token(text, normalized=False, special=True, **flags)}
}

# files, how tokenizer.json is made, the names, the tokens of TEXT with special ones
TEXT = "a<pad> <img>b"
TOKENS = lambda *pieces: [p.replace(" ", "Ġ") for p in pieces]
BARE, IMG = TOKENS("a", *"<pad>", " ", *"<img>", "b"), TOKENS("a", *"<pad>", " ", "<img>", "b")
PAD, BOTH = TOKENS("a", "<pad>", " ", *"<img>", "b"), TOKENS("a", "<pad>", " ", "<img>", "b")
FOLDERS = {
    "nothing beside tokenizer.json": ({}, {}, {}, BARE),
    "the settings": ({CONFIG: {"bos_token": "<s>", "eos_token": "</s>"}}, {}, {"bos_token": "<s>", "eos_token": "</s>"}, BARE),
    "the settings, as objects": ({CONFIG: {"bos_token": {"__type": "AddedToken", **token("<s>")}}}, {}, {"bos_token": "<s>"}, BARE),
    "the map alone": ({MAP: {"bos_token": "<s>", "eos_token": token("</s>")}}, {}, {"bos_token": "<s>", "eos_token": "</s>"}, BARE),
    "the map goes first": ({CONFIG: {"bos_token": "</s>"}, MAP: {"bos_token": "<s>"}}, {}, {"bos_token": "<s>"}, BARE),
    "the map is forgotten": ({CONFIG: {"eos_token": "</s>", **decoder(0, "<s>")}, MAP: {"bos_token": "<s>"}}, {}, {"eos_token": "</s>"}, BARE),
    "a token of the vocabulary becomes special": ({CONFIG: {"pad_token": "<pad>"}}, {}, {"pad_token": "<pad>"}, PAD),
    "every name": ({CONFIG: dict(zip(["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"], ["<s>", "</s>", "<pad>", "<img>", "<s>", "</s>", "<tool>"]))}, {},
                   dict(zip(["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"], ["<s>", "</s>", "<pad>", "<img>", "<s>", "</s>", "<tool>"])), BOTH),
    "a name of the model's own": ({CONFIG: {"image_token": "<img>"}}, {}, {"image_token": "<img>"}, IMG),
    "names of the model's own": ({CONFIG: {"extra_special_tokens": {"image_token": "<img>", "padder": "<pad>"}}}, {}, {"image_token": "<img>", "padder": "<pad>"}, BOTH),
    "saved names of the model's own": ({CONFIG: {"model_specific_special_tokens": {"image_token": "<img>"}}}, {}, {"image_token": "<img>"}, IMG),
    "additional tokens": ({CONFIG: {"additional_special_tokens": ["<img>"]}}, {}, {}, IMG),
    "additional tokens of the map": ({MAP: {"additional_special_tokens": ["<img>", "<pad>"]}}, {}, {}, BOTH),
    "extra tokens of both": ({CONFIG: {"extra_special_tokens": ["<img>"]}, MAP: {"extra_special_tokens": [token("<pad>")]}}, {}, {}, BOTH),
    "the settings' decoder adds": ({CONFIG: decoder(3, "<img>")}, {}, {}, IMG),
    "an older file adds": ({"added_tokens.json": {"<img>": 3}, CONFIG: {"pad_token": "<pad>"}}, {}, {"pad_token": "<pad>"}, BOTH),
    "a token that takes spaces": ({CONFIG: decoder(3, "<img>", lstrip=True) | {"pad_token": "<pad>"}}, {}, {"pad_token": "<pad>"}, TOKENS("a", "<pad>", "<img>", "b")),
    "a post-processor that begins": ({CONFIG: {"bos_token": "<s>"}}, {"begin": True}, {"bos_token": "<s>"}, ["<s>", *BARE]),
    "a post-processor that ends": ({CONFIG: {"eos_token": "</s>"}}, {"end": True}, {"eos_token": "</s>"}, [*BARE, "</s>"]),
    "a post-processor that does both": ({}, {"begin": True, "end": True}, {}, ["<s>", *BARE, "</s>"]),
    "settings that would begin": ({CONFIG: {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}}, {}, {"bos_token": "<s>", "eos_token": "</s>"}, BARE),
    "settings that would not begin": ({CONFIG: {"bos_token": "<s>", "add_bos_token": False}}, {"begin": True}, {"bos_token": "<s>"}, ["<s>", *BARE]),
    "special tokens as text": ({CONFIG: {"pad_token": "<pad>", "split_special_tokens": True}}, {}, {"pad_token": "<pad>"}, BARE),
}  # fmt: skip


def folder_of(path, case):
    files, settings, *_ = FOLDERS[case]
    return write(path / "model", files, **settings)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folders_special_tokens_are_known_by_name_and_cut_out_of_texts(tmp_path, case):
    *_, named, pieces = FOLDERS[case]
    tokenizer = mj.Tokenizer.from_folder(folder_of(tmp_path, case))
    tokenizer.save(tmp_path)
    for same in (tokenizer, mj.Tokenizer.from_folder(tmp_path)):
        assert same.special_tokens == named
        assert same(TEXT).ids.tolist() == [[WORDS.index(piece) for piece in pieces]]
        outside = [p for p in pieces if p not in ("<s>", "</s>")]
        assert same(TEXT, special=False).ids.tolist() == [[WORDS.index(piece) for piece in outside]]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FOLDERS)
def test_a_folders_special_tokens_are_those_of_transformers(tmp_path, case):
    *_, named, pieces = FOLDERS[case]
    folder = folder_of(tmp_path, case)
    tokenizer = mj.Tokenizer.from_folder(folder)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        other = theirs(place)
        assert other.special_tokens_map == named
        assert tuple(other.extra_special_tokens) == tokenizer.extra_special_tokens
        assert other(TEXT)["input_ids"] == [WORDS.index(piece) for piece in pieces]
        for special in (True, False):
            for side in ("left", "right"):
                texts = [TEXT, "a", "</s><pad>"]
                ids = other(texts, add_special_tokens=special)["input_ids"]
                tokens = tokenizer(texts, special=special, padding=side)
                assert [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask)] == ids
                other.pad_token = "<s>"
                padded = other(texts, add_special_tokens=special, padding=True, padding_side=side)
                assert tokens.mask.tolist() == np.array(padded["attention_mask"], bool).tolist()


def test_what_tokenizer_json_pads_with_is_the_padding_token(tmp_path):
    from tests.situations.folders import backend

    folder = write(tmp_path / "model", {})
    padded = backend()
    padded.enable_padding(pad_id=2, pad_token="<pad>")
    padded.save(str(folder / "tokenizer.json"))
    tokenizer = mj.Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"pad_token": "<pad>"} and tokenizer(["a", "bc"]).mask.tolist()[0] == [
        True,
        False,
    ]


# files, and the ids at which the model stops: transformers' generate stops at generation_config.json's, else config.json's
END = {
    "the tokenizer's": ({CONFIG: {"eos_token": "</s>"}}, (1,)),
    "none": ({CONFIG: {"bos_token": "<s>"}}, ()),
    "the model's": ({"config.json": {"eos_token_id": 4}}, (4,)),
    "those of generation": ({CONFIG: {"eos_token": "</s>"}, "generation_config.json": {"eos_token_id": [4, 1]}}, (1, 4)),
    "that of generation before the model's": ({"config.json": {"eos_token_id": 3}, "generation_config.json": {"eos_token_id": 4}}, (4,)),
    "generation says nothing": ({"config.json": {"eos_token_id": [3]}, "generation_config.json": {"do_sample": True}}, (3,)),
}  # fmt: skip


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("wrong", [-1, 50256, 2**40])
def test_an_end_that_is_no_token_is_told_and_left_out(wrong, file, tmp_path):
    """transformers writes 50256 for every GPT-2 and takes -1 for none; neither ends an answer there."""
    folder = write(tmp_path / "model", {file: {"eos_token_id": [4, wrong]}})
    with pytest.warns(
        UserWarning, match=f"{file}: eos_token_id {wrong} is no token of the tokenizer: generate will not"
    ):
        assert mj.Tokenizer.from_folder(folder).end_tokens == (4,)


@pytest.mark.parametrize("case", END)
def test_the_tokens_that_end_an_answer(tmp_path, case):
    files, expected = END[case]
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", files))
    assert tokenizer.end_tokens == expected
    tokenizer.save(tmp_path)
    assert mj.Tokenizer.from_folder(tmp_path).end_tokens == expected


WRONG = {
    "a number as a token": ({CONFIG: {"bos_token": 5}}, "tokenizer_config.json: bos_token must be a token .*, given 5"),
    "an object without content": ({MAP: {"bos_token": {"text": "<s>"}}}, "special_tokens_map.json: bos_token must be"),
    "a text as a list": ({CONFIG: {"additional_special_tokens": "<img>"}}, "tokenizer_config.json: additional_special_tokens must be an array"),
    "a list as a decoder": ({CONFIG: {"added_tokens_decoder": ["<img>"]}}, "added_tokens_decoder must be an object"),
    "an end that is no id": ({"generation_config.json": {"eos_token_id": "</s>"}}, "generation_config.json: eos_token_id must be an integer or an array"),
    "settings cut off": ({CONFIG: '{"bos_token":'}, "tokenizer_config.json is not valid JSON"),
    "a map cut off": ({MAP: "["}, "special_tokens_map.json is not valid JSON"),
    "a map that is a list": ({MAP: []}, "special_tokens_map.json must hold an object, given list"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_names_no_token_is_refused_with_its_file(tmp_path, fault):
    files, message = WRONG[fault]
    folder = write(tmp_path / "model", files)
    with refused(ValueError, message):
        mj.Tokenizer.from_folder(folder)


def test_what_generate_returned_is_read_without_its_padding(tmp_path):
    """The rows of right-padded prompts have their padding in mid-text."""
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", {}))
    config = mj.Config(n_layers=1, d_model=8, n_heads=2, d_vocab=len(WORDS), n_ctx=16)
    done = mj.generate(mj.init(config, jax.random.key(0)), tokenizer(["hello", "hi"]), max_new_tokens=3)
    for i, text in enumerate(["hello", "hi"]):
        real = [WORDS[id] for id, kept in zip(np.asarray(done.ids[i]), np.asarray(done.mask[i])) if kept]
        decoded = tokenizer.decode(done.ids[i], done.mask[i])
        assert decoded == tokenizer.backend.decoder.decode(real) and decoded.startswith(text)


def test_a_mask_that_does_not_fit_the_ids_is_refused(tmp_path):
    tokenizer = mj.Tokenizer.from_folder(write(tmp_path / "model", {}))
    for mask in ([True], [1, 0]):
        with refused(ValueError, r"mask must be boolean of ids' shape \(2,\), given"):
            tokenizer.decode([5, 6], np.array(mask))
