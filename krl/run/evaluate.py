"""Accuracy on held-out tasks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from krl.masked import divide
from krl.policy.tokenizer import Tokenizer
from krl.tasks import EncodedTasks
from krl.types import Prompts, Rollouts

Reward = Callable[[str, str], float]  # (response, gold answer) -> reward


def score_rollouts(tokenizer: Tokenizer, reward: Reward, rollouts: Rollouts, answers: Sequence[str]) -> np.ndarray:
    """Decode responses and compare them with the gold answers, on the host.

    Args:
        tokenizer: turns tokens into text.
        reward: (response, answer) -> a reward.
        rollouts: R rollouts of M prompts.
        answers: the gold answer of each of the M prompts.

    Returns:
        [R] float32; 0 on padding rows.
    """
    index, lengths, tokens = (np.asarray(array) for array in (rollouts.prompt_index, rollouts.lengths, rollouts.tokens))
    rewards = np.zeros(len(index), np.float32)
    for row in np.flatnonzero(np.asarray(rollouts.mask)):
        rewards[row] = reward(tokenizer.decode(tokens[row, : lengths[row]].tolist()), answers[index[row]])
    return rewards


def evaluate(
    sample: Callable[..., Rollouts],
    score: Callable[[Rollouts, Sequence[str]], np.ndarray],
    params: dict,
    encoded: EncodedTasks,
    key: jax.Array,
    *,
    num_prompts: int,
    samples: int,
    place: Callable[[Prompts], Prompts],
) -> dict[str, float]:
    """Sample every task a few times and average.

    Args:
        sample: (params, M prompts, counts [M], key, num_rollouts=R) -> rollouts; see `krl.rollout.generate`.
        score: (rollouts, the M gold answers) -> rewards [R] float32 on the host.
        params: of the policy.
        encoded: the D held-out tasks; the last batch is filled up with prompts of count 0.
        key: every batch uses it; a task's samples depend only on the key and its task id.
        num_prompts: M, prompts a call.
        samples: rollouts of each task.
        place: puts prompts on the mesh.

    Returns:
        `accuracy`, the mean reward over all samples (avg@k); `pass_at_k`, the share of tasks with a
        reward above 0 in k = samples tries; `response_length`, tokens; `truncation_rate`.
    """
    tasks, num_tasks = encoded.tasks, len(encoded)
    rewards = np.zeros((num_tasks, samples), np.float32)
    lengths, cut = 0, 0
    for begin in range(0, num_tasks, num_prompts):
        ids = np.arange(begin, min(begin + num_prompts, num_tasks), dtype=np.int32)
        padded = np.pad(ids, (0, num_prompts - len(ids)), mode="edge")
        prompts = place(Prompts(tokens=encoded.tokens[padded], mask=encoded.mask[padded], task_ids=padded))
        counts = jnp.where(jnp.arange(num_prompts) < len(ids), samples, 0).astype(jnp.int32)
        rollouts = sample(params, prompts, counts, key, num_rollouts=num_prompts * samples)
        real = len(ids) * samples
        got = score(rollouts, [tasks.answers[i] for i in padded])
        rewards[ids] = got[:real].reshape(len(ids), samples)
        lengths += int(np.asarray(rollouts.lengths)[:real].sum())
        cut += real - int(np.asarray(rollouts.finished)[:real].sum())
    total = num_tasks * samples
    return {
        "accuracy": float(rewards.mean()),
        "pass_at_k": float((rewards > 0).any(axis=1).mean()),
        "response_length": float(divide(jnp.float32(lengths), jnp.float32(total))),
        "truncation_rate": float(divide(jnp.float32(cut), jnp.float32(total))),
    }
