"""The tokenizer in a GGUF file, which splits text and adds tokens as in llama.cpp (llama-vocab.cpp).

A byte-level BPE (llama.cpp's `gpt2`), a BPE of SentencePiece (`llama`) or its unigram model (`t5`).
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mijax.checkpoints.backend import LONGEST_TOKEN, failures
from mijax.checkpoints.gguf_metadata import refuse, unknown
from mijax.checkpoints.gguf_sentencepiece import bpe, unigram
from mijax.checkpoints.tokenizer import Tokenizer
from mijax.rules import FLAG, INTEGER, NATURAL, NUMBER, TEXT, Rule, array, faults, missing, only, shown

_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# of o200k: words by case, with what is written together
_GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_byte_level = lambda use_regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


class _Splitting(NamedTuple):
    """How text is split into words, and the settings that llama.cpp derives from the name of the splitting.

    Attributes:
        pre_tokenizer: makes the step that splits text into words.
        ignore_merges: whether a word that is a token is never split further.
        add_bos: whether a text begins with the beginning token, unless the file says otherwise.
        add_eos: whether it ends with the end token, unless the file says otherwise.
        composed: whether characters are composed first (Unicode's NFC), as Hugging Face's tokenizer does.
    """

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False
    add_eos: bool = False
    composed: bool = False


def _by(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(False)])


_GPT2 = _Splitting(lambda: _byte_level(True))
_LLAMA3 = _Splitting(_by(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
_QWEN2 = _Splitting(_by(_QWEN2_SPLIT), composed=True)
_SPLITTINGS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _Splitting(
        lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)])
    ),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-4o": _Splitting(_by(_GPT4O_SPLIT)),
}
_UNKNOWN, _CONTROL, _USER_DEFINED = (
    2,
    3,
    4,
)  # llama.cpp's token types; the others are 1 (normal), 5 (unused) and 6 (byte)
# which do not split words
_SENTENCEPIECE = {
    "llama": _Splitting(pre_tokenizers.PreTokenizer, add_bos=True),
    "t5": _Splitting(pre_tokenizers.PreTokenizer, add_eos=True),
}
# from GGUF's names of special tokens to Hugging Face's
_NAMES = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token", "padding": "pad_token",
    "cls": "cls_token", "mask": "mask_token",
}  # fmt: skip
_END = ("eot", "eom")  # the tokens that end a turn and a message
_INFILL = ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle")

KEYS = {
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": array(TEXT),
    "tokenizer.ggml.token_type": array(INTEGER),
    "tokenizer.ggml.merges": array(TEXT),
    **{f"tokenizer.ggml.{name}_token_id": NATURAL for name in (*_NAMES, *_END)},
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.ggml.add_eos_token": FLAG,
    "tokenizer.chat_template": TEXT,
    "tokenizer.chat_templates": array(TEXT),
    "tokenizer.ggml.add_sep_token": only(False),
    "tokenizer.ggml.add_space_prefix": only(False),
    "tokenizer.ggml.remove_extra_whitespaces": only(False),
}
HARMLESS = {  # checked for their type, without effect on a byte-level BPE at any value
    "tokenizer.ggml.scores": array(NUMBER),
    "tokenizer.huggingface.json": TEXT,
    **{f"tokenizer.ggml.{name}_token_id": NATURAL for name in _INFILL},
}
_REQUIRED = {
    "gpt2": ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"),
    **dict.fromkeys(_SENTENCEPIECE, ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")),
}
_TEMPLATE = "tokenizer.chat_template."
_BYTES = array(Rule("a byte", lambda x: type(x) is int and 0 <= x < 256))


def read_tokenizer(fields: Mapping[str, Any], n_vocab: int, path: Path) -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        fields: the file's metadata, by key.
        n_vocab: the number of tokens of the model.
        path: the file, for error messages.

    Returns:
        The tokenizer, with its chat templates, special tokens and end tokens.

    Raises:
        ValueError: for another kind of tokenizer, an unknown way of splitting text into words, and metadata that
            are missing, unknown or contradictory.
    """
    values = {key: value for key, value in fields.items() if key.startswith("tokenizer.")}

    def get(key: str, default: Any = None) -> Any:
        return values.get(f"tokenizer.ggml.{key}", default)

    model = str(get("model"))
    splitting = _SPLITTINGS.get(str(get("pre"))) if model == "gpt2" else _SENTENCEPIECE.get(model)
    if splitting is None:
        raise ValueError(
            f"{path}: unsupported tokenizer {get('model')!r} with splitting {get('pre')!r} (tokenizer.ggml.pre); supported"
            f" are SentencePiece's BPE ('llama') and unigram model ('t5'), and byte-level BPE ('gpt2') split as {', '.join(_SPLITTINGS)}."
            " mijax.load(path, tokenizer=False) loads the weights alone"
        )
    known = KEYS | HARMLESS | {key: TEXT for key in values if key.startswith(_TEMPLATE)}
    if model in _SENTENCEPIECE:
        known |= {"tokenizer.ggml.add_space_prefix": FLAG, "tokenizer.ggml.merges": array(TEXT)}
    if model == "t5":
        known |= {"tokenizer.ggml.remove_extra_whitespaces": FLAG, "tokenizer.ggml.precompiled_charsmap": _BYTES}
    refuse(path, [*missing(values, _REQUIRED[model]), *unknown(values, known), *faults(values, known)])
    refuse(path, _vocabulary_faults(values, n_vocab, model))
    tokens, kinds = get("tokens"), get("token_type", [1] * n_vocab)
    refuse(path, _special_faults(values, kinds, splitting))
    with failures(f"{path}: the tokenizer cannot be built"):
        if model == "llama":
            backend = bpe(tokens, kinds, get("scores"), get("add_space_prefix", True))
        elif model == "t5":
            flags = get("add_space_prefix", True), get("remove_extra_whitespaces", False)
            backend = unigram(tokens, kinds, get("scores"), *flags, bytes(get("precompiled_charsmap", [])))
        else:
            backend = _byte_level_bpe(tokens, get("merges"), splitting)
        of_kind = lambda *accepted: [token for token, kind in zip(tokens, kinds) if kind in accepted]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in of_kind(_UNKNOWN, _CONTROL)])
        backend.add_tokens([AddedToken(t, normalized=False) for t in of_kind(_USER_DEFINED)])
    begin = [tokens[get("bos_token_id")]] if get("add_bos_token", splitting.add_bos) else []
    end = [tokens[get("eos_token_id")]] if get("add_eos_token", splitting.add_eos) else []
    if begin or end:
        backend.post_processor = _surround(backend, begin, end)
    ids = {name: get(f"{key}_token_id") for key, name in _NAMES.items()}
    named = {n: tokens[i] for n, i in ids.items() if i is not None and kinds[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    end_ids = [get(f"{name}_token_id") for name in _END]
    return Tokenizer(backend, _templates(values), named, end_tokens=[i for i in end_ids if i is not None])


def _byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], splitting: _Splitting) -> tokenizers.Tokenizer:
    """The byte-level BPE of these tokens and merges."""
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, fuse_unk=False, ignore_merges=splitting.ignore_merges))
    if splitting.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _surround(backend: tokenizers.Tokenizer, begin: Sequence[str], end: Sequence[str]) -> processors.PostProcessor:
    """A post-processor that puts tokens around a text, under names: a token may contain the syntax of its pattern."""
    groups = {"begin": begin, "end": end}
    return processors.TemplateProcessing(
        single=[*(["begin"] if begin else []), "$A", *(["end"] if end else [])],
        special_tokens=[
            {"id": name, "ids": [backend.token_to_id(t) for t in texts], "tokens": list(texts)}
            for name, texts in groups.items()
            if texts
        ],
    )


