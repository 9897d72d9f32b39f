"""Why every prompt got the count it got."""

import jax
import jax.numpy as jnp
import numpy as np

from krl.budget.allocate import Rule, allocate, expected_gains, has_rounds, kept_groups
from krl.budget.belief import Belief, mean, posterior
from krl.budget.solve import price


def explain(
    belief: Belief,
    budget: int,
    n_min: int,
    n_max: int,
    *,
    rule: str | Rule = "knapsack",
    group: int = 1,
    explored: int = 0,
    interval: float = 0.9,
) -> dict[str, np.ndarray]:
    """A table of a step's allocation, one row per prompt: `pandas.DataFrame(explain(...))` shows it.

    Args:
        belief: of the step's M prompts, see `krl.budget.take`.
        budget: R, rollouts.
        n_min, n_max: the fewest and the most rollouts of a prompt.
        rule, group, explored: as for `allocate`, such as functools.partial(budget.RULES["reach"], reach=0.1). Gains and
            prices are the knapsack's, so that other rules can be judged by them; with n_min = 0 they are those of whole
            groups.
        interval: probability of the interval of the success rate.

    Returns:
        Arrays of shape [M]: `mean`, `low`, `high` (success rate; the last two of what can be solved), `visits`,
        `count`, `value` (expected value of the count), `gain` (of the last rollout it got), `next_gain` (of one more),
        `price` (the smallest gain that any prompt's last rollout beyond n_min has, those that waited left out; the same
        in every row, inf if none got more than n_min), and `why`, the first of these that holds: "waited" (the rule
        gave it nothing, but few were not sampled for longer), "n_max" (bound from above), "unseen" (its belief is the
        prior), "n_min" or, where that is 0, "nothing" (one rollout more is worth no more than the price), "price" (it
        got rollouts until the next was worth no more). The last two reasons are the knapsack's.

    Raises:
        ValueError: as for `allocate`.
    """
    explored = 0 if has_rounds(rule) else explored
    counts, _ = allocate(rule, belief, budget, n_min, n_max, group=group, explored=explored)
    kept = 0 if n_min else int(kept_groups(len(counts), budget // group, explored))
    chosen, _ = allocate(rule, belief, budget - group * kept, n_min, n_max, group=group)
    # In steps of the unit from the first count that is worth anything: one rollout, or no group.
    first, unit = (1, 1) if n_min else (0, group)
    log_gains = expected_gains(belief, first, n_max + unit, group)
    gains, taken, by_price = jnp.exp(log_gains), (counts - first) // unit, (chosen - first) // unit
    spent = jnp.arange(gains.shape[1]) < taken[:, None]
    rows, free = jnp.arange(len(counts)), max(n_min - 1, 0)
    smallest = price(log_gains[:, free:], by_price - free, 0)
    number, (low, high) = np.asarray(counts), _between(belief, interval)
    why = np.select(
        [number > np.asarray(chosen), number > n_max - unit, np.asarray(belief.visits) == 0, number == n_min],
        ["waited", "n_max", "unseen", "n_min" if n_min else "nothing"],
        "price",
    )
    columns = {
        "mean": mean(belief), "low": low, "high": high, "visits": belief.visits, "count": counts,
        "value": jnp.where(spent, gains, 0.0).sum(axis=1),
        "gain": jnp.where(taken > 0, gains[rows, jnp.maximum(taken - 1, 0)], 0.0),
        "next_gain": gains[rows, taken],
        "price": jnp.full(len(counts), jnp.exp(smallest)),
        "why": why,
    }  # fmt: skip
    return jax.device_get(columns)


def _between(belief: Belief, interval: float) -> tuple[np.ndarray, np.ndarray]:
    """The two ends [M] of the success rates' intervals of a probability."""
    from scipy import stats  # slow to import; jax itself needs scipy

    return stats.beta.interval(interval, *(np.asarray(part, np.float64) for part in posterior(belief)))
