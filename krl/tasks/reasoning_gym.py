"""Tasks of the package reasoning-gym: over a hundred generators of questions whose answers a program checks.

`config.reasoning_gym.tasks` names generators, each with a weight and with options of its own, which decide how hard it
is: "chain_sum(min_digits=1, max_digits=2)*2, letter_counting, spell_backward(max_word_len=5)". The reward
"reasoning_gym" is each generator's own score (`krl.rewards.verify.score_reasoning_gym`).
"""

import ast
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from krl.tasks.data import TaskSet
from krl.tasks.embedded import SPLITS, draw_split

Entry = dict[str, Any]  # "question", "answer", "metadata", and the "options" of its generator, which its score needs
_CHUNK = 500  # entries that are drawn from one seed of a generator


class Generator(NamedTuple):
    """A part of a mixture."""

    name: str  # as reasoning-gym has it
    options: Mapping[str, Any]  # of its config
    weight: float  # positive; in proportion to it questions are drawn


def parse_tasks(text: str) -> list[Generator]:
    """The generators that a text names, with their options and weights; nothing is run.

    Raises:
        ValueError: no such list, an option that is no literal, a weight that is not positive, a name given twice with
            equal options, or none at all; the message goes on after the text.

    >>> parse_tasks("chain_sum(max_digits=2)*3, letter_counting")
    [Generator(name='chain_sum', options={'max_digits': 2}, weight=3.0), Generator(name='letter_counting', options={}, \
weight=1.0)]
    """
    must = "must name generators, such as chain_sum(max_digits=2)*3, letter_counting"
    try:
        listed = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: it has a null character
        raise ValueError(must) from None
    found: list[Generator] = []
    for part in listed.elts if isinstance(listed, ast.List) else []:
        weight = 1.0
        try:
            if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult):
                weight, part = float(ast.literal_eval(part.right)), part.left
            call = part if isinstance(part, ast.Call) else ast.Call(part, [], [])
            if not isinstance(call.func, ast.Name) or call.args:
                raise ValueError
            options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(must) from None
        if not 0 < weight < np.inf:
            raise ValueError(f"gives {call.func.id} the weight {weight}, which must be a positive number")
        found.append(Generator(call.func.id, options, weight))
    if not found:
        raise ValueError(must)
    if any(one[:2] == other[:2] for one, other in itertools.combinations(found, 2)):
        raise ValueError("names a generator twice with the same options; give it once, with the sum of the weights")
    return found


def draw_tasks(sizes: Mapping[str, int], *, seed: int, tasks: str) -> dict[str, TaskSet]:
    """Draw the splits of a mixture of generators; they are disjoint, see `draw_split`.

    Args:
        sizes: the number of questions wanted in each of SPLITS.
        seed: decides which questions are drawn and their order.
        tasks: the mixture, as `parse_tasks` reads it.

    Returns:
        A TaskSet for each of SPLITS, with the answers as completions, or none where a generator has no answer and only
        knows a right one when it sees it. Its fields are "generator" and "difficulty", what a question's entry says of
        how hard it is; its rows are the entries, which the generators' own scores need.

    Raises:
        ValueError: the package is not installed, a generator that it does not have, options that it refuses, or more
            questions than there are.
    """
    try:
        generators = parse_tasks(tasks)
    except ValueError as error:
        raise ValueError(f"config.reasoning_gym.tasks={tasks!r} {error}") from None
    # Some generators go through sets of texts, whose order is another one in every process that starts without this.
    here = os.environ.get("PYTHONHASHSEED") == "0"
    drawn = {}
    for split, entries in (_draw(generators, sizes, seed) if here else _draw_elsewhere(tasks, sizes, seed)).items():
        answers = tuple(str(entry["answer"] or "") for entry in entries)
        drawn[split] = TaskSet(
            prompts=tuple(entry["question"] for entry in entries),
            answers=answers,
            completions=answers if all(answers) else (),
            fields={
                "generator": tuple(entry["metadata"]["source_dataset"] for entry in entries),
                "difficulty": tuple(_difficulty(entry["metadata"]) for entry in entries),
            },
            rows=tuple(entries),
        )
    return drawn


def _draw(generators: Sequence[Generator], sizes: Mapping[str, int], seed: int) -> dict[str, list[Entry]]:
    """The entries of each split."""
    weights = np.array([generator.weight for generator in generators])
    drawn = {}
    for number, split in enumerate(SPLITS):
        rng = np.random.default_rng((seed, number))
        every = [_entries(each, np.random.default_rng((seed, number, i))) for i, each in enumerate(generators)]

        def draw(rng: np.random.Generator = rng, every: list[Iterator[Entry]] = every) -> tuple[str, Entry]:
            entry = _plain(next(every[rng.choice(len(weights), p=weights / weights.sum())]))
            return entry["question"], entry

        drawn[split] = list(draw_split(draw, split, sizes[split]).values())
    return drawn


def _draw_elsewhere(tasks: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[Entry]]:
    """The same by a process of its own, which writes what it drew as Python's literals."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from krl.tasks.reasoning_gym import _answer; _answer()"],
        input=repr((tasks, dict(sizes), seed)), capture_output=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": paths, "PYTHONUTF8": "1"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(last.removeprefix("ValueError: "))
    drawn: dict[str, list[Entry]] = ast.literal_eval(done.stdout)
    return drawn


def _answer() -> None:
    """What that process runs."""
    tasks, sizes, seed = ast.literal_eval(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):  # generators may print
        drawn = _draw(parse_tasks(tasks), sizes, seed)
    print(repr(drawn))


def _entries(generator: Generator, rng: np.random.Generator) -> Iterator[Entry]:
    """Entries of a generator without end: one of its data sets after another, each of another seed."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"these tasks need a library ({error}): pip install 'krl[reasoning-gym]'") from None
    options = ", ".join(f"{name}={value!r}" for name, value in generator.options.items())
    spelled = f"{generator.name}({options})"
    while True:
        try:
            made = reasoning_gym.create_dataset(
                generator.name, **generator.options, seed=int(rng.integers(2**31)), size=_CHUNK
            )
        except Exception as error:  # asserts, TypeErrors and others, as its authors chose
            raise ValueError(f"reasoning-gym has no {spelled}: {error}") from None
        for number in range(_CHUNK):
            try:
                entry = made[number]
            except Exception as error:
                raise ValueError(
                    f"reasoning-gym's {spelled} failed: {error!r}; change its options or leave it out"
                ) from None
            yield entry | {"options": dict(generator.options)}


def _plain(value: Any) -> Any:
    """An entry without NumPy's numbers and texts, which are no literals."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _difficulty(metadata: Mapping[str, Any]) -> str:
    """What makes an entry hard, by the names that its generator gives it; its own values where it tells them."""
    named = metadata.get("difficulty")
    if not isinstance(named, dict):
        return str(named or "")
    values = {name: metadata.get(name, metadata.get(f"num_{name}", value)) for name, value in named.items()}
    return ", ".join(f"{name}={value}" for name, value in values.items() if isinstance(value, int | float | str))
