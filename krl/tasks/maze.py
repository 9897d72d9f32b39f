"""The embedded data "maze": which moves lead from the top left of a maze to its bottom right?

Mazes are perfect: between any two cells there is exactly one simple path. So one answer is right, and one that hits a
wall, visits a dead end or misses the goal is not. The task and the sparse reward are those of the mazes of MaxRL (arXiv
2602.02710), which have 8 x 8 cells and a token for each wall; here a cell is one character, so that processors without
an accelerator can learn them.
"""

import heapq
import itertools
from collections.abc import Mapping

import numpy as np

from krl.tasks.data import TaskSet
from krl.tasks.embedded import SPLITS, draw_split

# A cell's character is the sum of its open walls, a digit. Its left and upper walls belong to its neighbours.
RIGHT_OPEN, LOWER_OPEN = 1, 2


def make_mazes(sizes: Mapping[str, int], *, seed: int, side: int = 5) -> dict[str, TaskSet]:
    """Draw the splits of the maze task.

    A prompt has a digit for each cell, row by row from the top left: 0 where the right and the lower wall are closed,
    1 where the right one is open, 2 where the lower one is, 3 where both are. It ends with "=". The answer and the
    completion are the moves of the only simple path: U up, D down, L left, R right. Splits are disjoint, see
    `draw_split`.

    Args:
        sizes: the number of mazes wanted in each of SPLITS.
        seed: decides which mazes are drawn and their order.
        side: n, cells along a side, at least 2; prompts have n * n + 1 characters and answers from 2 * (n - 1) to
            n * n - 1 moves.

    Returns:
        A TaskSet for each of SPLITS; "test" has the field "length", the moves of the path.

    Raises:
        ValueError: a side below 2, or more mazes than there are.

    >>> tasks = make_mazes({"warm": 1, "train": 1, "test": 1}, seed=0, side=3)["train"]
    >>> tasks.prompts, tasks.answers
    (('222122110=',), ('DRDR',))
    """
    if side < 2:
        raise ValueError(f"side={side} must be at least 2: a maze of one cell has no path")
    return {
        split: _draw(split, sizes[split], side, np.random.default_rng((seed, number)))
        for number, split in enumerate(SPLITS)
    }


def _draw(split: str, size: int, side: int, rng: np.random.Generator) -> TaskSet:
    """Different mazes of one split."""

    def draw() -> tuple[str, str]:
        parents = _grow(side, rng)
        return _spell(parents, side), _moves(parents, side)

    found = draw_split(draw, split, size)
    answers = tuple(found.values())
    # Of training prompts it is not told how long their path is: that would tell a prior what no text shows.
    fields = {"length": tuple(str(len(moves)) for moves in answers)} if split == "test" else {}
    return TaskSet(tuple(f"{maze}=" for maze in found), answers, answers, fields)


def _grow(side: int, rng: np.random.Generator) -> list[int]:
    """A spanning tree by randomised Prim: for each cell the one it was reached from; -1 for the first.

    Cells are numbered row by row. Every wall has a random weight; from the top left on, the lightest wall between a
    reached cell and another is opened, until all are reached. Paths of such a tree wind more than those of one that
    opens any of these walls with equal probability, of which nine in ten here would go right and down alone.
    """
    cells = side * side
    weights = rng.random(2 * cells).tolist()  # of the right walls, then of the lower ones; a call for each is slow
    parents = [-1] * cells
    reached = [False] * cells
    walls: list[tuple[float, int, int]] = [(0.0, -1, 0)]  # a heap: weight, the cell it is reached from, a cell
    while walls:
        _, parent, cell = heapq.heappop(walls)
        if reached[cell]:
            continue
        reached[cell], parents[cell] = True, parent
        row, column = divmod(cell, side)
        if column < side - 1:
            heapq.heappush(walls, (weights[cell], cell, cell + 1))
        if column > 0:
            heapq.heappush(walls, (weights[cell - 1], cell, cell - 1))
        if row < side - 1:
            heapq.heappush(walls, (weights[cells + cell], cell, cell + side))
        if row > 0:
            heapq.heappush(walls, (weights[cells + cell - side], cell, cell - side))
    return parents


def _spell(parents: list[int], side: int) -> str:
    """The digits of a maze, row by row."""
    cells = [0] * (side * side)
    for cell, parent in enumerate(parents):
        if parent >= 0:
            cells[min(cell, parent)] += RIGHT_OPEN if abs(cell - parent) == 1 else LOWER_OPEN
    return "".join(map(str, cells))


def _moves(parents: list[int], side: int) -> str:
    """The path from the first cell to the last, which is the line of the last cell's ancestors."""
    path = [side * side - 1]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    names = {1: "R", -1: "L", side: "D", -side: "U"}
    return "".join(names[after - before] for before, after in itertools.pairwise(reversed(path)))
