"""Verifiable rewards: find the final answer of a response and compare it with the gold answer.

`krl.base.answers` says where an answer stands, `krl.rewards.notation` brings both to one spelling and
`krl.rewards.units` takes units away. The comparison goes from cheap to dear: equal normal forms, exact numbers, the
parts of lists, tuples, intervals and matrices, and only then `krl.rewards.algebra`, which lets the library math-verify
parse LaTeX into sympy. What counts as equal:

- Numbers are compared exactly, whatever their size: 0.5, .50, 1/2, \\frac12, 5 \\times 10^{-1} and 5e-1 are one number,
  and 2^{-300} and 2^{-301} are two. The one exception is a number without a finite decimal, which also equals a
  decimal of at least six significant digits that it rounds to (1/3 and 0.333333, \\pi and 3.14159).
- 0.\\overline{3}, 0.(3) and 0.333... are 1/3. 5 million is 5000000. 30^\\circ 15' is 30.25.
- Units, currency and degree signs are not compared: "5 cm" and "5 m/s" equal "5". A letter after a space that is a
  unit's symbol (300 K) is a unit where the other answer is a number; but a gold "5 m" may be a product, and 5m is one.
- A gold percentage accepts the percentage, its number and its value: 50% accepts 50%, 50 and 0.5. Where
  the gold answer has no percent sign, a response's sign is a unit: 50 accepts 50%, and 0.5 does not.
- A list ("1, 2", "x=1 or x=2", 1 \\pm 2) and a set have no order; points, intervals and matrices do.
- "x = 5" equals "5" but not "y = 5". A number with its base, 52_8, equals 52 but not 52_9.
- A ratio may be reduced (3:4 and 6:8); what looks like a time (4:20 and 2:10) may not.
- Multiple choice letters may stand in brackets and be followed by the choice's text: "B. 12", "(B) x+1". An answer
  that names two letters is neither.
- Formulas are equal where they agree at several points to as many digits as their numbers need, with the same domain
  (\\sqrt{x^2} is not x). Equations and inequalities are equal if one is a multiple of the other or if they have the
  same solutions.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from krl.base.answers import Answer, after_thinking, extract_answer
from krl.configs.named import find
from krl.rewards.notation import MAX_CHARACTERS, normal_form
from krl.rewards.parts import brackets, list_parts, paired
from krl.rewards.units import UPRIGHT

Reward = Callable[..., float]  # of (prompt, response, answer), and row=... where it takes one

# ---------------------------------------------------------------- rewards


def score_exact(prompt: str, response: str, answer: Answer) -> float:
    """`exact_match` as a reward function."""
    return exact_match(response, answer)


def score_math(prompt: str, response: str, answer: Answer) -> float:
    """`math_reward` as a reward function."""
    return math_reward(response, answer)


def score_math_or_number(prompt: str, response: str, answer: Answer) -> float:
    """`math_reward` that takes the last number of a response which marks no answer."""
    return math_reward(response, answer, last_number=True)


def score_reasoning_gym(prompt: str, response: str, answer: Answer, row: Mapping[str, Any]) -> float:
    """The score, from 0 to 1, that a task's own generator gives to what a response marks, or else to all of it.

    An answer that the generator cannot read has 0.

    Args:
        row: an entry of a data set of reasoning-gym, as `krl.tasks.reasoning_gym` keeps it.
    """
    from reasoning_gym import create_dataset

    given = extract_answer(response) or after_thinking(response).strip()
    score = create_dataset(row["metadata"]["source_dataset"], **row.get("options", {})).score_answer
    try:
        return float(score(answer=given, entry=row))
    except Exception:  # some scorers raise where an answer is not of the form that they read
        return 0.0


REWARDS: dict[str, Reward] = {
    "exact": score_exact, "math": score_math, "math_or_number": score_math_or_number,
    "reasoning_gym": score_reasoning_gym,
}  # fmt: skip


def find_reward(name: str) -> Reward:
    """The reward function of a name in REWARDS, or a user's own as "package.module:function".

    Returns:
        A function (prompt, response, answer) -> float; answer is one gold answer or several accepted ones.

    Raises:
        ValueError: the module cannot be imported, has no such function, or the name is of neither kind.
    """
    function = find(name, REWARDS, "reward ")
    if not callable(function):
        raise ValueError(f"reward {name!r}: {name.partition(':')[2]} is a {type(function).__name__}, not a function")
    return function


def exact_match(response: str, answer: Answer) -> float:
    """1.0 if the response is the answer, or one of several, white space at its ends aside, else 0.0."""
    return float(any(response.strip() == gold.strip() for gold in _golds(answer)))


def math_reward(response: str, answer: Answer, *, last_number: bool = False) -> float:
    """1.0 if the response's final answer equals the gold one, else 0.0; never raises.

    Outside the main thread the symbolic comparison has no time limit; `krl.rewards.pool` gives it one.

    Args:
        response: marks its final answer, see `extract_answer`; a response that does not scores 0.
        answer: one gold answer or several accepted ones, each marked too (GSM8K's worked solutions end in
            "#### n") or standing alone.
        last_number: take the last number of a response without a marked answer.

    >>> math_reward("3 + 4 = 7, so #### 7", "7.0")
    1.0
    >>> math_reward("The answer is $\\\\frac12$.", ["0.5", "50\\\\%"])
    1.0
    """
    given = extract_answer(response, last_number=last_number)
    if given is None:
        return 0.0
    for text in _golds(answer):
        marked = extract_answer(text)
        gold = text.strip() if marked is None else marked
        if gold and (gold == given or _same_text(gold, given)):
            return 1.0
    return 0.0


def answer_key(text: str, *, last_number: bool = False) -> str | None:
    """A short form of a text's final answer for votes, or None: equal keys mean equal answers.

    It costs no symbolic work, so answers that only algebra shows to be equal have different keys.

    >>> answer_key("so \\\\boxed{\\\\dfrac{2}{4}}"), answer_key("#### 0.50"), answer_key("Answer: 3, 1")
    ('1/2', '1/2', '1,3')
    """
    given = extract_answer(text, last_number=last_number)
    if given is None or len(given) > MAX_CHARACTERS:
        return given
    return _key(normal_form(given))


def _key(form: str) -> str:
    parts = list_parts(form)
    if len(parts) > 1:
        return ",".join(sorted(map(_key, parts)))
    number = _number(_without_unit(form, gold=True))
    return form if number is None else str(number)


def _golds(answer: Answer) -> list[str]:
    several = isinstance(answer, Sequence) and not isinstance(answer, str)
    return [str(gold) for gold in answer] if several else [str(answer)]


# ---------------------------------------------------------------- equality

_MATRIX = re.compile(r"\\begin\{([pb]?)matrix\}(.*)\\end\{\1matrix\}")
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|(?<=[a-zA-Z])\\in(?![a-zA-Z])")
_NAME_IN = re.compile(r"^[a-zA-Z]\\in(?![a-zA-Z])")
_INDEX = re.compile(r"_\{?\\?\w+\}?|\([^()]*\)|\{[^{}]*\}")
_CONSTANT = re.compile(r"(?:[\d\s.+\-*/^{}()!%]|\\(?:sqrt|frac|cdot|times|pi|div|binom|ln|log)(?![a-zA-Z]))*+")
_DIGIT = re.compile(r"\d|\\pi")
_OPERATOR = re.compile(r"[-+*/^\d]")
_LETTER = re.compile(r"[a-zA-Z]")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[A-Za-z ]{4,}")
_WORDS = re.compile(r"[A-Za-z .]+")
_CHOICE = re.compile(r"\(?([A-J])\)?")
_WRAPPED = re.compile(rf"{UPRIGHT}\{{([^{{}}]*)\}}")
_CHOICE_FIRST = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer) )?"
    r"(?:([A-Ja-j])$|[(\[]([A-Ja-j])[)\]]|([A-J])(?:[.:)](?![a-zA-Z])))",
    re.IGNORECASE,
)
_LABEL = re.compile(
    rf"^[\s$]*+(?:{UPRIGHT}\{{\s*+)?(?:[(\[][A-J][)\]]|[A-J](?:[.:)](?=[\s\\}}$])))(?:\s*+\}})?"
    r"(?:(?:\\[ ,;:!]|\\q?quad(?![a-zA-Z])|[\s~$])++(?=[-+\d.(\\])|(?=[\d\\]))"
)
_CHOICE_AGAIN = re.compile(
    r"(?<![A-Za-z])[(\[][A-Ja-j][)\]]|(?<![A-Za-z\\])[A-J](?: ?[.:),]|$)|"
    r"\b(?:or|and) (?:[A-J]\b|[a-j]$)|[ /][a-j](?:[.:)] |$)|"
    r"\b(?:is|can|could|would) ?n[o'\u2019]t\b|\b(?:wrong|incorrect|eliminated|is false)\b"
)
_LOWER_UNIT = re.compile(r"[a-z]{1,2}")

_DECIMAL = r"(?:\d++(?:\.\d*+)?|\.\d++)"
_EXPONENT = r"([-+]?\d{1,3})"
_NUMBER = re.compile(
    rf"([-+]?)(?:(?:({_DECIMAL})(?:\\times|\\cdot|\*))?10\^\{{?{_EXPONENT}\}}?"
    rf"|({_DECIMAL})(?:/(\d++)|[eE]{_EXPONENT})?"
    rf"|(\d*+)\\frac\{{([-+]?{_DECIMAL})\}}\{{([-+]?{_DECIMAL})\}})"
)
_BASED = re.compile(r"(?<![0-9A-F])(-?[0-9][0-9A-F]*+)_\{?(\d++)\}?")


@functools.lru_cache(maxsize=8192)
def _number(form: str) -> Fraction | None:
    """The exact number a normal form writes, or None."""
    match = _NUMBER.fullmatch(form)
    if match is None:
        return None
    sign, factor, power, decimal, divisor, exponent, whole, above, below = match.groups()
    numerator, denominator = Fraction(above or decimal or factor or 1), Fraction(below or divisor or 1)
    if not denominator or (int(whole or 0) and numerator < 0):
        return None
    value = (int(whole or 0) + numerator / denominator) * Fraction(10) ** int(power or exponent or 0)
    return -value if sign == "-" else value


def _same_text(gold: str, given: str) -> bool:
    if max(len(gold), len(given)) > MAX_CHARACTERS:
        return False
    form = normal_form(gold)
    if choice := _CHOICE.fullmatch(form):
        alone = _CHOICE.fullmatch(normal_form(_WRAPPED.sub(r"\1", given)))
        return (alone[1] if alone else _chosen(given)) == choice[1]
    if _same(form, normal_form(given)) or _same_choice(gold, given):
        return True
    # A gold "5 m" stands for 5m too, so the response's \\text{ m} is compared as a letter.
    return "~" in form and _same(form, normal_form(_WRAPPED.sub(r" \1", given)))


def _same_choice(gold: str, given: str) -> bool:
    """Equality where one answer is a choice with its value, as (C) 45: all that both of them say must be the same."""
    (letter, value), (chosen, its_value) = _choice_and_value(gold), _choice_and_value(given)
    if not value:
        form = normal_form(gold)
        return bool(its_value) and _number(form) is not None and _same(form, normal_form(its_value))
    if its_value or not chosen:
        return chosen in (letter, None) and _same(normal_form(value), normal_form(its_value or given))
    return chosen == letter


def _choice_and_value(text: str) -> tuple[str | None, str]:
    """The choice a text begins with, and the value after it, "" without a digit in it: B and 12 of B. 12."""
    chosen, label = _chosen(text), _LABEL.match(text)
    value = text[label.end() :] if chosen and label else ""
    return chosen, value if _DIGIT.search(value) else ""


def _chosen(text: str) -> str | None:
    """The one choice that an answer begins with: B, (b), B. 12 or \\text{(B)} 12, but not A or B."""
    text = text.replace("\uff0e", ".").replace("\uff1a", ":")  # full width
    text = _WRAPPED.sub(r"\1", text).replace("$", "").replace("*", "").replace("\\", " ")
    text = " ".join(text.split()).rstrip(" .,;")
    first = _CHOICE_FIRST.match(text)
    if first is None or _CHOICE_AGAIN.search(text, first.end()):
        return None
    return (first[1] or first[2] or first[3]).upper()


def _same(gold: str, given: str) -> bool:
    """Whether two normal forms are equal answers."""
    if not gold or not given or gold == given:
        return bool(gold) and gold == given
    if "~" in gold or "~" in given:
        return _same_but_for_units(gold, given)
    if "%" in (gold[-1], given[-1]):
        return _same_percent(gold, given)
    expected, number = _number(gold), _number(given)
    if expected is not None and number is not None:
        return expected == number or _rounds_to(expected, number) or _rounds_to(number, expected)
    bases = _BASED.fullmatch(gold), _BASED.fullmatch(given)
    if bases[0] and bases[1]:
        return bases[0].groups() == bases[1].groups()
    if bases[0] or bases[1]:
        return gold.partition("_")[0] == given.partition("_")[0]
    if choice := _CHOICE.fullmatch(gold):
        other = _CHOICE.fullmatch(given)
        return other is not None and other[1] == choice[1]
    if _WORD.fullmatch(gold) and _WORDS.fullmatch(given):
        return gold.replace(" ", "").casefold() == given.replace(" ", "").casefold()
    ratios = _same_ratios(gold.split(":"), given.split(":"))
    parts = _same_parts(gold, given) if ratios is None else ratios
    if parts is not None:
        return parts
    short = max(len(gold), len(given)) <= MAX_CHARACTERS
    return (short and _algebra().same(gold, given)) or _is_rounded(gold, given)


def _same_but_for_units(gold: str, given: str) -> bool:
    """Equality of forms where letters that may be a unit follow a tilde: as numbers, or else as products."""
    values = _without_unit(gold, gold=True), _without_unit(given)
    if None not in map(_number, values):
        return _same(*values)
    parts = _same_parts(gold, given)
    if parts is not None:
        return parts
    if _same(gold.replace("~", ""), given.replace("~", "")):
        return True
    has_letters = any(_LETTER.search(_COMMAND.sub("", value)) for value in values if _number(value) is None)
    return not has_letters and "~" not in "".join(values) and _same(*values)


def _without_unit(form: str, gold: bool = False) -> str:
    """A value without what may be its unit; of a gold answer m, s or mg may be variables and stay."""
    value, _, unit = form.partition("~")
    whole = all(value.count(left) == value.count(right) for left, right in ("()", "[]", "{}"))
    return form if not whole or "~" in unit or (gold and _LOWER_UNIT.fullmatch(unit)) else value


def _same_ratios(gold: list[str], given: list[str]) -> bool | None:
    """Equality of a:b or a:b:c; None where algebra may compare what a ratio of two is worth."""
    if len(gold) != len(given) or len(gold) == 1:
        return None if max(len(gold), len(given)) <= 2 else False
    times = all(len(part) == 2 for part in gold[1:] + given[1:])
    expected: list[Any] = [_number(part) for part in gold]
    numbers: list[Any] = [_number(part) for part in given]
    if times and None not in expected:
        return expected == numbers
    if times or None in expected + numbers:
        return None if len(gold) == 2 else gold == given
    return all(a * numbers[0] == b * expected[0] for a, b in zip(expected, numbers, strict=True))


def _same_percent(gold: str, given: str) -> bool:
    if given[-1] == "%" or gold[-1] != "%":
        return _same(gold.removesuffix("%"), given.removesuffix("%"))
    value = _number(gold[:-1])
    return _same(gold[:-1], given) or (value is not None and _number(given) == value / 100)


def _rounds_to(exact: Fraction, decimal: Fraction) -> bool:
    """Whether a fraction without a finite decimal has this decimal of at least six significant digits."""

    def finite(number: Fraction) -> bool:
        below = number.denominator
        return below < 10**60 and 10**200 % below == 0

    if finite(exact) or not finite(decimal) or not decimal:
        return False
    places = next(n for n in range(201) if 10**n % decimal.denominator == 0)
    return abs(decimal) * 10**places >= 100_000 and abs(exact - decimal) * 10**places <= Fraction(1, 2)


def _is_rounded(gold: str, given: str) -> bool:
    """Whether one form is a decimal that the constant of the other, which is no number in digits, rounds to."""
    for form, decimal in ((gold, given), (given, gold)):
        number = _number(decimal)
        if number is not None and "." in decimal and _number(form) is None:
            exact = _algebra().constant(form)
            return exact is not None and _rounds_to(exact, number)
    return False


def _same_parts(gold: str, given: str) -> bool | None:
    """Equality of lists, unions, matrices, bracketed things and equations, part by part; None for anything else."""
    if r"\cup" in gold and r"\cup" in given:
        return _same_in_any_order(*([part.strip() for part in text.split(r"\cup")] for text in (gold, given)))
    matrices = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(given)
    if matrices[0] and matrices[1]:
        rows = [[_cells(row) for row in match[2].split(r"\\") if row] for match in matrices if match]
        return len(rows[0]) == len(rows[1]) and all(map(_same_in_order, *rows))
    lists = list_parts(gold), list_parts(given)
    if max(map(len, lists)) > 1:
        return _same_lists(gold, given, *lists)
    pairs = brackets(gold), brackets(given)
    if pairs[0] and pairs[1] and (("," in pairs[0][1]) or ("," in pairs[1][1])):
        inside = list_parts(pairs[0][1]), list_parts(pairs[1][1])
        if "\\{" in (pairs[0][0], pairs[1][0]):
            return pairs[0][0] == pairs[1][0] and _same_in_any_order(*inside)
        same_brackets = pairs[0][::2] == pairs[1][::2] or len(inside[0]) > 2
        return same_brackets and _same_in_order(*inside)
    if r"\approx" in gold or r"\approx" in given:
        exact = _not_approximated(gold), _not_approximated(given)
        return exact[0] is not None and exact[1] is not None and _same(exact[0], exact[1])
    sides = [_EQUALS.split(text, maxsplit=1) for text in (gold, given)]
    if len(sides[0]) == len(sides[1]):
        return _same(sides[0][1], sides[1][1]) if len(sides[0]) == 2 and sides[0][0] == sides[1][0] else None
    left, right = sides[len(sides[1]) == 2]
    if _is_constant(left) and not (_same(left, right) or _same(right, left)):  # 2 = 3 is neither
        return False
    # of the one that is an equation: x in x = 5, but not x + y in x + y = 5
    names_or_value = not _OPERATOR.search(_INDEX.sub("", left)) or not _LETTER.search(left)
    return names_or_value and _same(sides[0][-1], sides[1][-1])


def _not_approximated(form: str) -> str | None:
    """The exact part of "exact = decimal", both joined by \\approx; None where its digits are others."""
    exact, *decimals = form.split(r"\approx")
    if not decimals or (len(decimals) == 1 and "=" not in exact and not _is_constant(exact)):
        return form.replace(r"\approx", "=")  # of a name
    value = _constant(_EQUALS.split(exact)[-1])
    for text in decimals:
        decimal = _number(_without_unit(text))
        if value is None or decimal is None or "." not in text:
            return None
        unit = Fraction(1, 10 ** len(text.partition(".")[2]))
        error = abs(value) - abs(decimal)
        if value * decimal <= 0 or not (abs(error) <= unit / 2 or 0 <= error < unit):  # rounded or cut off
            return None
    return exact


def _is_constant(form: str) -> bool:
    return bool(_CONSTANT.fullmatch(form) and _DIGIT.search(form))


def _constant(form: str) -> Fraction | None:
    number = _number(form)
    return _algebra().constant(form) if number is None and _is_constant(form) else number


def _algebra() -> Any:
    from krl.rewards import algebra  # sympy is slow to import, and most answers do without

    return algebra


def _same_lists(gold: str, given: str, gold_parts: list[str], given_parts: list[str]) -> bool:
    """Equality of a list and a list, or of a list and a set or tuple."""
    if len(gold_parts) > 1 and len(given_parts) > 1:
        return _same_in_any_order(gold_parts, given_parts)
    gold, given = _NAME_IN.sub("", gold), _NAME_IN.sub("", given)
    if len(gold_parts) > 1 and (pair := brackets(given)):
        return _same_in_any_order(gold_parts, list_parts(pair[1]))
    if len(given_parts) > 1 and (pair := brackets(gold)):
        inside = list_parts(pair[1])
        if pair[0] == "\\{":
            return _same_in_any_order(inside, given_parts)
        return pair[::2] == ("(", ")") and _same_in_order(inside, given_parts)
    return False


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("&")]


def _same_in_order(gold: list[str], given: list[str]) -> bool:
    return len(gold) == len(given) and all(map(_same, gold, given))


def _same_in_any_order(gold: list[str], given: list[str]) -> bool:
    """Whether each part of one list has a partner in the other; equal keys are paired first."""
    if len(gold) != len(given):
        return False
    left = list(given)
    keys = [_key(part) for part in left]
    unpaired = []
    for part in gold:
        if (key := _key(part)) in keys:
            left.pop(keys.index(key))
            keys.remove(key)
        else:
            unpaired.append(part)
    return len(unpaired) <= 6 and paired(unpaired, left, _same)
