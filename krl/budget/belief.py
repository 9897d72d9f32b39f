"""What is known of every prompt's success rate, and how a step's rewards change it.

Each task's rate is believed to be Beta(prior_alpha + successes, prior_beta + failures). The prior
is the same for all tasks and is fitted to the data set's own statistics as training goes (empirical
Bayes). Evidence is discounted, because the policy moves. It moves most on the prompts it learns from: a
group whose rewards differ makes a gradient, and what it showed is about a policy that this very step
replaces; an even group makes none. So all of a task's evidence, the step's own too, is discounted by
`discount_mixed` after a mixed group and by the larger `discount` after an even one.
"""

import jax
import jax.numpy as jnp
from flax import struct

from krl.masked import divide, segment_differs, segment_sum

# The prior's strength alpha + beta stays in this range: below it a single outcome would count as
# certainty, above it no prompt could ever differ from the average one.
STRENGTH_RANGE = (0.1, 10.0)


class Belief(struct.PyTreeNode):
    """Statistics of D tasks; `take` makes the same record of a step's M prompts."""

    successes: jax.Array  # [D] float32, discounted sum of rewards
    failures: jax.Array  # [D] float32, discounted sum of 1 - reward
    visits: jax.Array  # [D] int32, steps in which the task was sampled
    prior_alpha: jax.Array  # [] float32
    prior_beta: jax.Array  # [] float32


def init_belief(num_tasks: int) -> Belief:
    """Nothing known of D tasks: Jeffreys' prior, Beta(1/2, 1/2)."""
    return Belief(
        successes=jnp.zeros(num_tasks, jnp.float32),
        failures=jnp.zeros(num_tasks, jnp.float32),
        visits=jnp.zeros(num_tasks, jnp.int32),
        prior_alpha=jnp.float32(0.5),
        prior_beta=jnp.float32(0.5),
    )


def take(belief: Belief, task_ids: jax.Array) -> Belief:
    """The beliefs of some tasks: [D] arrays in, [M] arrays out, the same prior."""
    return belief.replace(
        successes=belief.successes[task_ids],
        failures=belief.failures[task_ids],
        visits=belief.visits[task_ids],
    )


def posterior(belief: Belief) -> tuple[jax.Array, jax.Array]:
    """Parameters (alpha [D], beta [D]) of each task's Beta belief, float32, > 0."""
    return belief.prior_alpha + belief.successes, belief.prior_beta + belief.failures


def mean(belief: Belief) -> jax.Array:
    """Expected success rate of each task, [D] float32 in (0, 1)."""
    alpha, beta = posterior(belief)
    return divide(alpha, alpha + beta)


@jax.jit
def update(
    belief: Belief,
    task_ids: jax.Array,
    rewards: jax.Array,
    prompt_index: jax.Array,
    mask: jax.Array,
    discount: jax.Array | float,
    discount_mixed: jax.Array | float,
) -> Belief:
    """The belief after a step's rewards, with the prior fitted again.

    Args:
        belief: of D tasks.
        task_ids: [M] int32, distinct.
        rewards: [R] float32 in [0, 1]; a reward between counts as that fraction of a success.
        prompt_index: [R] int32, the row of task_ids that each rollout belongs to.
        mask: [R] bool, False on padding rows.
        discount: what is left of a task's evidence after a group of equal rewards, in [0, 1].
        discount_mixed: the same after a group of rewards that differ.

    Returns:
        The new belief. Tasks without a real rollout keep their evidence.
    """
    num_prompts = task_ids.shape[0]
    index = jnp.where(mask, prompt_index, num_prompts)
    wins = segment_sum(jnp.where(mask, rewards, 0.0), index, num_prompts)
    count = segment_sum(mask.astype(jnp.float32), index, num_prompts)
    visited = count > 0
    mixed = segment_differs(rewards, index, num_prompts)
    keep = jnp.where(visited, jnp.where(mixed, discount_mixed, discount), 1.0)
    belief = belief.replace(
        successes=belief.successes.at[task_ids].add(wins).at[task_ids].multiply(keep),
        failures=belief.failures.at[task_ids].add(count - wins).at[task_ids].multiply(keep),
        visits=belief.visits.at[task_ids].add(visited.astype(jnp.int32)),
    )
    alpha, beta = fit_prior(belief)
    return belief.replace(prior_alpha=alpha, prior_beta=beta)


def fit_prior(belief: Belief) -> tuple[jax.Array, jax.Array]:
    """Beta prior by moments over the tasks seen so far (empirical Bayes).

    A task with rate p ~ Beta(alpha, beta) of mean m and n outcomes has an observed rate of variance
    m (1-m) (rho + (1-rho) / n), where rho = 1 / (alpha + beta + 1). Averaging over the tasks and
    solving for rho gives the strength alpha + beta, kept within STRENGTH_RANGE. Two pseudo-tasks at
    rates 0 and 1 keep the mean off the edges and stand for Jeffreys' prior while little is known.

    Returns:
        (alpha, beta), float32 scalars.

    References:
        Kleinman, "Proportions with extraneous variance", JASA 68(341), 1973.
    """
    outcomes = belief.successes + belief.failures
    seen = outcomes > 0
    rate = divide(belief.successes, outcomes)
    tasks = seen.sum(dtype=jnp.float32) + 2
    centre = divide(rate.sum() + 1, tasks)
    spread = jnp.where(seen, (rate - centre) ** 2, 0.0).sum() + (1 - centre) ** 2 + centre**2
    noise = divide(jnp.where(seen, divide(1.0, jnp.maximum(outcomes, 1.0)), 0.0).sum(), tasks)
    observed = divide(spread, tasks * centre * (1 - centre))
    rho = jnp.clip(divide(observed - noise, 1 - noise), 1e-6, 1 - 1e-6)
    strength = jnp.clip(divide(1 - rho, rho), *STRENGTH_RANGE)
    return strength * centre, strength * (1 - centre)
