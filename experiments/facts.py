"""Facts that SmolLM2 knows, for causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations")."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import mijax as mj


class Fact(NamedTuple):
    """A prompt, the subject in it, and the true continuation with its leading space."""

    prompt: str
    subject: str
    object: str


class Facts(NamedTuple):
    """Facts as tokens, and where their subjects stand.

    `answer` holds the first token of each object, `[batch]`, and `spans` the positions of each subject's
    tokens. `roles` maps names of positions to `[batch, 1]` indices for `mijax.grid`. All positions count
    real tokens.
    """

    tokens: mj.Tokens
    texts: list[str]
    subjects: list[str]
    objects: list[str]
    answer: np.ndarray
    spans: list[np.ndarray]
    roles: dict[str, np.ndarray]


def _facts(template: str, objects: Mapping[str, str]) -> tuple[Fact, ...]:
    return tuple(Fact(template.format(subject), subject, f" {what}") for subject, what in objects.items())


# SmolLM2-135M-Instruct's first choice each, by 0.3 or more above the second; noise of three standard deviations on
# the subject's embeddings takes that away. A subject never stands first, where attention goes that has nothing to do
# (noise on the word "The" there costs a third of the answers' probability), and at least two tokens follow it.
RELATIONS: dict[str, tuple[Fact, ...]] = {
    "capital": _facts(
        "The capital of {} is the city of",
        {"South Korea": "Seoul", "France": "Paris", "North Korea": "Pyongyang", "Kenya": "Nairobi"},
    )
    + _facts("The capital of the {} is the city of", {"United Kingdom": "London", "Czech Republic": "Prague"}),
    "city of a landmark": _facts(
        "The {} is located in the city of",
        {"Eiffel Tower": "Paris", "Hagia Sophia": "Istanbul", "Colosseum": "Rome", "Uffizi Gallery": "Florence"},
    )
    + _facts("The famous {} stands in the city of", {"Dome of the Rock": "Jerusalem", "Statue of Liberty": "New York"}),
    "country of a place": _facts(
        "The location of {} is in the country of",
        {"Mount Fuji": "Japan", "Machu Picchu": "Peru", "Mount Vesuvius": "Italy", "Lake Baikal": "Russia"},
    )
    + _facts("The {} is located in the country of", {"Forbidden City": "China", "Prado Museum": "Spain"}),
    "country of a city": _facts(
        "The city of {} is located in the country of",
        {
            "Rio de Janeiro": "Brazil",
            "Tel Aviv": "Israel",
            "Ho Chi Minh City": "Vietnam",
            "Reykjavik": "Iceland",
            "Kathmandu": "Nepal",
            "Buenos Aires": "Argentina",
        },
    ),
    "continent": _facts(
        "The location of {} is on the continent of",
        {
            "South Korea": "Asia",
            "Mount Kilimanjaro": "Africa",
            "Canada": "North America",
            "Bolivia": "South America",
        },
    )
    + _facts("The location of the {} is on the continent of", {"Himalayas": "Asia", "Serengeti": "Africa"}),
    "birthplace": _facts(
        "The birthplace of {} is in the country of",
        {
            "Nelson Mandela": "South Africa",
            "Fidel Castro": "Cuba",
            "Akira Kurosawa": "Japan",
            "Henrik Ibsen": "Norway",
            "Marie Curie": "Poland",
            "Leonardo da Vinci": "Italy",
        },
    ),
    "language": _facts(
        "In {}, the official language is",
        {
            "Costa Rica": "Spanish",
            "Saudi Arabia": "Arabic",
            "St. Petersburg": "Russian",
            "Sao Paulo": "Portuguese",
            "Marseille": "French",
        },
    )
    + _facts("People who live in {} usually speak", {"Phnom Penh": "Khmer"}),
    "sport": _facts(
        "The name {} is known from the sport of",
        {
            "Rafael Nadal": "tennis",
            "LeBron James": "basketball",
            "Peyton Manning": "football",
            "Floyd Mayweather": "boxing",
            "Babe Ruth": "baseball",
        },
    )
    + _facts("The fans of {} love the game of", {"Bobby Fischer": "chess"}),
    "author": _facts(
        "The novel {} was written by",
        {
            "Huckleberry Finn": "Mark Twain",
            "To Kill a Mockingbird": "Harper Lee",
            "The Great Gatsby": "F. Scott Fitzgerald",
            "The Hobbit": "J. R. R. Tolkien",
        },
    )
    + _facts("The play {} was written by", {"Romeo and Juliet": "William Shakespeare"})
    + _facts("The book {} was written by", {"The Divine Comedy": "Dante Alighieri"}),
    "originator": _facts(
        "The {} was proposed by",
        {
            "theory of special relativity": "Albert Einstein",
            "theory of natural selection": "Charles Darwin",
            "theory of continental drift": "Alfred Wegener",
        },
    )
    + _facts(
        "The {} was invented by",
        {
            "World Wide Web": "Tim Berners-Lee",
            "printing press": "Johannes Gutenberg",
            "smallpox vaccine": "Edward Jenner",
        },
    ),
    "maker": _facts(
        "The {} was first released by",
        {
            "Macintosh computer": "Apple",
            "Windows operating system": "Microsoft",
            "Chrome browser": "Google",
            "Kindle reader": "Amazon",
            "Super Mario game": "Nintendo",
            "Photoshop software": "Adobe",
        },
    ),
    "country of a company": _facts(
        "The company {} was founded in the country of",
        {"Huawei": "China", "Mitsubishi": "Japan", "Fiat": "Italy", "Renault": "France", "Tata Motors": "India"},
    )
    + _facts("The company {} is based in the country of", {"Volkswagen": "Germany"}),
}

FACTS: tuple[Fact, ...] = tuple(fact for one_of_each in zip(*RELATIONS.values(), strict=True) for fact in one_of_each)
"""All facts, relations in turn: the first few are as varied as all."""


def make(tokenizer: mj.Tokenizer, facts: Sequence[Fact] = FACTS) -> Facts:
    """Encode facts and find their subjects.

    Raises `ValueError` where a subject does not stand in its prompt exactly once, ends the prompt, or does not
    begin and end with a token, and where the object does not begin with a token of its own.
    """
    facts = [Fact(*fact) for fact in facts]
    texts = [fact.prompt for fact in facts]
    tokens = tokenizer(texts)
    spans = [_span(tokenizer, fact) for fact in facts]
    return Facts(
        tokens,
        texts,
        [fact.subject for fact in facts],
        [fact.object for fact in facts],
        np.array([_first_token(tokenizer, fact) for fact in facts]),
        spans,
        _roles(spans, np.asarray(tokens.lengths)),
    )


def _span(tokenizer: mj.Tokenizer, fact: Fact) -> np.ndarray:
    """The positions of the tokens that cover the subject, of which the first may have the space before it."""
    prompt, subject = fact.prompt, fact.subject
    if not subject.strip() or prompt.count(subject) != 1:
        raise ValueError(f"{subject!r} must stand in the prompt exactly once, given {prompt!r}")
    start = prompt.index(subject)
    end = start + len(subject)
    encoded = tokenizer.backend.encode(prompt)
    span = np.array([i for i, (first, last) in enumerate(encoded.offsets) if first < end and last > start])
    first, last = encoded.offsets[span[0]][0], encoded.offsets[span[-1]][1]
    if prompt[first:last].lstrip(" ") != subject or first < start - 1:
        cut = tokenizer.strings([encoded.ids[i] for i in span])
        raise ValueError(f"{subject!r} does not begin and end with a token in {prompt!r}: the tokens there are {cut}")
    if span[-1] + 1 == len(encoded.ids):
        raise ValueError(f"{subject!r} must not end the prompt, given {prompt!r}")
    return span


def _first_token(tokenizer: mj.Tokenizer, fact: Fact) -> int:
    """The token that the object puts after the prompt."""
    prompt, whole = (tokenizer.backend.encode(text).ids for text in (fact.prompt, fact.prompt + fact.object))
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(f"{fact.object!r} does not begin with a token of its own after {fact.prompt!r}")
    return whole[len(prompt)]


def _roles(spans: list[np.ndarray], lengths: np.ndarray) -> dict[str, np.ndarray]:
    """The positions by name."""
    columns = {
        "first subject": [span[0] for span in spans],
        "last subject": [span[-1] for span in spans],
        "after subject": [span[-1] + 1 for span in spans],
        "last": lengths - 1,
    }
    return {name: np.array(column)[:, None] for name, column in columns.items()}
