"""Equality of two mathematical expressions by math-verify, which parses LaTeX into sympy."""

import functools
import logging
import re
import threading

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

# Forms beyond these are equal to nothing; `krl.tasks.verify` has compared them as text before it asks here.
MAX_DEPTH = 10
MAX_LETTERS = 30  # commands aside; more are prose, which would be parsed as a product of that many variables
# Sympy evaluates powers and factorials as whole numbers and multiplies out powers of sums, so a few characters can
# ask for more digits or terms than fit in memory: the most for a product of exponents, for n in n!, and for (a+b)^n.
MAX_POWER, MAX_FACTORIAL, MAX_EXPANSION = 10_000, 10_000, 100
# Of parsing one text and of comparing two; kept by an alarm signal, which exists in the main thread only.
SYMBOLIC_SECONDS = 2

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every time-out, and of having none

# The library's own removal of units would take the t of 2t for tonnes.
_LATEX = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
        )
    )
]
_POWER = re.compile(r"(.)\^[-+({\s]*(\d+)")
_TOWER = re.compile(r"[\d)}]\^(?:\{[^{}]*[\^!]|[^{}^]{1,9}\^)|\^\{[^{}]*\^\{[^{}]*\^")
_FACTORIAL = re.compile(r"(\d+)!|[)}!]!")
_ENDLESS = re.compile(r"\\(?:int|sum|prod|lim|Gamma)(?![a-zA-Z])|\\exp\W*\\exp|\^\{[^{}]*\d{5}")


def same(gold: str, given: str) -> bool:
    """Whether math-verify finds two normal forms equal; never raises.

    Args:
        gold, given: LaTeX as `krl.tasks.verify` normalises it, at most its MAX_CHARACTERS long.
    """
    if not (_tame(gold) and _tame(given)):
        return False
    seconds = SYMBOLIC_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = _parsed(gold, seconds), _parsed(given, seconds)
        equal = all(parsed) and verify(*parsed, timeout_seconds=seconds, allow_set_relation_comp=True)
        return bool(equal) and not _far_apart(parsed[0][0], parsed[1][0])
    except (Exception, TimeoutException):  # both libraries raise anything on odd input
        return False


@functools.lru_cache(maxsize=4096)
def _parsed(form: str, seconds: int | None) -> list:
    return parse(f"${form}$", extraction_config=_LATEX, parsing_timeout=seconds)


def _far_apart(gold, given) -> bool:
    """Whether two constants differ beyond rounding: the library calls all differences below 1e-15 rounding."""
    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (gold, given)):
        return False
    gold, given = sympy.N(gold, 30), sympy.N(given, 30)
    size = max(abs(gold), abs(given))
    return bool(size > 1e-60 and abs(gold - given) > 1e-6 * size)


def _tame(form: str) -> bool:
    """Whether sympy may see a text: shallow, no numbers of very many digits, no long expansions, no integrals."""
    depth = deepest = 0
    for letter in form:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, abs(depth))
    if deepest > MAX_DEPTH or _TOWER.search(form) or _ENDLESS.search(form):
        return False
    letters = len(re.findall(r"[a-zA-Z]", re.sub(r"\\(?:begin|end)\{\w*\}|\\[a-zA-Z]+", "", form)))
    if letters > (MAX_LETTERS if "!" not in form else MAX_LETTERS // 4):
        return False
    power = 1
    for base, exponent in _POWER.findall(form):
        size = int(exponent[:9])
        if base in ")]}" and size > MAX_EXPANSION:
            return False
        power *= size if size > 20 else 1
    factorials = _FACTORIAL.findall(form)
    return (
        power <= MAX_POWER
        and all(digits and int(digits[:9]) <= MAX_FACTORIAL for digits in factorials)
        and not (re.search(r"binom|choose", form) and re.search(r"\d{5}|\^", form))
    )
