"""The embedded data: an arithmetic ladder, generated from a seed, with exact answers.

A rung is a kind of expression and climbs from one-digit operands to longer ones. A small decoder that
was warm-started on the ladder solves the foot of each rung almost always and its top almost never.
"""

from collections.abc import Callable

import numpy as np

from krl.tasks.data import TaskSet
from krl.tasks.embedded import SPLITS, draw_split

Rung = Callable[[np.random.Generator, int], tuple[str, int]]


def make_ladder(rungs: dict[str, int], sizes: dict[str, int], *, seed: int) -> dict[str, TaskSet]:
    """Draw the splits of an arithmetic ladder.

    Splits are disjoint, see `draw_split`. In "train" and "test" every length of every rung is equally
    likely; "warm" has long operands less often, by the square of their digits, so that a warm start
    solves the foot of each rung first. A length that runs out of expressions leaves room to the others.

    Args:
        rungs: the most digits of an operand for each rung; the names are the keys of RUNGS.
        sizes: the number of tasks wanted in each of SPLITS.
        seed: decides which expressions are drawn and their order.

    Returns:
        A TaskSet for each of SPLITS, with the fields "rung" and "digits"; prompts look like "12+34=" and
        completions are the answers.

    Raises:
        ValueError: an unknown rung, fewer than one digit, or more tasks than there are expressions.

    >>> make_ladder({"addition": 2}, {"warm": 1, "train": 2, "test": 1}, seed=0)["train"].prompts
    ('99+37=', '0+90=')
    """
    unknown = sorted(set(rungs) - set(RUNGS))
    if unknown or not rungs or min(rungs.values()) < 1:
        raise ValueError(f"rungs must map names from {sorted(RUNGS)} to at least one digit, got {rungs}")
    levels = [(name, digits) for name, most in rungs.items() for digits in range(1, most + 1)]
    return {
        split: _draw(levels, split, sizes[split], np.random.default_rng((seed, number)))
        for number, split in enumerate(SPLITS)
    }


def _draw(levels: list[tuple[str, int]], split: str, size: int, rng: np.random.Generator) -> TaskSet:
    """Different expressions of one split."""
    weights = np.array([digits**-2.0 if split == "warm" else 1.0 for _, digits in levels])

    def draw() -> tuple[str, tuple[str, str, str]]:
        name, digits = levels[rng.choice(len(levels), p=weights / weights.sum())]
        expression, answer = RUNGS[name](rng, digits)
        return expression, (str(answer), name, str(digits))

    found = draw_split(draw, split, size)
    answers, names, digits = zip(*found.values(), strict=True) if found else ((), (), ())
    return TaskSet(tuple(f"{expression}=" for expression in found), answers, answers, {"rung": names, "digits": digits})


def _operand(rng: np.random.Generator, digits: int) -> int:
    """A number of exactly so many digits; 0 has one digit."""
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _pair(rng: np.random.Generator, digits: int) -> tuple[int, int]:
    """An operand of so many digits and one of at most as many, in either order."""
    pair = _operand(rng, digits), _operand(rng, int(rng.integers(1, digits + 1)))
    return pair if rng.integers(2) else pair[::-1]


def _addition(rng: np.random.Generator, digits: int) -> tuple[str, int]:
    a, b = _pair(rng, digits)
    return f"{a}+{b}", a + b


def _subtraction(rng: np.random.Generator, digits: int) -> tuple[str, int]:
    b, a = sorted(_pair(rng, digits))
    return f"{a}-{b}", a - b


def _multiplication(rng: np.random.Generator, digits: int) -> tuple[str, int]:
    a, b = _operand(rng, digits), _operand(rng, 1)
    return f"{a}*{b}", a * b


def _two_step(rng: np.random.Generator, digits: int) -> tuple[str, int]:
    a, b = _pair(rng, digits)
    c = int(rng.integers(0, a + b + 1))
    return f"{a}+{b}-{c}", a + b - c


RUNGS: dict[str, Rung] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "two_step": _two_step,
}
