"""Rules that others have published, with what was kept of each under a budget of R rollouts a step.

Where a method was stated otherwise, the docstring of its rule says what is different here. All of them keep the bounds
and the sum, so that runs and simulations can be compared at equal cost; pilots, too, are paid for and learnt from.
"""

import jax
import jax.numpy as jnp

from krl.base.masked import divide
from krl.budget.belief import Belief, mean, window_rate
from krl.budget.solve import Allocation, Shown, in_proportion, in_rounds, knapsack, pilot_and_rest, spread_evenly
from krl.budget.value import log_gains


def uniform_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
    """Plain GRPO (Shao et al., arXiv 2402.03300): every prompt the same; the remainder to the first ones.

    Of more candidates than there are groups, each has one as often as any other.
    """
    prompts = belief.visits.shape[0]
    if not n_min:
        return in_proportion(jnp.ones(prompts), budget, n_min, n_max, group, turn=belief.recorded.sum()), {}
    share, remainder = jnp.divmod(jnp.asarray(budget, jnp.int32), max(prompts, 1))
    return (share + (jnp.arange(prompts) < remainder)).astype(jnp.int32), {}


def knapsack_paper_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Allocation:
    """The rule of the Knapsack RL paper, as its text and published code have it.

    The success rate is that of the newest visit, filled up from earlier outcomes to 16. A prompt with fewer than 8
    outcomes gets the uniform count; solved (1) and unsolved (0) ones get n_min; the rest is divided by the knapsack on
    the plain rates. If the prompts in between need less than there is, which is log(0.1) / log(max(p, 1-p)) rollouts
    each, rounded down, above n_min, the surplus goes to the unsolved ones. Unlike the code, this keeps n_max, counts
    the value of n_min rollouts, and never divides by zero prompts: what is left when all are at their bounds goes first
    to prompts in between, then to new ones, then to solved ones.

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
    return knapsack(tiers, budget, n_min), {"surplus": surplus.astype(jnp.float32)}


def vip_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Allocation:
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


def inverse_sqrt_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
    """Counts in proportion to 1 / sqrt(p): the harder, the more.

    What minimises the gradient's variance when only successes are learnt from (Yao et al., "GVM-RAFT",
    arXiv 2505.02391, with equal gradient norms). Hopeless prompts take the most. Takes the belief's mean for p.
    """
    weights = jax.lax.rsqrt(jnp.maximum(mean(belief), 1e-30))
    return in_proportion(weights, budget, n_min, n_max, group, turn=belief.recorded.sum()), {}


def skip_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Allocation:
    """Skips prompts whose last groups were even, more often the longer that lasts; the others share alike.

    GRESO (Zheng et al., arXiv 2506.02177) skips a prompt with a probability that rises with its even groups in
    a row. Here a skipped prompt still gets n_min rollouts, which lengthen its streak z too; so it is explored with
    the share 1 / (z + 1), whose pauses double. Which prompts of a step these are is spread evenly over its rows
    (whose order is random), without random numbers.
    """
    explored = spread_evenly(len(belief.visits)) * (belief.even_streak + 1) < 1
    gains = jnp.where(explored, 0.0, -1.0)[:, None] * jnp.ones(n_max - n_min)
    return knapsack(gains, budget, n_min), {"skipped": (~explored).mean(dtype=jnp.float32)}


def dynamic_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Allocation:
    """DAPO's dynamic sampling: uniform groups, of the same policy, until R rollouts lie in mixed ones; then one update.

    A step spends R rollouts as ever, and training with this rule updates the policy only in the steps in which there
    are enough (for each of U updates a step, R / U); all that was sampled is paid for, nothing that has a gradient is
    thrown away. An update goes along the mean gradient of the steps it waited for, a penalty's included. `rounds` is
    how many steps it is expected to take.

    References:
        Yu et al., "DAPO", arXiv 2503.14476, section 3.2.
    """
    counts, _ = uniform_rule(belief, budget, n_min, n_max)
    rate = mean(belief)
    mixed = 1 - rate**counts - (1 - rate) ** counts
    useful = (counts * mixed).sum()
    return counts, {"rounds": jnp.where(useful > 0, divide(jnp.float32(counts.sum()), useful), jnp.inf)}


def mopps_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int) -> Allocation:
    """One group each for the prompts whose success rate, drawn from what is believed of it, is nearest to 1/2.

    Thompson sampling from Beta(1 + successes, 1 + failures) of a prompt's own record. The published runs keep all
    evidence on mathematics and half of it on other tasks (`alloc.discount` and `discount_mixed` of 1 or 0.5, `fade` of
    1, not fitted), serve one in sixteen candidates and take groups of 8.

    References:
        Qu et al., "MoPPS", arXiv 2507.04632.
    """
    key = jax.random.key(belief.recorded.sum())  # another one after every step that sampled any of them
    drawn = jax.random.beta(key, 1 + belief.successes, 1 + belief.failures)
    return _by_priority(-jnp.abs(drawn - 0.5), 1, budget, n_min, n_max, group), {}


def _half_and_rest(prompts: int, budget: int, n_min: int, group: int) -> tuple[int, ...]:
    return (budget // (2 * group) * group, budget)


@in_rounds(_half_and_rest)
def pilot_commit_rule(
    belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int, shown: Shown
) -> Allocation:
    """A group for as many prompts as half of the budget pays for, then three more for rates from 1/8 to 3/4.

    A prompt whose newest group was all right is no longer piloted. What is not committed goes to more pilots. The
    published method repeats both stages until it has 128 prompts to commit to, within no budget, and learns from the
    others' pilots too.

    References:
        Kim et al., "Pilot-Commit", arXiv 2605.26606.
    """
    given, wins, losses = shown
    count = wins + losses
    evicted = (belief.last_count > 0) & (belief.last_successes >= belief.last_count)
    rate = divide(wins, count)
    committed = (count > 0) & (rate >= 0.125) & (rate <= 0.75)
    priority = jnp.where(committed, 3.0, jnp.where(given > 0, 0.0, jnp.where(evicted, 1.0, 2.0)))
    wanted = jnp.where(committed, 3, (given == 0).astype(jnp.int32))
    return _by_priority(priority, wanted, budget, given, n_max, group), {"committed": committed.sum()}


def _half_and_three(prompts: int, budget: int, n_min: int, group: int) -> tuple[int, ...]:
    return (*(budget * part // (6 * group) * group for part in (3, 4, 5)), budget)


@in_rounds(_half_and_three)
def reinforce_ada_rule(
    belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int, shown: Shown
) -> Allocation:
    """Groups for a prompt until it has two successes and two failures, at most four, in as many rounds.

    The variant "balance". The published method has no budget and keeps two successes and two failures of each prompt;
    here half of the budget begins with new prompts, what a later round does not need begins with others, and all
    rollouts are learnt from.

    References:
        Xiong et al., "Reinforce-Ada", arXiv 2510.04996.
    """
    given, wins, losses = shown
    active = (given > 0) & ((wins < 2) | (losses < 2)) & (given < 4 * group)
    priority = jnp.where(active, 2.0, jnp.where(given == 0, 1.0, 0.0))
    wanted = (active | (given == 0)).astype(jnp.int32)
    return _by_priority(priority, wanted, budget, given, n_max, group), {"active": active.sum()}


def _by_priority(
    priority: jax.Array,
    wanted: jax.Array | int,
    budget: jax.Array | int,
    given: jax.Array | int,
    n_max: int,
    group: int,
) -> jax.Array:
    """Counts [M] in whole groups: `wanted` more for each prompt beyond `given`, by priority, and then for all alike."""
    number = jnp.arange(n_max // group)
    gains = jnp.where(number < jnp.reshape(wanted, (-1, 1)), priority[:, None], -10.0 - number)
    return group * knapsack(gains, jnp.asarray(budget) // group, jnp.asarray(given) // group, n_max // group)


def coba_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int) -> Allocation:
    """The greedy counts for (1 - exp(-n p (1-p) / tau)) times the density of a Beta distribution at p.

    Its mode is the share of failures F while that is above 1/2 and falls fast below, so a policy that fails often gets
    easy prompts, and one that succeeds gets hard ones. p is the rate of a prompt's newest visit, 1/2 before the first.
    tau is that of the released code, which unlike the paper and this rule also keeps a part of the budget for prompts
    below .05.

    References:
        Yao et al., "CoBA-RL", arXiv 2602.03048.
    """
    seen = belief.last_count > 0
    p = jnp.clip(jnp.where(seen, divide(belief.last_successes, belief.last_count), 0.5), 0.01, 0.99)
    failing = 1 - p.mean()
    mode = jnp.where(failing > 0.5, failing, jax.nn.sigmoid(10 * (failing - 0.5)))
    alpha = jnp.clip(1 + 9 * mode, 1.0, 10.0)
    speed = p * (1 - p) / (3 + 9 * jnp.clip(p.var() / 0.1667, 0.0, 1.0))
    first = jax.scipy.stats.beta.logpdf(p, alpha, 11 - alpha) + jnp.log(-jnp.expm1(-speed))
    n = n_min + jnp.arange(n_max - n_min)
    return knapsack(first[:, None] - speed[:, None] * n, budget, n_min), {}


@in_rounds(pilot_and_rest)
def hora_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, shown: Shown) -> Allocation:
    """After n_min rollouts of every prompt, the counts with the most prompts that are expected to succeed in the rest.

    The m-th further rollout is the first success with probability E[p (1-p)^(m-1)] under Beta(1 + successes, 1 +
    failures) of the pilot; successes of the pilot do not count. How large the authors' pilot is was not to be found.

    References:
        Wang et al., "HORA", arXiv 2605.07114.
    """
    _, wins, losses = shown
    a, b = 1 + wins[:, None], 1 + losses[:, None]
    m = jnp.arange(n_max - n_min, dtype=jnp.float32)
    later = jnp.log(b + m) - jnp.log(a + b + 1 + m)
    before = jnp.concatenate([jnp.zeros_like(wins)[:, None], jnp.cumsum(later, axis=1)[:, :-1]], axis=1)
    return knapsack(jnp.log(divide(a, a + b)) + before[:, : n_max - n_min], budget, n_min), {}


@in_rounds(pilot_and_rest)
def gvm_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, shown: Shown) -> Allocation:
    """After n_min rollouts of every prompt, the others in proportion to 1 / sqrt(p + alpha / p), and none where p is 0.

    p is the rate of the pilot, alpha 1/1000 (and beta 2). The published method throws its pilot away, renews it every
    ten steps, knows the norms of gradients, and learns from successes alone.

    References:
        Yao et al., "GVM-RAFT", arXiv 2505.02391.
    """
    _, wins, losses = shown
    p = divide(wins, wins + losses)
    weights = jnp.where(p > 0, divide(1.0, jnp.sqrt(p + divide(1e-3, p))), 0.0)
    m = jnp.arange(n_max - n_min, dtype=jnp.float32)
    return knapsack(jnp.log(weights)[:, None] - jnp.log(m + 0.5), budget, n_min), {}
