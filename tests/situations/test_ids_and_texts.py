"""What goes into a tokenizer and comes out of it: an id or a text that it cannot read is an error, not an empty text."""

import numpy as np
import pytest

import mijax as mj
from tests.situations import refused
from tests.situations.folders import WORDS, backend

pytestmark = pytest.mark.usefixtures("as_a_user")
A = WORDS.index("a")
IDS = {
    "an id beyond the vocabulary": ([A, 99999], ValueError, f"id 99999 is no token of the tokenizer, which has {len(WORDS)}$"),
    "an id beyond 32 bits": ([2**40], ValueError, f"id {2**40} is no token"),
    "what generate gives where nothing is finite": ([A, -1], ValueError, "id -1 is no token .*: generate gives -1 where the logits were not finite"),
    "a negative id": ([-2], ValueError, "id -2 is no token of the tokenizer, which has 261$"),
    "a mask": ([True, False], TypeError, "token ids must be integers, given booleans: a mask is the second argument"),
    "floats": ([float(A)], TypeError, "token ids must be integers, given dtype float64"),
    "a text": ("ab", TypeError, "token ids must be integers, given text"),
    "nothing": (None, TypeError, "token ids must be integers, given dtype object"),
}  # fmt: skip


@pytest.mark.parametrize("case", IDS)
def test_ids_without_a_token(case):
    ids, kind, message = IDS[case]
    tokenizer = mj.Tokenizer(backend())
    for read in (tokenizer.decode, tokenizer.strings):
        with refused(kind, message):
            read(ids)


def test_ids_of_every_kind_are_read_and_padding_is_left_out():
    tokenizer = mj.Tokenizer(backend())
    for ids in ([A, A], np.array([[A], [A]], np.uint8), np.int64(A)):
        assert tokenizer.decode(ids) == "a" * np.size(ids) and tokenizer.strings(ids) == ["a"] * np.size(ids)
    assert tokenizer.decode([]) == "" and tokenizer.strings(np.zeros((0, 2))) == []
    assert tokenizer.decode([A, -1], [True, False]) == "a"


TEXTS = {
    "a dict": ({"a": 1}, TypeError, "prompts must be a text or a list of texts, given dict"),
    "a set, which has no order": ({"a", "b"}, TypeError, "a text or a list of texts, given set"),
    "bytes": (b"ab", TypeError, "a text or a list of texts, given bytes"),
    "a number": (3, TypeError, "a text or a list of texts, given int"),
    "a number in a list": (["a", 3], TypeError, "prompt 1 must be a string, given int"),
    "half of a surrogate pair": (["a", "b\ud800"], ValueError, r"prompt 1 has half of a surrogate pair at 1: 'b\\ud800'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_prompts_that_are_no_texts(case):
    texts, kind, message = TEXTS[case]
    with refused(kind, message):
        mj.Tokenizer(backend())(texts)


@pytest.mark.parametrize("value", ["false", 0, None])
def test_words_and_numbers_for_booleans(value, tmp_path):
    tokenizer = mj.Tokenizer(backend(), "{{ add_generation_prompt }}")
    with refused(TypeError, f"special must be True or False, given {value!r}"):
        tokenizer("ab", special=value)
    with refused(TypeError, f"prompt must be True or False, given {value!r}"):
        tokenizer.chat([[{"role": "user", "content": "a"}]], prompt=value)
    with refused(TypeError, f"tokenizer must be True or False, given {value!r}"):
        mj.load(tmp_path, tokenizer=value)


def test_the_id_of_what_is_no_text():
    with refused(TypeError, "text must be a string, given int"):
        mj.Tokenizer(backend()).token_id(3)
    with refused(ValueError, "text has half of a surrogate pair at 0"):
        mj.Tokenizer(backend()).token_id("\udc00")


def test_special_tokens_of_the_constructor_are_cut_out_before_and_after_saving(tmp_path):
    """One id each, and those are the ids that the saved folder gives."""
    names = {"bos_token": "<s>", "image_token": "<img>", "pad_token": "<new>"}
    tokenizer = mj.Tokenizer(
        backend(), special_tokens=names, extra_special_tokens=["<tool>", "<newer>"], end_tokens=[2]
    )
    tokenizer.save(tmp_path)
    expected = [A, WORDS.index("<img>"), WORDS.index("<tool>"), len(WORDS), len(WORDS) + 1, A]
    for same in (tokenizer, mj.Tokenizer.from_folder(tmp_path)):
        assert same("a<img><tool><new><newer>a").ids.tolist() == [expected]
        assert (same.special_tokens, same.extra_special_tokens, same.end_tokens) == (names, ("<tool>", "<newer>"), (2,))


def test_special_and_end_tokens_that_are_none():
    with refused(TypeError, r"special_tokens must be texts, given \[3\]"):
        mj.Tokenizer(backend(), special_tokens={"eos_token": 3})
    with refused(TypeError, "extra_special_tokens must be texts, given '<img>'"):
        mj.Tokenizer(backend(), extra_special_tokens="<img>")
    for ids, kind, message in (
        ([-1], ValueError, "id -1 is no token"),
        ([999], ValueError, "id 999"),
        (["a"], TypeError, "must be integers"),
    ):
        with refused(kind, message):
            mj.Tokenizer(backend(), end_tokens=ids)
