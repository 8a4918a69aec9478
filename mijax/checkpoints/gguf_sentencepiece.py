"""A BPE of SentencePiece, from the tokens and scores of a GGUF file.

Kudo and Richardson 2018, "SentencePiece", arXiv:1808.06226. SentencePiece merges the two neighbours that give the token
of the highest score; a BPE that merges in the order of scores does the same.
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

_UNKNOWN, _NORMAL, _USER_DEFINED = 2, 1, 4  # llama.cpp's types of tokens that are relevant here
_SPACE = "▁"


def sentencepiece(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float], add_space_prefix: bool
) -> tokenizers.Tokenizer:
    """Build the tokenizer.

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
    spaces = normalizers.Replace(" ", _SPACE)
    first = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*first, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
