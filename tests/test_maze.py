"""The maze task: mazes with one way through, digits that spell them, and splits that never meet."""

import jax
import numpy as np
import pytest

from krl import budget
from krl.configs import maze
from krl.configs.check import check
from krl.run.data import find_features
from krl.run.setup import NAMES
from krl.tasks import EncodedTasks
from krl.tasks.maze import make_mazes
from tests.command_line import rows, run

SIZES = {"warm": 300, "train": 200, "test": 100}
STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def passages(prompt, side):
    """The pairs of cells, as (row, column), between which a prompt's digits say that there is no wall."""
    assert len(prompt) == side * side + 1
    assert prompt[-1] == "="
    cells = [(row, column) for row in range(side) for column in range(side)]
    right = {((row, column), (row, column + 1)) for (row, column), d in zip(cells, prompt, strict=False) if d in "13"}
    lower = {((row, column), (row + 1, column)) for (row, column), d in zip(cells, prompt, strict=False) if d in "23"}
    assert all(set(pair) <= set(cells) for pair in right | lower)  # the border is closed
    return right | lower


def ways(open_between, at, goal, before=()):
    """Every simple path from a cell to the goal, in moves, by trying all."""
    if at == goal:
        return [""]
    found = []
    for move, (down, right) in STEPS.items():
        to = at[0] + down, at[1] + right
        if to not in before and ((at, to) in open_between or (to, at) in open_between):
            found += [move + more for more in ways(open_between, to, goal, (*before, at))]
    return found


@pytest.mark.parametrize("side", [3, 5, 6])
def test_the_answer_is_the_only_way(side):
    drawn = make_mazes({"warm": 60, "train": 40, "test": 10}, seed=2, side=side)
    for tasks in drawn.values():
        for prompt, answer in zip(tasks.prompts, tasks.answers, strict=True):
            assert ways(passages(prompt, side), (0, 0), (side - 1, side - 1)) == [answer]
        assert tasks.completions == tasks.answers
    assert drawn["test"].fields == {"length": tuple(str(len(answer)) for answer in drawn["test"].answers)}
    assert drawn["train"].fields == {}  # no prior may go by what is not to be seen


def test_mazes_are_spanning_trees_and_decode_back():
    for prompt in make_mazes(SIZES, seed=0)["train"].prompts:
        open_between, reached = passages(prompt, 5), {(0, 0)}
        for _ in range(25):
            reached |= {cell for pair in open_between if reached & set(pair) for cell in pair}
        assert (len(reached), len(open_between)) == (25, 24)
        cells = [(row, column) for row in range(5) for column in range(5)]
        digits = [
            ((cell, (cell[0], cell[1] + 1)) in open_between) + 2 * ((cell, (cell[0] + 1, cell[1])) in open_between)
            for cell in cells
        ]
        assert "".join(map(str, digits)) + "=" == prompt


def test_a_maze_by_hand():
    """The search of these tests and the docstring's example, drawn.

    0 1 2      o-o-o      o o o
    3 4 5      |   |      | | |
    6 7 8      o-o o      o-o o
                   |        | |
               o-o-o      o-o-o
    """
    assert ways(passages("312102110=", 3), (0, 0), (2, 2)) == ["RRDD"]
    tasks = make_mazes({"warm": 1, "train": 1, "test": 1}, seed=0, side=3)["train"]
    assert (tasks.prompts, tasks.answers) == (("222122110=",), ("DRDR",))


def test_paths_wind():
    tasks = make_mazes({"warm": 0, "train": 1000, "test": 0}, seed=0)["train"]
    lengths = np.array([len(answer) for answer in tasks.answers])
    assert set(lengths) >= {8, 10, 12, 14}  # each detour takes two moves more
    assert 0.35 < (lengths > 8).mean() < 0.5
    assert {move for answer in tasks.answers for move in answer} == set("UDLR")


def test_splits_are_disjoint_whatever_the_seed_and_size():
    first, second = make_mazes(SIZES, seed=0, side=4), make_mazes(SIZES | {"test": 900}, seed=1, side=4)
    for a in SIZES:
        assert len(first[a]) == len(set(first[a].prompts)) == SIZES[a]
        for b in SIZES:
            if a != b:
                assert not set(first[a].prompts) & set(first[b].prompts)
                assert not set(first[a].prompts) & set(second[b].prompts)
    assert make_mazes(SIZES, seed=0, side=4) == first
    assert first["train"].prompts != second["train"].prompts


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="side=1 must be at least 2"):
        make_mazes(SIZES, seed=0, side=1)
    with pytest.raises(ValueError, match="ask for fewer"):  # there are 4 of 2 x 2 cells
        make_mazes({"warm": 0, "train": 5, "test": 0}, seed=0, side=2)
    for key, value, must in (("side", 1, "at least 2"), ("num_train", 0, "at least 1")):
        config = maze.get_config()
        config.maze[key] = value
        with pytest.raises(ValueError, match=f"maze.{key}={value} must be {must}"):
            check(config, NAMES)


@pytest.mark.slow
def test_the_config_trains(tmp_path, monkeypatch):
    """Compiled as for users, not as quickly as in other tests."""
    jax.devices()  # this process has read XLA_FLAGS by now; the one that it starts finds none
    monkeypatch.delenv("XLA_FLAGS")
    small = {
        "maze.num_warm": 200, "maze.num_train": 12, "maze.num_test": 6, "maze.side": 4, "data.max_prompt_tokens": 17,
        "sample.max_new_tokens": 16, "sft.steps": 2,
    }  # fmt: skip
    done = run(tmp_path / "work", config="maze", steps=2, **small)
    assert done.returncode == 0, done.stderr
    assert "12 training prompts (0 too long)" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "work")] == [0, 1, 2]


def test_the_config_holds_every_prompt_and_answer():
    config = maze.get_config()
    side = config.maze.side
    assert config.data.max_prompt_tokens == side * side + 1
    assert config.sample.max_new_tokens >= side * side  # the moves of a path through all cells, and the end


@pytest.mark.parametrize("source", ["features", "gaussian_process"])
def test_every_prior_finds_its_features(source):
    config = maze.get_config()
    config.alloc.prior = source
    tasks = make_mazes({"warm": 0, "train": 60, "test": 0}, seed=0)["train"]
    tokens = np.array([[ord(character) for character in prompt] for prompt in tasks.prompts], np.int32)
    features, number = find_features(config, EncodedTasks(tokens, np.ones(tokens.shape, bool), tasks, 0))
    assert features.shape[0] == 60
    assert 0 < len(np.unique(features)) <= number + 1
    assert budget.init_prior(source, number).source is budget.PRIORS[source]
