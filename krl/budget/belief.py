"""What is known of every prompt's success rate, and how a step's rewards change it.

Each task's rate is believed to be Beta(prior_alpha + successes, prior_beta + failures), or 0 if the task is one of
those that cannot be solved. The prior is fitted to the data set's own statistics as training goes (empirical Bayes),
and is the same for all tasks unless krl/budget/prior.py gives each one of its own. What was seen long ago fades.
Evidence is discounted, because the policy moves. It moves most on the prompts it learns from: a group whose rewards
differ makes a gradient, and what it showed is about a policy that this very step replaces; an even group makes none. So
all of a task's evidence, the step's own too, is discounted by `discount_mixed` after a mixed group and by `discount`
after an even one. Both follow the data: if new outcomes would have been likelier with less evidence, more is forgotten
from then on.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ops import segment_sum
from jax.scipy.special import betaln, logit

from krl.base.masked import divide, segment_differs
from krl.base.sharding import readable

# The prior's strength alpha + beta stays in this range: below it a single outcome would count as
# certainty, above it no prompt could ever differ from the average one.
STRENGTH_RANGE = (0.1, 10.0)
DISCOUNT_RATE = 0.5  # logits by which a discount moves for a slope of one nat
PROVEN = 1e6  # log-likelihood of what was solved once, against any that its failures may have
FEW_HOPELESS = (2.0, 20.0)  # before anything is known: two hopeless tasks among twenty
WINDOW = 16  # newest outcomes kept one by one, for the rule of the paper


class Belief(struct.PyTreeNode):
    """Statistics of D tasks; `take` makes the same record of a step's M prompts."""

    successes: jax.Array  # [D] float32, discounted sum of rewards
    failures: jax.Array  # [D] float32, discounted sum of 1 - reward
    prior_then: jax.Array  # [D] float32, what the task's own prior expected of it when those were seen
    prior_of: jax.Array  # [D] int32, which setting of the prior that was, see `krl.budget.inform`; -1 for none
    squares: jax.Array  # [D] float32, discounted sum of squared rewards
    prompt_tokens: jax.Array  # [D] float32, length of the prompt, which a step reads once if the task is sampled
    tokens: jax.Array  # [D] float32, discounted sum of response lengths, tokens
    visits: jax.Array  # [D] int32, steps in which the task was sampled
    last_step: jax.Array  # [D] int32, the newest of them, -1 before
    even_streak: jax.Array  # [D] int32, visits in a row whose rewards were all equal
    recorded: jax.Array  # [D] int32, rollouts seen in all
    last_count: jax.Array  # [D] int32, rollouts of the newest visit
    last_successes: jax.Array  # [D] float32, sum of their rewards
    barren: jax.Array  # [D] float32, log-probability of its failures if it can be solved; PROVEN after a success
    recent: jax.Array  # [D] uint32, bit i = the i-th newest outcome of WINDOW was a reward of 1/2 or more
    prior_alpha: jax.Array  # [] float32
    prior_beta: jax.Array  # [] float32
    discount: jax.Array  # [] float32, what is left of a task's evidence after a group of equal rewards
    discount_mixed: jax.Array  # [] float32, the same after a group of rewards that differ
    fade: jax.Array  # [] float32, what is left of it after a step without the task
    hopeless: jax.Array  # [] float32, log-odds that a task is one that no policy solves


def init_belief(
    num_tasks: int,
    *,
    discount: float = 0.5,
    discount_mixed: float = 0.25,
    fade: float = 0.95,
    prompt_tokens: jax.Array | None = None,
) -> Belief:
    """Nothing known of D tasks: Jeffreys' prior, Beta(1/2, 1/2).

    Args:
        num_tasks: D.
        discount, discount_mixed, fade: what is left of evidence to begin with, in [0, 1]; see `Belief`.
        prompt_tokens: [D], lengths of the prompts; 0 by default.
    """

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(num_tasks, dtype)

    return Belief(
        successes=zeros(jnp.float32),
        failures=zeros(jnp.float32),
        prior_then=zeros(jnp.float32),
        prior_of=jnp.full(num_tasks, -1, jnp.int32),
        squares=zeros(jnp.float32),
        prompt_tokens=zeros(jnp.float32) if prompt_tokens is None else jnp.asarray(prompt_tokens, jnp.float32),
        tokens=zeros(jnp.float32),
        visits=zeros(jnp.int32),
        last_step=jnp.full(num_tasks, -1, jnp.int32),
        even_streak=zeros(jnp.int32),
        recorded=zeros(jnp.int32),
        last_count=zeros(jnp.int32),
        last_successes=zeros(jnp.float32),
        barren=zeros(jnp.float32),
        recent=zeros(jnp.uint32),
        prior_alpha=jnp.float32(0.5),
        prior_beta=jnp.float32(0.5),
        discount=jnp.float32(discount),
        discount_mixed=jnp.float32(discount_mixed),
        fade=jnp.float32(fade),
        hopeless=jnp.float32(-PROVEN),
    )


