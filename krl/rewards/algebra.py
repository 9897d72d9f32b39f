"""Equality of two mathematical expressions, which math-verify parses from LaTeX into sympy.

Values are compared exactly, or with as many digits as the numbers in them need, and never with a bound on the
absolute difference: 2^{-300} is not 2^{-301}, and x > 10^{-20} is not x > 10^{-21}.
"""

import functools
import logging
import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from latex2sympy2_extended.logic import And
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from krl.rewards.parts import depths, paired

# Forms beyond these are equal to nothing; `krl.rewards.verify` has compared them as text before it asks here.
MAX_DEPTH = 10
MAX_LETTERS = 30  # commands aside; more are prose, which would be parsed as a product of that many variables
# Sympy evaluates powers and factorials as whole numbers and multiplies out powers of sums, so a few characters can
# ask for more digits or terms than fit in memory: the most for the digits of a power, for n in n!, and for (a+b)^n.
MAX_POWER, MAX_FACTORIAL, MAX_EXPANSION = 10_000, 10_000, 100
MAX_DIGITS = 40_000  # of a difference of two constants; 10,000! has 35,660
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
_POWER = re.compile(r"(?:(?<!\d)(\d++)|\(-?1\)|(.))\^[-+({\s]*(\d+)")
_TOWER = re.compile(r"[\d)}]\^(?:\{[^{}]*[\^!]|[^{}^]{1,9}\^)|\^\{[^{}]*\^\{[^{}]*\^")
_FACTORIAL = re.compile(r"(?<!\d)(\d++)!|[)}!]!")
_ENDLESS = re.compile(r"\\(?:int|sum|prod|lim|Gamma)(?![a-zA-Z])|\\exp\W*\\exp|\^\{[^{}]*\d{5}")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w*\}|\\[a-zA-Z]+")
_TWO_POINTS = re.compile(r"\.\d*+\.")
_SIGNS = re.compile(r"[-+]{4}")
_LETTER = re.compile(r"[a-zA-Z]")
_CHOOSE = re.compile(r"binom|choose")
_LONG_OR_POWER = re.compile(r"\d{5}|\^")
# What the parser gets wrong: it drops the prime of y'. Mixed numbers are written as fractions, see `_product`.
_MIXED = re.compile(r"(?<![\d.])(\d++)\\frac\{(\d++)\}\{(\d++)\}")
_PRIMES = re.compile(r"([a-zA-Z])('+)")

# Equal at some points does not mean equal for these: they are flat, or have kinks and jumps.
_NOT_ANALYTIC = (
    sympy.Abs, sympy.sign, sympy.floor, sympy.ceiling, sympy.Mod, sympy.Max, sympy.Min, sympy.Piecewise,
    sympy.Heaviside, sympy.re, sympy.im, sympy.arg, sympy.conjugate,
)  # fmt: skip


def same(gold: str, given: str) -> bool:
    """Whether two normal forms are equal as sympy reads them; never raises.

    Args:
        gold, given: LaTeX as `krl.rewards.notation` normalises it, at most its MAX_CHARACTERS long.
    """
    return bool(_asked(_equal, gold, given))


def constant(form: str) -> Fraction | None:
    """The real number that a normal form writes, exactly or to 80 digits; None for anything else."""
    return _asked(_value, form)


def _asked(question: Callable[..., Any], *forms: str) -> Any:
    """What a function says of what forms are, within the limit of time; None where sympy may not or cannot say."""
    if not all(map(_tame, forms)):
        return None
    seconds = SYMBOLIC_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = [_parsed(form, seconds) for form in forms]
        return timeout(timeout_seconds=seconds)(question)(*(found[0] for found in parsed)) if all(parsed) else None
    except (Exception, TimeoutException):  # both libraries raise anything on odd input
        return None


