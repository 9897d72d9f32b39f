"""Train a policy with Knapsack-GRPO, from scratch or from a Hugging Face checkpoint.

    python train.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.key=value ...]
    python train.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/qwen

The same command continues a run from its last checkpoint. Supervised fine-tuning comes first where
config.sft.steps asks for it, and alone with --config.steps=0. --verbosity=1 shows where an error came from.

In a notebook, `krl.train(config, workdir)` is the same run. `take_step` is one step: prompts -> belief -> counts ->
rollouts -> rewards -> advantages -> updates -> belief -> metrics; docs/architecture.md draws it.
"""

import contextlib
import functools
import inspect
import math
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from krl import budget
from krl.base.types import Prompts
from krl.configs.check import check, flatten
from krl.eval.held_out import evaluate_held_out, write_held_out
from krl.policy import PolicyConfig
from krl.report import command as report
from krl.rewards.pool import FAULTS
from krl.run import processes
from krl.run.checkpoint import Checkpoints, stop_on_signal
from krl.run.clock import CompileCounter, PhaseClock, give_back_memory, memory_used, profile
from krl.run.command import run_program
from krl.run.compiled import for_this_backend
from krl.run.guard import draws_before, find_spike, go_back, read_rollbacks, refuse_bad_updates
from krl.run.learner import Learner, find_advantages, rewards_to_compare, saved, start_or_continue, whole_policy
from krl.run.lock import hold_workdir
from krl.run.log import MetricsLog, progress, read_rows, short, status_line
from krl.run.metrics import belief_metrics, over_processes, step_metrics
from krl.run.optimizer import skipped_updates
from krl.run.result import Result
from krl.run.scoring import FaultWatch
from krl.run.setup import NAMES, Setup, about_run, describe_policy, describe_step, name_own, set_up
from krl.run.spend import (
    Chosen,
    describe_groups,
    describe_spending,
    each_rollout,
    find_chances,
    find_counts,
    rule_metrics,
    served_rows,
    spend_budget,
)
from krl.run.start import say_ends
from krl.run.update import policy_update
from krl.run.writers import check_writers, find_writers
from krl.tasks import step_task_ids


def train(
    config: ConfigDict, workdir: str | pathlib.Path, *, rule: budget.Rule | None = None,
    reward: Callable[..., float] | None = None, prior: budget.Source | None = None,
    policy: tuple[PolicyConfig, dict[str, Any]] | None = None,
) -> Result | None:  # fmt: skip
    """The run of a config, from its last checkpoint on or from the start.

    Args:
        config: every key of configs/default.py.
        workdir: the directory that keeps what the run writes; docs/architecture.md lists it.
        rule: from what is known of prompts to their counts, instead of config.alloc.rule; see `krl.budget.allocate`.
        reward: (prompt, response, answer) -> number, instead of config.data.reward; called in this process.
        prior: what to expect of a prompt before it was sampled, instead of config.alloc.prior.
        policy: (sizes, parameters), such as `krl.hf.load_hf` gives, instead of config.policy; the parameters are
            copied. config.tokenizer.path has its tokenizer.

    Returns:
        The trained policy and its last metrics; None if a signal stopped the run.

    Raises:
        ValueError: a config or data that cannot work; the message says the fix.
        FloatingPointError: too many updates in a row were not finite, or too many steps beyond config.guard.
    """
    workdir, compiles = pathlib.Path(workdir), CompileCounter()
    config, own = name_own(config, {"rule": rule, "reward": reward, "prior": prior, "policy": policy})
    check(config, NAMES, own)
    check_writers(flatten(config))
    with stop_on_signal() as asked, hold_workdir(workdir) if processes.is_first() else contextlib.nullcontext():
        with processes.first_before_others("set up"):
            parts = set_up(config, workdir, own)
        processes.say(
            f"krl: {config.alloc.rule} budgets, {describe_step(config, parts.candidates, parts.served)}, "
            f"{len(parts.train)} training prompts ({parts.train.dropped} too long), {describe_policy(parts)}, "
            f"mesh {dict(parts.mesh.shape)} of {jax.devices()[0].device_kind}"
        )
        say_ends(config, parts.ends, parts.train)
        folder = epath.Path(config.checkpoint.dir or workdir)
        with (
            parts.verifiers,
            jax.set_mesh(parts.mesh),
            Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
            Checkpoints(folder / "best", keep=1) as best,
        ):
            rollbacks, outcome = read_rollbacks(workdir), "went back"
            while outcome == "went back":
                outcome, params = take_steps(
                    config, workdir, parts, checkpoints, best, rollbacks, compiles,
                    lambda: processes.any_process(asked.is_set()),
                )  # fmt: skip
    return Result(params, last_row(config, workdir), config, parts) if outcome == "finished" else None


