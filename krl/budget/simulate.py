"""Replay of a rule without a model: prompts whose success rates are given for every step.

What a rule decides does not change the rates, so all rules face the same prompts and can be compared, also
with the rule that knows the rates. Everything is one jitted scan over the steps, vectorised over seeds.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ops import segment_sum

from krl.base.masked import divide
from krl.budget import belief as beliefs
from krl.budget.allocate import Rule, allocate, find_rule, rounds_of
from krl.budget.solve import Shown
from krl.budget.value import grpo_value

BINS = 20  # of the success rate, in the histograms
KNOWN = 1e6  # outcomes that make the belief of the rule that knows the rates


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a rule did, for S seeds and `steps` steps."""

    effective: np.ndarray  # [S, steps] share of the rollouts that lie in mixed groups
    mixed: np.ndarray  # [S, steps] share of the prompts whose group is mixed
    realised: np.ndarray  # [S, steps] sum over mixed groups of p (1-p)^2
    expected: np.ndarray  # [S, steps] sum over prompts of V(N, p) at the true rates
    log_loss: np.ndarray  # [S, steps] mean -log of the belief's probability of each outcome, nats
    counts: np.ndarray  # [S, BINS] mean rollouts of a prompt, by its true rate
    prompts: np.ndarray  # [S, BINS] how many prompts were seen at such a rate
    believed: np.ndarray  # [S, BINS] prompts seen, by the believed rate
    succeeded: np.ndarray  # [S, BINS] mean true rate of those prompts: believed well if near the bin's centre


def synthetic_rates(
    key: jax.Array,
    num_tasks: int,
    steps: int,
    *,
    hopeless: float = 0.3,
    solved: float = 0.3,
    drift: float = 0.05,
    trend: float = 0.003,
) -> jax.Array:
    """Success rates of a data set while a policy learns.

    A share of the tasks is hopeless (p = 0.0005), a share solved (p = 0.9995); the others start at
    uniform rates. All their logits move by a random walk with a trend upwards, the hopeless and solved ones' too.

    Args:
        key: consumed.
        num_tasks: D.
        steps: of the run.
        hopeless, solved: shares in [0, 1].
        drift: standard deviation of a step's move, logits.
        trend: mean of a step's move, logits.

    Returns:
        [steps, D] float32 in (0, 1).
    """
    kind_key, start_key, walk_key = jax.random.split(key, 3)
    kind = jax.random.uniform(kind_key, (num_tasks,))
    start = jax.random.uniform(start_key, (num_tasks,), minval=0.005, maxval=0.995)
    start = jnp.where(kind < hopeless, 0.0005, jnp.where(kind < hopeless + solved, 0.9995, start))
    moves = trend + drift * jax.random.normal(walk_key, (steps, num_tasks))
    return jax.nn.sigmoid(jax.scipy.special.logit(start) + jnp.cumsum(moves, axis=0))


def logged_rates(log: Sequence[Mapping[str, Any]] | Any, num_tasks: int, *, bandwidth: float = 20.0) -> jax.Array:
    """Success rates at every step of a real run, from the groups or the rollouts it logged.

    A task's outcomes are averaged with weights that fall with their distance in steps, as a normal
    distribution; a task that was never sampled has the average rate of all. Half an outcome at the task's
    own average, pulled a little off 0 and 1, keeps the rates inside.

    Args:
        log: the rows of a work directory's groups.jsonl, one per step, with `task_ids`, `counts`, `successes` and, if
            not every rollout has a reward, `scored`; or its rollout log as a table with the columns `step`, `prompt_id`
            and `reward`, such as a `datasets.Dataset`. Rewards count as parts of a success, as they do for a belief.
        num_tasks: D.
        bandwidth: standard deviation of the weights, steps.

    Returns:
        [steps, D] float32 in (0, 1), or all 0 or 1 where no logged rollout succeeded or every one.
    """
    if isinstance(log, Sequence):
        step = np.repeat(np.arange(len(log)), [len(row["counts"]) for row in log])
        task, won = (np.concatenate([row[name] for row in log]) for name in ("task_ids", "successes"))
        given = np.concatenate([row.get("scored", row["counts"]) for row in log])  # older logs have counts alone
        won = np.clip(won, 0, given)  # and sums of rewards beyond 0 and 1
    else:
        step, task = (np.asarray(log[name][:]) for name in ("step", "prompt_id"))
        won = np.array(log["reward"][:], float)  # a reward that could not be computed is NaN
        step, given = step - 1, np.isfinite(won).astype(float)
        if "fault" in getattr(log, "column_names", ()):
            given[np.asarray(log["fault"][:]) != ""] = 0  # which is 0 in older logs
        won = np.where(given > 0, np.clip(won, 0, 1), 0.0)
    steps = int(step.max()) + 1
    wins, outcomes = np.zeros((steps, num_tasks), np.float32), np.zeros((steps, num_tasks), np.float32)
    np.add.at(wins, (step, task), won)
    np.add.at(outcomes, (step, task), given)
    overall = divide(wins.sum(), outcomes.sum())
    own = divide(wins.sum(axis=0) + 0.1 * overall, outcomes.sum(axis=0) + 0.1)
    distance = jnp.arange(steps)[:, None] - jnp.arange(steps)[None, :]
    weights = jnp.exp(-0.5 * divide(distance.astype(jnp.float32), jnp.float32(bandwidth)) ** 2)
    return divide(weights @ wins + 0.5 * own, weights @ outcomes + 0.5)


