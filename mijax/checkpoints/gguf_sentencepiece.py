"""The tokenizers of SentencePiece, a BPE and a unigram model, from the tokens and scores of a GGUF file.

Kudo and Richardson 2018, "SentencePiece", arXiv:1808.06226. Its BPE merges the two neighbours that give the token of the
highest score; a BPE that merges in the order of scores does the same. A unigram model (Kudo 2018, arXiv:1804.10959)
splits a text into the tokens whose scores, logarithms of probabilities, have the highest sum.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers

_UNKNOWN, _NORMAL, _USER_DEFINED = 2, 1, 4  # llama.cpp's types of tokens that are relevant here
_SPACE = "▁"


def bpe(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], add_space_prefix: bool
) -> tokenizers.Tokenizer:
    """Build a BPE.

    Args:
        tokens: the tokens, in the order of their ids.
        kinds: their types, as llama.cpp numbers them.
        scores: their scores; a token of higher score is merged first.
        add_space_prefix: whether a text begins with a space.

    Returns:
        The tokenizer, without special tokens.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = [t for t, kind in zip(tokens, kinds) if kind in (_NORMAL, _USER_DEFINED)]
    known = set(pieces)
    merges = []  # by the score of the token that they give; of one token by the ids of its two parts, as transformers has it
    for token in sorted(pieces, key=lambda token: -scores[vocabulary[token]]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = next((token for token, kind in zip(tokens, kinds) if kind == _UNKNOWN), None)
    has_bytes = "<0x00>" in vocabulary
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    backend.normalizer = normalizers.Sequence(_spaces(add_space_prefix))
    backend.decoder = _decoder(add_space_prefix)
    return backend


def unigram(
    tokens: Sequence[str],
    kinds: Sequence[int],
    scores: Sequence[float],
    add_space_prefix: bool,
    remove_extra_whitespaces: bool,
    charsmap: bytes,
) -> tokenizers.Tokenizer:
    """Build a unigram model.

    Args:
        tokens: the tokens, in the order of their ids.
        kinds: their types, as llama.cpp numbers them.
        scores: the logarithms of their probabilities.
        add_space_prefix: whether a text begins with a space.
        remove_extra_whitespaces: whether spaces at the ends of a text are dropped, and several in a row are one.
        charsmap: SentencePiece's compiled table of characters and what they are replaced by; empty for none.

    Returns:
        The tokenizer, without special tokens.
    """
    unknown = next((i for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(models.Unigram(list(zip(tokens, scores)), unknown, "<0x00>" in set(tokens)))
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence([*steps, *_spaces(add_space_prefix)])
    backend.decoder = _decoder(add_space_prefix)
    return backend


def _spaces(add_space_prefix: bool) -> list[normalizers.Normalizer]:
    """Spaces as SentencePiece writes them, one in front of the text where that is asked for."""
    return [*([normalizers.Prepend(_SPACE)] if add_space_prefix else []), normalizers.Replace(" ", _SPACE)]


def _decoder(add_space_prefix: bool) -> decoders.Decoder:
    """From tokens to text, without the space in front that was added."""
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    return decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
