"""Evaluation during training, with a fake sampler and fake verifiers."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from krl.eval.sample import as_failures, evaluate, first_reward, score_rollouts
from krl.rewards.pool import VerifierPool
from krl.run.scoring import FaultWatch, Scoring, decode_rollouts
from krl.tasks import TaskSet
from tests.fake import TOKENIZER, make_rollouts, make_sampler, response, reward, score, tasks


def test_scores_are_of_the_response_alone_and_zero_on_padding():
    tokens = np.array([[50, 49, 7], [49, 10, 50], [49, 49, 49], [50, 0, 0]])
    index = np.array([1, 0, 2, 1])
    rollouts = make_rollouts(index, index, index < 2, tokens, np.array([2, 3, 3, 1]), index < 2)
    asked = []

    def keep(items):
        asked.extend(items)
        return np.array([0.5, 2.0, 3.0], np.float32), {"timeouts": 1}

    rewards, faults = score_rollouts(TOKENIZER, keep, rollouts, TaskSet(("p", "q"), ("a", ("b", "c"))))
    assert asked == [("q", "21", ("b", "c")), ("p", "1\n2", "a"), ("q", "2", ("b", "c"))]
    assert rewards.tolist() == [0.5, 2.0, 0.0, 3.0]
    assert rewards.dtype == np.float32
    assert faults == {"timeouts": 1}
    assert decode_rollouts(TOKENIZER, rollouts) == ["21", "1\n2", "", "2"]


def test_rollouts_that_are_scored_as_they_end_get_the_same_rewards():
    tokens = np.array([[50, 49, 7], [49, 10, 50], [49, 49, 49], [50, 0, 0], [9, 9, 9]])
    lengths, index = np.array([2, 3, 3, 1, 3]), np.array([0, 0, 0, 2, 3])
    rollouts = make_rollouts(index, index, index < 3, tokens, lengths, index < 3)
    asked, ready = TaskSet(("p", "q", "r"), ("21", "", "2")), [False, True, False, False, True]
    pool: Any = VerifierPool("tests.rewards:same", workers=0, item_seconds=9, batch_seconds=9, items_per_worker=9, memory_gb=2)  # fmt: skip
    with pool:
        expected, _ = score_rollouts(TOKENIZER, pool.score, rollouts, asked)
        scoring = Scoring(TOKENIZER, pool, asked, np.array([3, 0, 1]))
        for rows in ([3], [2, 0], [], [1]):
            scoring.watch(np.array(rows, int), tokens[rows], lengths[rows], lambda: ready.pop(0))
        said = scoring.finish(5)
    assert said.rewards.tolist() == expected.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert said.faults.tolist() == [0] * 5
    assert said.prompt_index.tolist() == [0, 0, 0, 2, 3]
    assert said.texts == [*decode_rollouts(TOKENIZER, rollouts)[:4], None]
    assert not ready  # one reward after the first call, none after the second, two after the third, none after the last


@pytest.mark.parametrize("num_rollouts", [2, 6, 7, 60])
def test_evaluation_during_training_averages_over_all_samples(num_rollouts):
    calls: list = []
    encoded = tasks(5)
    got, solved = evaluate(
        make_sampler(calls, num_rollouts),
        functools.partial(score_rollouts, TOKENIZER, score),
        {}, encoded, jax.random.key(0), samples=3, num_rollouts=num_rollouts, place=lambda x: x,
    )  # fmt: skip
    drawn = [[response(task, number) for number in range(3)] for task in range(5)]
    rewards = [
        [reward(f"question {task}", text, encoded.tasks.answers[task]) for text, _ in row]
        for task, row in enumerate(drawn)
    ]
    assert got["accuracy"] == pytest.approx(np.mean(rewards))
    assert got["pass_at_k"] == pytest.approx(np.mean([max(row) == 1.0 for row in rewards]))
    assert got["response_length"] == pytest.approx(np.mean([len(text) for row in drawn for text, _ in row]))
    assert got["truncation_rate"] == pytest.approx(np.mean([not finished for row in drawn for _, finished in row]))
    assert got["verifier_faults"] == 15 + sum("é" in text for row in drawn for text, _ in row)
    assert solved.tolist() == [sum(value == 1.0 for value in row) for row in rewards]
    assert 0 < got["pass_at_k"] < 1
    assert sum(n for call in calls for _, n in call) == 15


def test_an_evaluation_counts_what_could_not_be_judged_as_the_worst():
    assert as_failures(np.array([[1.0, np.nan], [0.5, 2.0]])).tolist() == [[1, 0], [0.5, 2]]
    assert as_failures(np.array([1.0, np.nan, -2.0])).tolist() == [1, -2, -2]
    assert as_failures(np.array([np.nan])).tolist() == [0]
    pool: Any = VerifierPool("tests.rewards:refuses_a,tests.rewards:same*5", workers=0, item_seconds=9, batch_seconds=9, items_per_worker=9, memory_gb=2)  # fmt: skip
    with pool:
        rewards, faults = first_reward(pool)([("q", "b", "b"), ("q", "a", "a"), ("q", "b", "c")])
    np.testing.assert_array_equal(rewards, [-1, np.nan, -1])  # of the first reward, whatever the weights
    assert faults == {"timeouts": 0, "crashes": 0, "errors": 1}
    told: list = []
    encoded = tasks(3)

    def judge(items):
        return np.array([np.nan if "1" in text else -1.0 for _, text, _ in items], np.float32), {"errors": sum("1" in text for _, text, _ in items)}  # fmt: skip

    got, solved = evaluate(
        make_sampler([], 6), functools.partial(score_rollouts, TOKENIZER, judge), {}, encoded, jax.random.key(0), samples=3,
        num_rollouts=6, place=lambda x: x, hear=lambda *numbers: told.append(numbers),
    )  # fmt: skip
    texts = [[response(task, number)[0] for number in range(3)] for task in range(3)]
    failed = [sum("1" in text for text in row) for row in texts]
    assert got["accuracy"] == -1.0
    assert solved.tolist() == [0, 0, 0]
    assert told == [(failed[0] + failed[1], 6, "the evaluation"), (sum(failed), 9, "the evaluation")]
    assert sum(failed) > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_counts_the_failures_of_the_first_reward_alone(workers):
    reward = "tests.rewards:same,tests.rewards:refuses_a*0.1,tests.rewards:huge_b*9"
    pool: Any = VerifierPool(reward, workers=workers, item_seconds=9, batch_seconds=9, items_per_worker=9, memory_gb=2)
    with pool:
        rewards, faults = first_reward(pool)([("q", "a", "a"), ("q", "b", "b"), ("q", "a", "c"), ("q", "c", "c")])
        assert pool.last_faults == ["errors", "errors", "errors", ""]  # for training, which goes by the sum
    assert rewards.tolist() == [1, 1, 0, 1]
    assert faults == {"timeouts": 0, "crashes": 0, "errors": 0}


def test_an_evaluation_averages_rewards_of_any_size():
    encoded = tasks(3)
    sizes = np.array([1e308, 1e308, 0.7 + 0.2 + 0.1] * 3)  # the last is 1 but for its last digit
    pool: Any = SimpleNamespace(names=(), last_rewards=sizes[:6], last_faults=[""] * 6)
    pool.score = lambda items: (None, {"errors": 0})
    assert first_reward(pool)([])[0].tolist() == sizes[:6].tolist()
    got, solved = evaluate(
        make_sampler([], 9), functools.partial(score_rollouts, TOKENIZER, lambda items: (sizes, {"errors": 0})), {},
        encoded, jax.random.key(0), samples=3, num_rollouts=9, place=lambda x: x,
    )  # fmt: skip
    assert got["accuracy"] == pytest.approx(1e308 / 1.5)
    assert solved.tolist() == [3, 3, 3]


def test_what_ends_the_process_is_a_failure_of_all_rewards():
    pool: Any = VerifierPool("tests.rewards:same,tests.rewards:leave", workers=1, item_seconds=9, batch_seconds=9, items_per_worker=9, memory_gb=2)  # fmt: skip
    with pool:
        rewards, faults = first_reward(pool)([("q", "b", "b"), ("q", "leave", "leave")])
    np.testing.assert_array_equal(rewards, [1, np.nan])
    assert faults == {"timeouts": 0, "crashes": 1, "errors": 0}


def test_the_first_failure_is_told_once_and_no_reward_at_all_ends_the_run(capsys):
    pool: Any = SimpleNamespace(last_failure="it raised KeyError: 'x' (prompt 'p', response 'r')")
    watch = FaultWatch(pool, may_fail=False)
    watch(0, 16, "step 1")
    assert capsys.readouterr().out == ""
    watch(1, 16, "step 2")
    watch(15, 16, "step 3")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("krl: ")
    assert line.endswith(pool.last_failure)
    pool.last_failure = "its process was killed by signal 9 (prompt 'p', response 'r')"
    with pytest.raises(
        ValueError, match=r"the reward failed on all 16 responses of step 4: its process was killed"
    ) as ended:
        watch(16, 16, "step 4")
    assert "\n" not in str(ended.value)
    assert "--config.verify.may_fail=True" in str(ended.value)
    with pytest.raises(ValueError, match="all 1 responses of an evaluation"):
        FaultWatch(pool, may_fail=False)(1, 1, "an evaluation")
    patient = FaultWatch(pool, may_fail=True)
    patient(16, 16, "step 1")
    patient(16, 16, "step 2")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_rows_of_the_data_reach_the_verifiers():
    asked: list = []
    encoded = tasks(3)
    with_rows = dataclasses.replace(encoded.tasks, rows=tuple({"level": number} for number in range(3)))
    assert with_rows.take([2, 0]).rows == ({"level": 2}, {"level": 0})

    def judge(items):
        asked.extend(items)
        return np.zeros(len(items), np.float32), {"errors": 0}

    evaluate(
        make_sampler([], 4), functools.partial(score_rollouts, TOKENIZER, judge), {}, dataclasses.replace(encoded, tasks=with_rows),
        jax.random.key(0), samples=2, num_rollouts=4, place=lambda x: x,
    )  # fmt: skip
    assert [(prompt, row) for prompt, _, _, row in asked] == [
        (f"question {n}", {"level": n}) for n in (0, 0, 1, 1, 2, 2)
    ]
    kept: Any = SimpleNamespace(begin=lambda: None, add=asked.extend, work=lambda *_, **__: None)
    asked.clear()
    scoring = Scoring(TOKENIZER, kept, with_rows, np.array([1, 0, 2]))
    scoring.watch(np.array([2, 0]), np.array([[49], [50]]), np.array([1, 1]), lambda: True)
    assert asked == [("question 2", "1", ("2", "\n"), {"level": 2}), ("question 0", "2", ("2", "\n"), {"level": 0})]
