"""Having rollouts verified while others are still sampled, and what the verifiers say of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from krl.base.types import Decoder, Rollouts
from krl.rewards.functions import Item
from krl.rewards.pool import FAULTS, VerifierPool
from krl.run.processes import first_text, say, sum_over_processes
from krl.tasks import TaskSet


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


def make_items(tasks: TaskSet, which: Sequence[int], texts: Sequence[str]) -> list[Item]:
    """What the verifiers get of n responses: `which` [n] is the number of each one's task."""
    pairs = zip(which, texts, strict=True)
    items: list[Any] = [(tasks.prompts[i], text, tasks.answers[i], *tasks.rows[i : i + 1]) for i, text in pairs]
    return items


class Verdicts(NamedTuple):
    """What the verifiers say of R rollouts; of those of other processes the first three have zeros."""

    rewards: np.ndarray  # [R] float64; 0 where there is none
    faults: np.ndarray  # [R] int32: 0 for none, else 1 and its place in `krl.rewards.pool.FAULTS`
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
        pairs: Any = zip(self, more, strict=True)
        joined: list[Any] = [a + b if isinstance(a, list) else np.concatenate([a, b]) for a, b in pairs]
        return Verdicts(*joined)


class Scoring:
    """Has rollouts verified while others are still decoded; its `watch` is for `krl.rollout.generate`.

    Args:
        tokenizer: turns tokens into text.
        verifiers: used by nothing else until `finish`.
        tasks: the M tasks that the rollouts answer.
        counts: [M] int32, rollouts of each.
    """

    def __init__(self, tokenizer: Decoder, verifiers: VerifierPool, tasks: TaskSet, counts: jax.Array):
        self._tokenizer, self._verifiers, self._tasks = tokenizer, verifiers, tasks
        self._prompt_index = np.repeat(np.arange(len(tasks)), counts)
        self._rows: list[int] = []
        self._texts: list[str] = []
        verifiers.begin()

    def watch(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, is_ready: Callable[[], bool]) -> None:
        """Have more rollouts verified, until the devices are ready; see `krl.rollout.Watch`."""
        which = self._prompt_index[rows].tolist()
        texts = [self._tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
        self._verifiers.add(make_items(self._tasks, which, texts))
        self._rows.extend(rows)
        self._texts.extend(texts)
        self._verifiers.work(is_ready, look_seconds=0.002)

    def finish(self, num_rollouts: int) -> Verdicts:
        """Wait for what is left: what is said of the R = num_rollouts rollouts, those of this process alone."""
        pool, mine = self._verifiers, self._rows
        pool.finish()
        rewards, faults = np.zeros(num_rollouts), np.zeros(num_rollouts, np.int32)
        parts, index = np.zeros((num_rollouts, len(pool.names))), np.full(num_rollouts, len(self._tasks), np.int32)
        rewards[mine], parts[mine] = pool.last_rewards, pool.last_parts
        faults[mine] = [("", *FAULTS).index(kind) for kind in pool.last_faults]
        index[: len(self._prompt_index)] = self._prompt_index
        texts: list[str | None] = [None] * num_rollouts
        reasons = [""] * num_rollouts
        for row, text, reason in zip(mine, self._texts, pool.last_reasons, strict=True):
            texts[row], reasons[row] = text, reason
        return Verdicts(rewards, faults, parts, index, texts, reasons)
