"""How well a policy does on tasks: sampling each task a few times, scoring the samples, averaging."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from krl.policy.tokenizer import Decoder
from krl.run.estimates import SOLVED
from krl.run.processes import sum_over_processes, to_host
from krl.tasks import Answer, EncodedTasks
from krl.tasks.pool import FAULTS, VerifierPool
from krl.types import Prompts, Rollouts

# [(prompt, response, gold answer)] of length n -> rewards [n] float32, and how often the verifiers failed, by kind.
Score = Callable[[Sequence[tuple[str, str, Answer]]], tuple[np.ndarray, dict[str, int]]]


def decode_rollouts(tokenizer: Decoder, rollouts: Rollouts) -> list[str]:
    """The R responses as text, each up to its length; "" on padding rows."""
    lengths = np.where(rollouts.mask, rollouts.lengths, 0)
    return [tokenizer.decode(row[:n].tolist()) for row, n in zip(np.asarray(rollouts.tokens), lengths, strict=True)]


def score_rollouts(
    tokenizer: Decoder, score: Score, rollouts: Rollouts, prompts: Sequence[str], answers: Sequence[Answer]
) -> tuple[np.ndarray, dict[str, int]]:
    """Decode responses and have them verified, on the host; of several processes, each does its share.

    Args:
        tokenizer: turns tokens into text.
        score: the verifiers, see `Score`.
        rollouts: R rollouts of M prompts.
        prompts: the M questions, without their template.
        answers: the M gold answers.

    Returns:
        (rewards [R] float32, 0 on padding rows; how often the verifiers failed, by kind).
    """
    index, real = np.asarray(rollouts.prompt_index), np.flatnonzero(rollouts.mask)
    texts, rewards = decode_rollouts(tokenizer, rollouts), np.zeros(len(index), np.float32)
    items = [(prompts[index[row]], texts[row], answers[index[row]]) for row in real]
    rewards[real], faults = score_apart(score, items)
    return rewards, faults


def score_apart(score: Score, items: Sequence[tuple[str, str, Answer]]) -> tuple[np.ndarray, dict[str, int]]:
    """What `score` finds of items that all processes have, of which each has its share verified."""
    mine, rewards = slice(jax.process_index(), None, jax.process_count()), np.zeros(len(items), np.float32)
    rewards[mine], faults = score(items[mine])
    counts = sum_over_processes(np.array(list(faults.values()), np.int32))
    return sum_over_processes(rewards), dict(zip(faults, counts.tolist(), strict=True))


class Scoring:
    """Has rollouts verified while others are still decoded; its `watch` is for `krl.rollout.generate`.

    Args:
        tokenizer: turns tokens into text.
        verifiers: used by nothing else until `finish`.
        prompts: the M questions, without their template.
        answers: the M gold answers.
        counts: [M] int32, rollouts of each.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        verifiers: VerifierPool,
        prompts: Sequence[str],
        answers: Sequence[Answer],
        counts: jax.Array,
    ):
        self._tokenizer, self._verifiers, self._prompts, self._answers = tokenizer, verifiers, prompts, answers
        self._prompt_index = np.repeat(np.arange(len(prompts)), counts)
        self._rows: list[int] = []
        self._texts: list[str] = []
        verifiers.begin()

    def watch(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, is_ready: Callable[[], bool]) -> None:
        """Have more rollouts verified, until the devices are ready; see `krl.rollout.Watch`."""
        texts = [self._tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
        which = self._prompt_index[rows]
        self._verifiers.add([(self._prompts[i], text, self._answers[i]) for i, text in zip(which, texts, strict=True)])
        self._rows.extend(rows)
        self._texts.extend(texts)
        self._verifiers.work(is_ready, look_seconds=0.002)

    def finish(self, num_rollouts: int) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Wait for what is left.

        Returns:
            (rewards [R = num_rollouts] float32, faults [R] int32: 0 for none, else 1 and its place in
            `krl.tasks.pool.FAULTS`, the R responses); 0, 0 and None where the rollout is another process's.
        """
        rewards, faults = np.zeros(num_rollouts, np.float32), np.zeros(num_rollouts, np.int32)
        rewards[self._rows], _ = self._verifiers.finish()
        faults[self._rows] = [("", *FAULTS).index(kind) for kind in self._verifiers.last_faults]
        texts: list[str | None] = [None] * num_rollouts
        for row, text in zip(self._rows, self._texts, strict=True):
            texts[row] = text
        return rewards, faults, texts


def sample_tasks(
    sample: Callable[..., Rollouts],
    params: dict,
    encoded: EncodedTasks,
    key: jax.Array,
    *,
    samples: int,
    num_rollouts: int,
    place: Callable[[Prompts], Prompts],
    first_task: int = 0,
) -> Iterator[tuple[np.ndarray, Rollouts]]:
    """Sample every task k times, a batch of tasks at a time.

    Every call has the same shapes, M = R // k prompts and R rows, so that nothing compiles again; the last
    batch is filled up with prompts of count 0. If k exceeds R, a batch is one task and several calls.

    Args:
        sample: (params, M prompts, counts [M], key, num_rollouts=R, first_sample=...) -> rollouts; see
            `krl.rollout.generate`.
        params: of the policy.
        encoded: the D tasks.
        key: every call uses it; a task's samples depend only on the key and its row in `encoded`.
        samples: k, rollouts of each task.
        num_rollouts: R, rows of a call; a multiple of k wastes none.
        place: puts prompts on the mesh.
        first_task: the tasks before it are left out.

    Yields:
        (task ids [m], their m * k rollouts), 1 <= m <= M: host arrays without padding rows, sorted by task
        and sample.

    Raises:
        ValueError: samples or num_rollouts is below 1.
    """
    if min(samples, num_rollouts) < 1:
        raise ValueError(f"samples={samples} and num_rollouts={num_rollouts} must be at least 1")
    most = min(samples, num_rollouts)  # samples of a task in one call
    num_prompts = num_rollouts // most
    for begin in range(first_task, len(encoded), num_prompts):
        ids = np.arange(begin, min(begin + num_prompts, len(encoded)), dtype=np.int32)
        padded = np.pad(ids, (0, num_prompts - len(ids)), mode="edge")
        prompts = place(Prompts(tokens=encoded.tokens[padded], mask=encoded.mask[padded], task_ids=padded))
        live = np.arange(num_prompts) < len(ids)
        parts = []
        for first in range(0, samples, most):
            counts = np.where(live, min(most, samples - first), 0).astype(np.int32)
            rollouts = sample(params, prompts, counts, key, num_rollouts=num_rollouts, first_sample=first)
            parts.append(to_host(rollouts))
        rollouts = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        real = np.flatnonzero(rollouts.mask)
        order = real[np.lexsort((rollouts.sample_index[real], rollouts.prompt_index[real]))]
        yield ids, jax.tree.map(lambda array, order=order: array[order], rollouts)


def evaluate(
    sample: Callable[..., Rollouts],
    score: Callable[[Rollouts, Sequence[str], Sequence[Answer]], tuple[np.ndarray, dict[str, int]]],
    params: dict,
    encoded: EncodedTasks,
    key: jax.Array,
    *,
    samples: int,
    num_rollouts: int,
    place: Callable[[Prompts], Prompts],
) -> tuple[dict[str, float], np.ndarray]:
    """Sample every task a few times and average.

    Args:
        score: (rollouts, questions, gold answers) -> (rewards [R] float32, verifier faults by kind), such as
            `score_rollouts` with its tokenizer and verifiers bound.
        sample, params, encoded, key, samples, num_rollouts, place: as for `sample_tasks`.

    Returns:
        (metrics, solved): `accuracy`, the mean reward over all samples (avg@k); `pass_at_k`, the share of tasks
        solved in k = samples tries; `response_length`, tokens; `truncation_rate`; `verifier_faults`, their
        number. solved [D] int64 counts the samples of each task with a reward of at least SOLVED.
    """
    tasks = encoded.tasks
    rewards, lengths, finished = [], [], []
    faults = 0
    for ids, rollouts in sample_tasks(
        sample, params, encoded, key, samples=samples, num_rollouts=num_rollouts, place=place
    ):
        got, failed = score(rollouts, [tasks.prompts[i] for i in ids], [tasks.answers[i] for i in ids])
        rewards.append(got.reshape(len(ids), samples))
        lengths.append(rollouts.lengths)
        finished.append(rollouts.finished)
        faults += sum(failed.values())
    solved = (np.concatenate(rewards) >= SOLVED).sum(axis=1)
    metrics = {
        "accuracy": float(np.concatenate(rewards).mean(dtype=np.float64)),
        "pass_at_k": float((solved > 0).mean()),
        "response_length": float(np.concatenate(lengths).mean()),
        "truncation_rate": float((~np.concatenate(finished)).mean()),
        "verifier_faults": float(faults),
    }
    return metrics, solved
