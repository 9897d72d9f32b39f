"""Train a policy with Knapsack-GRPO, from scratch or from a Hugging Face checkpoint.

    python train.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.key=value ...]
    python train.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/qwen

The same command continues a run from its last checkpoint. Supervised fine-tuning comes first where
config.sft.steps asks for it, and alone with --config.steps=0. --verbosity=1 shows where an error came from.

In a notebook, `train(config, workdir)` is the same run. `take_step` is one step: prompts -> belief -> counts ->
rollouts -> rewards -> advantages -> updates -> belief -> metrics; docs/architecture.md draws it.
"""

import contextlib
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from krl import budget, learn, rollout
from krl.configs.check import FREE_KEYS, check, flatten
from krl.configs.flags import define_flags, one_line_errors, parse_flags
from krl.eval.sample import FaultWatch, Scoring, Verdicts, evaluate, first_reward, score_rollouts
from krl.report import command as report
from krl.run.checkpoint import Checkpoints, digest, keep_from_others, stop_on_signal, write_json
from krl.run.guard import draws_before, find_spike, go_back, read_rollbacks, refuse_bad_updates
from krl.run.lock import hold_workdir
from krl.run.metrics import (
    CompileCounter,
    MetricsLog,
    PhaseClock,
    keep_compilations,
    mean_of,
    memory_used,
    over_processes,
    profile,
    progress,
    read_rows,
    short,
    staleness,
    status_line,
    step_metrics,
)
from krl.run.processes import (
    STOPPED,
    any_process,
    check_agreement,
    check_copies,
    first_before_others,
    gather,
    is_first,
    join_processes,
    place_whole,
    say,
    stay_together,
)
from krl.run.setup import (
    NAMES,
    Setup,
    about_run,
    describe_step,
    find_slots,
    prompts_of_a_step,
    say_ends,
    set_up,
    start_params,
)
from krl.run.update import (
    abstract_state,
    for_this_backend,
    init_state,
    policy_update,
    shared_jit,
    skipped_updates,
)
from krl.run.writers import check_writers, find_writers
from krl.sharding import named_sharding, reshape_mesh
from krl.tasks import step_task_ids
from krl.tasks.pool import FAULTS
from krl.tasks.rewards import as_float32
from krl.types import Prompts, Rollouts, TrainState