def _product(self: Any, factors: Sequence[Any], position: int = 0) -> Any:
    """Factors without a sign between them, multiplied: the library adds the numbers of (2)(3) like those of 1 1/2."""
    left = self.convert_postfix(factors[position])
    if position == len(factors) - 1:
        return left
    right = self.convert_postfix_list(factors, position + 1)
    if isinstance(left, list):
        return sympy.Derivative(right, *left)
    if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
        return self.mat_mul_flat(left, right)
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        raise ValueError("a product of what are no expressions")
    return self.mul_flat(left, right)


_Latex2Sympy.convert_postfix_list = _product


@functools.lru_cache(maxsize=4096)
def _parsed(form: str, seconds: int | None) -> list[Any]:
    """What the parser makes of a form; empty where it makes nothing."""
    form = _PRIMES.sub(lambda match: f"{match[1]}_{{{len(match[2])}prime}}", form)
    form = _MIXED.sub(lambda m: f"(\\frac{{{int(m[1]) * int(m[3]) + int(m[2])}}}{{{m[3]}}})", form)
    form = form.replace("\\pi(", "\\pi\\cdot(")
    return parse(f"${form}$", extraction_config=_LATEX, parsing_timeout=seconds)


_parsed("1+x", None)  # builds the parser's tables, which would else count against the first answer's time


def _value(parsed: Any) -> Fraction | None:
    if not isinstance(parsed, sympy.Expr):
        return None
    number = _exact(parsed)
    if number.is_Rational:
        return Fraction(int(number.p), int(number.q))
    number = sympy.N(number, 80) if number.is_number else None
    return Fraction(str(number)) if isinstance(number, sympy.Float) else None


def _exact(expression: sympy.Basic) -> Any:
    """An expression with fractions for decimals, and real variables for f(x), dx/dt and all symbols."""
    names = expression.atoms(AppliedUndef, sympy.Derivative) | expression.free_symbols
    replaced = {part: sympy.Symbol(str(part), real=True) for part in names}
    replaced |= {part: sympy.Rational(str(part)) for part in expression.atoms(sympy.Float)}
    return expression.xreplace(replaced).doit()


def _equal(gold: Any, given: Any) -> bool:
    """Equality of what the parser made of two forms, part by part down to their values."""
    if gold == given:
        return True
    if isinstance(gold, str) or isinstance(given, str):
        return False
    if isinstance(gold, sympy.MatrixBase) and isinstance(given, sympy.MatrixBase):
        return gold.shape == given.shape and all(map(_equal, gold.flat(), given.flat()))
    if isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr):
        if isinstance(gold, sympy.Symbol) or isinstance(given, sympy.Symbol):
            return bool(verify(gold, given, timeout_seconds=None))  # words
        return _same_values(_exact(gold), _exact(given))
    if isinstance(gold, Relational) and isinstance(given, Relational):
        return _same_relations(gold, given)
    if isinstance(gold, And) and isinstance(given, And):
        return paired(gold.args, given.args, _equal)
    return _same_sets(_as_set(gold), _as_set(given))


def _as_set(parsed: Any) -> Any:
    """A relation's solutions; what is no relation stays."""
    if isinstance(parsed, And) and len(parsed.free_symbols) == 1:
        return sympy.Intersection(*map(_as_set, parsed.args))
    if not isinstance(parsed, Relational):
        return parsed
    relation = _larger_first(parsed)
    strict = isinstance(relation, sympy.StrictGreaterThan)
    if (strict or isinstance(relation, sympy.GreaterThan)) and relation.lhs.is_Symbol != relation.rhs.is_Symbol:
        bound = relation.rhs if relation.lhs.is_Symbol else relation.lhs
        if bound.is_number:  # at once: the general way takes a hundred times as long
            ends = (bound, sympy.oo) if relation.lhs.is_Symbol else (-sympy.oo, bound)
            return sympy.Interval(*ends, left_open=strict, right_open=strict)
    return relation.as_set()


