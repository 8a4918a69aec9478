"""Rules for values that come from files: what each key may hold, said once, checked before anything is made of it."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """The values that a key may have.

    Attributes:
        expected: a description of these values, for error messages.
        accepts: whether a value is one of them.
    """

    expected: str
    accepts: Callable[[Any], bool]


def only(*values: Any) -> Rule:
    """A rule that accepts the listed values only, compared with their types.

    Args:
        values: the values, for a key that would change the computation at any other.

    Returns:
        The rule.

    >>> only(0).accepts(0), only(0).accepts(False)
    (True, False)
    """
    known = [(type(value), value) for value in values]
    return Rule(" or ".join(map(repr, values)), lambda x: (type(x), x) in known)


def array(of: Rule) -> Rule:
    """A rule that accepts lists.

    Args:
        of: the rule of the entries.

    Returns:
        The rule.

    >>> array(TEXT).accepts(["a"]), array(TEXT).accepts([1])
    (True, False)
    """
    entries = "" if of is ANYTHING else f", each entry {of.expected}"
    return Rule(f"an array{entries}", lambda x: isinstance(x, list | tuple) and all(map(of.accepts, x)))


def mapping(of: Rule) -> Rule:
    """A rule that accepts objects of JSON.

    Args:
        of: the rule of the values; keys are any texts.

    Returns:
        The rule.

    >>> mapping(COUNT).accepts({"a": 1}), mapping(COUNT).accepts({"a": 0})
    (True, False)
    """
    accepts = lambda x: isinstance(x, Mapping) and all(map(of.accepts, x.values()))
    return Rule("an object" if of is ANYTHING else f"an object, each value {of.expected}", accepts)


def either(*rules: Rule) -> Rule:
    """A rule that accepts what one of several accepts.

    Args:
        rules: these.

    Returns:
        The rule.

    >>> either(COUNT, NULL).accepts(None), either(COUNT, NULL).expected
    (True, 'a positive integer or null')
    """
    return Rule(" or ".join(rule.expected for rule in rules), lambda x: any(rule.accepts(x) for rule in rules))


def _is_number(x: Any) -> bool:
    """Whether it is a number that float64 holds; a boolean is none."""
    try:
        return type(x) in (int, float) and math.isfinite(x)
    except OverflowError:
        return False


NULL = Rule("null", lambda x: x is None)
COUNT = Rule("a positive integer", lambda x: type(x) is int and x > 0)
NATURAL = Rule("an integer that is not negative", lambda x: type(x) is int and x >= 0)
INTEGER = Rule("an integer", lambda x: type(x) is int)
NUMBER = Rule("a finite number", _is_number)
POSITIVE = Rule("a positive number", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Rule("a number that is not negative", lambda x: _is_number(x) and x >= 0)
FLAG = Rule("true or false", lambda x: type(x) is bool)
TEXT = Rule("a text", lambda x: type(x) is str)
ANYTHING = Rule("any value", lambda x: True)


def missing(values: Mapping[str, Any], required: Sequence[str]) -> list[str]:
    """Messages about missing keys.

    Args:
        values: values by key.
        required: the keys that must be present.

    Returns:
        One message for each missing key.

    >>> missing({"a": 1}, ["a", "b"])
    ['the key b is missing']
    """
    return [f"the key {key} is missing" for key in required if key not in values]


def faults(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Messages about the values that their rules refuse.

    Args:
        values: values by key; those without a rule are not looked at.
        rules: the rules.

    Returns:
        One message for each.

    >>> faults({"a": 1, "b": 2}, {"a": only(0)})
    ['a must be 0, given 1']
    """
    wrong = [(key, rule) for key, rule in rules.items() if key in values and not rule.accepts(values[key])]
    return [f"{key} must be {rule.expected}, given {shown(values[key])}" for key, rule in wrong]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: Any) -> str:
    """A value in an error message, shortened.

    Args:
        value: the value.

    >>> shown(list(range(100)))
    '[0, 1, 2, 3, 4, 5, ...]'
    """
    return _SHORT.repr(value)