def replay(
    rule: str | Rule,
    rates: jax.Array,
    keys: jax.Array,
    *,
    prompts_per_step: int,
    budget: int,
    n_min: int,
    n_max: int,
    group: int = 1,
    explored: int = 0,
    prior: tuple[float, float] | None = None,
    discounts: tuple[float, float] | None = None,
) -> Replay:
    """Run a rule for every step of some success rates.

    Each pass over the data is a fresh permutation, cut into steps of M prompts, the same for every rule.

    Args:
        rule: a key of RULES, a function like them, or "known" for the knapsack that is told the rates.
        rates: [S, steps, D] float32, true success rates for each seed.
        keys: [S] random keys, one per seed; consumed.
        prompts_per_step: M <= D.
        budget: R, rollouts per step.
        n_min, n_max: the fewest and the most rollouts of a prompt.
        group, explored: with n_min = 0, where the M prompts are candidates that may get nothing: as for `allocate`.
        prior: (alpha, beta) held fixed; by default it is fitted as the run goes.
        discounts: of the belief, after even and after mixed groups, held fixed as its `fade` then is; by default all
            three are fitted.

    Returns:
        A Replay.

    Raises:
        ValueError: an unknown rule, bounds or a budget that cannot be, a rule that does not keep them, rates
            that are not [S, steps, D] with D >= M, or keys that are not [S].
    """
    if rates.ndim != 3 or rates.shape[2] < prompts_per_step:
        raise ValueError(f"rates must be [seeds, steps, D] with D >= {prompts_per_step}, got {rates.shape}")
    if keys.shape != rates.shape[:1]:
        raise ValueError(f"there must be a key for each of the {len(rates)} seeds of the rates, got {keys.shape}")
    start = beliefs.init_belief(rates.shape[2])
    if prior is not None:
        start = start.replace(prior_alpha=jnp.float32(prior[0]), prior_beta=jnp.float32(prior[1]))
    if discounts is not None:
        start = start.replace(discount=jnp.float32(discounts[0]), discount_mixed=jnp.float32(discounts[1]))
    choose = find_rule("knapsack" if rule == "known" else rule)
    some = beliefs.take(start, jnp.arange(prompts_per_step))
    allocate(choose, some, budget, n_min, n_max, group=group, explored=explored)  # refuses what cannot be
    setting = _Setting(
        choose, prompts_per_step, budget, n_min, n_max, group, explored,
        fit_prior=prior is None, fit_discounts=discounts is None, known=rule == "known",
    )  # fmt: skip
    shown = {name: np.asarray(value) for name, value in _replay_seeds(setting, rates, keys, start).items()}
    low, high = shown.pop("fewest").min(), shown.pop("most").max()
    spent = next((spent for spent in shown.pop("spent").flat if spent != budget), budget)
    if low < n_min or high > n_max or spent != budget:
        raise ValueError(f"the rule spent {spent} rollouts, {low} to {high} each, not {budget}, {n_min} to {n_max}")
    return Replay(**shown)


class _Setting(NamedTuple):
    """What a replay is compiled for; `replay` says more of each."""

    rule: Rule
    prompts_per_step: int
    budget: int
    n_min: int
    n_max: int
    group: int
    explored: int
    fit_prior: bool
    fit_discounts: bool
    known: bool  # whether the rule is told the rates


@functools.partial(jax.jit, static_argnums=0)
def _replay_seeds(setting: _Setting, rates: jax.Array, keys: jax.Array, start: beliefs.Belief) -> dict[str, jax.Array]:
    return jax.vmap(functools.partial(_replay_one, setting), in_axes=(0, 0, None))(rates, keys, start)