def take(belief: Belief, task_ids: jax.Array, step: jax.Array | int | None = None) -> Belief:
    """The beliefs of some tasks: [D] arrays in, [M] arrays out, the same prior.

    All arrays are copies, so that the belief of the D tasks may be donated while these are still asked.
    With a step their evidence is what time has left of it, and fades no further.
    """
    taken = jax.tree.map(lambda leaf: leaf[task_ids] if leaf.ndim else jnp.copy(leaf), belief)
    if step is None:
        return taken
    kept = taken.fade ** _age(taken, step)
    evidence = ("successes", "failures", "squares", "tokens")
    return taken.replace(fade=jnp.float32(1.0), **{name: kept * getattr(taken, name) for name in evidence})


def _age(belief: Belief, step: jax.Array | int) -> jax.Array:
    return jnp.maximum(step - 1 - belief.last_step, 0).astype(jnp.float32)


def possible(belief: Belief) -> jax.Array:
    """Probability that a task can be solved at all, [D] float32.

    What was never solved has failed so often either because it is hard or because it is hopeless: Bayes' rule,
    with the share of hopeless tasks among all of them as the prior.
    """
    return jnp.exp(log_possible(belief))


def log_possible(belief: Belief) -> jax.Array:
    """Logarithm of `possible`, which float32 can tell apart where the probability itself would be 0."""
    return jax.nn.log_sigmoid(belief.barren - belief.hopeless)


def fit_hopeless(log_odds: jax.Array, barren: jax.Array, seen: jax.Array) -> jax.Array:
    """The log-odds of what fails always, by expectation maximisation; float32 scalar.

    Args:
        log_odds: to begin with.
        barren: log-probability of the failures of each if it does not fail always, PROVEN where there was a success.
        seen: those that say anything. FEW_HOPELESS more are taken to be seen.
    """
    share, known = FEW_HOPELESS

    def again(_: int, log_odds: jax.Array) -> jax.Array:
        hopeless = jnp.where(seen, jax.nn.sigmoid(log_odds - barren), 0.0).sum() + share
        return jnp.log(hopeless) - jnp.log(seen.sum() + known - hopeless)

    return jax.lax.fori_loop(0, 8, again, log_odds)


def posterior(belief: Belief) -> tuple[jax.Array, jax.Array]:
    """Parameters (alpha [D], beta [D]) of each task's Beta belief if it can be solved, float32, > 0."""
    return belief.prior_alpha + belief.successes, belief.prior_beta + belief.failures


def mean(belief: Belief) -> jax.Array:
    """Expected success rate of each task, [D] float32 in [0, 1]."""
    alpha, beta = posterior(belief)
    return possible(belief) * divide(alpha, alpha + beta)


def prior_mean(belief: Belief) -> jax.Array:
    """Expected success rate of each task without its own record, [D] float32 in [0, 1]."""
    return jnp.broadcast_to(jax.nn.sigmoid(-belief.hopeless) * prior_rate(belief), belief.visits.shape)


def prior_rate(belief: Belief) -> jax.Array:
    """`prior_mean` of what can be solved, of the shape of the prior."""
    return divide(belief.prior_alpha, belief.prior_alpha + belief.prior_beta)


def reward_variance(belief: Belief) -> jax.Array:
    """Expected variance of a reward of each task, [D] float32 in [0, 1/4].

    The prior stands for rewards of 0 and 1 in its proportion, so that few rewards that happen to be equal
    are not taken for certainty. For 0/1 rewards this is m (1-m) with the mean m of `mean`.
    """
    alpha, beta = posterior(belief)
    square = possible(belief) * divide(belief.prior_alpha + belief.squares, alpha + beta)
    return jnp.clip(square - mean(belief) ** 2, 0.0, 0.25)


def mean_tokens(belief: Belief) -> jax.Array:
    """Expected response length of each task, tokens, [D] float32; the average of the seen ones for others."""
    outcomes = belief.successes + belief.failures
    average = divide(belief.tokens.sum(), outcomes.sum())
    return jnp.where(outcomes > 0, divide(belief.tokens, outcomes), jnp.where(average > 0, average, 1.0))