def _larger_first(relation: Relational) -> Any:
    """A relation, exact, with > for < and >= for <=; a truth value where sympy has decided it: 0 = 0."""
    relation = _exact(relation)
    return relation.reversed if isinstance(relation, sympy.StrictLessThan | sympy.LessThan) else relation


def _same_sets(gold: Any, given: Any) -> bool:
    if isinstance(gold, sympy.Interval) and isinstance(given, sympy.Interval):
        ends = gold.left_open == given.left_open and gold.right_open == given.right_open
        return bool(ends) and _equal(gold.start, given.start) and _equal(gold.end, given.end)
    if isinstance(gold, sympy.Tuple) and isinstance(given, sympy.Tuple):
        return len(gold) == len(given) and all(map(_equal, gold, given))
    if isinstance(gold, sympy.Expr) or isinstance(given, sympy.Expr):  # {5} is 5
        gold, given = (x if isinstance(x, sympy.Set) else sympy.FiniteSet(x) for x in (gold, given))
    for kind in (sympy.FiniteSet, sympy.Union):
        if isinstance(gold, kind) and isinstance(given, kind):
            return paired(gold.args, given.args, _equal)
    sets = isinstance(gold, sympy.Set) and isinstance(given, sympy.Set)
    return sets and _exact(gold).symmetric_difference(_exact(given)) == sympy.S.EmptySet


def _same_relations(gold: Relational, given: Relational) -> bool:
    """Equality of two equations or two inequalities: one side's difference is a multiple of the other's, or else
    both have the same solutions."""
    relations = _larger_first(gold), _larger_first(given)
    if not all(isinstance(relation, Relational) for relation in relations):
        return False
    kind, other = map(type, relations)
    sides = first, second = [relation.lhs - relation.rhs for relation in relations]
    if kind is not other or first.free_symbols != second.free_symbols:
        return False
    p, q, *_ = _points(first.free_symbols)
    crossed = first.subs(p) * second.subs(q) - first.subs(q) * second.subs(p)
    multiple = first.subs(p) / second.subs(p)
    if _is_zero(crossed) and _same_values(first, multiple * second):
        return kind in (sympy.Eq, sympy.Ne) or bool(sympy.N(multiple, 20) > 0)
    if kind is sympy.Eq:
        solved = ([sympy.solve(side, x) for side in sides] for x in sorted(first.free_symbols, key=str))
        solutions = next(filter(all, solved), None)
        return solutions is not None and paired(solutions[0], solutions[1], _equal)
    return kind is not sympy.Ne and len(first.free_symbols) == 1 and _same_sets(_as_set(gold), _as_set(given))


def _same_values(gold: sympy.Expr, given: sympy.Expr) -> bool:
    """Equality of two expressions: at points, where that decides, and by math-verify where it does not."""
    difference = gold - given
    if difference == 0:
        return True
    if not difference.free_symbols:
        return _is_zero(difference) is True
    real: list[bool] = []  # whether they are equal where both are real numbers
    other: list[bool] = []  # and where neither is
    for point in _points(difference.free_symbols):
        are_real = [_is_real(side, point) for side in (gold, given)]
        equal = _is_zero(difference, point)
        if None in are_real or equal is None:
            continue
        if are_real[0] != are_real[1] or (are_real[0] and not equal):
            return False
        (real if are_real[0] else other).append(equal)
    checked = real or other
    if not all(checked):
        return False
    if len(checked) > 1 and not difference.has(*_NOT_ANALYTIC):
        return True
    return bool(verify(gold, given, timeout_seconds=None))


def _points(symbols: Iterable[sympy.Symbol]) -> list[dict[sympy.Symbol, sympy.Expr]]:
    """Four points: small and larger positive numbers, negative ones, and some of both."""
    ordered = sorted(symbols, key=str)
    signs_and_sizes = ((1, 0), (1, 2), (-1, 0), (None, 1))
    return [
        {
            symbol: (sign or (-1) ** k) * (size + sympy.Rational(7 + 13 * k + 3 * size, 17 + 19 * k))
            for k, symbol in enumerate(ordered)
        }
        for sign, size in signs_and_sizes
    ]