def main(argv):
    """The command line."""
    script = pathlib.Path(argv[0]).name
    with one_line_errors(script):
        join_processes(flags.FLAGS.config.distributed)
    file = pathlib.Path(flags.FLAGS.workdir, f"error{jax.process_index() or ''}.txt")
    with stay_together(), one_line_errors(script, file):
        keep_from_others()
        keep_compilations()
        last = train(flags.FLAGS.config, flags.FLAGS.workdir)
    if last is None:
        raise SystemExit(STOPPED)


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict | None:
    """The run of a config, from its last checkpoint on or from the start.

    Args:
        config: every key of configs/default.py.
        workdir: the directory that keeps what the run writes; docs/architecture.md lists it.

    Returns:
        The last row of metrics.jsonl, {} if it has none; None if a signal stopped the run.

    Raises:
        ValueError: a config or data that cannot work; the message says the fix.
        FloatingPointError: too many updates in a row were not finite, or too many steps beyond config.guard.
    """
    workdir, compiles = pathlib.Path(workdir), CompileCounter()
    check(config, **NAMES)
    check_writers(flatten(config))
    with stop_on_signal() as asked, hold_workdir(workdir) if is_first() else contextlib.nullcontext():
        with first_before_others("set up"):
            parts = set_up(config, workdir, flatten(config), FREE_KEYS)
        size = sum(leaf.size for leaf in jax.tree.leaves(parts.params))
        say(
            f"krl: {config.alloc.rule} budgets, {describe_step(config, len(parts.train))}, "
            f"{len(parts.train)} training prompts ({parts.train.dropped} too long), {size:,} parameters, "
            f"mesh {dict(parts.mesh.shape)} of {jax.devices()[0].device_kind}"
        )
        say_ends(config, parts.ends, parts.train)
        place = epath.Path(config.checkpoint.dir or workdir)
        with (
            parts.verifiers,
            jax.set_mesh(parts.mesh),
            Checkpoints(place / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
            Checkpoints(place / "best", keep=1) as best,
        ):
            rollbacks, about, outcome = read_rollbacks(workdir), about_run(config, parts), "went back"
            while outcome == "went back":
                outcome = take_steps(
                    config, workdir, parts, checkpoints, best, rollbacks, about | {"rollbacks": len(rollbacks)},
                    compiles, lambda: any_process(asked.is_set()),
                )  # fmt: skip
    return last_row(config, workdir) if outcome == "finished" else None


def take_steps(
    config: ConfigDict, workdir: pathlib.Path, parts: Setup, checkpoints: Checkpoints, best: Checkpoints,
    rollbacks: list[dict], about: dict, compiles: CompileCounter, should_stop: Callable[[], bool],
) -> str:  # fmt: skip
    """Take the steps that are left, from the newest checkpoint on or from the start.

    Returns:
        "finished"; "stopped", everything being saved; or "went back": the same call goes on from the last checkpoint.
    """
    # ---------------------------------------------------------------- where the run starts from
    from krl.run.rollouts import describe_rollouts  # with Arrow, for which help and refusals need not wait

    step, learner, reference = start_or_continue(config, parts, checkpoints, about, should_stop)
    if learner is None:
        say("krl: stopped during supervised fine-tuning; the same command continues it")
        return "stopped"
    if step == 0 and is_first():
        held_out = parts.test.tasks
        write_json(workdir / "held_out.json", {"prompts": held_out.prompts, "fields": dict(held_out.fields)})
    hear = FaultWatch(parts.verifiers, config.verify.may_fail)
    highest, newest = best.about_newest().get("accuracy", -math.inf), None

    # ---------------------------------------------------------------- the loop
    with (
        MetricsLog(
            workdir,
            first_step=step,
            writers=find_writers(workdir, flatten(config)),
            rollouts_gb=config.log.rollouts_gb,
            texts_every=config.log.texts_every,
        ) as log,
        progress(config.steps, step, config.alloc.rule) as show,
        profile(workdir / "profile", begin=step + 2, steps=config.profile.steps if is_first() else 0) as record,
    ):
        if step == 0 and config.eval.every and not should_stop():
            metrics = {"rollouts_total": 0} | evaluate_held_out(config, parts, learner, log, 0, hear)
            log.write(0, metrics)
            newest = metrics["eval/accuracy"]
            show(0, f"accuracy {short(newest)}")
        if config.steps == 0:
            checkpoints.save(0, saved(learner), about | {"step": 0})
        while step < config.steps and not should_stop():
            record(step)
            draw = draws_before(rollbacks, step)
            learner, metrics, groups, rollouts = take_step(config, parts, learner, step, draw, reference)
            step += 1
            spike = find_spike(metrics, config.guard)
            if spike:
                go_back(workdir, rollbacks, step, checkpoints.latest_step() or 0, spike, most=config.guard.rollbacks)
                return "went back"
            every = gather({k: v for k, v in metrics.items() if k.startswith("seconds/")} | memory_used())
            metrics |= {"compiles": compiles.count, "rollbacks": len(rollbacks)} | over_processes(every)
            if config.eval.every and (step % config.eval.every == 0 or step == config.steps):
                metrics |= evaluate_held_out(config, parts, learner, log, step, hear)
                if metrics["eval/accuracy"] > highest:
                    highest = metrics["eval/accuracy"]
                    best.save(step, {"params": learner.state.params}, about | {"step": step, "accuracy": highest})
                newest = metrics["eval/accuracy"]
            log.write(step, metrics)
            served = np.asarray(groups["counts"]) > 0
            log.write_groups(step, {name: np.asarray(values)[served] for name, values in groups.items()})
            log.write_processes(step, every)
            if config.log.rollouts_gb or config.log.texts_every:
                log.write_rollouts(step, describe_rollouts(parts.train, step, groups, **rollouts))
            show(step, status_line(metrics, newest))
            hear(int(sum(metrics[f"verifier/{kind}"] for kind in FAULTS)), config.alloc.budget, f"step {step}")
            refuse_bad_updates(learner.state, config.max_bad_updates)
            if step % config.checkpoint.every == 0 or step == config.steps:
                check_copies(learner.state.params)
                checkpoints.save(step, saved(learner), about | {"step": step})
    if step < config.steps:
        check_copies(learner.state.params)
        checkpoints.save(step, saved(learner), about | {"step": step})
        say(f"krl: stopped after step {step}; the same command continues from there")
        return "stopped"
    return "finished"


def last_row(config: ConfigDict, workdir: pathlib.Path) -> dict:
    """Tell what a finished run showed; the last row of its metrics, {} if it has none."""
    with first_before_others("report"):
        if config.steps:
            say(report.of_a_run(workdir) if is_first() else "")
        else:
            say(f"krl: fine-tuned; the checkpoint is in {epath.Path(config.checkpoint.dir or workdir) / 'checkpoints'}")
    rows = read_rows(workdir / "metrics.jsonl")
    return rows[-1] if rows else {}


# -------------------------------------------------------------------- what a run carries from step to step


class Learner(NamedTuple):
    """What a step changes and a checkpoint keeps."""

    state: TrainState
    belief: budget.Belief  # of the D training prompts
    prior: budget.Prior | None  # None where all prompts share one


def start_or_continue(
    config: ConfigDict, parts: Setup, checkpoints: Checkpoints, about: dict, should_stop: Callable[[], bool]
) -> tuple[int, Learner | None, dict | None]:
    """Read the newest checkpoint, or begin, after fine-tuning.

    Returns:
        (steps done, learner, parameters to stay close to). The learner is None if it should stop before
        fine-tuning was finished; the parameters are None without a penalty, and else about["reference"] tells them.
    """
    place, alloc = functools.partial(place_whole, parts.mesh), config.alloc
    kept = {name: alloc[name] for name in ("discount", "discount_mixed", "fade")}
    belief = place(budget.init_belief(len(parts.train), prompt_tokens=parts.train.mask.sum(axis=1), **kept))
    prior = None if alloc.prior == "shared" else place(budget.init_prior(alloc.prior, parts.num_features))
    begins = checkpoints.latest_step() is None
    params: dict | None = {}
    if begins or config.loss.kl_coefficient:
        params = start_params(
            config, parts.policy_config, parts.mesh, parts.pairs, parts.cache, should_stop=should_stop
        )
    if params is None:
        return 0, None, None
    reference = jax.tree.map(jnp.copy, params) if config.loss.kl_coefficient else None
    if reference is not None:
        about["reference"] = digest(reference)
    if begins:
        return 0, Learner(init_state(parts.policy_config, parts.optimizer, params), belief, prior), reference
    like = saved(Learner(abstract_state(parts.policy_config, parts.optimizer, parts.params), belief, prior))
    found = checkpoints.restore(like)
    assert found is not None  # latest_step has seen it
    first, trees = found
    was = about | trees["about"]
    if was["train"] != about["train"]:
        raise ValueError(
            f"the training prompts are not those of the run: {was['train']} at step {first}, {about['train']} now; "
            "what is believed of each would be of another one; bring its data back or choose another --workdir"
        )
    if was["test"] != about["test"]:
        raise ValueError(
            f"the held-out prompts are not those of the run: {was['test']} at step {first}, {about['test']} now; its "
            "evaluations would be of others; bring its data back or choose another --workdir"
        )
    if was["config_digest"] != about["config_digest"]:
        raise ValueError(
            f"{checkpoints.directory} has checkpoints of a run with another config; choose another "
            "config.checkpoint.dir"
        )
    if was.get("reference") != about.get("reference"):
        raise ValueError(
            "the policy that config.loss.kl_coefficient holds the run to is not the one that it began from: "
            f"{was['reference']} at step {first}, {about['reference']} now; bring back what config.policy.path or "
            "config.sft.dir held, or choose another --workdir"
        )
    say(f"krl: continuing from step {first}")
    state = TrainState(trees["params"], trees["opt_state"])
    return first, Learner(state, trees["belief"], trees.get("prior")), reference


def saved(learner: Learner) -> dict:
    """The trees of a checkpoint, apart so that an evaluation can read the parameters alone."""
    state, belief, prior = learner
    trees = {"params": state.params, "opt_state": state.opt_state, "belief": belief}
    return trees if prior is None else trees | {"prior": prior}


# -------------------------------------------------------------------- one step

# The programs of a step that are small; what is static is hashable and the same in every step.
take, inform, learn_prior = jax.jit(budget.take), jax.jit(budget.inform), jax.jit(budget.learn_prior)
mean_tokens = jax.jit(budget.mean_tokens)
allocate = jax.jit(budget.allocate, static_argnames=("rule", "n_min", "n_max", "group", "explored"))
reach_chances = jax.jit(budget.reach_chances, static_argnames=("group", "explored", "reach"))
update_belief = jax.jit(budget.update, static_argnames="fit_discounts", donate_argnums=0)


def take_step(
    config: ConfigDict, parts: Setup, learner: Learner, step: int, draw: int = 0, reference: dict | None = None
) -> tuple[Learner, dict[str, float], dict, dict]:
    """One step: choose prompts and counts, sample, score, and learn.

    Args:
        config, parts: of the run.
        learner: before the step; its buffers are given away.
        step: steps done before this one; it decides prompts and random keys.
        draw: how often it was taken before, and undone: every time its rollouts are others.
        reference: the parameters to stay close to, if there is a penalty.

    Returns:
        (learner after the step, its metrics, [M] quantities of its groups, its rollouts with [R] quantities of each);
        docs/metrics.md defines metrics and groups.
    """
    clock, (state, belief, prior) = PhaseClock(config.stuck_seconds), learner
    place = functools.partial(place_whole, parts.mesh)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    sample_key, shuffle_key = jax.random.split(jax.random.fold_in(key, draw) if draw else key)
    with clock.phase("budget"):
        candidates, num_prompts = prompts_of_a_step(config, len(parts.train))
        task_ids = step_task_ids(len(parts.train), candidates, step, seed=config.seed)
        before = known = take(belief, place(task_ids), step)
        features = place(parts.features[task_ids])
        if prior is not None:
            known = inform(prior, before, features)
        chances, chosen = find_chances(config, num_prompts, known), None
        if candidates > num_prompts:
            counts, info = choose_counts(config, num_prompts, known, config.alloc.budget)
            rows, (before, known, features, counts, chances) = served_rows(
                counts, (before, known, features, counts, chances), most=num_prompts
            )
            task_ids, chosen = task_ids[np.asarray(rows)], (counts, info)
        prompts = place(Prompts(parts.train.tokens[task_ids], parts.train.mask[task_ids], task_ids))
    drawn = spend_budget(config, parts, state.params, prompts, known, step, sample_key, clock, chosen)
    rollouts, rewards, said = drawn.rollouts, drawn.rewards, drawn.verdicts
    heard = rollouts.replace(mask=drawn.scored)  # a rollout without a reward teaches nothing
    served = int((drawn.counts > 0).sum())
    with clock.phase("update"):
        compared = place(rewards_to_compare(config.loss.scale, said, summed=len(parts.verifiers.names) > 1))
        advantages = find_advantages(config, compared, heard, num_prompts, chances)
        state, learnt = update_policy(config, parts, reference, state, prompts, heard, advantages, shuffle_key)
        outcomes = jnp.clip(rewards, 0.0, 1.0)  # beliefs are about shares of success
        index, scored = rollouts.prompt_index, drawn.scored
        if prior is not None:
            prior = learn_prior(prior, before, features, outcomes, index, scored)
            learnt |= budget.prior_metrics(prior, served)
        belief = update_belief(
            belief, prompts.task_ids, outcomes, index, scored, step, rollouts.lengths, known=known,
            sampled=drawn.counts > 0, fit_discounts=config.alloc.fit_discounts,
        )  # fmt: skip
        learner = jax.block_until_ready(Learner(state, belief, prior))
    check_agreement(drawn.counts, rewards, belief.successes, belief.failures)

    # ---------------------------------------------------------------- what the step showed
    shown = step_metrics(drawn.counts, before.visits > 0, rollouts, rewards, advantages, scored)
    has_reward = (said.faults == 0) & (said.prompt_index < num_prompts)
    metrics = {"reward_mean": mean_of(said.rewards, has_reward)}
    metrics |= {k: float(v) for k, v in (shown | learnt | drawn.info).items()}
    seconds = sum(clock.seconds.values())
    metrics |= {f"seconds/{phase}": spent for phase, spent in clock.seconds.items()}
    metrics |= {f"verifier/{kind}": int((said.faults == 1 + number).sum()) for number, kind in enumerate(FAULTS)}
    several = dict(zip(parts.verifiers.names, said.parts.T, strict=True))
    metrics |= {f"reward/{name}": mean_of(values, has_reward) for name, values in several.items()}
    metrics |= {
        "discount": float(belief.discount), "discount_mixed": float(belief.discount_mixed), "fade": float(belief.fade),
        "hopeless": float(jax.nn.sigmoid(belief.hopeless)), "candidates": candidates,
        **staleness(belief.last_step, step),
        "seconds/step": seconds, "tokens_per_second": int(rollouts.lengths.sum()) / seconds,
        "rollouts_total": (step + 1) * config.alloc.budget, "skipped_updates": skipped_updates(state)[1],
    }  # fmt: skip
    given, wins, tokens = (
        jax.ops.segment_sum(x, index, num_segments=num_prompts)
        for x in (scored.astype(jnp.int32), jnp.where(scored, outcomes, 0.0), rollouts.lengths)
    )
    groups: dict[str, Any] = {
        "task_ids": task_ids,
        "counts": drawn.counts,
        "scored": given,
        "successes": wins,
        "tokens": tokens,
    }
    groups |= {"belief": drawn.believed, "prior": budget.prior_mean(known)}
    each = {"faults": said.faults, "texts": said.texts, "reasons": said.reasons, "parts": several}
    return learner, metrics, groups, {"rollouts": rollouts, "rewards": rewards, "advantages": advantages} | each


class Drawn(NamedTuple):
    """What the budget of a step was spent on."""

    counts: jax.Array  # [M] int32
    believed: jax.Array  # [M] float32, expected success rates when the counts were chosen
    info: dict[str, jax.Array]  # what the rule says of the counts, float32 scalars
    rollouts: Rollouts  # R of them
    verdicts: Verdicts  # on the host, exact
    rewards: jax.Array  # [R] float32, the nearest that there are
    scored: jax.Array  # [R] bool, the rollouts that have a reward


def spend_budget(
    config: ConfigDict, parts: Setup, params: dict, prompts: Prompts, known: budget.Belief, step: int, key: jax.Array,
    clock: PhaseClock, chosen: tuple[jax.Array, dict] | None,
) -> Drawn:  # fmt: skip
    """Choose the counts of M prompts by what is known of them, [M] each, if they are not `chosen`; sample and score.

    A rule of ROUNDS sees what the rounds before have shown; a round's samples of a prompt go on from there.
    Scouts come before all rounds: the counts follow from what they alone show, and nothing else does.
    """
    alloc, num_prompts, place = config.alloc, len(prompts.task_ids), functools.partial(place_whole, parts.mesh)
    tasks = parts.train.tasks.take(np.asarray(prompts.task_ids).tolist())

    def draw(counts, num_rollouts, clock=clock, **options):
        with clock.phase("rollout"):
            scoring = Scoring(parts.ends, parts.verifiers, tasks.prompts, tasks.answers, counts, tasks.rows)
            options |= {"num_rollouts": num_rollouts, "expected_tokens": lengths, "watch": scoring.watch}
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
        return seen, *(jax.ops.segment_sum(x, index, num_segments=num_prompts) for x in sums)

    lengths, scouts = mean_tokens(known), alloc.scouts
    if scouts:  # their samples are numbered after those that count, and neither they nor their time do
        every, free = jnp.full_like(prompts.task_ids, scouts), PhaseClock(config.stuck_seconds)
        seen = draw(every, num_prompts * scouts, free, first_sample=alloc.n_max)
        known, *_ = learn_from(budget.init_belief(num_prompts), *seen)
    counts = jnp.zeros_like(prompts.task_ids)
    shown = budget.Shown(counts, counts * 0.0, counts * 0.0)
    rounds: list[tuple[Rollouts, Verdicts]] = []
    ends = budget.rounds_of(alloc.rule, num_prompts, alloc.budget, alloc.n_min, alloc.group)
    for spent, until in itertools.pairwise((0, *ends)):
        if rounds:
            known, wins, losses = learn_from(known, *rounds[-1])
            shown = budget.Shown(counts, shown.successes + wins, shown.failures + losses)
        told = {"shown": shown} if alloc.rule in budget.ROUNDS else {}
        with clock.phase("budget"):
            counts, info = chosen or choose_counts(config, num_prompts, known, until, **told)
        rounds.append(draw(counts - shown.counts, until - spent, first_sample=shown.counts))
    rollouts = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(rollouts for rollouts, _ in rounds))
    verdicts = functools.reduce(Verdicts.then, (verdicts for _, verdicts in rounds))
    return Drawn(
        counts=counts, believed=budget.mean(known), info=info, rollouts=rollouts, verdicts=verdicts,
        rewards=place(as_float32(verdicts.rewards)),
        scored=rollouts.mask & place(verdicts.faults == 0),
    )  # fmt: skip


