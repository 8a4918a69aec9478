"""Prompts for indirect object identification (Wang et al. 2022), balanced and checked."""

from typing import Literal, NamedTuple

import numpy as np

import mijax as mj

Counterfactual = Literal["flip", "abc"]

# Of the templates of Wang et al. 2022. (SmolLM2 fails on those that say "gave it to": it names either.)
TEMPLATES = (
    "When{A} and{B} went to the{place},{S} gave a{thing} to",
    "After{A} and{B} went to the{place},{S} gave a{thing} to",
    "Afterwards,{A} and{B} went to the{place}.{S} gave a{thing} to",
    "Then,{A} and{B} went to the{place}.{S} gave a{thing} to",
)
NAMES = (" Mary", " John", " Tom", " James", " Sarah", " Michael", " Anna", " Peter", " Emma", " David", " Alice",
         " Paul", " Laura", " Mark", " Kate", " Robert")  # fmt: skip
PLACES = (" store", " park", " school", " office", " hospital", " station", " restaurant", " garden")
THINGS = (" drink", " book", " ring", " letter", " basketball", " computer", " kiss", " bone")


class IOI(NamedTuple):
    """Clean and corrupted prompts, the clean answers, and where the names stand.

    `io` and `subject` are the token ids `[batch]` of the right and the wrong answer to the clean prompt. `pair` numbers the pairs
    of names: the four prompts of a pair are no independent observations.
    `roles` maps names of positions to `[batch, 1]` indices for `mijax.grid`.
    """

    clean: mj.Tokens
    corrupted: mj.Tokens
    texts: list[str]
    corrupted_texts: list[str]
    io: np.ndarray
    subject: np.ndarray
    pair: np.ndarray
    roles: dict[str, np.ndarray]


def make(tokenizer: mj.Tokenizer, n: int, *, counterfactual: Counterfactual = "flip", seed: int = 0) -> IOI:
    """`n` prompts: each pair of names in both roles and both orders, templates in turn.

    `flip` makes the second subject the other name, so that the answer flips; `abc` puts three other
    names everywhere, so that there is none. The two roles of a pair come in different sentences: in the
    same one, the corrupted prompts of `flip` would be the clean ones once more, and denoising and noising
    the same experiment. Words that are not one token each are an error.
    """
    if n < 4 or n % 4:
        raise ValueError(f"the number of prompts must be a positive multiple of 4 (two roles x two orders), given {n}")
    ids = {word: tokenizer.token_id(word) for word in (*NAMES, *PLACES, *THINGS)}
    rng = np.random.default_rng(seed)
    texts, corrupted, answers = [], [], []
    for pair in range(n // 4):
        a, b, *others = rng.permutation(NAMES)
        for role, (io, subject) in enumerate(((a, b), (b, a))):
            template = TEMPLATES[(2 * pair + role) % len(TEMPLATES)]
            words = {"place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
            for first, second in ((io, subject), (subject, io)):
                texts.append(template.format(A=first, B=second, S=subject, **words))
                instead = (first, second, io) if counterfactual == "flip" else others[:3]
                corrupted.append(template.format(A=instead[0], B=instead[1], S=instead[2], **words))
                answers.append((ids[io], ids[subject]))
    io, subject = np.array(answers).T
    clean = tokenizer(texts)
    pair = np.repeat(np.arange(n // 4), 4)
    return IOI(clean, tokenizer(corrupted), texts, corrupted, io, subject, pair, _roles(clean, io, subject))


def _roles(tokens: mj.Tokens, io: np.ndarray, subject: np.ndarray) -> dict[str, np.ndarray]:
    """Where each prompt has its names, counted in real tokens."""
    rows = []
    for ids, mask, right, wrong in zip(np.asarray(tokens.ids), np.asarray(tokens.mask), io, subject):
        real = ids[mask]
        (first,), (s1, s2) = np.flatnonzero(real == right), np.flatnonzero(real == wrong)
        rows.append((first, s1, s1 + 1, s2, len(real) - 1))
    return {name: column[:, None] for name, column in zip(("IO", "S1", "S1+1", "S2", "end"), np.array(rows).T)}
