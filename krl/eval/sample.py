"""How well a policy does on tasks: sampling each task a few times, scoring the samples, averaging."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from krl.policy.tokenizer import Decoder
from krl.run.metrics import mean_of
from krl.run.processes import first_text, say, sum_over_processes, to_host
from krl.tasks import Answer, EncodedTasks
from krl.tasks.pool import FAULTS, VerifierPool
from krl.tasks.rewards import SOLVED, Item, Row, as_float32
from krl.types import Prompts, Rollouts

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


@dataclasses.dataclass
class FaultWatch:
    """Tells of the first reward that could not be computed, and ends a program in which none can be.

    Of several processes all must call it, with the same numbers.
    """

    verifiers: VerifierPool
    may_fail: bool  # go on where all fail
    told: bool = False

    def __call__(self, failed: int, total: int, where: str) -> None:
        """Take note of the rewards that could not be computed.

        Args:
            failed, total: responses without a reward, and all, of all processes.
            where: words for what they are the responses of.

        Raises:
            ValueError: none has a reward; with the reason of one.
        """
        all_failed = 0 < failed == total and not self.may_fail
        if not failed or (self.told and not all_failed):
            return
        example = first_text(self.verifiers.last_failure) or "no process knows why"
        if all_failed:
            raise ValueError(
                f"the reward failed on all {total} responses of {where}: {example}; mend the function that "
                "config.data.reward names, or go on without with --config.verify.may_fail=True"
            )
        say(f"krl: a response has no reward and is left out; this is told once: {example}")
        self.told = True


def decode_rollouts(tokenizer: Decoder, rollouts: Rollouts) -> list[str]:
    """The R responses as text, each up to its length; "" on padding rows."""
    lengths = np.where(rollouts.mask, rollouts.lengths, 0)
    return [tokenizer.decode(row[:n].tolist()) for row, n in zip(np.asarray(rollouts.tokens), lengths, strict=True)]


def score_rollouts(
    tokenizer: Decoder,
    score: Score,
    rollouts: Rollouts,
    prompts: Sequence[str],
    answers: Sequence[Answer],
    rows: Sequence[Row] = (),
) -> tuple[np.ndarray, dict[str, int]]:
    """Decode responses and have them verified, on the host; of several processes, each does its share.

    Args:
        tokenizer: turns tokens into text.
        score: the verifiers, see `Score`.
        rollouts: R rollouts of M prompts.
        prompts: the M questions, without their template.
        answers: the M gold answers.
        rows: the other fields of the M rows of the data; () where there are none.

    Returns:
        (rewards [R] as `score` has them, 0 on padding rows; how often the verifiers failed, by kind).
    """
    index, real = np.asarray(rollouts.prompt_index), np.flatnonzero(rollouts.mask)
    texts = decode_rollouts(tokenizer, rollouts)
    items = make_items(prompts, answers, rows, index[real].tolist(), [texts[row] for row in real])
    found, faults = score_apart(score, items)
    rewards = np.zeros(len(index), found.dtype)
    rewards[real] = found
    return rewards, faults


def make_items(
    prompts: Sequence[str], answers: Sequence[Answer], rows: Sequence[Row], which: Sequence[int], texts: Sequence[str]
) -> list[Item]:
    """What the verifiers get of n responses: `which` [n] is the number of each one's prompt, answer and row."""
    pairs = zip(which, texts, strict=True)
    return [(prompts[i], text, answers[i], rows[i]) if rows else (prompts[i], text, answers[i]) for i, text in pairs]


def score_apart(score: Score, items: Sequence[Item]) -> tuple[np.ndarray, dict[str, int]]:
    """What `score` finds of items that all processes have, of which each has its share verified."""
    mine = slice(jax.process_index(), None, jax.process_count())
    found, faults = score(items[mine])
    rewards = np.zeros(len(items), found.dtype)
    rewards[mine] = found
    counts = sum_over_processes(np.array(list(faults.values()), np.int32))
    return sum_over_processes(rewards), dict(zip(faults, counts.tolist(), strict=True))


class Verdicts(NamedTuple):
    """What the verifiers say of R rollouts; of those of other processes the first three have zeros."""

    rewards: np.ndarray  # [R] float64; 0 where there is none
    faults: np.ndarray  # [R] int32: 0 for none, else 1 and its place in `krl.tasks.pool.FAULTS`
    parts: np.ndarray  # [R, C] float64, what each of several rewards gave, NaN where it failed; C = 0 for one alone
    prompt_index: np.ndarray  # [R] int32, the prompt of each; M on padding rows
    texts: list[str | None]  # the responses; None for those of other processes
    reasons: list[str]  # why there is no reward; "" where there is one, and for other processes' rollouts

    def of_all_processes(self) -> "Verdicts":
        """The same with the other processes' numbers."""
        rewards, faults, *parts = map(sum_over_processes, (self.rewards, self.faults, *self.parts.T))
        return self._replace(rewards=rewards, faults=faults, parts=np.array(parts).T.reshape(self.parts.shape))

    def then(self, more: "Verdicts") -> "Verdicts":
        """Those of these rollouts and, after them, of others of the same prompts."""
        return Verdicts(
            rewards=np.concatenate([self.rewards, more.rewards]),
            faults=np.concatenate([self.faults, more.faults]),
            parts=np.concatenate([self.parts, more.parts]),
            prompt_index=np.concatenate([self.prompt_index, more.prompt_index]),
            texts=self.texts + more.texts,
            reasons=self.reasons + more.reasons,
        )


