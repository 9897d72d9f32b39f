"""From gains and a budget to counts.

The knapsack of a step is: maximise sum_i V(N_i, p_i) subject to sum_i N_i = R and
n_min <= N_i <= n_max. V is concave in N, so this is a separable concave resource allocation, and
taking the R - M n_min largest marginal gains is optimal (Fox, "Discrete optimization via marginal
analysis", Management Science 13(3), 1966; Ibaraki & Katoh, "Resource Allocation Problems", 1988).
No dynamic program is needed: one search for the threshold gain.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from krl.budget.belief import Belief, posterior
from krl.budget.value import log_gains_beta

Rule = Callable[[Belief, jax.Array | int, int, int], tuple[jax.Array, dict[str, Any]]]


def knapsack(log_gains: jax.Array, budget: jax.Array | int, n_min: int) -> jax.Array:
    """The exact counts for a table of marginal gains that do not rise along a row.

    The budget is data: changing it does not recompile. Ties go to the smaller count first and then to
    the lower prompt index, so equal prompts share evenly and the answer is deterministic.

    Args:
        log_gains: [M, J] float32; column j is the (log) gain of rollout n_min + j + 1.
        budget: R, an int or int32 scalar with M n_min <= R <= M (n_min + J). Outside jit another
            value is refused; inside, the nearest possible budget is spent.
        n_min: rollouts that every prompt gets in any case.

    Returns:
        counts [M] int32, sum R.

    Raises:
        ValueError: log_gains is not of rank 2 or holds NaN, or the budget is out of range.

    References:
        Fox 1966; Ibaraki & Katoh 1988, chapter 4.

    >>> from krl.budget.value import log_gains as gains
    >>> knapsack(gains(jnp.array([0.0, 0.1, 0.5]), n_min=1, n_max=9), budget=10, n_min=1).tolist()
    [1, 4, 5]
    """
    if jnp.ndim(log_gains) != 2:
        raise ValueError(f"log_gains must have shape [M, n_max - n_min], got {jnp.shape(log_gains)}")
    prompts, columns = jnp.shape(log_gains)
    if not isinstance(budget, jax.core.Tracer):
        least, most = prompts * n_min, prompts * (n_min + columns)
        if not least <= int(budget) <= most:
            raise ValueError(f"budget {int(budget)} cannot be met: {prompts} prompts take {least} to {most} rollouts")
    if not isinstance(log_gains, jax.core.Tracer) and bool(jnp.isnan(log_gains).any()):
        raise ValueError("log_gains holds NaN; every success rate must be a number in [0, 1]")
    return _take_largest(jnp.asarray(log_gains, jnp.float32), jnp.asarray(budget, jnp.int32), n_min)


@jax.jit(static_argnames="n_min")
def _take_largest(log_gains: jax.Array, budget: jax.Array, n_min: int) -> jax.Array:
    prompts, columns = log_gains.shape
    wanted = jnp.clip(budget - prompts * n_min, 0, prompts * columns)
    keys = _ordered_integers(log_gains)
    threshold = _largest_threshold(keys, wanted)
    surely = keys > threshold
    tied = keys == threshold
    # Tied gains are taken column by column: the n-th rollout of every prompt before anyone's next.
    rank = jnp.cumsum(tied.T.reshape(-1), dtype=jnp.int32).reshape(columns, prompts).T
    taken = surely | (tied & (rank <= wanted - surely.sum(dtype=jnp.int32)))
    return n_min + taken.sum(axis=1, dtype=jnp.int32)


def _ordered_integers(values: jax.Array) -> jax.Array:
    """Integers in the order of float32 values: the bit pattern, with negative numbers turned round."""
    bits = jax.lax.bitcast_convert_type(values + 0.0, jnp.int32)  # + 0.0 makes -0.0 equal 0.0
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits - 1, bits)


def _largest_threshold(keys: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest integer t for which at least `wanted` of the keys are >= t, by bisection.

    Building t bit by bit from the sign down needs 32 counts over the table, and no sort.
    """

    def with_bit(step, threshold):
        candidate = threshold + jnp.left_shift(jnp.int32(1), 30 - step)
        enough = (keys >= candidate).sum(dtype=jnp.int32) >= wanted
        return jnp.where(enough, candidate, threshold)

    lowest = jnp.iinfo(jnp.int32).min
    start = jnp.where((keys >= 0).sum(dtype=jnp.int32) >= wanted, 0, lowest).astype(jnp.int32)
    return jax.lax.fori_loop(0, 31, with_bit, start)


def knapsack_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> tuple[jax.Array, dict[str, Any]]:
    """The exact knapsack on the expected gains under each prompt's Beta belief."""
    alpha, beta = posterior(belief)
    gains = log_gains_beta(alpha, beta, n_min, n_max)
    counts = knapsack(gains, budget, n_min)
    return counts, {"price": _price(gains, counts, n_min)}


def uniform_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> tuple[jax.Array, dict[str, Any]]:
    """Plain GRPO (Shao et al., arXiv 2402.03300): every prompt the same; the remainder to the first ones."""
    prompts = belief.successes.shape[0]
    share, remainder = jnp.divmod(jnp.asarray(budget, jnp.int32), prompts)
    counts = share + (jnp.arange(prompts) < remainder)
    return counts.astype(jnp.int32), {}


def _price(log_gains: jax.Array, counts: jax.Array, n_min: int) -> jax.Array:
    """The smallest (log) gain that was taken: what the last rollout of the budget was worth."""
    taken = jnp.arange(log_gains.shape[1])[None, :] < (counts - n_min)[:, None]
    return jnp.where(taken, log_gains, jnp.inf).min(initial=jnp.inf)


RULES: dict[str, Rule] = {"knapsack": knapsack_rule, "uniform": uniform_rule}


def allocate(
    rule: str | Rule, belief: Belief, budget: jax.Array | int, n_min: int, n_max: int
) -> tuple[jax.Array, dict[str, Any]]:
    """The counts of a step under a rule.

    Args:
        rule: a key of RULES, or any function (belief, budget, n_min, n_max) -> (counts, info).
        belief: what is known of the step's M prompts, see `krl.budget.take`.
        budget: R, rollouts to spend.
        n_min, n_max: the fewest and the most rollouts of a prompt, static.

    Returns:
        (counts [M] int32 with sum R, info: the rule's own numbers).

    Raises:
        ValueError: an unknown name, bounds with n_min < 1 or n_max < n_min, a budget out of range.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown allocation rule {rule!r}; the rules are {sorted(RULES)}")
        rule = RULES[rule]
    if not 1 <= n_min <= n_max:
        raise ValueError(f"need 1 <= n_min <= n_max, got n_min={n_min}, n_max={n_max}")
    prompts = belief.successes.shape[0]
    if not isinstance(budget, jax.core.Tracer) and not prompts * n_min <= int(budget) <= prompts * n_max:
        raise ValueError(
            f"budget {int(budget)} cannot be met: {prompts} prompts take {prompts * n_min} to {prompts * n_max} rollouts"
        )
    return rule(belief, budget, n_min, n_max)