def choose_counts(
    config: ConfigDict, num_prompts: int, known: budget.Belief, spent: int, **told: budget.Shown
) -> tuple[jax.Array, dict]:
    """What the rule gives of the first `spent` rollouts of a step, checked, and what it says of that."""
    alloc, rule = config.alloc, budget.RULES[config.alloc.rule]
    if alloc.rule == "reach":
        rule = reach_rule(alloc.reach)
    counts, info = jax.block_until_ready(
        allocate(
            rule,
            known,
            spent,
            alloc.n_min,
            alloc.n_max,
            group=alloc.group,
            explored=explored(alloc, num_prompts),
            **told,
        )
    )
    check_counts(alloc, counts, spent)
    return counts, info


@functools.cache
def reach_rule(reach: float) -> budget.Rule:
    """The rule "reach" with an r; the same function for the same r, so that it is compiled once."""
    return functools.partial(budget.RULES["reach"], reach=reach)


def explored(alloc: ConfigDict, num_prompts: int) -> int:
    """How many prompts of a step are sampled since they waited longest; one at least of a share above 0."""
    return max(round(alloc.explored * num_prompts), math.ceil(alloc.explored))


def find_chances(config: ConfigDict, num_prompts: int, known: budget.Belief) -> jax.Array | None:
    """The probabilities [C] with which candidates are served, where the loss asks for them."""
    alloc = config.alloc
    if config.loss.average != "candidates":
        return None
    groups = {"group": alloc.group, "explored": explored(alloc, num_prompts)}
    return reach_chances(known, alloc.budget, **groups, reach=alloc.reach)


