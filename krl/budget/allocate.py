"""The rules: from what is known of a step's prompts to their counts, behind one signature.

A rule is a function (belief of M prompts, budget R, n_min, n_max) -> (counts [M] int32 with sum R, info).
Where a rule from the literature was stated otherwise, its docstring says what was kept. All of them keep
the bounds and the sum, so that runs and simulations can be compared at equal cost.

The natural items of the knapsack are more prompts than a step can serve, of which most are best left alone for now. So
the CHOOSING_RULES also take `group`: with n_min = 0 a prompt gets nothing or whole groups of that many rollouts, which
teach by their comparison. In units of groups the problem is a separable concave one as before,

    maximise sum_i V_i(g k_i)  subject to  sum_i k_i = R / g,  0 <= k_i <= n_max / g,

and the largest gains of whole groups are exact. Single rollouts would not fall in gain, since one alone is worth
nothing; groups of two or more do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from krl.budget.belief import Belief, mean, mean_tokens, possible, posterior, reward_variance, window_rate
from krl.budget.solve import knapsack, knapsack_large, price
from krl.budget.value import Value, check_bounds, continuous_value, gains_of, log_gains, log_gains_beta
from krl.masked import divide

Counts = tuple[jax.Array, dict[str, Any]]
Rule = Callable[..., Counts]  # (belief, budget, n_min, n_max), and of CHOOSING_RULES group= too


def knapsack_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """The exact knapsack on the expected gains under each prompt's Beta belief.

    Assumes 0/1 rewards and that the policy moves little between a prompt's visits, beyond what the belief's
    discounts say. Value: Li et al., arXiv 2509.25849.
    """
    return _solve(_expected(belief, n_min, n_max, group), budget, n_min, group)


def knapsack_log_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """The knapsack with progress measured in log p: a mixed group is worth 1 - p instead of p (1-p)^2.

    A mixed group is taken to move the logit of p by as much everywhere, which moves log p by 1 - p as much. So moving
    a prompt from 1% to 2% counts as much as moving one from 20% to 40%: both halve the rollouts until the next
    success. The paper's value spends little where successes are rare, so what a policy seldom does
    right may be unlearnt before it is found. Chosen among the powers of p and 1 - p in docs/results.md.
    """
    return _solve(_expected(belief, n_min, n_max, group, powers=(0, 1)), budget, n_min, group)


def knapsack_tokens_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """The knapsack by gain per token: of prompts that teach as much, the short ones with short responses first.

    The R rollouts with the most expected gain for each of their tokens, which no other counts can beat at
    the tokens these are expected to take (`expected_tokens`, prompts not counted). A prompt that may get nothing costs its
    own tokens too, once, with its first group. Assumes that a prompt's responses stay as long as they were.
    """
    tokens = jnp.maximum(mean_tokens(belief), 1.0)
    costs = jnp.broadcast_to(group * tokens[:, None], (len(tokens), (n_max - n_min) // group))
    if not n_min:
        costs = costs.at[:, :1].add(belief.prompt_tokens[:, None])
    density = jax.lax.cummin(_expected(belief, n_min, n_max, group) - jnp.log(costs), axis=1)
    counts, info = _solve(density, budget, n_min, group)
    return counts, info | {"expected_tokens": (counts * tokens).sum()}


def knapsack_continuous_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """The knapsack for rewards that are any numbers in [0, 1]: see `continuous_value`."""
    variance = reward_variance(belief)[:, None]
    return value_rule(lambda average, n: continuous_value(average, variance, n))(belief, budget, n_min, n_max, group)


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


def reach_rule(
    belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1, reach: float = 0.01
) -> Counts:
    """Counts in proportion to sqrt(p (1-p)) / (p + r): the optimum for the objective sum_i log(p_i + r).

    For an objective sum_i f(p_i), unbiased gradients and scores of equal norm, the variance of an update falls most with
    counts in proportion to |f'(p)| sqrt(p (1-p)) (Neyman 1934). f = p gives `variance`. f = log p lets every
    doubling of a success rate count as much, rare ones first; but it gives without bound to what is hopeless.
    log(p + r) is bold above r and calm below it. The share of a prompt is the one that is expected under its belief: where
    p may be 0 or 0.1 it is the mean of what the two would get.
    """
    return _in_proportion(reach_weights(belief, reach), budget, n_min, n_max, group)


def reach_weights(belief: Belief, reach: float) -> jax.Array:
    """E[sqrt(p (1-p)) / (p + reach)] under the belief, [M] float32, by the trapezoidal rule in the logit of p."""
    alpha, beta = posterior(belief)
    # A belief narrower than the grid can follow is widened to a standard deviation of 0.2 in the logit.
    widened = jnp.minimum(1.0, (1 / alpha + 1 / beta) / 0.2**2)
    alpha, beta = widened * alpha, widened * beta
    logit, width = jnp.linspace(-20.0, 16.0, 145), 0.25
    log_p, log_q = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    # dp = p (1-p) d logit, so the density in the logit is p^alpha (1-p)^beta.
    log_density = alpha[:, None] * log_p + beta[:, None] * log_q
    density = jnp.exp(log_density - log_density.max(axis=1, keepdims=True))
    # Beyond the grid it falls as exp(alpha logit) and exp(-beta logit), and the weight is next to nothing.
    tails = density[:, 0] * (1 / alpha - width / 2) + density[:, -1] * (1 / beta - width / 2)
    mass = width * density.sum(axis=1) + tails
    weighed = width * (density @ jnp.exp((log_p + log_q) / 2 - jnp.log(jnp.exp(log_p) + reach)))
    return possible(belief) * divide(weighed, mass)


def variance_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """Counts in proportion to sqrt(p (1-p)), the reward's standard deviation.

    Neyman's allocation (J. Royal Statistical Society 97, 1934): it minimises the variance of the mean reward's
    estimate over all prompts. Assumes that p is known; takes the belief's mean for it.
    """
    rate = mean(belief)
    return _in_proportion(jnp.sqrt(rate * (1 - rate)), budget, n_min, n_max, group)


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


def inverse_sqrt_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """Counts in proportion to 1 / sqrt(p): the harder, the more.

    What minimises the gradient's variance when only successes are learnt from (Yao et al., "GVM-RAFT",
    arXiv 2505.02391, with equal gradient norms). Hopeless prompts take the most. Takes the belief's mean for p.
    """
    return _in_proportion(divide(1.0, jnp.sqrt(mean(belief))), budget, n_min, n_max, group)


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

    def rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
        def of_groups(p: jax.Array, n: jax.Array) -> jax.Array:
            return jnp.where(n > 0, value(p, group * jnp.maximum(n, 1)), 0.0)

        gains = gains_of(of_groups, mean(belief), n_min // group, n_max // group)
        return _solve(gains if n_min else jax.lax.cummin(gains, axis=1), budget, n_min, group)

    return rule


RULES: dict[str, Rule] = {  # by the name in config.alloc.rule
    "knapsack": knapsack_rule,
    "knapsack_log": knapsack_log_rule,
    "knapsack_tokens": knapsack_tokens_rule,
    "knapsack_continuous": knapsack_continuous_rule,
    "knapsack_paper": knapsack_paper_rule,
    "uniform": uniform_rule,
    "reach": reach_rule,
    "variance": variance_rule,
    "vip": vip_rule,
    "inverse_sqrt": inverse_sqrt_rule,
    "skip": skip_rule,
    "dynamic": dynamic_rule,
    "two_round": two_round_rule,
}
PILOT_RULES = {"two_round"}  # rules whose belief must already hold n_min rollouts of this step
# Rules that may give nothing to a prompt: they take `group`.
CHOOSING_RULES = {
    "knapsack",
    "knapsack_log",
    "knapsack_tokens",
    "knapsack_continuous",
    "reach",
    "variance",
    "inverse_sqrt",
}


def allocate(
    rule: str | Rule,
    belief: Belief,
    budget: jax.Array | int,
    n_min: int,
    n_max: int,
    *,
    group: int = 1,
    explored: int = 0,
) -> Counts:
    """The counts of a step under a rule.

    Args:
        rule: a key of RULES, or any function (belief, budget, n_min, n_max) -> (counts, info). With n_min = 0 a key of
            CHOOSING_RULES, or a function that takes `group` too and gives each prompt nothing or a multiple of it.
        belief: what is known of the step's M prompts, see `krl.budget.take`.
        budget: R, rollouts to spend; with n_min = 0 a multiple of group.
        n_min, n_max: the fewest and the most rollouts of a prompt, static.
        group: g, the rollouts of a group, static; used with n_min = 0, and 2 at least there.
        explored: with n_min = 0, how many prompts get a group that the rule gives nothing: those that were not sampled
            for longest, the lower index first; static. The rule has g times as many rollouts less.

    Returns:
        (counts [M] int32, info: the rule's own numbers; docs/metrics.md says which). The counts of the rules
        in RULES sum to R.

    Raises:
        ValueError: an unknown name, bounds with n_min < 0 or n_max < n_min, a budget out of range, a rule that cannot
            give nothing where n_min is 0.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown allocation rule {rule!r}; the rules are {sorted(RULES)}")
        if not n_min and rule not in CHOOSING_RULES:
            raise ValueError(
                f"the rule {rule!r} gives every prompt some; with n_min=0 take one of {sorted(CHOOSING_RULES)}"
            )
        rule = RULES[rule]
    check_bounds(n_min, n_max, least=0)
    prompts = belief.visits.shape[0]
    if n_min:
        _check_sum(prompts, budget, n_min, n_max)
        return rule(belief, budget, n_min, n_max)
    if not 2 <= group <= n_max:
        raise ValueError(f"a group must have 2 to n_max={n_max} rollouts, got group={group}")
    _check_sum(prompts, budget, 0, group * (n_max // group), group)
    return _choose(rule, belief, jnp.asarray(budget, jnp.int32), n_max, group, min(explored, prompts))


def _choose(rule: Rule, belief: Belief, budget: jax.Array, n_max: int, group: int, explored: int) -> Counts:
    """Counts of 0 or whole groups, of which `explored` go to prompts that the rule gives nothing."""
    # So many remain unserved whatever the rule does: each of its groups serves one prompt at most.
    groups = budget // group
    kept = jnp.clip(len(belief.visits) - groups, 0, jnp.minimum(explored, groups))
    counts, info = rule(belief, budget - group * kept, 0, n_max, group=group)
    waiting = jnp.where(counts == 0, belief.last_step, np.iinfo(np.int32).max)
    _, longest = jax.lax.top_k(-waiting, explored)
    return counts.at[longest].add(jnp.where(jnp.arange(explored) < kept, group, 0)), info


def _check_sum(prompts: int, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> None:
    """Refuse a budget that no counts sum to, where it is known."""
    if isinstance(budget, jax.core.Tracer):
        return
    if not prompts * n_min <= int(budget) <= prompts * n_max:
        raise ValueError(
            f"budget {int(budget)} cannot be met: {prompts} prompts take {prompts * n_min} to {prompts * n_max} rollouts"
        )
    if int(budget) % group:
        raise ValueError(f"budget {int(budget)} cannot be met: it must be a multiple of group={group}")


def _solve(gains: jax.Array, budget: jax.Array | int, n_min: int, group: int = 1) -> Counts:
    """The knapsack of gains [M, J], column j that of the group after n_min + j group rollouts."""
    groups = knapsack(gains, jnp.asarray(budget) // group, n_min // group)
    return group * groups, {"price": price(gains, groups, n_min // group)}


def _expected(belief: Belief, n_min: int, n_max: int, group: int, powers: tuple[int, int] = (1, 2)) -> jax.Array:
    """Logarithms of the expected gains under the belief: of single rollouts beyond n_min, or of whole groups from 0."""
    gains = log_gains_beta(*posterior(belief), n_min or 1, n_max, powers=powers)
    if not n_min:
        gains = whole_groups(gains, group)
    return gains + jnp.log(possible(belief))[:, None]


def whole_groups(log_gains: jax.Array, group: int) -> jax.Array:
    """The log gains of whole groups from those of single rollouts.

    Args:
        log_gains: [M, n_max - 1] float32; column j is the gain of rollout j + 2: the first one alone is worth nothing.
        group: g, at least 2.

    Returns:
        [M, n_max // g] float32; column k is the gain of rollouts k g + 1 .. (k + 1) g together. Rows do not rise: where a
        value is not concave in whole groups, a group counts as the smallest before it.
    """
    first = jnp.full((len(log_gains), 1), -jnp.inf)
    groups = (log_gains.shape[1] + 1) // group
    single = jnp.concatenate([first, log_gains], axis=1)[:, : groups * group]
    return jax.lax.cummin(jax.nn.logsumexp(single.reshape(len(single), groups, group), axis=2), axis=1)


def _in_proportion(weights: jax.Array, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Counts:
    """Whole counts in proportion to weights [M] within the bounds, by a divisor method: highest w / (n + offset) first.

    From n_min on the offset is 1/2 (Webster). From 0 on most shares are below one group, which Webster gives always or
    never: there offsets lie evenly over (0, 1), as in systematic sampling, so that half a group is one in half of the steps.
    """
    prompts = len(weights)
    spread = jnp.maximum(jnp.arange(1, prompts + 1) * 0.6180340 % 1.0, 1e-6)  # the rows are in random order
    known = jnp.log(weights), jnp.full(prompts, 0.5) if n_min else spread
    groups = jnp.asarray(budget) // group
    return group * knapsack_large(known, groups, n_min // group, n_max // group, gain=_share_gain), {}


def _share_gain(known: tuple[jax.Array, jax.Array], n: jax.Array) -> jax.Array:
    """Log of a prompt's weight over what it has, the offset of the divisor method included."""
    log_weight, offset = known
    return log_weight - jnp.log(n + offset)
