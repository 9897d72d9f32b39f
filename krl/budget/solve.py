"""Exact solvers: from a table of gains and a budget to counts.

The knapsack of a step is: maximise sum_i V(N_i, p_i) subject to sum_i N_i = R and
n_min <= N_i <= n_max. V is concave in N, so this is a separable concave resource allocation, and
taking the R - M n_min largest marginal gains is optimal (Fox, "Discrete optimization via marginal
analysis", Management Science 13(3), 1966; Ibaraki & Katoh, "Resource Allocation Problems", 1988).
No dynamic program is needed: one search for the threshold gain.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from krl.base.sharding import readable
from krl.base.threshold import NEVER, largest_threshold, narrow_threshold, ordered_integers
from krl.budget.value import Bound, check_bounds, log_gain

Allocation = tuple[jax.Array, dict[str, Any]]  # counts [M] int32, and what a rule says of them


class Shown(NamedTuple):
    """What the rounds of a step have given so far, and what came of it."""

    counts: jax.Array  # [M] int32, rollouts
    successes: jax.Array  # [M] float32, sums of their rewards
    failures: jax.Array  # [M] float32, sums of 1 - reward; those without a reward are in neither


# (M, R, n_min, group) -> the rollouts that are spent by the end of each round
RoundEnds = Callable[[int, int, int, int], tuple[int, ...]]


def in_rounds(ends: RoundEnds) -> Callable[[Callable[..., Allocation]], Callable[..., Allocation]]:
    """Marks a rule that spends the budget of a step in rounds, each after the outcomes of those before.

    Such a rule also takes `shown`, what the rounds before have given, which it may not lower, and what came of it; its
    belief has seen that too.
    """

    def mark(rule: Callable[..., Allocation]) -> Callable[..., Allocation]:
        vars(rule)["ends"] = ends
        return rule

    return mark


def pilot_and_rest(prompts: int, budget: int, n_min: int, group: int) -> tuple[int, ...]:
    """Two rounds: n_min rollouts of every prompt come first."""
    return (prompts * n_min, budget)


def knapsack(
    log_gains: jax.Array,
    budget: jax.Array | int,
    n_min: Bound,
    n_max: Bound | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The exact counts for a table of marginal gains that do not rise along a row.

    The budget is data: changing it does not recompile. Ties go to the smaller count first and then to
    the lower prompt index, so equal prompts share evenly and the answer is deterministic.

    Args:
        log_gains: [M, J] float32; column j of row i is the (log) gain of rollout n_min_i + j + 1.
        budget: R, an int or int32 scalar from the sum of n_min to the sum of n_max. Outside jit another
            value is refused; inside, the nearest possible budget is spent.
        n_min: rollouts that every prompt gets in any case, an int or [M] int32.
        n_max: the most rollouts of a prompt, an int or [M] int32; by default n_min + J, the table's width.
        mask: [M] bool, False on prompts that get nothing.

    Returns:
        counts [M] int32, sum R.

    Raises:
        ValueError: log_gains is not of rank 2, holds NaN or rises along a row; the bounds or the budget are
            out of range. Values inside jit cannot be checked.

    References:
        Fox 1966; Ibaraki & Katoh 1988, chapter 4.

    >>> from krl.budget.value import log_gains as gains
    >>> knapsack(gains(jnp.array([0.0, 0.1, 0.5]), n_min=1, n_max=9), budget=10, n_min=1).tolist()
    [1, 4, 5]
    """
    if jnp.ndim(log_gains) != 2:
        raise ValueError(f"log_gains must have shape [M, n_max - n_min], got {jnp.shape(log_gains)}")
    least, most = _limits(jnp.shape(log_gains), n_min, n_max, mask)
    _check_budget(budget, least, most)
    _check_gains(log_gains, least, most)
    budget = jnp.asarray(budget, jnp.int32)
    return _take_largest(jnp.asarray(log_gains, jnp.float32), jnp.ones_like(least), budget, least, most)[0]