@functools.partial(jax.jit, static_argnames="most")
def served_rows(counts: jax.Array, candidates: Any, most: int) -> tuple[jax.Array, Any]:
    """(rows of the candidates that get any, filled up to `most` with others; what is known of these)."""
    rows = jnp.argsort(counts == 0, stable=True)[:most]
    return rows, jax.tree.map(lambda x: x[rows] if x.ndim else x, candidates)


def check_counts(alloc: ConfigDict, counts: jax.Array, spent: int) -> None:
    """Refuse counts that a rule must not give: it is named, with what is wrong.

    Args:
        alloc: the part of the config about the budget.
        counts: of a step's prompts or candidates, [M] or [C].
        spent: what they are to sum to, config.alloc.budget but for earlier rounds.

    Raises:
        ValueError: counts that are no integers, do not sum to it, leave the bounds, or split a group.
    """
    given, wrong = np.asarray(counts), ""
    if not np.issubdtype(given.dtype, np.integer):
        wrong = f"counts of type {given.dtype}, which are to be whole numbers"
    elif given.sum() != spent:
        wrong = f"{given.sum()} rollouts, and {spent} of config.alloc.budget={alloc.budget} are to be spent"
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


# -------------------------------------------------------------------- sampling and learning, by the keys of a config


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


def rewards_to_compare(scale: str, said: Verdicts, *, summed: bool) -> np.ndarray:
    """A step's rewards as float32, [R], from which its advantages are right: see `krl.learn.fit_float32`.

    Raises:
        ValueError: a negative reward where advantages are divided by the mean one.
    """
    if scale != "mean":
        return learn.fit_float32(said.rewards, said.prompt_index, said.faults == 0, summed=summed)
    if (said.rewards[said.faults == 0] < 0).any():
        raise ValueError(
            f"a reward of {said.rewards[said.faults == 0].min():g}: config.loss.scale='mean' divides by the mean "
            "reward of a prompt and needs rewards of at least 0; set it to 'std' or 'none'"
        )
    return as_float32(said.rewards)


