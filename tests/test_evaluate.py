"""Evaluation during training, with a fake sampler and fake verifiers."""

from typing import Any

import jax
import numpy as np
import pytest

from krl.run.evaluate import Scoring, decode_rollouts, evaluate, score_rollouts
from krl.tasks.pool import VerifierPool
from tests.fake import TOKENIZER, make_rollouts, make_sampler, response, reward, score, tasks


def test_scores_are_of_the_response_alone_and_zero_on_padding():
    tokens = np.array([[50, 49, 7], [49, 10, 50], [49, 49, 49], [50, 0, 0]])
    index = np.array([1, 0, 2, 1])
    rollouts = make_rollouts(index, index, index < 2, tokens, np.array([2, 3, 3, 1]), index < 2)
    asked = []

    def keep(items):
        asked.extend(items)
        return np.array([0.5, 2.0, 3.0], np.float32), {"timeouts": 1}

    rewards, faults = score_rollouts(TOKENIZER, keep, rollouts, ["p", "q"], ["a", ("b", "c")])
    assert asked == [("q", "21", ("b", "c")), ("p", "1\n2", "a"), ("q", "2", ("b", "c"))]
    assert rewards.tolist() == [0.5, 2.0, 0.0, 3.0]
    assert rewards.dtype == np.float32
    assert faults == {"timeouts": 1}
    assert decode_rollouts(TOKENIZER, rollouts) == ["21", "1\n2", "", "2"]


def test_rollouts_that_are_scored_as_they_end_get_the_same_rewards():
    tokens = np.array([[50, 49, 7], [49, 10, 50], [49, 49, 49], [50, 0, 0], [9, 9, 9]])
    lengths, index = np.array([2, 3, 3, 1, 3]), np.array([0, 0, 0, 2, 3])
    rollouts = make_rollouts(index, index, index < 3, tokens, lengths, index < 3)
    questions, answers, ready = ["p", "q", "r"], ["21", "", "2"], [False, True, False, False, True]
    pool: Any = VerifierPool("tests.rewards:same", workers=0, item_seconds=9, batch_seconds=9, items_per_worker=9, memory_gb=2)  # fmt: skip
    with pool:
        expected, _ = score_rollouts(TOKENIZER, pool.score, rollouts, questions, answers)
        scoring = Scoring(TOKENIZER, pool, questions, answers, np.array([3, 0, 1]))
        for rows in ([3], [2, 0], [], [1]):
            scoring.watch(np.array(rows, int), tokens[rows], lengths[rows], lambda: ready.pop(0))
        rewards, faults, texts = scoring.finish(5)
    assert rewards.tolist() == expected.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert faults.tolist() == [0] * 5
    assert texts == [*decode_rollouts(TOKENIZER, rollouts)[:4], None]
    assert not ready  # one reward after the first call, none after the second, two after the third, none after the last


@pytest.mark.parametrize("num_rollouts", [2, 6, 7, 60])
def test_evaluation_during_training_averages_over_all_samples(num_rollouts):
    calls: list = []
    encoded = tasks(5)
    got, solved = evaluate(
        make_sampler(calls, num_rollouts),
        lambda rollouts, prompts, answers: score_rollouts(TOKENIZER, score, rollouts, prompts, answers),
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