@jax.jit
def _take_largest(
    log_gains: jax.Array, costs: jax.Array, budget: jax.Array, least: jax.Array, most: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The counts [M] of the largest gains that fit, what is left of the budget, and the largest gain that was left."""
    fewest = (costs * least).sum()
    left = jnp.clip(budget, fewest, (costs * most).sum()) - fewest
    allowed = jnp.arange(log_gains.shape[1]) < (most - least)[:, None]
    keys = jnp.where(allowed, ordered_integers(log_gains), NEVER)
    spent = jnp.where(allowed, costs[:, None], 0)
    # The largest gain down to which the budget is overrun: what is above it fits, and of what is at it the first ones.
    threshold = largest_threshold(lambda key: jnp.where(keys >= key, spent, 0).sum(dtype=jnp.int32) > left)
    tied = jnp.where(keys == threshold, spent, 0)
    left = left - jnp.where(keys > threshold, spent, 0).sum(dtype=jnp.int32)
    taken = allowed & ((keys > threshold) | ((keys == threshold) & (_running_total(tied) <= left)))
    left = left - jnp.where(taken, tied, 0).sum(dtype=jnp.int32)
    next_gain = jnp.where(allowed & ~taken, log_gains, -jnp.inf).max(initial=-jnp.inf)
    return least + taken.sum(axis=1, dtype=jnp.int32), left, next_gain


def knapsack_large(
    p: Any,
    budget: jax.Array | int,
    n_min: Bound,
    n_max: Bound,
    mask: jax.Array | None = None,
    *,
    gain: Callable[[Any, jax.Array], jax.Array] = log_gain,
) -> jax.Array:
    """The counts of `knapsack` for very many prompts, without an [M, J] table.

    The same search for the threshold gain, but how many rollouts of a prompt reach a threshold is found by
    bisection over its count. The brackets of earlier thresholds are kept, so they narrow as the search does.
    Between prompts there are only sums, and one running sum of an int per prompt to break ties: p may be
    sharded over the devices of one or many hosts.

    Args:
        p: [M] float, success rates in [0, 1]; with a `gain` of your own any tree of [M] arrays.
        budget, n_min, n_max, mask: as for `knapsack`; n_max is needed, and in all below 2^31 rollouts.
        gain: (p, n [M] float32) -> [M] float32, the (log) gain of rollout n + 1, not rising in n; static.

    Returns:
        counts [M] int32, sum R, with the ties of `knapsack`.

    Raises:
        ValueError: arrays of p that are not [M], bounds or budget out of range, or p holds NaN.

    >>> knapsack_large(jnp.array([0.0, 0.1, 0.5]), budget=10, n_min=1, n_max=9).tolist()
    [1, 4, 5]
    """
    leaves = jax.tree.leaves(p)
    if any(jnp.ndim(leaf) != 1 for leaf in leaves):
        raise ValueError(f"p must have shape [M], got {[jnp.shape(leaf) for leaf in leaves]}")
    least, most = _limits(jnp.shape(leaves[0]), n_min, n_max, mask)
    _check_budget(budget, least, most)
    for leaf in leaves:
        if readable(leaf, most) and bool((jnp.isnan(leaf) & (most > 0)).any()):
            raise ValueError("p holds NaN; every success rate must be a number in [0, 1]")
    p = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), p)
    return _take_largest_by_bisection(p, jnp.asarray(budget, jnp.int32), least, most, gain)


@functools.partial(jax.jit, static_argnames="gain")
def _take_largest_by_bisection(
    p: jax.Array,
    budget: jax.Array,
    least: jax.Array,
    most: jax.Array,
    gain: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    wanted = jnp.clip(budget, least.sum(), most.sum()) - least.sum()

    def counts_at(threshold: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """How many rollouts each prompt has if it takes those with keys >= threshold; low <= it <= high."""

        def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = state
            middle = low + (high - low) // 2
            key = ordered_integers(gain(p, middle.astype(jnp.float32)))
            searching, enough = low < high, key >= threshold
            low = jnp.where(searching & enough, middle + 1, low)
            return low, jnp.where(searching & ~enough, middle, high)

        return jax.lax.while_loop(lambda state: (state[0] < state[1]).any(), halve, (low, high))[0]

    def enough(key: jax.Array, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        low, high = bracket
        reached = counts_at(key, low, high)
        holds = (reached - least).sum(dtype=jnp.int32) >= wanted
        return holds, (jnp.where(holds, low, reached), jnp.where(holds, reached, high))

    threshold, (low, high) = narrow_threshold(enough, (least, most))
    # Now low counts the keys above the threshold and high those at it too: what lies between is tied.
    low, high = counts_at(threshold + 1, low, high), counts_at(threshold, low, high)
    missing = wanted - (low - least).sum(dtype=jnp.int32)

    def tied_before(column: jax.Array) -> jax.Array:
        """How many tied rollouts lie in columns < column, counted from each prompt's least."""
        return jnp.clip(jnp.minimum(high, least + column) - low, 0)

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, last = state
        middle = first + (last - first) // 2
        enough = tied_before(middle).sum(dtype=jnp.int32) >= missing
        return jnp.where(enough, first, middle + 1), jnp.where(enough, middle, last)

    width = (most - least).max(initial=0)
    _, column = jax.lax.while_loop(lambda state: state[0] < state[1], halve, (jnp.int32(0), width))
    taken = tied_before(jnp.maximum(column - 1, 0))
    last = tied_before(column) - taken
    left = missing - taken.sum(dtype=jnp.int32)
    return low + taken + jnp.where(jnp.cumsum(last, dtype=jnp.int32) <= left, last, 0)


def in_proportion(
    weights: jax.Array, budget: jax.Array | int, n_min: int, n_max: int, group: int = 1, turn: jax.Array | int = 0
) -> jax.Array:
    """Whole counts in proportion to weights [M] within the bounds, by a divisor method: highest w / (n + offset) first.

    From n_min on the offset is 1/2 (Webster). From 0 on most shares are below one group, which Webster gives always or
    never: there offsets lie evenly over (0, 1), as in systematic sampling, and are others in every turn, so that half a
    group is one in half of the turns.

    Args:
        weights: [M] float32, at least 0.
        budget: R, a multiple of group.
        n_min, n_max: the fewest and the most rollouts of a prompt.
        group: what counts are multiples of where n_min is 0.
        turn: any number that is another one every time, int32.

    Returns:
        counts [M] int32.

    Raises:
        ValueError: weights that are not [M] or not all numbers of at least 0, or bounds or a budget out of range.
    """
    if jnp.ndim(weights) != 1:
        raise ValueError(f"weights must have shape [M], got {jnp.shape(weights)}")
    if readable(weights) and not bool((weights >= 0).all()):
        raise ValueError("the weights must be numbers of at least 0")
    prompts = len(weights)
    known = jnp.log(weights), jnp.full(prompts, 0.5) if n_min else spread_evenly(prompts, turn)
    groups = jnp.asarray(budget) // group
    return group * knapsack_large(known, groups, n_min // group, n_max // group, gain=_share_gain)


def spread_evenly(size: int, turn: jax.Array | int = 0) -> jax.Array:
    """[size] float32 in (0, 1), evenly spread in any stretch of them: multiples of the golden ratio, modulo 1."""
    number = jnp.arange(1, size + 1, dtype=jnp.uint32) + jnp.asarray(turn, jnp.uint32)
    return jnp.clip((number * np.uint32(2654435769)).astype(jnp.float32) / 2.0**32, 1e-7, 1 - 1e-7)


def _share_gain(known: tuple[jax.Array, jax.Array], n: jax.Array) -> jax.Array:
    """Log of a prompt's weight over what it has, the offset of the divisor method included."""
    log_weight, offset = known
    return log_weight - jnp.log(n + offset)


def knapsack_cost(
    log_gains: jax.Array,
    costs: jax.Array,
    budget: jax.Array | int,
    n_min: Bound,
    n_max: Bound | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The counts under a budget of tokens, when a rollout of prompt i costs costs_i tokens.

    Rollouts are taken by their gain per token as long as they fit. Up to the first that does not fit this is
    the optimum of the problem in which rollouts may be split, so no way to spend the budget can be worth more
    than these counts plus the tokens left times that rollout's gain per token: less than its gain.

    Args:
        log_gains, n_min, n_max, mask: as for `knapsack`.
        costs: [M] float or int > 0, tokens of one rollout, rounded up to whole tokens.
        budget: tokens, an int or int32 scalar that covers n_min. Sums are int32: n_max rollouts of every
            prompt must cost less than 2^31 tokens.

    Returns:
        (counts [M] int32, bound [] float32): the value that was missed is at most the bound, in the units
        of the gains.

    Raises:
        ValueError: as for `knapsack`; costs of the wrong shape or not above 0, a budget that does not cover
            n_min.

    References:
        Dantzig, "Discrete-variable extremum problems", Operations Research 5(2), 1957.
    """
    if jnp.ndim(log_gains) != 2 or jnp.shape(costs) != jnp.shape(log_gains)[:1]:
        raise ValueError(f"need log_gains [M, J] and costs [M], got {jnp.shape(log_gains)} and {jnp.shape(costs)}")
    least, most = _limits(jnp.shape(log_gains), n_min, n_max, mask)
    costs = jnp.asarray(costs)
    if not jnp.issubdtype(costs.dtype, jnp.integer):
        costs = jnp.ceil(costs)
    costs = jnp.where(most > 0, costs, 1).astype(jnp.int32)
    _check_costs(costs, budget, least, most)
    _check_gains(log_gains, least, most)
    density = jnp.asarray(log_gains, jnp.float32) - jnp.log(costs.astype(jnp.float32))[:, None]
    counts, left, next_density = _take_largest(density, costs, jnp.asarray(budget, jnp.int32), least, most)
    return counts, jnp.where(left > 0, jnp.exp(next_density) * left, 0.0)


def max_plus_dp(values: jax.Array, budget: int) -> jax.Array:
    """The exact counts for any table of values, concave or not.

    best_i(b) = max over n of best_{i-1}(b - n) + values[i, n]: a max-plus convolution for each prompt, of
    O(M R N) time and O(M R) memory. For concave rows `knapsack` finds an optimum thousands of times faster, and
    a call outside jit says so. Outside jit the sums are float64.

    Args:
        values: [M, N+1] float, the value of giving a prompt 0 .. N rollouts; -inf for counts that are not
            allowed.
        budget: R, static.

    Returns:
        counts [M] int32, sum R; of equal optima the one in which later prompts have fewer rollouts.

    Raises:
        ValueError: values is not of shape [M, N+1] or holds NaN, or no allowed counts sum to R. Inside jit
            values cannot be checked.

    References:
        Ibaraki & Katoh 1988, chapter 3.

    >>> max_plus_dp(jnp.array([[0.0, 0.0, 3.0], [0.0, 1.0, 1.5]]), 2).tolist()
    [2, 0]
    """
    if jnp.ndim(values) != 2 or not jnp.shape(values)[1]:
        raise ValueError(f"values must have shape [M, N+1], got {jnp.shape(values)}")
    budget = int(budget)
    if budget < 0:
        raise ValueError(f"budget {budget} is below 0")
    if isinstance(values, jax.core.Tracer):
        return _max_plus(values, budget)[0]
    table = np.asarray(values, np.float64)
    if np.isnan(table).any():
        raise ValueError("values holds NaN; use -inf for a count that is not allowed")
    with np.errstate(invalid="ignore"):
        gains = np.diff(table, axis=1)
        tolerance = 1e-12 * np.abs(table).max(axis=1, initial=0, keepdims=True)
        concave = np.isfinite(table).all() and (np.diff(gains, axis=1) <= tolerance).all() and (gains >= 0).all()
    if concave and gains.shape[1] > 1 and len(table):
        warnings.warn("every row is concave: krl.budget.knapsack gives an optimum much faster", stacklevel=2)
    with jax.enable_x64(True):
        counts, best = _max_plus(jnp.asarray(table), budget)
        counts, best = np.asarray(counts), float(best)
    if not best > -math.inf:
        raise ValueError(f"no allowed counts of {len(table)} prompts sum to budget {budget}")
    return jnp.asarray(counts, jnp.int32)


@functools.partial(jax.jit, static_argnames="budget")
def _max_plus(values: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    most = values.shape[1] - 1

    def add_prompt(best: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        def try_count(n: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, choice = state
            shifted = jnp.where(jnp.arange(budget + 1) >= n, jnp.roll(best, n), -jnp.inf) + row[n]
            return jnp.where(shifted > total, shifted, total), jnp.where(shifted > total, n, choice)

        nothing = jnp.full(budget + 1, -jnp.inf, values.dtype), jnp.zeros(budget + 1, jnp.int32)
        return jax.lax.fori_loop(0, most + 1, try_count, nothing)

    start = jnp.where(jnp.arange(budget + 1) == 0, 0.0, -jnp.inf).astype(values.dtype)
    best, choices = jax.lax.scan(add_prompt, start, values)

    def look_back(left: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
        return left - choice[left], choice[left]

    _, counts = jax.lax.scan(look_back, jnp.int32(budget), choices, reverse=True)
    return counts, best[budget]


def _running_total(table: jax.Array) -> jax.Array:
    """Sums in the order of ties, column by column: the n-th rollout of every prompt before anyone's next."""
    columns = table.sum(axis=0, dtype=jnp.int32)
    return jnp.cumsum(table, axis=0, dtype=jnp.int32) + (jnp.cumsum(columns) - columns)[None, :]


def _limits(
    shape: tuple[int, ...], n_min: Bound, n_max: Bound | None, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The fewest and the most rollouts of each prompt, [M] int32, 0 where mask is False."""
    prompts = shape[0]
    n_max = n_min + shape[1] if n_max is None else n_max
    check_bounds(n_min, n_max, prompts, least=0)
    least, most = (jnp.broadcast_to(jnp.asarray(bound, jnp.int32), (prompts,)) for bound in (n_min, n_max))
    if len(shape) > 1:
        most = jnp.minimum(most, least + shape[1])  # a table has no gains beyond its width
    if mask is not None:
        least, most = jnp.where(mask, least, 0), jnp.where(mask, most, 0)
    return least, most


def _check_budget(budget: jax.Array | int, least: jax.Array, most: jax.Array) -> None:
    """Refuse a budget that no counts sum to, where it is known."""
    if not readable(budget, least, most):
        return
    lowest, highest = (int(np.asarray(bound, np.int64).sum()) for bound in (least, most))
    if highest >= 2**31:
        raise ValueError(f"the prompts may take {highest} rollouts in all; n_max must leave that below 2^31")
    check_sum(int(budget), len(least), lowest, highest)


def check_sum(budget: int, prompts: int, lowest: int, highest: int) -> None:
    """Refuse a budget that the counts of the prompts cannot sum to."""
    if not lowest <= budget <= highest:
        raise ValueError(f"budget {budget} cannot be met: {prompts} prompts take {lowest} to {highest} rollouts")


def _check_costs(costs: jax.Array, budget: jax.Array | int, least: jax.Array, most: jax.Array) -> None:
    """Refuse costs and a budget of tokens that make no sense, where they are known."""
    if not readable(costs, budget, least, most):
        return
    wide = np.asarray(costs, np.int64)
    if (wide < 1).any():
        raise ValueError("every cost must be a number of tokens above 0")
    lowest, highest = (int(wide @ np.asarray(bound, np.int64)) for bound in (least, most))
    if highest >= 2**31:
        raise ValueError(
            f"n_max rollouts of every prompt cost {highest} tokens; all costs together must stay below 2^31"
        )
    if int(budget) < lowest:
        raise ValueError(f"budget {int(budget)} does not cover the {lowest} tokens of n_min rollouts of every prompt")


def _check_gains(log_gains: jax.Array, least: jax.Array, most: jax.Array) -> None:
    """Refuse a table that is not one of falling gains where they may be taken, where it is known."""
    if not readable(log_gains, least, most):
        return
    room = np.arange(log_gains.shape[1]) < np.asarray(most - least)[:, None]
    gains = np.where(room, np.asarray(log_gains, np.float32), -np.inf)
    if np.isnan(gains).any():
        raise ValueError("log_gains holds NaN; every success rate must be a number in [0, 1]")
    rising = np.flatnonzero((gains[:, 1:] > gains[:, :-1]).any(axis=1))
    if rising.size:
        raise ValueError(
            f"log_gains rises along row {rising[0]}: its value is not concave; use max_plus_dp on a table of values"
        )


def price(log_gains: jax.Array, counts: jax.Array, n_min: Bound) -> jax.Array:
    """The smallest (log) gain that was taken: what the last rollout of the budget was worth; [] float32."""
    taken = jnp.arange(log_gains.shape[1])[None, :] < (counts - n_min)[:, None]
    return jnp.where(taken, log_gains, jnp.inf).min(initial=jnp.inf)