def window_rate(belief: Belief) -> jax.Array:
    """Success rate over the newest visit, filled up from the newest earlier outcomes to WINDOW; [D] float32.

    0 for a task without outcomes. The paper's estimate (Li et al., arXiv 2509.25849).
    """
    kept = jnp.minimum(belief.recorded, WINDOW)
    ones = jax.lax.population_count(belief.recent & (jnp.left_shift(jnp.uint32(1), kept.astype(jnp.uint32)) - 1))
    long = belief.last_count >= WINDOW
    return jnp.where(long, divide(belief.last_successes, belief.last_count), divide(ones.astype(jnp.float32), kept))


def observe(
    belief: Belief,
    task_ids: jax.Array,
    rewards: jax.Array,
    prompt_index: jax.Array,
    mask: jax.Array,
    step: jax.Array | int = 0,
    lengths: jax.Array | None = None,
) -> Belief:
    """The belief after more rewards from the same policy: they discount nothing, and the prior stays as it was.

    Only time does: what was known before fades by the steps since, as in `take`. Every call counts as a visit.

    Args:
        belief: of D tasks.
        task_ids: [M] int32, distinct: of two rows of one task only one would be kept.
        rewards: [R] float32 in [0, 1]; a reward between counts as that fraction of a success.
        prompt_index: [R] int32, the row of task_ids that each rollout belongs to.
        mask: [R] bool, False on padding rows.
        step: of the training run, kept as the tasks' newest visit.
        lengths: [R] int32, response tokens; without them every length counts as 1.

    Returns:
        The new belief. Tasks without a real rollout keep their record.

    Raises:
        ValueError: a reward outside [0, 1], a task that is not there or is named twice, or a row of no prompt; not
            inside jit, where values are not known and nothing waits for them, nor in a run of several processes.
    """
    discounts = {"discount": belief.discount, "discount_mixed": belief.discount_mixed}
    whole = belief.replace(**dict.fromkeys(discounts, jnp.float32(1.0)))
    arrays = task_ids, rewards, prompt_index, mask, step, lengths
    return update(whole, *arrays, fit_prior=False, fit_discounts=False).replace(**discounts)


class Outcomes(NamedTuple):
    """What a step's rollouts of M prompts came to; `observe` says more of each."""

    rewards: jax.Array  # [R] float32 in [0, 1]
    prompt_index: jax.Array  # [R] int32
    mask: jax.Array  # [R] bool
    lengths: jax.Array | None  # [R] int32, tokens


def _check(belief: Belief, task_ids: jax.Array, outcomes: Outcomes) -> None:
    """Refuse outcomes that cannot be, where they are known: not inside jit, nor where other processes have a part."""
    if not readable(task_ids, outcomes.rewards, outcomes.prompt_index, outcomes.mask):
        return
    ids, index, mask = np.asarray(task_ids), np.asarray(outcomes.prompt_index), np.asarray(outcomes.mask, bool)
    rewards, index, tasks = np.asarray(outcomes.rewards, np.float32)[mask], index[mask], len(belief.visits)
    wrong = rewards[~((rewards >= 0) & (rewards <= 1))]
    if wrong.size:
        raise ValueError(f"rewards must be from 0 to 1, shares of a success, got {wrong[0]}; clip or scale them")
    if ids.size and not 0 <= ids.min() <= ids.max() < tasks:
        raise ValueError(f"task_ids must be from 0 to {tasks - 1}, got {ids.min()} to {ids.max()}")
    if len(np.unique(ids)) < len(ids):
        raise ValueError("task_ids must be distinct: of two rows of one task only one would be kept; join their groups")
    if index.size and not 0 <= index.min() <= index.max() < len(ids):
        raise ValueError(f"prompt_index must be from 0 to {len(ids) - 1}, got {index.min()} to {index.max()}")