def find_advantages(
    config: ConfigDict, rewards: jax.Array, rollouts: Rollouts, num_prompts: int, chances: jax.Array | None
) -> jax.Array:
    """The advantages of a step's rollouts, [R] float32, by config.loss.

    Prompts were served with the chances [M], which the average "candidates" needs.
    """
    weigh = shared_jit(step_advantages, FrozenConfigDict(config.loss), num_prompts, config.sample.max_new_tokens)
    return weigh(rewards, rollouts, chances)


def step_advantages(
    loss: FrozenConfigDict, num_prompts: int, longest: int, rewards: jax.Array, rollouts: Rollouts,
    chances: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """What `find_advantages` computes; responses have at most `longest` tokens."""
    groups, lengths = (rollouts.prompt_index, rollouts.mask, num_prompts), rollouts.lengths
    if loss.overlong_tokens:
        rewards = rewards - learn.overlong_penalty(lengths, longest, loss.overlong_tokens)
    values = learn.group_advantages(
        rewards, *groups, scale_by_std=loss.scale == "std", scale_by_mean=loss.scale == "mean",
        leave_one_out=loss.leave_one_out, clip=loss.advantage_clip or math.inf,
    )  # fmt: skip
    values = jnp.where(rollouts.finished, values, 0.0) if loss.mask_truncated else values
    return values * learn.token_weights(loss.average, lengths, *groups, longest, chances)


def update_policy(
    config: ConfigDict, parts: Setup, reference: dict | None, state: TrainState, *drawn: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`krl.run.update.policy_update` of the state on what was drawn: prompts, rollouts, advantages and a key."""
    optim, loss = config.optim, config.loss
    update = for_this_backend(
        policy_update, parts.policy_config, parts.optimizer,
        num_updates=optim.updates_per_step, micro_tokens=optim.micro_tokens, packed=optim.packed,
        temperature=config.sample.temperature, surrogate=loss.surrogate, clip_low=loss.clip_low,
        clip_high=loss.clip_high, dual_clip=loss.dual_clip, importance_cap=loss.importance_cap,
        kl_coefficient=loss.kl_coefficient, kl_estimator=loss.kl_estimator,
        entropy_coefficient=loss.entropy_coefficient,
    )  # fmt: skip
    return update(state, *drawn, reference=reference)


def measure(config: ConfigDict, parts: Setup, params: dict, hear: FaultWatch) -> tuple[dict[str, float], np.ndarray]:
    """What `krl.eval.sample.evaluate` finds on the held-out prompts."""
    sample = functools.partial(generate, config, parts, temperature=config.eval.temperature, top_p=config.eval.top_p)
    return evaluate(
        sample, functools.partial(score_rollouts, parts.ends, first_reward(parts.verifiers)), params, parts.test,
        jax.random.key(config.seed + 1), samples=config.eval.samples, num_rollouts=config.alloc.budget,
        place=functools.partial(place_whole, parts.mesh), hear=hear,
    )  # fmt: skip


def evaluate_held_out(
    config: ConfigDict, parts: Setup, learner: Learner, log: MetricsLog, step: int, hear: FaultWatch
) -> dict[str, float]:
    """The metrics of the held-out prompts after some steps; the solved samples of each prompt go to the log."""
    with PhaseClock(config.stuck_seconds).phase("evaluation"):
        measured, solved = measure(config, parts, learner.state.params, hear)
    spent = step * config.alloc.budget
    log.write_evaluation(step, rollouts_total=spent, samples=config.eval.samples, solved=solved)
    return {f"eval/{name}": value for name, value in measured.items()}


def run_command() -> None:
    """The commands `krl-train` and `python train.py`."""
    main_module = sys.modules["__main__"]
    main_module.__doc__ = main_module.__doc__ or __doc__  # which --help shows; an installed command has none
    define_flags()
    app.run(main, flags_parser=parse_flags)
