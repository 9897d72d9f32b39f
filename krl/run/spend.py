"""Spending the budget of a step: which prompts get how many rollouts, sampling them, having them scored."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ops import segment_sum
from ml_collections import ConfigDict

from krl import budget, rollout
from krl.base.sharding import named_sharding, reshape_mesh
from krl.base.types import Prompts, Rollouts
from krl.rewards.functions import as_float32
from krl.rewards.pool import FAULTS
from krl.run.clock import PhaseClock
from krl.run.metrics import mean_of
from krl.run.processes import place_whole
from krl.run.scoring import Scoring, Verdicts
from krl.run.setup import Setup, find_slots

# Small programs; what is static is hashable and the same in every step.
mean_tokens = jax.jit(budget.mean_tokens)
allocate = jax.jit(budget.allocate, static_argnames=("rule", "n_min", "n_max", "group", "explored"))
reach_chances = jax.jit(budget.reach_chances, static_argnames=("group", "explored", "reach"))


class Chosen(NamedTuple):
    """The prompts of a step, or the candidates for it, and what was known of each: [M] or [C]."""

    task_ids: np.ndarray  # int32
    before: budget.Belief  # from what was sampled of the prompt itself
    known: budget.Belief  # with what the prior makes of its features
    features: jax.Array  # [M, F] int32
    chances: jax.Array | None  # float32, the probability with which it is served, where the loss asks for it
    counts: jax.Array | None = None  # int32, where the rule chose the prompts, too
    info: dict[str, jax.Array] | None = None  # what it says of them


class Drawn(NamedTuple):
    """What the budget of a step was spent on."""

    counts: jax.Array  # [M] int32
    believed: jax.Array  # [M] float32, expected success rates when the counts were chosen
    info: dict[str, jax.Array]  # what the rule says of the counts, float32 scalars
    rollouts: Rollouts  # R of them
    verdicts: Verdicts  # on the host, exact
    rewards: jax.Array  # [R] float32, those of the verdicts rounded
    scored: jax.Array  # [R] bool, the rollouts that have a reward


def describe_groups(drawn: Drawn, task_ids: np.ndarray, prior: jax.Array) -> dict[str, Any]:
    """The row of a step's M groups for groups.jsonl: [M] each; docs/metrics.md says what they are.

    Args:
        drawn: what the budget was spent on.
        task_ids: [M], of the prompts.
        prior: [M] float32, what was expected of each before it was sampled.
    """
    index, num_prompts = drawn.rollouts.prompt_index, len(task_ids)
    successes = jnp.where(drawn.scored, jnp.clip(drawn.rewards, 0.0, 1.0), 0.0)
    given, wins, tokens = (
        segment_sum(x, index, num_prompts) for x in (drawn.scored.astype(jnp.int32), successes, drawn.rollouts.lengths)
    )
    return {
        "task_ids": task_ids, "counts": drawn.counts, "scored": given, "successes": wins, "tokens": tokens,
        "belief": drawn.believed, "prior": prior,
    }  # fmt: skip


def describe_spending(drawn: Drawn, clock: PhaseClock, names: Sequence[str]) -> dict[str, float]:
    """A step's metrics of its rewards (of each of `names` too), its verifiers and its time; see docs/metrics.md."""
    said, seconds = drawn.verdicts, sum(clock.seconds.values())
    has_reward = (said.faults == 0) & (said.prompt_index < len(drawn.counts))
    metrics: dict[str, float] = {"reward_mean": mean_of(said.rewards[has_reward])}
    metrics |= {f"verifier/{kind}": int((said.faults == number).sum()) for number, kind in enumerate(FAULTS, start=1)}
    metrics |= {f"reward/{name}": mean_of(part[has_reward]) for name, part in zip(names, said.parts.T, strict=True)}
    metrics |= {f"seconds/{phase}": spent for phase, spent in clock.seconds.items()}
    return metrics | {"seconds/step": seconds, "tokens_per_second": int(drawn.rollouts.lengths.sum()) / seconds}


def rule_metrics(rule: str, info: dict[str, jax.Array], metrics: dict[str, float]) -> dict[str, float]:
    """What a rule says beside the counts, as metrics of a step that has others.

    Raises:
        ValueError: it gives one the name of one of krl's.
    """
    for name in info:
        later = ("step", "compiles", "rollbacks", "slowest_process")
        if name in metrics or name in later or name.startswith(("eval/", "seconds/", "memory/")):
            raise ValueError(f"the rule {rule!r} returns {name!r} beside the counts, a metric of krl's; rename it")
    return {name: float(value) for name, value in info.items()}