def _replay_one(setting: _Setting, rates: jax.Array, key: jax.Array, start: beliefs.Belief) -> dict[str, jax.Array]:
    prompts_per_step, budget, n_max = setting.prompts_per_step, setting.budget, setting.n_max
    steps, num_tasks = rates.shape
    per_pass = num_tasks // prompts_per_step
    order_key, outcome_key = jax.random.split(key)

    def tasks_of(step: jax.Array) -> jax.Array:
        order = jax.random.permutation(jax.random.fold_in(order_key, step // per_pass), num_tasks)
        return jax.lax.dynamic_slice(order, (step % per_pass * prompts_per_step,), (prompts_per_step,))

    def take_step(belief: beliefs.Belief, inputs: tuple[jax.Array, jax.Array]) -> tuple[beliefs.Belief, Any]:
        step, rate = inputs
        ids = tasks_of(step)
        p = rate[ids]
        believed = beliefs.take(belief, ids, step)
        # Outcome j of a prompt is the same whatever the counts, so that rules differ in nothing but their counts.
        luck = jax.random.fold_in(outcome_key, step)
        draws = jax.random.uniform(luck, (prompts_per_step, n_max)) < p[:, None]
        informed = believed
        if setting.known:
            always = jnp.full_like(p, beliefs.PROVEN)
            informed = believed.replace(successes=KNOWN * p, failures=KNOWN * (1 - p), barren=always)
        counts = _in_rounds(setting, informed, draws, step)
        index = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(budget), side="right")
        sample = jnp.arange(budget) - (jnp.cumsum(counts) - counts)[index]
        rewards = draws[index, sample].astype(jnp.float32)
        shown = _measure(p, believed, counts, rewards, index)
        belief = beliefs.update(
            belief, ids, rewards, index, jnp.ones(budget, bool), step,
            fit_prior=setting.fit_prior, fit_discounts=setting.fit_discounts,
        )  # fmt: skip
        return belief, shown

    _, shown = jax.lax.scan(take_step, start, (jnp.arange(steps), rates))
    sums = {name: shown.pop(name).sum(axis=0) for name in ("counts", "prompts", "believed", "succeeded")}
    sums["counts"] = divide(sums["counts"], sums["prompts"])
    sums["succeeded"] = divide(sums["succeeded"], sums["believed"])
    return shown | sums


def _in_rounds(setting: _Setting, belief: beliefs.Belief, draws: jax.Array, step: jax.Array) -> jax.Array:
    """The counts [M] of a step whose prompts' outcomes are draws [M, n_max]; a rule with rounds sees those so far."""
    rule, _, budget, n_min, n_max, group, explored = setting[:7]
    counts = jnp.zeros(len(draws), jnp.int32)
    rows, number = jnp.arange(len(draws)), jnp.arange(n_max)
    for until in rounds_of(rule, len(draws), budget, n_min, group):
        drawn = number < counts[:, None]
        shown = Shown(counts, *((drawn & kind).sum(axis=1, dtype=jnp.float32) for kind in (draws, ~draws)))
        counts, _ = allocate(rule, belief, until, n_min, n_max, group=group, explored=explored, shown=shown)
        new = ~drawn & (number < counts[:, None])
        outcomes = draws.reshape(-1).astype(jnp.float32), jnp.repeat(rows, n_max), new.reshape(-1)
        belief = beliefs.observe(belief, rows, *outcomes, step)
    return counts


def _measure(
    p: jax.Array, belief: beliefs.Belief, counts: jax.Array, rewards: jax.Array, index: jax.Array
) -> dict[str, jax.Array]:
    """The numbers of one step; all but `rewards` and `index` [R] are [M]."""
    prompts = len(p)
    wins = segment_sum(rewards, index, prompts)
    mixed = (wins > 0) & (wins < counts)
    rates = p, jnp.clip(beliefs.mean(belief), 1e-9, 1 - 1e-7)
    misfit = -wins * jnp.log(rates[1]) - (counts - wins) * jnp.log1p(-rates[1])
    true_bin, believed_bin = (jnp.clip((rate * BINS).astype(jnp.int32), 0, BINS - 1) for rate in rates)
    ones = jnp.ones(prompts)
    return {
        "spent": counts.sum(),
        "fewest": counts.min(),
        "most": counts.max(),
        "effective": divide(jnp.where(mixed, counts, 0).sum(), counts.sum()),
        "mixed": mixed.mean(dtype=jnp.float32),
        "realised": jnp.where(mixed, p * (1 - p) ** 2, 0.0).sum(),
        "expected": jnp.where(counts > 0, grpo_value(p, counts), 0.0).sum(),
        "log_loss": divide(misfit.sum(), counts.sum()),
        "counts": segment_sum(counts.astype(jnp.float32), true_bin, BINS),
        "prompts": segment_sum(ones, true_bin, BINS),
        "believed": segment_sum(ones, believed_bin, BINS),
        "succeeded": segment_sum(p, believed_bin, BINS),
    }
