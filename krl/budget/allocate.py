"""The rules: from what is known of a step's prompts to their counts, behind one signature.

A rule is a function (belief of M prompts, budget R, n_min, n_max) -> (counts [M] int32 with sum R, info).
Where a rule from the literature was stated otherwise, its docstring says what was kept. All of them keep
the bounds and the sum, so that runs and simulations can be compared at equal cost.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from krl.budget.belief import Belief, mean, mean_tokens, posterior, reward_variance, window_rate
from krl.budget.solve import knapsack, price
from krl.budget.value import Value, check_bounds, continuous_value, gains_of, log_gains, log_gains_beta
from krl.masked import divide

Counts = tuple[jax.Array, dict[str, Any]]
Rule = Callable[[Belief, jax.Array | int, int, int], Counts]


def knapsack_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The exact knapsack on the expected gains under each prompt's Beta belief.

    Assumes 0/1 rewards and that the policy moves little between a prompt's visits, beyond what the belief's
    discounts say. Value: Li et al., arXiv 2509.25849.
    """
    alpha, beta = posterior(belief)
    return _solve(log_gains_beta(alpha, beta, n_min, n_max), budget, n_min)


def knapsack_log_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The knapsack with progress measured in log p: a mixed group is worth 1 - p instead of p (1-p)^2.

    A mixed group is taken to move the logit of p by as much everywhere, which moves log p by 1 - p as much. So moving
    a prompt from 1% to 2% counts as much as moving one from 20% to 40%: both halve the rollouts until the next
    success. The paper's value spends little where successes are rare, so what a policy seldom does
    right may be unlearnt before it is found. Chosen among the powers of p and 1 - p in docs/results.md.
    """
    alpha, beta = posterior(belief)
    return _solve(log_gains_beta(alpha, beta, n_min, n_max, powers=(0, 1)), budget, n_min)


def knapsack_tokens_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The knapsack by gain per token: of prompts that teach as much, those with short responses first.

    The R rollouts with the most expected gain for each of their tokens, which no other counts can beat at
    the tokens these are expected to take (`expected_tokens`). Assumes that a prompt's responses stay as
    long as they were.
    """
    alpha, beta = posterior(belief)
    tokens = jnp.maximum(mean_tokens(belief), 1.0)
    counts, info = _solve(log_gains_beta(alpha, beta, n_min, n_max) - jnp.log(tokens)[:, None], budget, n_min)
    return counts, info | {"expected_tokens": (counts * tokens).sum()}


