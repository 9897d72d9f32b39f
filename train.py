"""Train a policy with Knapsack-GRPO.

    python train.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.key=value ...]

The same command continues a run from its last checkpoint. One step: prompts -> belief -> counts ->
rollouts -> rewards -> advantages -> updates -> belief -> metrics; docs/architecture.md draws it.
"""

import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.check import FREE_KEYS, check, flatten, parse_flags
from krl import budget, learn, policy, rollout
from krl.policy.tokenizer import SentencePieceTokenizer, train_sentencepiece
from krl.run import report
from krl.run.checkpoint import Checkpoints, claim_workdir, open_workdir, stop_on_signal
from krl.run.evaluate import evaluate, score_rollouts
from krl.run.metrics import CompileCounter, MetricsLog, PhaseClock, progress, step_metrics
from krl.run.update import init_state, make_optimizer, policy_update, skipped_updates
from krl.run.warm_start import encode_pairs, warm_start
from krl.sharding import make_mesh, named_sharding, tree_sharding
from krl.tasks import TaskSet, encode_tasks, load_tasks, step_task_ids
from krl.tasks.arithmetic import make_ladder
from krl.tasks.verify import exact_match, math_reward
from krl.types import Prompts, TrainState

CONFIG = config_flags.DEFINE_config_file("config", None, "the configuration file", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/default", "where the run keeps everything it writes")
REWARDS = {"exact": exact_match, "math": math_reward}


def main(_):
    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # Orbax tells every write

    # ---------------------------------------------------------------- refuse what cannot work
    try:
        check(config, rules=list(budget.RULES), rewards=list(REWARDS))
        mesh = make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
        open_workdir(workdir, flatten(config), FREE_KEYS)
        tasks = load_task_sets(config)
        cache = warm_start_cache(config, workdir)
        tokenizer_file = find_tokenizer(config, tasks["warm"], cache, workdir)
        tokenizer = SentencePieceTokenizer(tokenizer_file)
        encode = functools.partial(encode_tasks, tokenizer=tokenizer, max_prompt_tokens=config.data.max_prompt_tokens)
        train_tasks, test_tasks = encode(tasks["train"]), encode(tasks["test"], limit=config.eval.prompts)
        step_task_ids(len(train_tasks), config.prompts_per_step, 0, seed=config.seed)
        pairs = (
            encode_pairs(encode(tasks["warm"]), tokenizer, config.sample.max_new_tokens)
            if config.warm_start.steps
            else None
        )
        policy_config = policy.PolicyConfig(vocab_size=tokenizer.vocab_size, **config.policy)
        shapes = jax.eval_shape(functools.partial(policy.init, policy_config), jax.random.key(0))
        shardings = tree_sharding(mesh, policy.param_axes(policy_config), shapes)
        claim_workdir(workdir, flatten(config), tokenizer_file)
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from None
    stop = stop_on_signal()
    compiles = CompileCounter()
    print(
        f"krl: {config.alloc.rule} budgets, {config.prompts_per_step} prompts and {config.alloc.budget} rollouts a step, "
        f"{len(train_tasks)} training prompts ({train_tasks.dropped} too long), {sum(x.size for x in jax.tree.leaves(shapes)):,} "
        f"parameters, mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}"
    )

    # ---------------------------------------------------------------- functions of this run
    generate = functools.partial(
        rollout.generate,
        policy_config,
        max_new_tokens=config.sample.max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    score = functools.partial(score_rollouts, tokenizer, REWARDS[config.data.reward])
    allocate = jax.jit(
        functools.partial(budget.allocate, config.alloc.rule, n_min=config.alloc.n_min, n_max=config.alloc.n_max)
    )
    update_belief = jax.jit(
        functools.partial(budget.update, fit_discounts=config.alloc.fit_discounts), donate_argnums=0
    )
    advantages_of = jax.jit(
        functools.partial(
            learn.group_advantages,
            num_prompts=config.prompts_per_step,
            scale_by_std=config.loss.scale_by_std,
        )
    )
    place = functools.partial(jax.device_put, device=named_sharding(mesh))
    measure = functools.partial(
        evaluate,
        functools.partial(generate, temperature=config.eval.temperature),
        score,
        encoded=test_tasks,
        key=jax.random.key(config.seed + 1),
        num_prompts=config.prompts_per_step,
        samples=config.eval.samples,
        place=place,
    )
    optimizer = make_optimizer(
        learning_rate=config.optim.learning_rate, warmup_steps=config.optim.warmup_steps,
        decay_steps=config.optim.decay_steps, beta1=config.optim.beta1,
        beta2=config.optim.beta2, weight_decay=config.optim.weight_decay, grad_clip=config.optim.grad_clip,
    )  # fmt: skip

    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        # ------------------------------------------------------------ where the run starts from
        root = jax.random.key(config.seed)
        params = jax.jit(functools.partial(policy.init, policy_config), out_shardings=shardings)(root)
        belief = place(
            budget.init_belief(
                len(train_tasks), discount=config.alloc.discount, discount_mixed=config.alloc.discount_mixed
            )
        )
        state = init_state(policy_config, optimizer, params)
        try:
            restored = checkpoints.restore(saved(state, belief))
        except ValueError as error:
            raise SystemExit(f"train.py: {error}") from None
        if restored is not None:
            first, trees = restored
            state, belief = TrainState(trees["params"], trees["opt_state"]), trees["belief"]
            print(f"krl: continuing from step {first}")
        else:
            first = 0
            if pairs is not None:
                try:
                    with progress(config.warm_start.steps, 0, "warm start") as show:
                        params, finished = warm_start(
                            policy_config, params, pairs, cache, steps=config.warm_start.steps,
                            batch_size=config.warm_start.batch_size, learning_rate=config.warm_start.learning_rate,
                            seed=config.seed, max_bad_updates=config.max_bad_updates, stop=stop, place=place,
                            report=lambda step, loss: show(step, f"loss {loss:.3f}"),
                        )  # fmt: skip
                except FloatingPointError as error:
                    raise SystemExit(f"train.py: {error}") from None
                if not finished:
                    print("krl: stopped during the warm start; the same command continues it")
                    return
                state = init_state(policy_config, optimizer, params)

        # ------------------------------------------------------------ the loop
        with MetricsLog(workdir, first_step=first) as log, progress(config.steps, first, config.alloc.rule) as show:
            if first == 0 and config.eval.every:
                evaluation = measure(params=state.params)
                log.write(0, {"rollouts_total": 0} | {f"eval/{k}": v for k, v in evaluation.items()})
                show(0, f"accuracy {evaluation['accuracy']:.3f}")
            step = first
            while step < config.steps and not stop.is_set():
                clock = PhaseClock()
                sample_key, shuffle_key = jax.random.split(jax.random.fold_in(root, step))
                with clock.phase("budget"):
                    task_ids = step_task_ids(len(train_tasks), config.prompts_per_step, step, seed=config.seed)
                    prompts = place(
                        Prompts(tokens=train_tasks.tokens[task_ids], mask=train_tasks.mask[task_ids], task_ids=task_ids)
                    )
                    draw = functools.partial(
                        sample_and_score, generate, score, clock, state.params, prompts, sample_key,
                        answers=[train_tasks.tasks.answers[i] for i in task_ids], temperature=config.sample.temperature,
                    )  # fmt: skip
                    known = budget.take(belief, prompts.task_ids)
                    seen, pilot, rounds = known.visits > 0, 0, []
                if (
                    config.alloc.rule in budget.PILOT_RULES
                ):  # n_min rollouts of every prompt before the counts are chosen
                    pilot = config.alloc.n_min
                    rounds.append(draw(jnp.full_like(prompts.task_ids, pilot), num_rollouts=len(task_ids) * pilot))
                    first, outcomes = rounds[0]
                    known = budget.observe(known, jnp.arange(len(task_ids)), outcomes, first.prompt_index, first.mask)
                with clock.phase("budget"):
                    counts, info = jax.block_until_ready(allocate(known, config.alloc.budget))
                    believed = budget.mean(known)  # the belief's buffers are given away below
                left = config.alloc.budget - len(task_ids) * pilot
                rounds.append(draw(counts - pilot, num_rollouts=left, first_sample=pilot))
                rollouts = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(drawn for drawn, _ in rounds))
                rewards = place(np.concatenate([got for _, got in rounds]))
                with clock.phase("update"):
                    advantages = advantages_of(rewards, rollouts.prompt_index, rollouts.mask)
                    state, learnt = policy_update(
                        policy_config, optimizer, state, prompts, rollouts, advantages, shuffle_key,
                        num_updates=config.optim.updates_per_step, micro_batch=config.optim.micro_batch,
                        temperature=config.sample.temperature, clip_low=config.loss.clip_low,
                        clip_high=config.loss.clip_high, dual_clip=config.loss.dual_clip,
                    )  # fmt: skip
                    belief = update_belief(
                        belief, prompts.task_ids, rewards, rollouts.prompt_index, rollouts.mask, step, rollouts.lengths
                    )
                    jax.block_until_ready((state, belief))
                step += 1

                # ---------------------------------------------------- what the step showed
                shown = step_metrics(counts, seen, rollouts, rewards, advantages)
                metrics = {k: float(v) for k, v in (shown | learnt | info).items()}
                seconds = sum(clock.seconds.values())
                in_a_row, skipped = skipped_updates(state)
                metrics |= {f"seconds/{phase}": spent for phase, spent in clock.seconds.items()}
                metrics |= {
                    "discount": float(belief.discount), "discount_mixed": float(belief.discount_mixed),
                    "seconds/step": seconds, "tokens_per_second": int(rollouts.lengths.sum()) / seconds,
                    "rollouts_total": step * config.alloc.budget, "skipped_updates": skipped, "compiles": compiles.count,
                }  # fmt: skip
                text = f"reward {metrics['reward_mean']:.3f}  effective {metrics['effective_ratio_rollouts']:.2f}  counts {int(counts.min())}-{int(counts.max())}"
                if config.eval.every and (step % config.eval.every == 0 or step == config.steps):
                    evaluation = measure(params=state.params)
                    metrics |= {f"eval/{k}": v for k, v in evaluation.items()}
                    text += f"  accuracy {evaluation['accuracy']:.3f}"
                log.write(step, metrics)
                wins, lengths = (
                    jax.ops.segment_sum(x, rollouts.prompt_index, num_segments=config.prompts_per_step)
                    for x in (rewards, rollouts.lengths)
                )
                groups = {"task_ids": task_ids, "counts": counts, "successes": wins, "tokens": lengths}
                log.write_groups(step, groups | {"belief": believed})
                show(step, text)
                if in_a_row >= config.max_bad_updates:
                    raise SystemExit(
                        f"train.py: {in_a_row} updates in a row had a loss or gradient that was not finite and were skipped; "
                        "lower config.optim.learning_rate, or look at metrics.jsonl for when it began"
                    )
                if step % config.checkpoint.every == 0 or step == config.steps:
                    checkpoints.save(step, saved(state, belief))
        if stop.is_set() and step < config.steps:
            checkpoints.save(step, saved(state, belief))
            print(f"krl: stopped after step {step}; the same command continues from there")
            return

    # ---------------------------------------------------------------- what the run showed
    print(report.write([workdir], workdir))


def sample_and_score(generate, score, clock, params, prompts, key, counts, *, answers, **options):
    """One round of a step's rollouts and their rewards, timed."""
    with clock.phase("rollout"):
        rollouts = jax.block_until_ready(generate(params, prompts, counts, key, **options))
    with clock.phase("verify"):
        return rollouts, score(rollouts, answers)


def saved(state: TrainState, belief: budget.Belief) -> dict:
    """The trees of a checkpoint, apart so that an evaluation can read the parameters alone."""
    return {"params": state.params, "opt_state": state.opt_state, "belief": belief}


def load_task_sets(config: ConfigDict) -> dict[str, TaskSet]:
    """The tasks for "warm", "train" and "test"."""
    if config.data.source == "arithmetic":
        c = config.arithmetic
        rungs = {name: c[name] for name in ("addition", "subtraction", "multiplication", "two_step") if c[name]}
        sizes = {"warm": c.num_warm, "train": c.num_train, "test": c.num_test}
        return make_ladder(rungs, sizes, seed=config.seed)
    data = config.data
    load = functools.partial(
        load_tasks, name=data.name, subset=data.subset, prompt_field=data.prompt_field, answer_field=data.answer_field,
        completion_field=data.completion_field, template=data.template,
    )  # fmt: skip
    train = load(split=data.train_split, path=data.path, limit=data.max_train)
    if data.path and not data.test_path:
        held_out = min(config.eval.prompts or len(train) // 10, len(train) // 2)
        kept = train.take(range(len(train) - held_out))
        return {"warm": kept, "train": kept, "test": train.take(range(len(train) - held_out, len(train)))}
    test = load(split=data.test_split, path=data.test_path, limit=0)
    return {"warm": train, "train": train, "test": test}


def warm_start_cache(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The directory of the tokenizer and warm start that belong to this config and no other."""
    decides = ("seed", "data.", "arithmetic.", "tokenizer.", "policy.", "warm_start.", "sample.max_new_tokens")
    flat = {k: v for k, v in flatten(config).items() if k.startswith(decides) and k != "warm_start.dir"}
    name = hashlib.blake2b(json.dumps(flat, sort_keys=True).encode(), digest_size=6).hexdigest()
    return pathlib.Path(config.warm_start.dir or workdir / "warm_start") / name


def find_tokenizer(config: ConfigDict, tasks: TaskSet, cache: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The tokenizer of a run that has begun, or the config's, or one trained on the texts."""
    if (workdir / "config.json").exists():
        return workdir / "tokenizer.model"
    file = pathlib.Path(config.tokenizer.path or cache / "tokenizer.model")
    if not config.tokenizer.path and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = [p + c for p, c in zip(tasks.prompts, tasks.completions or tasks.prompts, strict=True)]
        size, fallback = config.tokenizer.vocab_size, config.tokenizer.byte_fallback
        train_sentencepiece(texts, file, vocab_size=size, byte_fallback=fallback)
    return file


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
