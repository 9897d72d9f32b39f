"""The embedded data "operators": what does each operator do to a string of digits?

Every operator, a letter or a pair of letters, means one of a few string functions. The demonstrations of the warm start
show each function often, but for half of the operators they mostly apply a wrong one. So a policy that learnt from
them can execute every function and must find out, by trial, which one each of those operators means; what it finds for
an operator holds for strings it has not seen.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from krl.tasks.data import TaskSet
from krl.tasks.embedded import SPLITS, draw_split

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FUNCTIONS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "reverse": lambda text: text[::-1],
    "rotate_left": lambda text: text[1:] + text[:1],
    "rotate_right": lambda text: text[-1:] + text[:-1],
    "add_one": lambda text: "".join(str((int(digit) + 1) % 10) for digit in text),
    "complement": lambda text: "".join(str(9 - int(digit)) for digit in text),
    "repeat_first": lambda text: text[:1] * len(text),
    "swap_halves": lambda text: text[len(text) // 2 :] + text[: len(text) // 2],
}
GOOD_SHARE = 0.98  # right demonstrations of an operator that is shown well
MOST_OPERATORS = len(LETTERS) ** 2
IMPOSSIBLE = "?"  # an answer that no function gives
POOR_SHARES = (0.005, 0.4)  # bounds of the share of the others, log-uniform between


def make_operators(
    sizes: Mapping[str, int],
    *,
    seed: int,
    num_operators: int = 52,
    digits: int = 4,
    shown_well: float = 0.5,
    impossible: float = 0.0,
    wrong: float = 0.0,
) -> dict[str, TaskSet]:
    """Draw the splits of the operators task.

    The meaning of an operator and its share of right demonstrations follow from the seed and num_operators
    alone. Completions are right in "train" and "test"; in "warm" a wrong one applies another function.

    Args:
        sizes: the number of tasks wanted in each of SPLITS.
        seed: decides the meanings, the shares, and which prompts are drawn.
        num_operators: from 1 to 2704. Up to 52 they are letters; more are pairs of letters.
        digits: of a string.
        shown_well: share of the operators whose demonstrations are nearly all right.
        impossible: share of the operators for which no answer is ever right, in "train" and "test".
        wrong: share of the answers in "train" that are another function's.

    Returns:
        A TaskSet for each of SPLITS, with the field "operator"; prompts look like "k4071=" or "kR4071=".

    Raises:
        ValueError: too many or no operators, or more tasks than there are prompts.

    >>> make_operators({"warm": 1, "train": 2, "test": 1}, seed=0)["train"].prompts
    ('Y0808=', 'c3269=')
    """
    if not 1 <= num_operators <= MOST_OPERATORS or digits < 1:
        raise ValueError(
            f"num_operators={num_operators} must be from 1 to {MOST_OPERATORS} and digits={digits} at least 1"
        )
    meanings = operator_meanings(seed, num_operators, shown_well)
    drawn = {
        split: _draw(meanings, split, sizes[split], digits, np.random.default_rng((seed, 1 + number)))
        for number, split in enumerate(SPLITS)
    }
    rng = np.random.default_rng((seed, 1 + len(SPLITS)))
    hopeless = set(rng.permutation(list(meanings))[: round(impossible * num_operators)].tolist())
    for split in ("train", "test"):
        tasks = drawn[split]
        answers = list(tasks.answers)
        for row, (prompt, operator) in enumerate(zip(tasks.prompts, tasks.fields["operator"], strict=True)):
            if split == "train" and rng.random() < wrong:
                other = rng.choice([name for name in FUNCTIONS if name != meanings[operator][0]])
                answers[row] = FUNCTIONS[other](prompt[len(operator) : -1])
            if operator in hopeless:
                answers[row] = IMPOSSIBLE
        drawn[split] = dataclasses.replace(tasks, answers=tuple(answers))
    return drawn


def operator_meanings(seed: int, num_operators: int = 52, shown_well: float = 0.5) -> dict[str, tuple[str, float]]:
    """What each operator means, a key of FUNCTIONS, and the share of its demonstrations that are right."""
    rng = np.random.default_rng((seed, 0))
    names = rng.choice(list(FUNCTIONS), num_operators)
    low, high = np.log(POOR_SHARES)
    shares = np.exp(rng.uniform(low, high, num_operators))
    shares[rng.permutation(num_operators)[: int(shown_well * num_operators)]] = GOOD_SHARE
    pairs = [first + second for first in LETTERS for second in LETTERS]
    operators = (
        LETTERS[:num_operators] if num_operators <= len(LETTERS) else rng.choice(pairs, num_operators, replace=False)
    )
    return {str(op): (str(name), float(share)) for op, name, share in zip(operators, names, shares, strict=True)}


def _draw(
    meanings: dict[str, tuple[str, float]], split: str, size: int, digits: int, rng: np.random.Generator
) -> TaskSet:
    names = list(meanings)

    def draw() -> tuple[str, tuple[str, str, str]]:
        operator, text = names[rng.integers(len(names))], f"{rng.integers(10**digits):0{digits}d}"
        name, share = meanings[operator]
        shown = name
        if split == "warm" and rng.random() >= share:
            shown = str(rng.choice([other for other in FUNCTIONS if other != name]))
        return f"{operator}{text}", (FUNCTIONS[name](text), FUNCTIONS[shown](text), operator)

    found = draw_split(draw, split, size)
    answers, completions, operators = zip(*found.values(), strict=True) if found else ((), (), ())
    return TaskSet(tuple(f"{prompt}=" for prompt in found), answers, completions, {"operator": operators})