def knapsack_continuous_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The knapsack for rewards that are any numbers in [0, 1]: see `continuous_value`."""
    variance = reward_variance(belief)[:, None]
    gains = gains_of(lambda average, n: continuous_value(average, variance, n), mean(belief), n_min, n_max)
    return _solve(gains, budget, n_min)


def knapsack_paper_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The rule of the Knapsack RL paper, as its text and published code have it.

    The success rate is that of the newest visit, filled up from earlier outcomes to 16. A prompt with fewer
    than 8 outcomes gets the uniform count; solved (1) and unsolved (0) ones get n_min; the rest is divided
    by the knapsack on the plain rates. If the prompts in between need less than there is, which is
    log(0.1) / log(max(p, 1-p)) rollouts each, rounded down, above n_min, the surplus goes to the unsolved ones. Unlike the code,
    this keeps n_max, counts the value of n_min rollouts, and never divides by zero prompts: what is left when all are
    at their bounds goes first to prompts in between, then to new ones, then to solved ones.

    References:
        Li et al., "Knapsack RL", arXiv 2509.25849.
    """
    prompts = belief.visits.shape[0]
    budget = jnp.asarray(budget, jnp.int32)
    rate = window_rate(belief)
    new = belief.recorded < 8
    unsolved, solved = ~new & (rate <= 0), ~new & (rate >= 1)
    between = ~new & ~unsolved & ~solved
    least = jnp.where(new, jnp.clip(budget // max(prompts, 1), n_min, n_max), n_min)
    safe = jnp.where(between, rate, 0.5)
    need = jnp.minimum(n_max, divide(jnp.log(10.0), -jnp.log(jnp.maximum(safe, 1 - safe))).astype(jnp.int32))
    surplus = jnp.where(between, need, 0).sum() < budget - least.sum()

    # One knapsack in tiers: a whole tier is taken before anything of the one below.
    n = n_min + jnp.arange(n_max - n_min)[None, :]
    gains = log_gains(safe, n_min, n_max)
    wanted = between[:, None] & (~surplus | (n < n_min + need[:, None]))
    tiers = jnp.where(wanted, gains, jnp.where(between[:, None], gains - 2e4, -3e4))
    tiers = jnp.where(unsolved[:, None], -1e4, jnp.where(solved[:, None], -4e4, tiers))
    # A new prompt's first rollouts are its uniform count, above every tier.
    tiers = jnp.where(new[:, None] & (n < least[:, None]), 1.0, tiers)
    counts = knapsack(tiers, budget, n_min)
    return counts, {"surplus": surplus.astype(jnp.float32)}


def uniform_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """Plain GRPO (Shao et al., arXiv 2402.03300): every prompt the same; the remainder to the first ones."""
    prompts = belief.visits.shape[0]
    share, remainder = jnp.divmod(jnp.asarray(budget, jnp.int32), max(prompts, 1))
    counts = share + (jnp.arange(prompts) < remainder)
    return counts.astype(jnp.int32), {}


def variance_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """Counts in proportion to sqrt(p (1-p)), the reward's standard deviation.

    Neyman's allocation (J. Royal Statistical Society 97, 1934): it minimises the variance of the mean reward's
    estimate over all prompts. Assumes that p is known; takes the belief's mean for it.
    """
    rate = mean(belief)
    return _in_proportion(jnp.sqrt(rate * (1 - rate)), budget, n_min, n_max)


def vip_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The counts that minimise the variance of the update: the sum over prompts of p (1-p) / (N - 1).

    VIP's allocation for the leave-one-out estimator, solved exactly: the sum is convex in the counts, so the
    largest decreases are taken (Fox 1966). With `alloc.prior=gaussian_process` the rates are predicted as VIP does.
    Takes the belief's mean for p; every prompt's score is assumed to vary alike. A prompt needs two rollouts before
    its variance is finite, so those come first where n_min is 1.

    References:
        Nguyen et al., "Adaptive rollout allocation", arXiv 2602.01601.
    """
    rate = mean(belief)
    n = n_min + jnp.arange(n_max - n_min, dtype=jnp.float32)
    saved = jnp.where(n > 1, -jnp.log(n) - jnp.log(jnp.maximum(n - 1, 1)), 1e4)  # 1 / (n-1) - 1 / n
    gains = jnp.log(rate * (1 - rate))[:, None] + saved[None, :]
    return knapsack(gains, budget, n_min), {}


def inverse_sqrt_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """Counts in proportion to 1 / sqrt(p): the harder, the more.

    What minimises the gradient's variance when only successes are learnt from (Yao et al., "GVM-RAFT",
    arXiv 2505.02391, with equal gradient norms). Hopeless prompts take the most. Takes the belief's mean for p.
    """
    return _in_proportion(divide(1.0, jnp.sqrt(mean(belief))), budget, n_min, n_max)


def skip_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """Skips prompts whose last groups were even, more often the longer that lasts; the others share alike.

    GRESO (Zheng et al., arXiv 2506.02177) skips a prompt with a probability that rises with its even groups in
    a row. Here a skipped prompt still gets n_min rollouts, which lengthen its streak z too; so it is explored with
    the share 1 / (z + 1), whose pauses double. Which prompts of a step these are is spread evenly over its rows
    (whose order is random), without random numbers.
    """
    rows = jnp.arange(1, belief.visits.shape[0] + 1)
    explored = (rows * 0.6180340) % 1.0 * (belief.even_streak + 1) < 1
    gains = jnp.where(explored, 0.0, -1.0)[:, None] * jnp.ones(n_max - n_min)
    return knapsack(gains, budget, n_min), {"skipped": (~explored).mean(dtype=jnp.float32)}


def dynamic_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """DAPO's dynamic sampling (Yu et al., arXiv 2503.14476) under a fixed budget.

    DAPO samples uniform groups until R rollouts lie in mixed ones, however many that takes. With a
    fixed budget its counts are the uniform ones: it changes when an update is made, not what a rollout
    shows. `rounds` is how many such budgets one of its updates is expected to take.
    """
    counts, _ = uniform_rule(belief, budget, n_min, n_max)
    rate = mean(belief)
    mixed = 1 - rate**counts - (1 - rate) ** counts
    useful = (counts * mixed).sum()
    return counts, {"rounds": jnp.where(useful > 0, divide(jnp.float32(counts.sum()), useful), jnp.inf)}


def two_round_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The knapsack after a pilot: n_min rollouts of every prompt from the current policy come first.

    Every prompt gets those in any case. Whoever calls this rule draws them, adds them to the belief with
    `krl.budget.observe`, and passes that belief: see PILOT_RULES. Assumes that waiting between the two rounds
    is worth it. Two-stage adaptive sampling as in Xiong et al., "Reinforce-Ada", arXiv 2510.04996.
    """
    return knapsack_rule(belief, budget, n_min, n_max)


def value_rule(value: Value) -> Rule:
    """A knapsack rule from a value function of your own, (p, n) -> value, at the belief's mean."""

    def rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
        return _solve(gains_of(value, mean(belief), n_min, n_max), budget, n_min)

    return rule


RULES: dict[str, Rule] = {  # by the name in config.alloc.rule
    "knapsack": knapsack_rule,
    "knapsack_log": knapsack_log_rule,
    "knapsack_tokens": knapsack_tokens_rule,
    "knapsack_continuous": knapsack_continuous_rule,
    "knapsack_paper": knapsack_paper_rule,
    "uniform": uniform_rule,
    "variance": variance_rule,
    "vip": vip_rule,
    "inverse_sqrt": inverse_sqrt_rule,
    "skip": skip_rule,
    "dynamic": dynamic_rule,
    "two_round": two_round_rule,
}
PILOT_RULES = {"two_round"}  # rules whose belief must already hold n_min rollouts of this step


def allocate(rule: str | Rule, belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """The counts of a step under a rule.

    Args:
        rule: a key of RULES, or any function (belief, budget, n_min, n_max) -> (counts, info).
        belief: what is known of the step's M prompts, see `krl.budget.take`.
        budget: R, rollouts to spend.
        n_min, n_max: the fewest and the most rollouts of a prompt, static.

    Returns:
        (counts [M] int32, info: the rule's own numbers; docs/metrics.md says which). The counts of the rules
        in RULES sum to R.

    Raises:
        ValueError: an unknown name, bounds with n_min < 1 or n_max < n_min, a budget out of range.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown allocation rule {rule!r}; the rules are {sorted(RULES)}")
        rule = RULES[rule]
    check_bounds(n_min, n_max)
    prompts = belief.visits.shape[0]
    if not isinstance(budget, jax.core.Tracer) and not prompts * n_min <= int(budget) <= prompts * n_max:
        raise ValueError(
            f"budget {int(budget)} cannot be met: {prompts} prompts take {prompts * n_min} to {prompts * n_max} rollouts"
        )
    return rule(belief, budget, n_min, n_max)


def _solve(gains: jax.Array, budget: jax.Array | int, n_min: int) -> Counts:
    counts = knapsack(gains, budget, n_min)
    return counts, {"price": price(gains, counts, n_min)}


def _in_proportion(weights: jax.Array, budget: jax.Array | int, n_min: int, n_max: int) -> Counts:
    """Whole counts in proportion to weights [M] within the bounds, by Webster's method of highest averages."""
    n = n_min + jnp.arange(n_max - n_min, dtype=jnp.float32)
    return knapsack(jnp.log(weights)[:, None] - jnp.log(n + 0.5)[None, :], budget, n_min), {}
