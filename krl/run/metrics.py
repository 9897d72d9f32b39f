"""What a step is measured by: numbers of its counts, rollouts and rewards, and of the belief after it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ops import segment_sum

from krl import _moved
from krl.base.masked import divide, masked_sum
from krl.base.types import Rollouts
from krl.budget import Belief
from krl.learn import mixed_groups


@jax.jit
def step_metrics(
    counts: jax.Array, seen: jax.Array, rollouts: Rollouts, rewards: jax.Array, advantages: jax.Array, scored: jax.Array
) -> dict[str, jax.Array]:
    """The metrics of a step that do not depend on the update; docs/metrics.md defines each.

    Args:
        counts: [M] int32.
        seen: [M] bool, prompts sampled in an earlier step.
        rollouts: R rollouts.
        rewards: [R] float32.
        advantages: [R] float32.
        scored: [R] bool, the rollouts that have a reward.

    Returns:
        Scalars by name.
    """
    num_prompts, served = counts.shape[0], counts > 0
    index = jnp.where(rollouts.mask, rollouts.prompt_index, num_prompts)
    given = segment_sum(scored.astype(jnp.float32), index, num_prompts)
    wins = segment_sum(jnp.where(scored, rewards, 0.0), index, num_prompts)
    mixed = mixed_groups(rewards, rollouts.prompt_index, scored, num_prompts)
    mixed |= segment_sum((advantages != 0).astype(jnp.float32), index, num_prompts) > 0  # beyond float32's digits
    tokens = jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    share = lambda which: divide((which & served).sum(dtype=jnp.float32), jnp.float32(served.sum()))  # noqa: E731
    return {
        "effective_ratio_rollouts": divide(*masked_sum(advantages != 0, rollouts.mask)),
        "effective_ratio_prompts": share(mixed),
        "prompts_all_solved": share(~mixed & (given > 0) & (wins > 0)),
        "prompts_all_failed": share(~mixed & (given > 0) & (wins <= 0)),
        "prompts_mixed": share(mixed),
        "prompts_unseen": share(~seen),
        "prompts": served.sum(),
        "count_min": jnp.where(served, counts, counts.max()).min(),
        "count_mean": divide(counts.sum(), served.sum()),
        "count_max": counts.max(),
        "count_gini": gini(counts),
        "response_length_mean": divide(*masked_sum(rollouts.lengths, rollouts.mask)),
        "response_length_max": jnp.where(rollouts.mask, rollouts.lengths, 0).max(),
        "truncation_rate": divide(*masked_sum(~rollouts.finished, rollouts.mask)),
        "entropy": divide(*masked_sum(-rollouts.logps, tokens & rollouts.mask[:, None])),
        "rollouts": rollouts.mask.sum(dtype=jnp.float32),
    }


def belief_metrics(belief: Belief, step: int) -> dict[str, float]:
    """What the belief of all training prompts has come to after a step; see docs/metrics.md."""
    fitted = {name: float(getattr(belief, name)) for name in ("discount", "discount_mixed", "fade")}
    return fitted | {"hopeless": float(jax.nn.sigmoid(belief.hopeless))} | staleness(belief.last_step, step)


def staleness(last_step: jax.Array, step: int) -> dict[str, float]:
    """How many steps ago the D training prompts were sampled, on average and at most; before the first time, all steps.

    >>> staleness(jnp.array([5, 3, -1]), 5)
    {'staleness_mean': 2.6666666666666665, 'staleness_max': 6}
    """
    ages = step - np.asarray(last_step)
    return {"staleness_mean": float(ages.mean()), "staleness_max": int(ages.max())}


def gini(counts: jax.Array) -> jax.Array:
    """Gini coefficient of the counts: 0 if all are equal, towards 1 if one prompt takes all.

    >>> round(float(gini(jnp.array([0, 0, 0, 4]))), 3)
    0.75
    """
    ordered = jnp.sort(counts.astype(jnp.float32))
    size = counts.shape[0]
    weights = 2.0 * jnp.arange(1, size + 1) - size - 1
    return divide((weights * ordered).sum(), size * ordered.sum())


def mean_of(values: np.ndarray) -> float:
    """The mean of finite float64, on the host, whatever their size; NaN if there are none.

    >>> mean_of(np.array([1e308, 1.5e308]))
    1.25e+308
    """
    if not values.size:
        return math.nan
    largest = np.abs(values).max()
    unit = 2.0 ** max(0, math.frexp(largest)[1] - 900)  # 1 for most; a power of two changes no digit
    return unit * float((values / unit).mean().clip(-largest / unit, largest / unit))


def over_processes(every: dict[str, list[float]]) -> dict[str, float]:
    """The metrics that follow from what every process has, see `krl.run.processes.gather`.

    `memory/*` are the largest. Of several processes `slowest_process` is the number of the one that the others waited
    for when rewards were exchanged, and `seconds/behind` how long.
    """
    shown = {name: max(values) for name, values in every.items() if name.startswith("memory/")}
    waited = every["seconds/wait"]
    if len(waited) > 1:
        shown |= {"slowest_process": int(np.argmin(waited)), "seconds/behind": max(waited) - min(waited)}
    return shown


def __getattr__(name: str) -> Any:
    return _moved.attribute(__name__, name)
