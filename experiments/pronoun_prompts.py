"""Prompts for the mediation of gender bias (Vig et al. 2020, "Investigating Gender Bias in Language Models")."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import mijax as mj

# Of Vig et al. 2020 and like theirs. (After "said that" SmolLM2 gives " she" and " he" an eighth together.)
TEMPLATES = (
    "The {} was promoted because",
    "The {} stayed up because",
    "The {} was fired because",
    "The {} went home because",
    "The {} was late because",
    "The {} was tired because",
)
FEMALE = ("nurse", "librarian", "secretary", "teacher", "dancer", "therapist", "educator", "singer", "counselor",
          "assistant")  # fmt: skip
"""Professions that are stereotypically women's; see `make`."""
MALE = ("farmer", "carpenter", "sailor", "butcher", "warrior", "philosopher", "senator", "president", "physicist",
        "surgeon")  # fmt: skip
"""Professions that are stereotypically men's; see `make`."""


class Pronouns(NamedTuple):
    """Prompts about a profession (`base`) and about a person of the other gender (`source`).

    `stereotypical` and `anti` are the token ids `[batch]` of the pronoun that goes with the profession's
    stereotype and of the other, which is the one that goes with `source`. `roles` maps names of positions to
    `[batch, 1]` indices for `mijax.grid`.
    """

    base: mj.Tokens
    source: mj.Tokens
    texts: list[str]
    source_texts: list[str]
    stereotypical: np.ndarray
    anti: np.ndarray
    professions: list[str]
    roles: dict[str, np.ndarray]


def make(
    tokenizer: mj.Tokenizer,
    *,
    female: Sequence[str] = FEMALE,
    male: Sequence[str] = MALE,
    templates: Sequence[str] = TEMPLATES,
) -> Pronouns:
    """Each template with each profession, female and male in turn, beside the set-gender counterfactual of Vig et al.

    That puts "man" for a stereotypically female profession and "woman" for a male one. What is stereotypical is
    stated, not the model's own preference: the crowd's ratings in Bolukbasi et al. 2016, as Vig et al. use them,
    except for counselor and assistant, which are among the female ones of WinoBias (Zhao et al. 2018). SmolLM2
    shares it in every one of these prompts: left out are professions for which it prefers the other pronoun (clerk;
    pilot, scientist, manager) or hardly either (engineer, doctor), as are words that are gendered by definition
    (maid, priest) or more than one token.

    Raises `ValueError` where a word is not one token, or is not the only difference between two prompts.
    """
    she, he = tokenizer.token_id(" she"), tokenizer.token_id(" he")
    for word in (*female, *male):
        tokenizer.token_id(f" {word}")
    kinds = [(list(female), "man", she, he), (list(male), "woman", he, she)]
    texts, source_texts, answers, professions = [], [], [], []
    for template in templates:
        for place in range(max(len(female), len(male))):
            for words, counterpart, stereotypical, anti in kinds:
                for word in words[place : place + 1]:
                    texts.append(template.format(word))
                    source_texts.append(template.format(counterpart))
                    answers.append((stereotypical, anti))
                    professions.append(word)
    base, source = tokenizer(texts), tokenizer(source_texts)
    stereotypical, anti = np.array(answers).T
    roles = {"profession": _difference(base, source), "end": np.asarray(base.lengths)[:, None] - 1}
    return Pronouns(base, source, texts, source_texts, stereotypical, anti, professions, roles)


def _difference(base: mj.Tokens, source: mj.Tokens) -> np.ndarray:
    """The one position `[batch, 1]` at which two batches (padded on the right) differ."""
    if not np.array_equal(base.mask, source.mask):
        raise ValueError("a profession must be as many tokens as what stands in its place: one")
    differs = np.asarray(base.ids) != np.asarray(source.ids)
    if not (differs.sum(axis=1) == 1).all():
        raise ValueError("each pair of prompts must differ in one token: that of the profession")
    return differs.argmax(axis=1)[:, None]