def _observe(belief: Belief, old: Belief, task_ids: jax.Array, outcomes: Outcomes, step: jax.Array | int) -> Belief:
    """The belief after outcomes of tasks of which `old` was known."""
    num_prompts, (rewards, prompt_index, mask, lengths) = task_ids.shape[0], outcomes
    index = jnp.where(mask, prompt_index, num_prompts)
    rewards = jnp.where(mask, jnp.asarray(rewards, jnp.float32), 0.0)
    lengths = jnp.ones(rewards.shape, jnp.float32) if lengths is None else lengths.astype(jnp.float32)

    wins, squares, tokens = (segment_sum(x, index, num_prompts) for x in (rewards, rewards**2, lengths))
    count = segment_sum(mask.astype(jnp.float32), index, num_prompts)
    mixed = segment_differs(rewards, index, num_prompts)
    keep = jnp.where(mixed, belief.discount_mixed, belief.discount)
    number, solved = count.astype(jnp.int32), segment_sum((rewards >= 0.5).astype(jnp.float32), index, num_prompts) > 0
    # How likely the failures are if the task can be solved, at a rate that may be anything around its prior's mean. A
    # prior that is sure of a higher rate would take all that is rare for hopeless.
    rate = jnp.clip(prior_rate(old), 1e-6, 1 - 1e-6)
    failures = 1 - rate + old.recorded
    failed = old.barren + betaln(rate, failures + count) - betaln(rate, failures)
    new = old.replace(
        successes=keep * (old.successes + wins),
        failures=keep * (old.failures + count - wins),
        squares=keep * (old.squares + squares),
        tokens=keep * (old.tokens + tokens),
        visits=old.visits + 1,
        last_step=jnp.full(num_prompts, step, jnp.int32),
        even_streak=jnp.where(mixed, 0, old.even_streak + 1),
        recorded=old.recorded + number,
        last_count=number,
        last_successes=wins,
        # Once solved, for good; and what happened at a barren of PROVEN stays so.
        barren=jnp.where(solved | (old.barren > 0), PROVEN, failed),
        recent=_shift_in(old.recent, rewards, index, number),
    )
    return _put(belief, task_ids, count > 0, new)


def _put(belief: Belief, task_ids: jax.Array, where: jax.Array, new: Belief) -> Belief:
    """The belief of D tasks with the new one of M of them where [M] says so."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return whole.at[task_ids].set(jnp.where(where, part, whole[task_ids])) if whole.ndim else whole

    return jax.tree.map(put, belief, new)


def update(
    belief: Belief,
    task_ids: jax.Array,
    rewards: jax.Array,
    prompt_index: jax.Array,
    mask: jax.Array,
    step: jax.Array | int = 0,
    lengths: jax.Array | None = None,
    *,
    known: Belief | None = None,
    sampled: jax.Array | None = None,
    fit_prior: bool = True,
    fit_discounts: bool = True,
) -> Belief:
    """The belief after a step's rewards and the policy's change: evidence discounted, prior and discounts fitted.

    The arrays of all D tasks are copied. A loop that has no more use for the old belief saves that with
    `jax.jit(update, donate_argnums=0)`.

    Args:
        belief, task_ids, rewards, prompt_index, mask, step, lengths: as for `observe`.
        known: what was known of the tasks before the step, [M] each, where a prior of their own has informed it.
        sampled: [M] bool, which of the tasks had rollouts, also those of which none has a reward; by default those in
            mask.
        fit_prior, fit_discounts: False holds them as they are.

    Returns:
        The new belief.

    Raises:
        ValueError: as for `observe`.
    """
    outcomes = Outcomes(rewards, prompt_index, mask, lengths)
    _check(belief, task_ids, outcomes)
    return _update(belief, task_ids, outcomes, step, known, sampled, fit_prior=fit_prior, fit_discounts=fit_discounts)


@functools.partial(jax.jit, static_argnames=("fit_prior", "fit_discounts"))
def _update(
    belief: Belief, task_ids: jax.Array, outcomes: Outcomes, step: jax.Array | int, known: Belief | None,
    sampled: jax.Array | None, *, fit_prior: bool, fit_discounts: bool,
) -> Belief:  # fmt: skip
    old = take(belief, task_ids, step) if known is None else known
    ages, faded = _age(old, step), take(belief, task_ids, step + 1)
    belief = _observe(belief, old, task_ids, outcomes, step)
    if sampled is not None:  # of those without a reward the record fades on from here
        missed = sampled & (belief.last_step[task_ids] != step)
        belief = _put(belief, task_ids, missed, faded.replace(last_step=jnp.full_like(faded.last_step, step)))
    if fit_discounts:
        even, mixed, fade = _next_discounts(old.replace(fade=belief.fade), ages, outcomes)
        belief = belief.replace(discount=even, discount_mixed=mixed, fade=fade)
    if fit_prior:
        alpha, beta = prior_by_moments(belief)
        belief = belief.replace(
            prior_alpha=alpha, prior_beta=beta, hopeless=fit_hopeless(belief.hopeless, belief.barren, belief.visits > 0)
        )
    return belief


def _next_discounts(known: Belief, ages: jax.Array, outcomes: Outcomes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step up the likelihood of new outcomes, for each discount by the tasks whose evidence it cut last.

    The slope is d/dc log P(successes | Beta(prior + c evidence)) at c = 1, nats per visit: above 0 where more
    evidence should have been kept.
    """
    num_prompts, (rewards, prompt_index, mask, _) = len(ages), outcomes
    index = jnp.where(mask, prompt_index, num_prompts)
    count = segment_sum(mask.astype(jnp.float32), index, num_prompts)
    wins = segment_sum(jnp.where(mask, rewards, 0.0), index, num_prompts)

    def log_likelihood(kept: jax.Array) -> jax.Array:
        alpha, beta = posterior(known.replace(successes=kept * known.successes, failures=kept * known.failures))
        return betaln(alpha + wins, beta + count - wins) - betaln(alpha, beta)

    ones = jnp.ones(num_prompts)
    _, slope = jax.jvp(log_likelihood, (ones,), (ones,))
    seen, was_mixed = (known.visits > 0) & (count > 0), known.even_streak == 0

    def move(discount: jax.Array, tasks: jax.Array) -> jax.Array:
        rise = DISCOUNT_RATE * divide(jnp.where(tasks, slope, 0.0).sum(), tasks.sum())
        return jax.nn.sigmoid(logit(jnp.clip(discount, 0.02, 0.98)) + rise)

    # fade ** age is a task's share: its logarithm is -age / e^x, and x moves by the slope times that share's own slope
    rate = -jnp.log(known.fade)
    gain = divide(jnp.where(seen, slope * jnp.minimum(ages * rate, 5.0), 0.0).sum(), seen.sum())
    fade = jnp.exp(-jnp.clip(rate * jnp.exp(-DISCOUNT_RATE * gain), 1e-5, 1.0))
    return move(known.discount, seen & ~was_mixed), move(known.discount_mixed, seen & was_mixed), fade


