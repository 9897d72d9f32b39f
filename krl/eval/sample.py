"""How well a policy does on tasks: sampling each task a few times, scoring the samples, averaging."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from krl.base.types import Decoder, Prompts, Rollouts
from krl.rewards.functions import SOLVED, Item, as_float32
from krl.rewards.pool import FAULTS, VerifierPool
from krl.run.metrics import mean_of
from krl.run.processes import sum_over_processes, to_host
from krl.run.scoring import decode_rollouts, make_items
from krl.tasks import EncodedTasks, TaskSet

# n items -> rewards [n] float64 or float32, and how often the verifiers failed, by kind.
Score = Callable[[Sequence[Item]], tuple[np.ndarray, dict[str, int]]]


def first_reward(verifiers: VerifierPool) -> Score:
    """The `Score` of evaluations: of several rewards the first alone, and NaN where that could not be computed.

    What a policy is measured by must not change with the rewards that shape its training, nor where those fail.
    """

    def score(items: Sequence[Item]) -> tuple[np.ndarray, dict[str, int]]:
        _, faults = verifiers.score(items)
        kinds = np.array(verifiers.last_faults, str)
        if not verifiers.names:
            return np.where(kinds == "", verifiers.last_rewards, np.nan), faults
        first = verifiers.last_parts[:, 0].copy()
        return first, {kind: int((kinds[np.isnan(first)] == kind).sum()) for kind in FAULTS}

    return score


def as_failures(rewards: np.ndarray) -> np.ndarray:
    """Rewards where those that could not be computed, NaN, are 0, or the lowest of the others if that is below 0.

    So a policy gains nothing by responses that a verifier cannot judge.

    >>> as_failures(np.array([1.0, np.nan, -1.0])).tolist()
    [1.0, -1.0, -1.0]
    """
    known = np.isfinite(rewards)
    return np.where(known, rewards, rewards.min(initial=0.0, where=known))


def score_rollouts(
    tokenizer: Decoder, score: Score, rollouts: Rollouts, tasks: TaskSet
) -> tuple[np.ndarray, dict[str, int]]:
    """Decode responses and have them verified, on the host; of several processes, each does its share.

    Args:
        tokenizer: turns tokens into text.
        score: the verifiers, see `Score`.
        rollouts: R rollouts of M prompts.
        tasks: the M that these are of.

    Returns:
        (rewards [R] as `score` has them, 0 on padding rows; how often the verifiers failed, by kind).
    """
    index, real = np.asarray(rollouts.prompt_index), np.flatnonzero(rollouts.mask)
    texts = decode_rollouts(tokenizer, rollouts)
    items = make_items(tasks, index[real].tolist(), [texts[row] for row in real])
    found, faults = score_apart(score, items)
    rewards = np.zeros(len(index), found.dtype)
    rewards[real] = found
    return rewards, faults


def score_apart(score: Score, items: Sequence[Item]) -> tuple[np.ndarray, dict[str, int]]:
    """What `score` finds of items that all processes have, of which each has its share verified."""
    mine = slice(jax.process_index(), None, jax.process_count())
    found, faults = score(items[mine])
    rewards = np.zeros(len(items), found.dtype)
    rewards[mine] = found
    counts = sum_over_processes(np.array(list(faults.values()), np.int32))
    return sum_over_processes(rewards), dict(zip(faults, counts.tolist(), strict=True))


def sample_tasks(
    sample: Callable[..., Rollouts],
    params: dict[str, Any],
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
    reward: Callable[[Rollouts, TaskSet], tuple[np.ndarray, dict[str, int]]],
    params: dict[str, Any],
    encoded: EncodedTasks,
    key: jax.Array,
    *,
    samples: int,
    num_rollouts: int,
    place: Callable[[Prompts], Prompts],
    hear: Callable[[int, int, str], None] = lambda failed, total, where: None,
) -> tuple[dict[str, float], np.ndarray]:
    """Sample every task a few times and average.

    Args:
        reward: (rollouts, their tasks) -> (rewards [R], NaN for none; verifier faults by kind), such as
            `score_rollouts` with its tokenizer and verifiers bound.
        sample, params, encoded, key, samples, num_rollouts, place: as for `sample_tasks`.
        hear: told after each batch how many rewards until then could not be computed, of how many; see `FaultWatch`.

    Returns:
        (metrics, solved): `accuracy`, the mean reward over all samples (avg@k), those that could not be computed as
        in `as_failures`; `pass_at_k`, the share of tasks solved in k = samples tries; `response_length`, tokens;
        `truncation_rate`; `verifier_faults`, their number. solved [D] int64 counts the samples of each task with a
        reward of at least SOLVED.
    """
    found, faults = [], 0
    for ids, rollouts in sample_tasks(
        sample, params, encoded, key, samples=samples, num_rollouts=num_rollouts, place=place
    ):
        got, failed = reward(rollouts, encoded.tasks.take(ids.tolist()))
        found.append((got.reshape(len(ids), samples), rollouts.lengths, rollouts.finished))
        faults += sum(failed.values())
        hear(faults, samples * (int(ids[-1]) + 1), "the evaluation")
    rewards, lengths, finished = map(np.concatenate, zip(*found, strict=True))
    every = as_failures(rewards.astype(np.float64))
    solved = (as_float32(rewards) >= SOLVED).sum(axis=1)  # 0.7 + 0.2 + 0.1, which is below 1, too
    metrics = {
        "accuracy": mean_of(every.ravel()),
        "pass_at_k": float((solved > 0).mean()),
        "response_length": float(lengths.mean()),
        "truncation_rate": float((~finished).mean()),
        "verifier_faults": float(faults),
    }
    return metrics, solved