class Scoring:
    """Has rollouts verified while others are still decoded; its `watch` is for `krl.rollout.generate`.

    Args:
        tokenizer: turns tokens into text.
        verifiers: used by nothing else until `finish`.
        prompts: the M questions, without their template.
        answers: the M gold answers.
        counts: [M] int32, rollouts of each.
        rows: the other fields of the M rows of the data; () where there are none.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        verifiers: VerifierPool,
        prompts: Sequence[str],
        answers: Sequence[Answer],
        counts: jax.Array,
        rows: Sequence[Row] = (),
    ):
        self._tokenizer, self._verifiers, self._asked = tokenizer, verifiers, (prompts, answers, rows)
        self._prompt_index = np.repeat(np.arange(len(prompts)), counts)
        self._rows: list[int] = []
        self._texts: list[str] = []
        verifiers.begin()

    def watch(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, is_ready: Callable[[], bool]) -> None:
        """Have more rollouts verified, until the devices are ready; see `krl.rollout.Watch`."""
        texts = [self._tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
        self._verifiers.add(make_items(*self._asked, self._prompt_index[rows].tolist(), texts))
        self._rows.extend(rows)
        self._texts.extend(texts)
        self._verifiers.work(is_ready, look_seconds=0.002)

    def finish(self, num_rollouts: int) -> Verdicts:
        """Wait for what is left: what is said of the R = num_rollouts rollouts, those of this process alone."""
        pool, mine = self._verifiers, self._rows
        pool.finish()
        rewards, faults = np.zeros(num_rollouts), np.zeros(num_rollouts, np.int32)
        parts, index = np.zeros((num_rollouts, len(pool.names))), np.full(num_rollouts, len(self._asked[0]), np.int32)
        rewards[mine], parts[mine] = pool.last_rewards, pool.last_parts
        faults[mine] = [("", *FAULTS).index(kind) for kind in pool.last_faults]
        index[: len(self._prompt_index)] = self._prompt_index
        texts: list[str | None] = [None] * num_rollouts
        reasons = [""] * num_rollouts
        for row, text, reason in zip(mine, self._texts, pool.last_reasons, strict=True):
            texts[row], reasons[row] = text, reason
        return Verdicts(rewards, faults, parts, index, texts, reasons)


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
    score: Callable[[Rollouts, Sequence[str], Sequence[Answer], Sequence[Row]], tuple[np.ndarray, dict[str, int]]],
    params: dict,
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
        score: (rollouts, questions, gold answers, rows) -> (rewards [R], NaN for none; verifier faults by
            kind), such as `score_rollouts` with its tokenizer and verifiers bound.
        sample, params, encoded, key, samples, num_rollouts, place: as for `sample_tasks`.
        hear: told after each batch how many rewards until then could not be computed, of how many; see `FaultWatch`.

    Returns:
        (metrics, solved): `accuracy`, the mean reward over all samples (avg@k), those that could not be computed as
        in `as_failures`; `pass_at_k`, the share of tasks
        solved in k = samples tries; `response_length`, tokens; `truncation_rate`; `verifier_faults`, their
        number. solved [D] int64 counts the samples of each task with a reward of at least SOLVED.
    """
    tasks = encoded.tasks
    rewards, lengths, finished = [], [], []
    faults = 0
    for ids, rollouts in sample_tasks(
        sample, params, encoded, key, samples=samples, num_rollouts=num_rollouts, place=place
    ):
        batch = tasks.take(ids.tolist())
        got, failed = score(rollouts, batch.prompts, batch.answers, batch.rows)
        rewards.append(got.reshape(len(ids), samples))
        lengths.append(rollouts.lengths)
        finished.append(rollouts.finished)
        faults += sum(failed.values())
        hear(faults, samples * sum(map(len, rewards)), "the evaluation")
    every = as_failures(np.concatenate(rewards).astype(np.float64))
    solved = (as_float32(np.concatenate(rewards)) >= SOLVED).sum(axis=1)  # 0.7 + 0.2 + 0.1, which is below 1, too
    metrics = {
        "accuracy": mean_of(every, np.isfinite(every)),
        "pass_at_k": float((solved > 0).mean()),
        "response_length": float(np.concatenate(lengths).mean()),
        "truncation_rate": float((~np.concatenate(finished)).mean()),
        "verifier_faults": float(faults),
    }
    return metrics, solved
