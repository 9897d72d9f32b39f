"""The rules: from what is known of a step's prompts to their counts, behind one signature.

A rule is a function (belief of M prompts, budget R, n_min, n_max) -> (counts [M] int32 with sum R, info).
Where a rule from the literature was stated otherwise, its docstring says what was kept. All of them keep
the bounds and the sum, so that runs and simulations can be compared at equal cost.

The natural items of the knapsack are more prompts than a step can serve, of which most are best left alone for now. So
those that may choose prompts also take `group`, the unit of counts: with n_min = 0 a prompt gets nothing or a multiple
of that many rollouts, all compared together. In such units the problem is a separable concave one as before,

    maximise sum_i V_i(g k_i)  subject to  sum_i k_i = R / g,  0 <= k_i <= n_max / g,

and the largest gains of whole groups are exact. Single rollouts would not fall in gain, since one alone is worth
nothing; groups of two or more do.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from krl.base.masked import divide
from krl.budget import published
from krl.budget.belief import Belief, log_possible, mean, mean_tokens, possible, posterior, reward_variance
from krl.budget.solve import (
    Allocation,
    RoundEnds,
    Shown,
    check_sum,
    in_proportion,
    in_rounds,
    knapsack,
    pilot_and_rest,
    price,
)
from krl.budget.value import Value, check_bounds, continuous_value, gains_of, log_gains_beta
from krl.configs.named import find

Rule = Callable[..., Allocation]  # (belief, budget, n_min, n_max), and group= too where it may choose prompts


def knapsack_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
    """The exact knapsack on the expected gains under each prompt's Beta belief.

    Assumes 0/1 rewards and that the policy moves little between a prompt's visits, beyond what the belief's
    discounts say. Value: Li et al., arXiv 2509.25849.
    """
    return _solve(expected_gains(belief, n_min, n_max, group), budget, n_min, group)


def knapsack_log_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
    """The knapsack with progress measured in log p: a mixed group is worth 1 - p instead of p (1-p)^2.

    A mixed group is taken to move the logit of p by as much everywhere, which moves log p by 1 - p as much. So moving
    a prompt from 1% to 2% counts as much as moving one from 20% to 40%: both halve the rollouts until the next
    success. The paper's value spends little where successes are rare, so what a policy seldom does
    right may be unlearnt before it is found. Chosen among the powers of p and 1 - p in docs/results.md.
    """
    return _solve(expected_gains(belief, n_min, n_max, group, powers=(0, 1)), budget, n_min, group)


def knapsack_tokens_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
    """The knapsack by gain per token: of prompts that teach as much, the short ones with short responses first.

    The R rollouts with the most expected gain for each of their tokens, which no other counts can beat at the tokens
    these are expected to take (`expected_tokens`). A prompt that may get nothing costs its own tokens too, once, with
    its first group; a later group then counts as no denser than those before it, which may miss a few percent. Assumes
    that a prompt's responses stay as long as they were.
    """
    tokens = jnp.maximum(mean_tokens(belief), 1.0)
    costs = jnp.broadcast_to(group * tokens[:, None], (len(tokens), (n_max - n_min) // group))
    if not n_min:
        costs = costs.at[:, :1].add(belief.prompt_tokens[:, None])
    density = jax.lax.cummin(expected_gains(belief, n_min, n_max, group) - jnp.log(costs), axis=1)
    counts, info = _solve(density, budget, n_min, group)
    prompts = 0.0 if n_min else jnp.where(counts > 0, belief.prompt_tokens, 0.0).sum()
    return counts, info | {"expected_tokens": (counts * tokens).sum() + prompts}


def knapsack_continuous_rule(
    belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1
) -> Allocation:
    """The knapsack for rewards that are any numbers in [0, 1]: see `continuous_value`."""
    variance = reward_variance(belief)[:, None]
    return value_rule(lambda average, n: continuous_value(average, variance, n))(belief, budget, n_min, n_max, group)


def reach_rule(
    belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1, reach: float = 0.01
) -> Allocation:
    """Counts in proportion to sqrt(p (1-p)) / (p + r): the optimum for the objective sum_i log(p_i + r).

    For an objective sum_i f(p_i), unbiased gradients and scores of equal norm, the variance of an update falls most
    with counts in proportion to |f'(p)| sqrt(p (1-p)) (Neyman 1934). f = p gives `variance`. f = log p lets every
    doubling of a success rate count as much, rare ones first; but it gives without bound to what is hopeless. log(p +
    r) is bold above r and calm below it. The share of a prompt is the one that is expected under its belief: where p
    may be 0 or 0.1 it is the mean of what the two would get.
    """
    return in_proportion(reach_weights(belief, reach), budget, n_min, n_max, group, turn=belief.recorded.sum()), {}


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


def reach_chances(
    belief: Belief, budget: jax.Array | int, *, group: int = 1, explored: int = 0, reach: float = 0.01
) -> jax.Array:
    """The probability with which each of C candidates gets any rollouts from `reach_rule`, were there no n_max.

    Shares of a group below 1 are such probabilities by the offsets of `in_proportion`. Those of exploration are about
    right: it is taken to fall on all that are left alike, and what is rare waits longest and gets a little more.

    Args:
        belief, budget, group, explored: as for `allocate` with n_min = 0.
        reach: r of the rule, a success rate.

    Returns:
        [C] float32 in (0, 1]; 0 only for what cannot be served.
    """
    weights, groups = reach_weights(belief, reach), jnp.asarray(budget) // group
    kept = kept_groups(len(weights), groups, explored)
    chosen = jnp.minimum(divide(weights, weights.sum()) * (groups - kept), 1.0)
    # Over many steps what is kept for exploration goes to all that are left alike.
    return chosen + (1 - chosen) * jnp.minimum(divide(kept, (1 - chosen).sum()), 1.0)


def variance_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
    """Counts in proportion to sqrt(p (1-p)), the reward's standard deviation.

    Neyman's allocation (J. Royal Statistical Society 97, 1934): it minimises the variance of the mean reward's
    estimate over all prompts. Assumes that p is known; takes the belief's mean for it.
    """
    rate = mean(belief)
    return in_proportion(jnp.sqrt(rate * (1 - rate)), budget, n_min, n_max, group, turn=belief.recorded.sum()), {}


@in_rounds(pilot_and_rest)
def two_round_rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, shown: Shown) -> Allocation:
    """The knapsack after a pilot: n_min rollouts of every prompt from the current policy come first.

    Every prompt gets those in any case. Assumes that waiting between the two rounds is worth it.
    """
    return knapsack_rule(belief, budget, n_min, n_max)


def value_rule(value: Value) -> Rule:
    """A knapsack rule from a value function of your own, (p, n) -> value, at the belief's mean."""

    def rule(belief: Belief, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1) -> Allocation:
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
    "reach": reach_rule,
    "variance": variance_rule,
    "two_round": two_round_rule,
    "knapsack_paper": published.knapsack_paper_rule,
    "uniform": published.uniform_rule,
    "vip": published.vip_rule,
    "inverse_sqrt": published.inverse_sqrt_rule,
    "skip": published.skip_rule,
    "dynamic": published.dynamic_rule,
    "mopps": published.mopps_rule,
    "pilot_commit": published.pilot_commit_rule,
    "reinforce_ada": published.reinforce_ada_rule,
    "coba": published.coba_rule,
    "hora": published.hora_rule,
    "gvm": published.gvm_rule,
}