def _is_real(expression: sympy.Expr, point: dict[sympy.Symbol, sympy.Expr]) -> bool | None:
    """Whether an expression is a real number at a point; None where it has no value."""
    parts = _real_and_imaginary(expression.evalf(15, subs=point))
    return _zero_to_its_digits(parts[1]) if parts else None


def _real_and_imaginary(value: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The parts of a finite number; None for anything else."""
    return value.as_real_imag() if value.is_number and not value.has(sympy.nan, sympy.zoo, sympy.oo) else None


def _is_zero(expression: sympy.Expr, point: dict[sympy.Symbol, sympy.Expr] | None = None) -> bool | None:
    """Whether a constant, or an expression at a point, is 0 to many digits of its terms; None if it has no value."""
    if expression.is_Rational:
        return bool(expression == 0)
    digits = _digits(expression, point)
    if digits > MAX_DIGITS:
        return False
    parts = _real_and_imaginary(expression.evalf(2, subs=point, maxn=digits))
    return all(map(_zero_to_its_digits, parts)) if parts else None


def _zero_to_its_digits(value: sympy.Expr) -> bool:
    """Whether a number is 0, or what was left after all of its digits had cancelled, which sympy gives precision 1."""
    return bool(value == 0) or (isinstance(value, sympy.Float) and value._prec == 1)


def _digits(expression: sympy.Expr, point: dict[sympy.Symbol, sympy.Expr] | None = None) -> int:
    """Enough to tell apart what the numbers and exponents in an expression can tell apart."""
    numbers = sum(
        int(number.p).bit_length() + int(number.q).bit_length() for number in expression.atoms(sympy.Rational)
    )
    # sin(x) and x - x^3/6 differ at a small x by its fifth power
    digits = 100 + 0.31 * numbers * (10 if expression.atoms(sympy.Function) else 1)
    for power in expression.atoms(sympy.Pow, sympy.exp):
        base, exponent = power.as_base_exp()
        if exponent.is_number and base.is_number:
            size = math.log10(2 + abs(int(base))) if base.is_Rational else 1
            digits += size * abs(int(sympy.N(exponent, 15, maxn=20)))
    for function in expression.atoms(sympy.tanh, sympy.coth, sympy.sinh, sympy.cosh, sympy.exp):
        size = sympy.Abs(function.args[0]).evalf(15, subs=point, maxn=20)
        digits += 2 * float(size) if size.is_number else 0
    return int(min(digits, 10 * MAX_DIGITS))


def _tame(form: str) -> bool:
    """Whether sympy may see a text: shallow, no numbers of very many digits, no long expansions, no integrals."""
    if any(abs(depth) > MAX_DEPTH for depth in depths(form)) or any(
        odd.search(form) for odd in (_TOWER, _ENDLESS, _SIGNS, _TWO_POINTS)
    ):
        return False
    letters = len(_LETTER.findall(_COMMAND.sub("", form)))
    if letters > (MAX_LETTERS if "!" not in form else MAX_LETTERS // 4):
        return False
    power, outer = 1, 1  # the most digits that one base asks for, and the product of the powers of brackets
    for number, base, exponent in _POWER.findall(form):
        size = int(exponent[:9])
        if base and base in ")]}":
            if size > MAX_EXPANSION:
                return False
            outer *= size if size > 20 else 1
        power = max(power, size * max(1, len(number) - 1))
    power *= outer
    factorials = _FACTORIAL.findall(form)
    return (
        power <= MAX_POWER
        and all(digits and int(digits[:9]) <= MAX_FACTORIAL for digits in factorials)
        and not (_CHOOSE.search(form) and _LONG_OR_POWER.search(form))
    )
