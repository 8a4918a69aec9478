"""Tokenizers rebuilt from GGUF files, against the `tokenizers` models that they were written from, trained here on a page of texts."""

import numpy as np
import pytest
import tokenizers
from gguf import GGUFValueType as T
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

import mijax as mj
from tests.situations import refused
from tests.situations.gguf_files import write

PAGE = [
    "The quick brown fox didn't jump over 12345 lazy dogs; it's 3.14159, isn't it?",
    "Größe, façade, naïve, cafe\u0301 (composed: café), Ångström, ﬁn, İstanbul, ŒUVRE",
    "Москва слезам не верит. Αθήνα, Ελλάδα. שלום עולם. السلام عليكم. नमस्ते दुनिया",
    "日本語のテキストと漢字、中文文本。한국어 텍스트 ไทย",
    "👋🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🤖 a👍b \u200d \ufeff \u00a0 x²₃ ½",
    "def f(x):\n\tif x >= 10_000:\n        return {'a': [1, 2,  3]}  # comment\n\n\n\r\n  # end  \n",
    "   leading, trailing   ", " one", "", " ", "\n\n", "\t tab \t", "aaaaaaaaaaaaaaaa", "don't DON'T I'LL we'Ve", "1 22 333 4444 55555",
    "https://example.org/a?b=c&d=%20e <html lang=\"en\">&amp;</html> \\frac{1}{2} $x_i^2$",
]  # fmt: skip
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = [  # of tiktoken's o200k_base
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""", r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""", r"""\s*[\r\n]+""", r"""\s+(?!\S)""", r"""\s+""",
]  # fmt: skip
_bytes = lambda pattern: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
SPLITTINGS = {  # as in the tokenizer.json of the models on the hub
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": _bytes(LLAMA3),
    "qwen2": _bytes(QWEN2),
    "gpt-4o": _bytes("|".join(O200K)),
}  # fmt: skip


def written(tmp_path, fields, n_vocab):
    """The tokenizer of a file with a vocabulary of this size."""
    embedding = {"token_embd.weight": np.zeros((n_vocab, 8), np.float32)}
    names = ("bos_token_id", "eos_token_id", "merges", "pre")
    fields = {**{f"tokenizer.ggml.{name}": None for name in names}, **fields}
    return mj.load(write(tmp_path / "x.gguf", fields, embedding))[1]


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_byte_level_bpe(pre, tmp_path):
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    theirs.pre_tokenizer, theirs.decoder = SPLITTINGS[pre], decoders.ByteLevel()
    if pre == "qwen2":
        theirs.normalizer = normalizers.NFC()
    theirs.train_from_iterator(PAGE, trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))  # fmt: skip
    theirs.add_special_tokens(["<|end|>"])
    vocabulary = theirs.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in _merges(theirs)]
    kinds = [3 if token == "<|end|>" else 1 for token in tokens]
    ours = written(tmp_path, {
        "tokenizer.ggml.pre": (pre, T.STRING), "tokenizer.ggml.tokens": (tokens, T.STRING), "tokenizer.ggml.token_type": (kinds, T.INT32),
        "tokenizer.ggml.merges": (merges, T.STRING), "tokenizer.ggml.add_bos_token": (False, T.BOOL),
    }, len(tokens))  # fmt: skip
    check(ours, theirs)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    """Llama 2's tokenizer begins a text with a space, Gemma's does not. The scores are the negative ranks, as SentencePiece has them."""
    spaces, strip = normalizers.Replace(" ", "▁"), [decoders.Strip(" ", 1, 0)] if prefix else []
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(
        PAGE[:3], trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False)
    )
    # of each token, all pairs that give it, by its rank: what transformers makes of a SentencePiece model
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    pieces = {t for t in tokens if t not in special}
    pairs = lambda t: sorted([(t[:i], t[i:]) for i in range(1, len(t)) if {t[:i], t[i:]} <= pieces], key=lambda p: (vocabulary[p[0]], vocabulary[p[1]]))  # fmt: skip
    merges = [pair for token in tokens if token in pieces for pair in pairs(token)]
    theirs = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    theirs.normalizer = normalizer
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    kinds = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t in special else 1 for t in tokens]
    ours = written(tmp_path, {
        "tokenizer.ggml.model": ("llama", T.STRING), "tokenizer.ggml.tokens": (tokens, T.STRING), "tokenizer.ggml.token_type": (kinds, T.INT32),
        "tokenizer.ggml.scores": ([-float(i) for i in range(len(tokens))], T.FLOAT32), "tokenizer.ggml.add_space_prefix": (prefix, T.BOOL),
        "tokenizer.ggml.add_bos_token": (False, T.BOOL),
    }, len(tokens))  # fmt: skip
    assert any(
        token in special[3:] for text in PAGE[3:] for token in theirs.encode(text).tokens
    )  # what is not in the vocabulary: its bytes
    check(ours, theirs)


