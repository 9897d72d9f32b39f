"""A fake sampler, fake verifiers and a tokenizer of letters, for tests of evaluation without a model."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from krl.base.types import Rollouts
from krl.tasks import EncodedTasks, TaskSet

LETTERS = '12\n\u2028é"'
TOKENIZER: Any = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))  # one token a letter


def tasks(size):
    """`size` tasks; some accept several answers."""
    answers = tuple("1" if i % 2 else ("2", "\n") for i in range(size))
    mask = np.arange(4) >= np.arange(size)[:, None] % 3
    tokens = np.where(mask, np.arange(3, size + 3)[:, None], 0).astype(np.int32)
    return EncodedTasks(tokens, mask, TaskSet(tuple(f"question {i}" for i in range(size)), answers), dropped=0)


def response(task, number):
    """The text that the fake policy samples, and whether it came to an end."""
    rng = np.random.default_rng((task, number))
    return "".join(rng.choice(list(LETTERS), rng.integers(1, 6))), bool(rng.integers(2))


def make_rollouts(index, number, mask, tokens, lengths, finished):
    """Rollouts on the host, without log-probabilities."""
    return Rollouts(index, number, mask, tokens, tokens * 0.0, lengths, finished)


def make_sampler(calls, num_rollouts):
    """A sampler whose rows come in any order with padding in between; it notes (task, count) of each call."""

    def sample(params, prompts, counts, key, num_rollouts=None, first_sample=0):
        assert num_rollouts == expected
        counts = np.asarray(counts)
        assert prompts.tokens.shape == (len(counts), 4)
        np.testing.assert_array_equal(prompts.tokens.max(axis=1), np.asarray(prompts.task_ids) + 3)
        calls.append([(int(task), int(n)) for task, n in zip(prompts.task_ids, counts, strict=True) if n])
        rows = [(i, first_sample + j) for i, n in enumerate(counts) for j in range(n)]
        assert len(rows) <= num_rollouts
        places = np.random.default_rng(len(calls)).permutation(num_rollouts)[: len(rows)]
        index, number = np.full(num_rollouts, len(counts)), np.zeros(num_rollouts, int)
        tokens, lengths = np.full((num_rollouts, 6), 50), np.full(num_rollouts, 3)
        finished = np.zeros(num_rollouts, bool)
        for place, (i, j) in zip(places, rows, strict=True):
            text, finished[place] = response(int(prompts.task_ids[i]), j)
            index[place], number[place], lengths[place] = i, j, len(text)
            tokens[place, : len(text)] = [ord(letter) for letter in text]
        mask = index < len(counts)
        return make_rollouts(index, number, mask, tokens, lengths, finished)

    expected = num_rollouts
    return sample


def reward(prompt, text, answer):
    """Right if the first letter is an accepted answer; even questions give partial credit for length."""
    number = int(prompt.removeprefix("question "))
    return 1.0 if text[0] in answer else 0.25 * (number % 2 == 0 and len(text) > 2)


def score(items):
    faults = {"timeouts": sum("é" in text for _, text, _ in items), "crashes": 0, "errors": len(items)}
    return np.array([reward(*item) for item in items], np.float32), faults


def answer_key(text):
    return text[0] if text[0] in "12" else None
