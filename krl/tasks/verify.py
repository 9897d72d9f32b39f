"""Verifiable rewards: find the final answer of a response and compare it with the gold answer."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(/\d+)?$")


def exact_match(response: str, answer: str) -> float:
    """1.0 if the response is the answer, white space at its ends aside, else 0.0."""
    return float(response.strip() == answer.strip())


def math_reward(response: str, answer: str) -> float:
    """1.0 if the response's final answer equals the gold one, else 0.0.

    The response must mark its final answer, see `extract_answer`. The gold answer may be marked too
    (GSM8K's worked solutions end in "#### n") or stand alone. Numbers are compared exactly, so 0.5,
    .50 and 1/2 are equal; anything else is compared as text without spaces.

    >>> math_reward("3 + 4 = 7, so #### 7", "7.0")
    1.0
    """
    given, gold = extract_answer(response), extract_answer(answer)
    gold = answer if gold is None else gold
    return float(given is not None and _normal_form(given) == _normal_form(gold))


def extract_answer(text: str) -> str | None:
    """The final answer a text marks, or None.

    Looks for the last balanced \\boxed{...}, then for what follows the last "####", then for what
    follows the last "Answer:", each up to the end of its line.

    >>> extract_answer("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for mark in (r"####", r"[Aa]nswer:"):
        found = re.findall(mark + r"[ \t]*([^\n]+)", text)
        if found:
            return found[-1].strip()
    return None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for position in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _normal_form(answer: str) -> Fraction | str:
    plain = answer.replace(",", "").replace("$", "").replace("%", "").replace("\\", "").strip().rstrip(".")
    plain = "".join(plain.split())
    if _NUMBER.match(plain):
        whole, _, below = plain.partition("/")
        if not below or int(below):
            return Fraction(whole) / int(below or 1)
    return plain