@pytest.mark.parametrize("prefix, whitespace", [(True, True), (False, False)])
def test_unigram(prefix, whitespace, tmp_path):
    """Trained by the library; set up as transformers sets up a SentencePiece model."""
    steps = [(r"\A +| +\z", ""), (" {2,}", " ")] if whitespace else []
    steps = [normalizers.Replace(Regex(pattern), by) for pattern, by in steps]
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence(steps)
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always" if prefix else "never")
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(PAGE[:3], trainer)
    import json

    pieces = json.loads(trained.to_str())["model"]["vocab"]
    tokens, scores = [token for token, _ in pieces], [float(np.float32(score)) for _, score in pieces]
    theirs = tokenizers.Tokenizer(models.Unigram(list(zip(tokens, scores)), 2, True))
    theirs.normalizer, theirs.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    theirs.add_special_tokens(["<pad>", "</s>", "<unk>"])
    kinds = [2 if t == "<unk>" else 3 if t in special[:2] else 6 if t in special else 1 for t in tokens]
    fields = {
        "tokenizer.ggml.model": ("t5", T.STRING), "tokenizer.ggml.tokens": (tokens, T.STRING), "tokenizer.ggml.token_type": (kinds, T.INT32),
        "tokenizer.ggml.scores": (scores, T.FLOAT32), "tokenizer.ggml.add_space_prefix": (prefix, T.BOOL),
        "tokenizer.ggml.remove_extra_whitespaces": (whitespace, T.BOOL), "tokenizer.ggml.add_eos_token": (False, T.BOOL),
    }  # fmt: skip
    ours = written(tmp_path, fields, len(tokens))
    check(ours, theirs)
    # the end token is added unless the file says otherwise, as in llama.cpp
    del fields["tokenizer.ggml.add_eos_token"]
    with refused(
        ValueError, "the key tokenizer.ggml.eos_token_id is missing, although it is to be added to every text"
    ):
        written(tmp_path, fields, len(tokens))
    ended = written(tmp_path, {**fields, "tokenizer.ggml.eos_token_id": (1, T.UINT32)}, len(tokens))
    assert ended(PAGE[0]).ids[0].tolist() == [*theirs.encode(PAGE[0]).ids, 1]


@pytest.mark.parity
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("whitespace", [True, False])
def test_unigram_of_sentencepiece(rule, whitespace, prefix, tmp_path):
    """A model that SentencePiece trained gives its tokens, or others of the same score (in float32, 1e-4)."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    (tmp_path / "page.txt").write_text("\n".join(PAGE * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "page.txt"), model_prefix=str(tmp_path / "x"), vocab_size=500, model_type="unigram", byte_fallback=True, minloglevel=3,
        remove_extra_whitespaces=whitespace, add_dummy_prefix=prefix, normalization_rule_name=rule, hard_vocab_limit=False,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "x.model"))
    model = proto.ModelProto.FromString((tmp_path / "x.model").read_bytes())
    scores = np.array([piece.score for piece in model.pieces])
    table = list(model.normalizer_spec.precompiled_charsmap)
    ours = written(tmp_path, {
        "tokenizer.ggml.model": ("t5", T.STRING), "tokenizer.ggml.tokens": ([piece.piece for piece in model.pieces], T.STRING),
        "tokenizer.ggml.token_type": ([piece.type for piece in model.pieces], T.INT32), "tokenizer.ggml.scores": (scores.tolist(), T.FLOAT32),
        "tokenizer.ggml.add_space_prefix": (prefix, T.BOOL), "tokenizer.ggml.remove_extra_whitespaces": (whitespace, T.BOOL),
        "tokenizer.ggml.add_eos_token": (False, T.BOOL), **({"tokenizer.ggml.precompiled_charsmap": (table, T.UINT8)} if table else {}),
    }, len(scores))  # fmt: skip
    page = [
        text.replace("\r\n", "\n") for text in PAGE
    ]  # by tables, Hugging Face's library replaces "\r\n" as one character
    texts = [text for text in (*page, "\n".join(page)) if theirs.encode(text)]
    assert len(texts) > 10
    for text in texts:
        mine, other = ours(text).ids[0].tolist(), theirs.encode(text)
        assert mine == other or abs(scores[mine].sum() - scores[other].sum()) < 1e-4, text


BAD_UNIGRAMS = {
    "a score that is not finite": ({"tokenizer.ggml.scores": ([0.0, 0.0, -1.0, float("nan")], T.FLOAT32)}, "tokenizer.ggml.scores must be an array, each entry a finite number"),
    "a table that is none": ({"tokenizer.ggml.precompiled_charsmap": ([1, 2, 3], T.UINT8)}, "the tokenizer cannot be built"),
    "no unknown token": ({"tokenizer.ggml.token_type": ([1, 3, 1, 1], T.INT32)}, r"token_type marks no token as unknown \(2\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_UNIGRAMS)
def test_bad_unigrams(name, tmp_path):
    changed, message = BAD_UNIGRAMS[name]
    fields = {
        "tokenizer.ggml.model": ("t5", T.STRING), "tokenizer.ggml.tokens": (["<unk>", "</s>", "▁", "a"], T.STRING),
        "tokenizer.ggml.token_type": ([2, 3, 1, 1], T.INT32), "tokenizer.ggml.scores": ([0.0, 0.0, -1.0, -2.0], T.FLOAT32),
        "tokenizer.ggml.add_eos_token": (False, T.BOOL),
    }  # fmt: skip
    with refused(ValueError, message):
        written(tmp_path, {**fields, **changed}, 4)


def test_sentencepiece_with_some_bytes(tmp_path):
    tokens = ["<unk>", "<0x00>", "▁", "a"]
    with refused(ValueError, "tokens must hold the bytes <0x00> to <0xFF>"):
        written(tmp_path, {
            "tokenizer.ggml.model": ("llama", T.STRING), "tokenizer.ggml.tokens": (tokens, T.STRING), "tokenizer.ggml.token_type": ([2, 6, 1, 1], T.INT32),
            "tokenizer.ggml.scores": ([0.0] * 4, T.FLOAT32), "tokenizer.ggml.add_bos_token": (False, T.BOOL),
        }, 4)  # fmt: skip


def _merges(tokenizer):
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


def check(ours, theirs):
    """The same ids of every text, and the same text of its ids."""
    for text in (*PAGE, "\n".join(PAGE)):
        ids = theirs.encode(text).ids
        if ids:
            assert ours(text).ids[0].tolist() == ids, text
            assert ours.decode(ids) == theirs.decode(ids)
