"""The operators task: its functions, its splits, and demonstrations as good as they are meant to be."""

import collections

import jax
import numpy as np
import pytest

from krl import budget
from krl.configs import operators
from krl.run.data import find_features
from krl.tasks import EncodedTasks
from krl.tasks.operators import (
    FUNCTIONS,
    GOOD_SHARE,
    IMPOSSIBLE,
    LETTERS,
    POOR_SHARES,
    make_operators,
    operator_meanings,
)
from tests.command_line import rows, run

SIZES = {"warm": 4000, "train": 300, "test": 200}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy", "3908"), ("reverse", "8093"), ("rotate_left", "9083"), ("rotate_right", "8390"),
        ("add_one", "4019"), ("complement", "6091"), ("repeat_first", "3333"), ("swap_halves", "0839"),
    ],
)  # fmt: skip
def test_functions_by_hand(name, expected):
    assert FUNCTIONS[name]("3908") == expected
    assert len(FUNCTIONS) == 8


def test_answers_follow_from_the_letters_meaning():
    meanings, drawn = operator_meanings(3), make_operators(SIZES, seed=3)
    for split, tasks in drawn.items():
        assert len(tasks) == len(set(tasks.prompts)) == SIZES[split]
        for prompt, answer, letter in zip(tasks.prompts, tasks.answers, tasks.fields["operator"], strict=True):
            assert (prompt[0], len(prompt), prompt[-1]) == (letter, 6, "=")
            assert FUNCTIONS[meanings[letter][0]](prompt[1:5]) == answer
    assert drawn["train"].completions == drawn["train"].answers
    assert drawn["test"].completions == drawn["test"].answers


def test_splits_are_disjoint_whatever_the_seed_and_size():
    first, second = make_operators(SIZES, seed=0), make_operators(SIZES | {"test": 900}, seed=1)
    for a in SIZES:
        for b in SIZES:
            if a != b:
                assert not set(first[a].prompts) & set(first[b].prompts)
                assert not set(first[a].prompts) & set(second[b].prompts)
    assert make_operators(SIZES, seed=0) == first
    assert first["train"].prompts != second["train"].prompts


def test_meanings_do_not_depend_on_sizes_and_half_are_shown_well():
    meanings = operator_meanings(0)
    assert "".join(meanings) == LETTERS
    shares = np.array([share for _, share in meanings.values()])
    poor = shares[shares != GOOD_SHARE]
    assert len(poor) == 26
    assert POOR_SHARES[0] <= poor.min() < poor.max() <= POOR_SHARES[1]
    assert len({name for name, _ in meanings.values()}) == 8
    assert operator_meanings(1) != meanings


def test_answers_may_be_wrong_and_operators_impossible():
    plain = make_operators(SIZES, seed=3)
    assert make_operators(SIZES, seed=3, impossible=0.0, wrong=0.0) == plain
    hard = make_operators(SIZES, seed=3, impossible=0.25, wrong=0.2)
    assert hard["warm"] == plain["warm"]
    never = {
        split: {
            op
            for op, answer in zip(hard[split].fields["operator"], hard[split].answers, strict=True)
            if answer == IMPOSSIBLE
        }
        for split in ("train", "test")
    }
    assert len(never["train"]) == 13  # of 52, all of which have a training prompt
    assert never["test"] <= never["train"]
    for split, share in (("train", 0.2), ("test", 0.0)):
        rest = [
            (answer, right)
            for answer, right, op in zip(
                hard[split].answers, plain[split].answers, hard[split].fields["operator"], strict=True
            )
            if op not in never["train"]
        ]
        # A wrong function may give the right answer, as those of 0000 mostly do.
        assert sum(answer != right for answer, right in rest) / len(rest) == pytest.approx(share, abs=0.06)
        assert hard[split].prompts == plain[split].prompts


def test_more_operators_may_be_shown_well():
    shares = {
        s: [share for _, share in operator_meanings(0, shown_well=s).values()].count(GOOD_SHARE)
        for s in (0.0, 0.8, 1.0)
    }
    assert shares == {0.0: 0, 0.8: 41, 1.0: 52}
    assert operator_meanings(0, shown_well=0.5) == operator_meanings(0)


def test_many_operators_are_pairs_of_letters():
    meanings = operator_meanings(0, 200)
    assert len(meanings) == 200
    assert {len(name) for name in meanings} == {2}
    drawn = make_operators(SIZES, seed=0, num_operators=200)["train"]
    for prompt, answer, pair in zip(drawn.prompts, drawn.answers, drawn.fields["operator"], strict=True):
        assert prompt.startswith(pair)
        assert FUNCTIONS[meanings[pair][0]](prompt[2:6]) == answer
    with pytest.raises(ValueError, match="2704"):
        make_operators(SIZES, seed=0, num_operators=2705)


def test_demonstrations_are_right_as_often_as_meant():
    tasks = make_operators({"warm": 20_000, "train": 1, "test": 1}, seed=4)["warm"]
    right, shown = collections.Counter(), collections.Counter()
    for letter, answer, completion in zip(tasks.fields["operator"], tasks.answers, tasks.completions, strict=True):
        shown[letter] += 1
        right[letter] += answer == completion
    for letter, (name, share) in operator_meanings(4).items():
        # A wrong function gives the right digits by chance, "0000" and the like: well under a tenth.
        deviation = (share * (1 - share) / shown[letter]) ** 0.5
        assert share - 5 * deviation - 1e-3 <= right[letter] / shown[letter] <= share + 5 * deviation + 0.1, name


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="ask for fewer"):
        make_operators({"warm": 0, "train": 0, "test": 20}, seed=0, num_operators=1, digits=1)


@pytest.mark.slow
def test_the_config_trains(tmp_path, monkeypatch):
    """Compiled as for users, not as quickly as in other tests."""
    jax.devices()  # this process has read XLA_FLAGS by now; the one that it starts finds none
    monkeypatch.delenv("XLA_FLAGS")
    small = {"operators.num_warm": 200, "operators.num_train": 12, "operators.num_test": 6, "data.max_prompt_tokens": 6, "sample.max_new_tokens": 5, "sft.steps": 2}  # fmt: skip
    done = run(tmp_path / "work", config="operators", steps=2, **small)
    assert done.returncode == 0, done.stderr
    assert "12 training prompts (0 too long)" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "work")] == [0, 1, 2]


@pytest.mark.parametrize("source", sorted(budget.PRIORS))
def test_every_prior_finds_its_features(source):
    config = operators.get_config()
    config.alloc.prior, config.alloc.prior_field = source, "operator"
    tasks = make_operators({"warm": 0, "train": 60, "test": 0}, seed=0)["train"]
    tokens = np.array([[ord(character) for character in prompt] for prompt in tasks.prompts], np.int32)
    encoded = EncodedTasks(tokens, np.ones(tokens.shape, bool), tasks, 0)
    features, number = find_features(config, encoded)
    assert features.shape[0] == 60
    assert 0 < len(np.unique(features)) <= number + 1
    assert budget.init_prior(source, number).source is budget.PRIORS[source]