def take_steps(
    config: ConfigDict, workdir: pathlib.Path, parts: Setup, checkpoints: Checkpoints, best: Checkpoints,
    rollbacks: list[dict[str, Any]], compiles: CompileCounter, should_stop: Callable[[], bool],
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Take the steps that are left, from the newest checkpoint on or from the start.

    Returns:
        A pair, "finished" with the policy's parameters, "stopped" with {}, everything being saved, or "went back" with
        {}, when the same call goes on from the last checkpoint.
    """
    # ---------------------------------------------------------------- where the run starts from
    about = about_run(config, parts) | {"rollbacks": len(rollbacks)}
    step, learner, reference = start_or_continue(config, parts, checkpoints, about, should_stop)
    if learner is None:
        processes.say("krl: stopped during supervised fine-tuning; the same command continues it")
        return "stopped", {}
    if step == 0:
        write_held_out(workdir, parts.test.tasks)
    faults = FaultWatch(parts.verifiers, config.verify.may_fail)
    highest, newest = best.about_newest().get("accuracy", -math.inf), None

    # ---------------------------------------------------------------- the loop
    with (
        open_log(config, workdir, step) as log,
        progress(config.steps, step, config.alloc.rule) as show,
        profile(workdir / "profile", begin=step + 2, steps=config.profile.steps * processes.is_first()) as record,
    ):
        if step == 0 and config.eval.every and not should_stop():
            newest = evaluate_start(config, parts, whole_policy(parts, learner, reference), log, faults)
            show(0, f"accuracy {short(newest)}")
        if config.steps == 0:
            save(checkpoints, step, learner, about)
        while step < config.steps and not should_stop():
            record(step)
            draw = draws_before(rollbacks, step)
            learner, metrics, groups, rollouts = take_step(config, parts, learner, step, draw, reference)
            step += 1
            spike = find_spike(metrics, config.guard)
            if spike:
                go_back(workdir, rollbacks, step, checkpoints.latest_step() or 0, spike, most=config.guard.rollbacks)
                return "went back", {}
            every = processes.gather({k: v for k, v in metrics.items() if k.startswith("seconds/")} | memory_used())
            metrics |= {"compiles": compiles.count, "rollbacks": len(rollbacks)} | over_processes(every)
            if config.eval.every and (step % config.eval.every == 0 or step == config.steps):
                metrics |= evaluate_held_out(config, parts, whole_policy(parts, learner, reference), log, step, faults)
                newest = metrics["eval/accuracy"]
                if newest > highest:
                    highest, kept = newest, about | {"step": step, "accuracy": newest}
                    best.save(step, {"params": learner.state.params}, kept, again=True)  # it may have been undone
            log_step(log, parts, step, metrics, every, groups, rollouts)
            show(step, status_line(metrics, newest))
            faults(int(sum(metrics[f"verifier/{kind}"] for kind in FAULTS)), config.alloc.budget, f"step {step}")
            refuse_bad_updates(learner.state, config.max_bad_updates)
            if step % config.checkpoint.every == 0 or step == config.steps:
                save(checkpoints, step, learner, about)
    if step < config.steps:
        save(checkpoints, step, learner, about)
        processes.say(f"krl: stopped after step {step}; the same command continues from there")
        return "stopped", {}
    return "finished", whole_policy(parts, learner, reference)


def save(checkpoints: Checkpoints, step: int, learner: Learner, about: dict[str, Any]) -> None:
    """A checkpoint, when every process has been seen to have the same parameters."""
    processes.check_copies(learner.state.params)
    checkpoints.save(step, saved(learner), about | {"step": step})


def evaluate_start(
    config: ConfigDict, parts: Setup, params: dict[str, Any], log: MetricsLog, faults: FaultWatch
) -> float:
    """The accuracy before the first step, which is the log's first row."""
    metrics = {"rollouts_total": 0} | evaluate_held_out(config, parts, params, log, 0, faults)
    log.write(0, metrics)
    return metrics["eval/accuracy"]


def open_log(config: ConfigDict, workdir: pathlib.Path, step: int) -> MetricsLog:
    """What a run that goes on behind a step writes beside its checkpoints."""
    return MetricsLog(
        workdir, first_step=step, writers=find_writers(workdir, flatten(config)), rollouts_gb=config.log.rollouts_gb,
        texts_every=config.log.texts_every,
    )  # fmt: skip


def log_step(
    log: MetricsLog, parts: Setup, step: int, metrics: dict[str, float], every: dict[str, list[float]],
    groups: dict[str, Any], rollouts: dict[str, Any],
) -> None:  # fmt: skip
    """Write a step's row, its groups that got any rollouts, the processes' times, and its rollouts if they are kept."""
    log.write(step, metrics)
    served = np.asarray(groups["counts"]) > 0
    log.write_groups(step, {name: np.asarray(values)[served] for name, values in groups.items()})
    log.write_processes(step, every)
    if log.wants_rollouts:
        from krl.run.rollouts import describe_rollouts  # with Arrow, for which help and refusals need not wait

        log.write_rollouts(step, describe_rollouts(parts.train, step, groups, rollouts))


def last_row(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Tell what a finished run showed; the last row of its metrics, {} if it has none."""
    with processes.first_before_others("report"):
        if config.steps:
            processes.say(report.of_a_run(workdir) if processes.is_first() else "")
        else:
            processes.say(
                f"krl: {'fine-tuned' if config.sft.steps else 'no step was asked for'}; the checkpoint is in "
                f"{epath.Path(config.checkpoint.dir or workdir) / 'checkpoints'}"
            )
    rows = read_rows(workdir / "metrics.jsonl")
    return rows[-1] if rows else {}


# -------------------------------------------------------------------- one step

# The programs of a step that are small; what is static is hashable and the same in every step.
take, inform, learn_prior = jax.jit(budget.take), jax.jit(budget.inform), jax.jit(budget.learn_prior)
update_belief = jax.jit(budget.update, static_argnames="fit_discounts", donate_argnums=0)


def take_step(
    config: ConfigDict,
    parts: Setup,
    learner: Learner,
    step: int,
    draw: int = 0,
    reference: dict[str, Any] | None = None,
) -> tuple[Learner, dict[str, float], dict[str, Any], dict[str, Any]]:
    """One step: choose prompts and counts, sample, score, and learn.

    Args:
        config, parts: of the run.
        learner: before the step; its buffers are given away.
        step: steps done before this one; it decides prompts and random keys.
        draw: how many rollbacks it comes after: its rollouts are others after each.
        reference: the parameters to stay close to, if there is a penalty; with adapters those that they stand on.

    Returns:
        (learner after the step, its metrics, [M] quantities of its groups, its rollouts with [R] quantities of each);
        docs/metrics.md defines metrics and groups.
    """
    clock, (state, belief, prior) = PhaseClock(config.stuck_seconds), learner
    place = functools.partial(processes.place_whole, parts.mesh)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    sample_key, shuffle_key = jax.random.split(jax.random.fold_in(key, draw) if draw else key)
    with clock.phase("budget"):
        chosen = choose_prompts(config, parts, learner, step)
        task_ids, before = chosen.task_ids, chosen.before
        prompts = place(Prompts(parts.train.tokens[task_ids], parts.train.mask[task_ids], task_ids))
    params = whole_policy(parts, learner, reference)
    drawn = spend_budget(config, parts, params, prompts, chosen, step, sample_key, clock)
    give_back_memory(params)
    rollouts, rewards, scored, said = drawn.rollouts, drawn.rewards, drawn.scored, drawn.verdicts
    taught = rollouts.replace(mask=scored)  # a rollout without a reward teaches nothing
    with clock.phase("update"):
        compared = place(rewards_to_compare(config.loss.scale, said, summed=len(parts.verifiers.names) > 1))
        loss = FrozenConfigDict(config.loss)
        advantages = find_advantages(loss, len(task_ids), compared, taught, chosen.chances)
        update = for_this_backend(policy_update, parts.policy_config, parts.optimizer, **parts.learning)
        state, metrics = update(state, prompts, taught, advantages, shuffle_key, reference=reference)
        outcomes, index = jnp.clip(rewards, 0.0, 1.0), rollouts.prompt_index  # beliefs are about shares of success
        if prior is not None:
            prior = learn_prior(prior, before, chosen.features, outcomes, index, scored)
            metrics |= budget.prior_metrics(prior, int((drawn.counts > 0).sum()))
        belief = update_belief(
            belief, prompts.task_ids, outcomes, index, scored, step, rollouts.lengths, known=chosen.known,
            sampled=drawn.counts > 0, fit_discounts=config.alloc.fit_discounts,
        )  # fmt: skip
        learner = jax.block_until_ready(Learner(state, belief, prior))
    give_back_memory(params)
    processes.check_agreement(drawn.counts, rewards, belief.successes, belief.failures)
    metrics |= step_metrics(drawn.counts, before.visits > 0, rollouts, rewards, advantages, scored)
    metrics = {name: float(value) for name, value in metrics.items()} | belief_metrics(belief, step)
    metrics |= {"rollouts_total": (step + 1) * config.alloc.budget, "skipped_updates": skipped_updates(state)[1]}
    metrics |= {"candidates": parts.candidates} | describe_spending(drawn, clock, parts.verifiers.names)
    metrics |= rule_metrics(config.alloc.rule, drawn.info, metrics)
    groups = describe_groups(drawn, task_ids, budget.prior_mean(chosen.known))
    return learner, metrics, groups, each_rollout(drawn, advantages, parts.verifiers.names)


def choose_prompts(config: ConfigDict, parts: Setup, learner: Learner, step: int) -> Chosen:
    """The prompts of a step: the next ones, or those of the next candidates that the rule gives any rollouts."""
    place = functools.partial(processes.place_whole, parts.mesh)
    task_ids = step_task_ids(len(parts.train), parts.candidates, step, seed=config.seed)
    before = take(learner.belief, place(task_ids), step)
    features = place(parts.features[task_ids])
    known = before if learner.prior is None else inform(learner.prior, before, features)
    all_of_them = Chosen(task_ids, before, known, features, find_chances(config, parts, known))
    if parts.candidates == parts.served:
        return all_of_them
    counts, info = find_counts(config, parts, known, config.alloc.budget)
    rows, served = served_rows(counts, all_of_them._replace(counts=counts), most=parts.served)
    return served._replace(task_ids=task_ids[np.asarray(rows)], info=info)


# -------------------------------------------------------------------- the command


def run_command() -> None:
    """The commands `krl-train` and `python train.py`."""
    run_program(train, __doc__)


class _Callable(types.ModuleType):
    """The type of this module, so that `krl.train(config, workdir)` is a run whatever was imported before."""

    def __call__(self, *args: Any, **options: Any) -> Result | None:
        return train(*args, **options)


sys.modules[__name__].__class__ = _Callable
__signature__ = inspect.signature(train)  # what notebooks show of it