def _shift_in(recent: jax.Array, rewards: jax.Array, index: jax.Array, count: jax.Array) -> jax.Array:
    """The windows after a step's outcomes; recent [M] uint32, rewards [R], index [R] (M marks padding), count [M]."""
    num_prompts = len(count)
    order = jnp.argsort(index, stable=True)
    group = index[order]
    end = jnp.append(jnp.cumsum(count), 0)[group]
    age = end - 1 - jnp.arange(len(order))  # 0 for the newest outcome of a group
    fits = (age < WINDOW) & (group < num_prompts)
    bits = jnp.where(fits & (rewards[order] >= 0.5), jnp.left_shift(1, jnp.clip(age, 0, WINDOW - 1)), 0)
    new = segment_sum(bits.astype(jnp.uint32), group, num_prompts)
    shift = jnp.minimum(count, WINDOW).astype(jnp.uint32)
    return (jnp.left_shift(recent, shift) | new) & jnp.uint32(2**WINDOW - 1)


def prior_by_moments(belief: Belief) -> tuple[jax.Array, jax.Array]:
    """Beta prior by moments over the tasks seen so far (empirical Bayes).

    A task with rate p ~ Beta(alpha, beta) of mean m and n outcomes has an observed rate of variance
    m (1-m) (rho + (1-rho) / n), where rho = 1 / (alpha + beta + 1). Averaging over the tasks and
    solving for rho gives the strength alpha + beta, kept within STRENGTH_RANGE. Two pseudo-tasks at
    rates 0 and 1 keep the mean off the edges, and the prior weak while little is known.

    Returns:
        (alpha, beta), float32 scalars.

    References:
        Kleinman, "Proportions with extraneous variance", JASA 68(341), 1973.
    """
    outcomes = belief.successes + belief.failures
    weight = jnp.where(outcomes > 0, possible(belief), 0.0)  # hopeless tasks are none of the prior's
    rate = divide(belief.successes, outcomes)
    tasks = weight.sum() + 2
    centre = divide((weight * rate).sum() + 1, tasks)
    spread = (weight * (rate - centre) ** 2).sum() + (1 - centre) ** 2 + centre**2
    noise = divide((weight * divide(1.0, jnp.maximum(outcomes, 1.0))).sum(), tasks)
    observed = divide(spread, tasks * centre * (1 - centre))
    rho = jnp.clip(divide(observed - noise, 1 - noise), 1e-6, 1 - 1e-6)
    strength = jnp.clip(divide(1 - rho, rho), *STRENGTH_RANGE)
    return strength * centre, strength * (1 - centre)