def _templates(values: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates, by name."""
    default = values.get("tokenizer.chat_template")
    named = {key.removeprefix(_TEMPLATE): text for key, text in values.items() if key.startswith(_TEMPLATE)}
    return named if default is None else {"default": default} | named


def _vocabulary_faults(values: Mapping[str, Any], n_vocab: int, model: str) -> list[str]:
    """Messages about the lists of tokens, token types, merges and chat templates."""
    tokens = values["tokenizer.ggml.tokens"]
    messages = [
        f"{key} has {len(values[key])} entries, the model's vocabulary {n_vocab}"
        for key in (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
        if key in values and len(values[key]) != n_vocab
    ]
    long = [token for token in tokens if len(token) > LONGEST_TOKEN]
    if long:
        messages.append(
            f"tokenizer.ggml.tokens has a token of {len(long[0])} characters, expected at most {LONGEST_TOKEN}"
        )
    repeated = [token for token, n in collections.Counter(tokens).items() if n > 1]
    if repeated:
        messages.append(f"tokenizer.ggml.tokens has tokens more than once: {shown(repeated)}")
    kinds = range(1, 7 if model in _SENTENCEPIECE else 6)
    odd = set(values.get("tokenizer.ggml.token_type", [])) - {*kinds}
    if odd:
        expected = ", ".join(map(str, kinds[:-1])) + f" or {kinds[-1]}"
        messages.append(f"tokenizer.ggml.token_type must be an array of {expected}, given {shown(odd)}")
    messages += _byte_faults(values) if model in _SENTENCEPIECE else _merge_faults(values)
    scores = values.get("tokenizer.ggml.scores", []) if model in _SENTENCEPIECE else []
    if not all(map(math.isfinite, scores)):
        messages.append("tokenizer.ggml.scores must be finite numbers")
    if model == "t5" and _UNKNOWN not in values["tokenizer.ggml.token_type"]:
        messages.append("tokenizer.ggml.token_type marks no token as unknown (2), which a unigram model needs")
    absent = set(values.get("tokenizer.chat_templates", [])) - {k.removeprefix(_TEMPLATE) for k in values}
    if absent:
        messages.append(f"tokenizer.chat_templates names {shown(sorted(absent))}, which the file lacks")
    return messages


def _byte_faults(values: Mapping[str, Any]) -> list[str]:
    """Messages about the tokens of single bytes, of which SentencePiece has all or none."""
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    of_bytes = {token for token, kind in zip(tokens, kinds) if kind == 6}
    if of_bytes and of_bytes != {f"<0x{i:02X}>" for i in range(256)}:
        return [f"tokenizer.ggml.tokens must hold the bytes <0x00> to <0xFF>, given {shown(sorted(of_bytes))}"]
    return []


def _merge_faults(values: Mapping[str, Any]) -> list[str]:
    """Messages about the merges of a byte-level BPE."""
    messages, merges, tokens = [], values["tokenizer.ggml.merges"], values["tokenizer.ggml.tokens"]
    vocabulary = set(tokens)
    invalid = [m for m in merges if len(m.split(" ")) != 2 or not {*m.split(" "), m.replace(" ", "")} <= vocabulary]
    if invalid:
        messages.append(f"tokenizer.ggml.merges must be two tokens each, that give a third; given {shown(invalid)}")
    if len(set(merges)) < len(merges):
        messages.append("tokenizer.ggml.merges has the same merge more than once")
    return messages


def _special_faults(values: Mapping[str, Any], kinds: Sequence[int], splitting: _Splitting) -> list[str]:
    """Messages about the ids of special tokens."""
    ids = {key: value for key, value in values.items() if key.endswith("_token_id")}
    messages = [f"{k} is {i}, outside the vocabulary of {len(kinds)}" for k, i in ids.items() if i >= len(kinds)]
    for name, default in (("bos", splitting.add_bos), ("eos", splitting.add_eos)):
        key, flag = f"tokenizer.ggml.{name}_token_id", f"tokenizer.ggml.add_{name}_token"
        if key not in ids and values.get(flag, default):
            messages.append(f"the key {key} is missing, although it is to be added to every text ({flag})")
        if ids.get(key, len(kinds)) < len(kinds) and kinds[ids[key]] not in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            messages.append(
                f"{key} is {ids[key]}, a token of ordinary text (tokenizer.ggml.token_type), expected a control token"
            )
    return messages
