"""The parts of an answer: what stands between separators, in brackets and in lists, and parts in any order."""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

_PM, _MP = re.compile(r"\\pm ?"), re.compile(r"\\mp ?")


def depths(text: str) -> list[int]:
    """How many brackets are open after each character, of any kind; below 0 where more were closed."""
    return list(itertools.accumulate((letter in "([{") - (letter in ")]}") for letter in text))


def list_parts(text: str) -> list[str]:
    """The members of a list, which stand between separators outside all brackets; one for what is none.

    A \\pm b has the two members a+b and a-b.
    """
    ends = [i for i, depth in enumerate(depths(text)) if depth == 0 and text[i] in ",;"]
    parts = [part for begin, end in itertools.pairwise([-1, *ends, len(text)]) if (part := text[begin + 1 : end])]
    if any(r"\pm" in part and not brackets(part) for part in parts):
        upper = [_MP.sub("-", _PM.sub("+", part)) for part in parts]
        lower = [_MP.sub("+", _PM.sub("-", part)) for part in parts]
        parts = list(dict.fromkeys(part.removeprefix("+") for pair in zip(upper, lower, strict=True) for part in pair))
    return parts


def brackets(text: str) -> tuple[str, str, str] | None:
    """The opening bracket, inside and closing bracket of a text that one pair encloses."""
    left, right = (2 if text.startswith("\\{") else 1), (2 if text.endswith("\\}") else 1)
    if len(text) <= left + right or text[left - 1] not in "([{" or text[-1] not in ")]}":
        return None
    *before, last = depths(text)[left:]
    return (text[:left], text[left:-right], text[-right:]) if last == 0 and 0 not in before else None


def paired(gold: Iterable[Any], given: Iterable[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether each part of one has a part of its own in the other that is the same."""
    left = list(given)
    for part in gold:
        partner = next((i for i, other in enumerate(left) if same(part, other)), None)
        if partner is None:
            return False
        left.pop(partner)
    return not left