def each_rollout(drawn: Drawn, advantages: jax.Array, names: Sequence[str]) -> dict[str, Any]:
    """What the rollout log keeps of R rollouts, for `krl.run.rollouts.describe_rollouts`.

    Args:
        drawn: what the budget was spent on.
        advantages: [R] float32.
        names: of several rewards, () for one alone.

    Returns:
        rollouts; rewards and advantages, [R] float32; faults, [R] int32 as in `Verdicts`; texts, the R responses, None
        for those of other processes; reasons, R texts; parts, each of several rewards by its name, [R] float64.
    """
    said = drawn.verdicts
    several = dict(zip(names, said.parts.T, strict=True))
    each = {"faults": said.faults, "texts": said.texts, "reasons": said.reasons, "parts": several}
    return {"rollouts": drawn.rollouts, "rewards": drawn.rewards, "advantages": advantages} | each


def spend_budget(
    config: ConfigDict, parts: Setup, params: dict, prompts: Prompts, chosen: Chosen, step: int, key: jax.Array,
    clock: PhaseClock,
) -> Drawn:  # fmt: skip
    """Choose the counts of M prompts by what is known of them, if they were not chosen with them; sample and score.

    A rule in rounds sees what the rounds before have shown; a round's samples of a prompt go on from there.
    Scouts come before all rounds: the counts, and the expected rates that are logged with them, follow from what they
    alone show; the run's belief and the gradient see nothing of them.
    """
    alloc, num_prompts, place = config.alloc, len(prompts.task_ids), functools.partial(place_whole, parts.mesh)
    expected_tokens = mean_tokens(chosen.known)
    tasks = parts.train.tasks.take(np.asarray(prompts.task_ids).tolist())

    def draw(counts, num_rollouts, clock=clock, **options):
        with clock.phase("rollout"):
            scoring = Scoring(parts.ends, parts.verifiers, tasks, counts)
            options |= {"num_rollouts": num_rollouts, "expected_tokens": expected_tokens, "watch": scoring.watch}
            options |= {name: config.sample[name] for name in ("temperature", "top_k", "top_p", "min_p")}
            rollouts = jax.block_until_ready(generate(config, parts, params, prompts, counts, key, **options))
        with clock.phase("verify"):
            verdicts = scoring.finish(num_rollouts)
        with clock.phase("wait"):  # for the other processes
            return rollouts, verdicts.of_all_processes()

    def learn_from(known, rollouts, verdicts):
        outcomes, has_reward = place((np.float32(verdicts.rewards.clip(0.0, 1.0)), verdicts.faults == 0))
        index, scored, lengths = rollouts.prompt_index, rollouts.mask & has_reward, rollouts.lengths
        seen = budget.observe(known, jnp.arange(num_prompts), outcomes, index, scored, step, lengths)
        sums = (jnp.where(scored, x, 0.0) for x in (outcomes, 1 - outcomes))
        return seen, *(segment_sum(x, index, num_prompts) for x in sums)

    known, scouts = chosen.known, alloc.scouts
    if scouts:  # their samples are numbered after those that count, and neither they nor their time do
        every, free = jnp.full_like(prompts.task_ids, scouts), PhaseClock(config.stuck_seconds)
        seen = draw(every, num_prompts * scouts, free, first_sample=alloc.n_max)
        known, *_ = learn_from(budget.init_belief(num_prompts), *seen)
    counts = jnp.zeros_like(prompts.task_ids)
    shown = budget.Shown(counts, counts * 0.0, counts * 0.0)
    rounds: list[tuple[Rollouts, Verdicts]] = []
    ends = budget.rounds_of(parts.rule, num_prompts, alloc.budget, alloc.n_min, alloc.group)
    for spent, until in itertools.pairwise((0, *ends)):
        if rounds:
            known, wins, losses = learn_from(known, *rounds[-1])
            shown = budget.Shown(counts, shown.successes + wins, shown.failures + losses)
        if chosen.counts is not None:
            counts, info = chosen.counts, chosen.info or {}
        else:
            with clock.phase("budget"):
                counts, info = find_counts(config, parts, known, until, shown)
        rounds.append(draw(counts - shown.counts, until - spent, first_sample=shown.counts))
    rollouts = jax.tree.map(lambda *each: jnp.concatenate(each), *(rollouts for rollouts, _ in rounds))
    verdicts = functools.reduce(Verdicts.then, (verdicts for _, verdicts in rounds))
    return Drawn(
        counts=counts, believed=budget.mean(known), info=info, rollouts=rollouts, verdicts=verdicts,
        rewards=place(as_float32(verdicts.rewards)),
        scored=rollouts.mask & place(verdicts.faults == 0),
    )  # fmt: skip