def find_rule(rule: str | Rule) -> Rule:
    """The rule of a name in RULES, or of one's own, "package.module:function"; a function is itself.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(rule, str):
        return rule
    if rule not in RULES and ":" not in rule:
        raise ValueError(f"unknown allocation rule {rule!r}; the rules are {sorted(RULES)}, or package.module:function")
    found = find(rule, RULES, "rule ")
    if not callable(found):
        raise ValueError(f"rule {rule!r}: {rule.partition(':')[2]} is a {type(found).__name__}, not a function")
    return found


def has_rounds(rule: str | Rule) -> bool:
    """Whether a rule spends the budget of a step in several rounds, see `in_rounds`."""
    return _ends_of(rule) is not None


def _ends_of(rule: str | Rule) -> RoundEnds | None:
    """Where the rounds of a rule end, see `in_rounds`; of a partial function, those of the whole one."""
    found: Any = find_rule(rule)
    while not hasattr(found, "ends") and isinstance(found, functools.partial):
        found = found.func
    return getattr(found, "ends", None)


def may_choose(rule: str | Rule) -> bool:
    """Whether a rule may give prompts nothing: one that takes `group`."""
    return "group" in inspect.signature(find_rule(rule)).parameters


def must_choose(rule: str | Rule) -> bool:
    """Whether a rule cannot give every prompt some: one that takes `group`, and has no default for it."""
    taken = inspect.signature(find_rule(rule)).parameters
    return "group" in taken and taken["group"].default is inspect.Parameter.empty


def allocate(
    rule: str | Rule,
    belief: Belief,
    budget: jax.Array | int,
    n_min: int,
    n_max: int,
    *,
    group: int = 1,
    explored: int = 0,
    shown: Shown | None = None,
) -> Allocation:
    """The counts of a step under a rule.

    Args:
        rule: a key of RULES, or any function (belief, budget, n_min, n_max) -> (counts, info). With n_min = 0 one that
            takes `group` too and gives each prompt nothing or a multiple of it.
        belief: what is known of the step's M prompts, see `krl.budget.take`.
        budget: R, rollouts to spend; with n_min = 0 a multiple of group.
        n_min, n_max: the fewest and the most rollouts of a prompt, static.
        group: g, the rollouts of a group, static; used with n_min = 0, and 2 at least there.
        explored: with n_min = 0, how many prompts get a group that the rule gives nothing: those that were not sampled
            for longest, the lower index first; static. The rule has g times as many rollouts less. 0 in a pool that has
            fewer prompts than the budget has groups, and in rounds.
        shown: of the rounds before, nothing by default; only a rule in rounds is told. budget is then what is spent
            with this round.

    Returns:
        (counts [M] int32, info: the rule's own numbers; docs/metrics.md says which). The counts of the rules
        in RULES sum to R.

    Raises:
        ValueError: an unknown name, bounds with n_min < 0 or n_max < n_min, a budget, a group or `explored` out of
            range, a rule that cannot give nothing where n_min is 0.
    """
    if not n_min and not may_choose(rule):
        names = sorted(filter(may_choose, RULES))
        raise ValueError(f"the rule {rule!r} gives every prompt some; with n_min=0 take one of {names}")
    if n_min and must_choose(rule):
        raise ValueError(f"the rule {rule!r} chooses which prompts get any; it needs n_min=0, got {n_min}")
    rule = find_rule(rule)
    prompts = belief.visits.shape[0]
    check_bounds(n_min, n_max, prompts, least=0)
    if not n_min and not (isinstance(group, int | np.integer) and 2 <= group <= n_max):
        raise ValueError(f"a group must have a whole number, 2 to n_max={n_max} rollouts, got group={group!r}")
    if not isinstance(explored, int | np.integer) or explored < 0:
        raise ValueError(f"explored must be a whole number of prompts, not below 0, got {explored!r}")
    _check_sum(prompts, budget, n_min, n_max, 1 if n_min else group)
    none = jnp.zeros(prompts)
    more = {"shown": shown or Shown(none.astype(jnp.int32), none, none)} if has_rounds(rule) else {}
    if n_min:
        return _checked(rule, rule(belief, budget, n_min, n_max, **more), prompts)
    budget, explored = jnp.asarray(budget, jnp.int32), 0 if more else min(explored, prompts)
    kept = kept_groups(prompts, budget // group, explored)
    counts, info = _checked(rule, rule(belief, budget - group * kept, 0, n_max, group=group, **more), prompts)
    # A group each for those that the rule gives nothing and that were not sampled for longest.
    waiting = jnp.where(counts == 0, belief.last_step, np.iinfo(np.int32).max)
    _, longest = jax.lax.top_k(-waiting, explored)
    return counts.at[longest].add(jnp.where(jnp.arange(explored) < kept, group, 0)), info


def _checked(rule: Rule, given: Any, prompts: int) -> Allocation:
    """What a rule gave, if it is of the right form."""
    name = getattr(rule, "__name__", type(rule).__name__)
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], Mapping):
        raise ValueError(f"the rule {name} must return (counts, a dictionary of numbers), it returned {given!r}"[:300])
    counts, info = given
    if isinstance(counts, list | tuple) or jnp.shape(counts) != (prompts,):
        raise ValueError(
            f"the rule {name} must return an array with a count for each of the {prompts} prompts, it returned one of "
            f"shape {list(np.shape(counts))}"
        )
    for key, value in info.items():
        if isinstance(value, str) or jnp.shape(value) != ():
            raise ValueError(f"the rule {name} must return numbers beside the counts, {key!r} is none: {value!r}"[:300])
    counts = jnp.asarray(counts)
    return counts.astype(jnp.int32) if jnp.issubdtype(counts.dtype, jnp.integer) else counts, dict(info)


def kept_groups(prompts: int, groups: jax.Array | int, explored: int) -> jax.Array:
    """How many groups of a step are kept for prompts that the rule gives nothing."""
    # Each of the rule's groups serves one prompt at most, so with as many prompts as groups at least so many get none.
    return jnp.where(prompts >= groups, jnp.minimum(explored, groups), 0)


def rounds_of(rule: str | Rule, prompts: int, budget: int, n_min: int, group: int = 1) -> tuple[int, ...]:
    """The rollouts that a step of M prompts has spent by the end of each of its rounds; (R,) for a rule without any.

    Raises:
        ValueError: an unknown rule, or one whose rounds are not whole numbers that rise to the budget.

    >>> rounds_of("two_round", 8, 64, 2)
    (16, 64)
    """
    ends_of = _ends_of(rule)
    ends = ends_of(prompts, budget, n_min, group) if ends_of else (budget,)
    if not isinstance(ends, tuple | list) or not all(isinstance(end, int | np.integer) for end in ends):
        raise ValueError(f"the rounds of a rule must be given as whole numbers of rollouts, got {ends!r}")
    if not ends or ends[-1] != budget or any(end < before for before, end in itertools.pairwise((0, *ends))):
        raise ValueError(f"the rounds of a rule must rise to the budget, {budget} rollouts, got {tuple(ends)}")
    return tuple(end for before, end in itertools.pairwise((0, *ends)) if end > before)  # none that spends nothing


def _check_sum(prompts: int, budget: jax.Array | int, n_min: int, n_max: int, group: int) -> None:
    """Refuse a budget that no counts sum to, where it is known."""
    if isinstance(budget, jax.core.Tracer):
        return
    if budget is None or isinstance(budget, str) or budget % 1 != 0:  # not a number, and infinity, too
        raise ValueError(f"budget {budget} must be a whole number of rollouts")
    check_sum(int(budget), prompts, prompts * n_min, prompts * (n_max // group * group))
    if int(budget) % group:
        raise ValueError(f"budget {int(budget)} cannot be met: it must be a multiple of group={group}")


def _solve(gains: jax.Array, budget: jax.Array | int, n_min: int, group: int) -> Allocation:
    """The knapsack of gains [M, J], column j that of the group after n_min + j group rollouts."""
    groups = knapsack(gains, jnp.asarray(budget) // group, n_min // group)
    return group * groups, {"price": price(gains, groups, n_min // group)}


def expected_gains(belief: Belief, n_min: int, n_max: int, group: int, powers: tuple[int, int] = (1, 2)) -> jax.Array:
    """Logarithms of the expected gains under the belief: of single rollouts beyond n_min, or of whole groups from 0."""
    gains = log_gains_beta(*posterior(belief), n_min or 1, n_max, powers=powers)
    if not n_min:
        gains = whole_groups(gains, group)
    return gains + log_possible(belief)[:, None]


def whole_groups(log_gains: jax.Array, group: int) -> jax.Array:
    """The log gains of whole groups from those of single rollouts.

    Args:
        log_gains: [M, n_max - 1] float32; column j is the gain of rollout j + 2: the first one alone is worth nothing.
        group: g, at least 2.

    Returns:
        [M, n_max // g] float32; column k is the gain of rollouts k g + 1 .. (k + 1) g together. Rows do not rise: where
        a value is not concave in whole groups, a group counts as the smallest before it.
    """
    first = jnp.full((len(log_gains), 1), -jnp.inf)
    groups = (log_gains.shape[1] + 1) // group
    single = jnp.concatenate([first, log_gains], axis=1)[:, : groups * group]
    return jax.lax.cummin(jax.nn.logsumexp(single.reshape(len(single), groups, group), axis=2), axis=1)
