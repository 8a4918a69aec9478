"""Capital cities that SmolLM2 knows, each prompt beside one of another country."""

from typing import NamedTuple

import numpy as np

import mijax as mj

TEMPLATE = "The capital of {} is the city of"
# One token each, and the model's first choice is the capital (its first token, where it has several).
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi",
    "Greece": "Athens", "Cuba": "Havana", "Italy": "Rome", "Thailand": "Bangkok", "Ireland": "Dublin",
    "Nepal": "Kathmandu", "Germany": "Berlin", "Chile": "Santiago", "Sweden": "Stockholm", "Iran": "Tehran",
    "Portugal": "Lisbon", "China": "Beijing", "Hungary": "Budapest", "Syria": "Damascus", "England": "London",
    "Indonesia": "Jakarta", "Finland": "Helsinki", "Lebanon": "Beirut", "Austria": "Vienna", "Jordan": "Amman",
    "Denmark": "Copenhagen", "Colombia": "Bogota", "Scotland": "Edinburgh", "Serbia": "Belgrade", "Canada": "Ottawa",
    "Croatia": "Zagreb", "Belgium": "Brussels", "Ethiopia": "Addis Ababa", "Iceland": "Reykjavik", "Bulgaria": "Sofia",
}  # fmt: skip


class Capitals(NamedTuple):
    """Prompts of known capitals and, as corrupted ones, those of another of the countries.

    `correct` and `wrong` are the first tokens `[batch]` of the two capitals; `roles` maps names of positions to `[batch, 1]`.
    """

    clean: mj.Tokens
    corrupted: mj.Tokens
    texts: list[str]
    correct: np.ndarray
    wrong: np.ndarray
    roles: dict[str, np.ndarray]


def make(model: mj.Transformer, tokenizer: mj.Tokenizer, n: int) -> Capitals:
    """`n` prompts to which the model gives the right answer, each beside the next one's.

    Raises `ValueError` where it knows fewer.
    """
    countries = [country for country in CAPITALS if len(tokenizer.backend.encode(f" {country}").ids) == 1]
    texts = [TEMPLATE.format(country) for country in countries]
    answers = np.array([_first_token(tokenizer, text, CAPITALS[c]) for text, c in zip(texts, countries)])
    rank = np.asarray(mj.metrics.rank(answers)(mj.run(model, tokenizer(texts))))
    first = np.unique(answers, return_index=True)[1]  # of capitals that begin alike, one
    known = np.intersect1d(np.flatnonzero(rank == 0), first)[:n]
    if len(known) < max(2, n):
        raise ValueError(
            f"the model knows {len(known)} of the {len(CAPITALS)} capitals (in one token each), asked for {n}"
        )
    texts, answers = [texts[i] for i in known], answers[known]
    clean = tokenizer(texts)
    country = len(tokenizer.backend.encode(TEMPLATE.split(" {}")[0]).ids)
    length = np.asarray(clean.lengths)
    places = {"country": np.full(len(known), country), "is": np.full(len(known), country + 1), "end": length - 1}
    roles = {name: place[:, None] for name, place in places.items()}
    return Capitals(clean, tokenizer([*texts[1:], texts[0]]), texts, answers, np.roll(answers, -1), roles)


def _first_token(tokenizer: mj.Tokenizer, text: str, answer: str) -> int:
    return tokenizer.backend.encode(f"{text} {answer}").ids[len(tokenizer.backend.encode(text).ids)]