def find_counts(
    config: ConfigDict, parts: Setup, known: budget.Belief, total: int, shown: budget.Shown | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the rule of a run makes of what is known of prompts, refused if it must not: (counts [M], what it says)."""
    counts, info = jax.block_until_ready(allocate(parts.rule, known, total, **parts.bounds, shown=shown))
    check_counts(config.alloc, counts, total)
    return counts, info


def find_chances(config: ConfigDict, parts: Setup, known: budget.Belief) -> jax.Array | None:
    """The probabilities [C] with which candidates are served, where the loss asks for them."""
    if config.loss.average != "candidates":
        return None
    groups = {name: parts.bounds[name] for name in ("group", "explored")}
    return reach_chances(known, config.alloc.budget, **groups, reach=config.alloc.reach)


@functools.partial(jax.jit, static_argnames="most")
def served_rows(counts: jax.Array, candidates: Any, most: int) -> tuple[jax.Array, Any]:
    """(rows of the candidates that get any, filled up to `most` with others; what is known of these)."""
    rows = jnp.argsort(counts == 0, stable=True)[:most]
    return rows, jax.tree.map(lambda x: x[rows] if x.ndim else x, candidates)


def check_counts(alloc: ConfigDict, counts: jax.Array, total: int) -> None:
    """Refuse counts that a rule must not give: it is named, with what is wrong.

    Args:
        alloc: the part of the config about the budget.
        counts: of a step's prompts or candidates, [M] or [C].
        total: what they are to sum to, config.alloc.budget but for earlier rounds.

    Raises:
        ValueError: counts that are no integers, do not sum to it, leave the bounds, or split a group.
    """
    given, wrong = np.asarray(counts), ""
    if not np.issubdtype(given.dtype, np.integer):
        wrong = f"counts of type {given.dtype}, which are to be whole numbers"
    elif given.sum() != total:
        wrong = f"{given.sum()} rollouts, and {total} of config.alloc.budget={alloc.budget} are to be spent"
    elif given.min() < alloc.n_min or given.max() > alloc.n_max:
        wrong = (
            f"a prompt {given.min()} rollouts and another {given.max()}, and config.alloc.n_min={alloc.n_min} to "
            f"n_max={alloc.n_max} are allowed"
        )
    elif not alloc.n_min and (given % alloc.group).any():
        wrong = (
            f"a prompt {given[given % alloc.group > 0][0]} rollouts, and config.alloc.group={alloc.group} or a "
            "multiple of it are allowed"
        )
    if wrong:
        raise ValueError(f"the rule {alloc.rule!r} gave {wrong}; docs/recipes/rule.md says what a rule must keep")


def generate(
    config: ConfigDict,
    parts: Setup,
    params: dict,
    *inputs: Any,
    expected_tokens: jax.Array | None = None,
    **options: Any,
) -> Rollouts:
    """`krl.rollout.generate` of the policy: params, then its prompts, counts and key, and its other options.

    It decodes on the mesh of config.mesh.decode; what goes in and comes out is on that of the run.
    """
    layout = reshape_mesh(parts.mesh, tuple(config.mesh.decode))
    elsewhere = layout != parts.mesh  # arrays know the mesh that they were made on, and programs take those of one
    if elsewhere:
        inputs, expected_tokens = jax.device_put((inputs, expected_tokens), named_sharding(layout))
    with jax.set_mesh(layout):
        rollouts = rollout.generate(
            parts.policy_config, params, *inputs, max_new_tokens=config.sample.max_new_tokens,
            eos_ids=parts.ends.eos_ids, stop_table=parts.ends.table, pad_id=parts.tokenizer.pad_id,
            num_slots=find_slots(config, parts.policy_config, layout), expected_tokens=expected_tokens, **options,
        )  # fmt: skip
    return jax.device_put(rollouts, named_sharding(parts.mesh)) if elsewhere else rollouts
