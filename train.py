"""Train a policy with Knapsack-GRPO, from scratch or from a Hugging Face checkpoint.

    python train.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.key=value ...]
    python train.py --config configs/qwen2_5_math_7b.py --config.policy.path=DIR --workdir runs/qwen

The same command continues a run from its last checkpoint. Supervised fine-tuning comes first where
config.sft.steps asks for it, and alone with --config.steps=0. One step: prompts -> belief -> counts ->
rollouts -> rewards -> advantages -> updates -> belief -> metrics; docs/architecture.md draws it.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs.check import FREE_KEYS, check, flatten, parse_flags
from krl import budget, learn, policy, rollout
from krl.policy.hf import check_hf
from krl.policy.hf_config import config_json
from krl.policy.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_sentencepiece
from krl.run import report
from krl.run.checkpoint import Checkpoints, claim_workdir, open_workdir, stop_on_signal
from krl.run.evaluate import evaluate, score_rollouts
from krl.run.metrics import CompileCounter, MetricsLog, PhaseClock, progress, step_metrics
from krl.run.sft import Pairs, encode_pairs, finetune, pack_pairs
from krl.run.update import abstract_state, init_state, make_optimizer, policy_update, skipped_updates
from krl.sharding import make_mesh, named_sharding, tree_sharding
from krl.tasks import SOURCES, TEMPLATES, EncodedTasks, TaskSet, encode_tasks, load_named, load_tasks, step_task_ids
from krl.tasks.arithmetic import make_ladder
from krl.tasks.operators import make_operators
from krl.tasks.pool import VerifierPool
from krl.types import Prompts, TrainState

CONFIG = config_flags.DEFINE_config_file("config", None, "the configuration file", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/default", "where the run keeps everything it writes")


def main(_):
    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # Orbax tells every write

    # ---------------------------------------------------------------- refuse what cannot work
    try:
        check(config, rules=budget.RULES, priors=budget.PRIORS, templates=TEMPLATES, sources=SOURCES)
        mesh = make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
        open_workdir(workdir, flatten(config), FREE_KEYS)
        verifiers = make_verifiers(config)
        tasks = load_task_sets(config)
        cache = sft_cache(config, workdir)
        tokenizer = load_tokenizer(find_tokenizer(config, tasks["sft"], cache, workdir))
        policy_config = find_policy(config, tokenizer, workdir)
        encode = functools.partial(
            encode_tasks,
            tokenizer=tokenizer,
            template=config.data.template,
            max_prompt_tokens=config.data.max_prompt_tokens,
        )
        train_tasks, test_tasks = encode(tasks["train"]), encode(tasks["test"], limit=config.eval.prompts)
        step_task_ids(len(train_tasks), config.prompts_per_step, 0, seed=config.seed)
        features, num_features = find_features(config, train_tasks)
        pairs = find_pairs(config, encode(tasks["sft"]), tokenizer) if config.sft.steps else None
        shapes = jax.eval_shape(functools.partial(policy.init, policy_config), jax.random.key(0))
        shardings = tree_sharding(mesh, policy.param_axes(policy_config), shapes)
        policy_json = config_json(policy_config, policy_config.stored_dtype)
        claim_workdir(workdir, flatten(config), policy_json, tokenizer.files)
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
    score = functools.partial(score_rollouts, tokenizer, verifiers.score)
    allocate = jax.jit(
        functools.partial(budget.allocate, config.alloc.rule, n_min=config.alloc.n_min, n_max=config.alloc.n_max)
    )
    update_belief = jax.jit(
        functools.partial(budget.update, fit_discounts=config.alloc.fit_discounts), donate_argnums=0
    )
    inform, learn_prior = jax.jit(budget.inform), jax.jit(budget.learn_prior)
    advantages_of = jax.jit(
        functools.partial(
            learn.group_advantages,
            num_prompts=config.prompts_per_step,
            scale_by_std=config.loss.scale_by_std,
            clip=config.loss.advantage_clip or math.inf,
        )
    )
    place = functools.partial(jax.device_put, device=named_sharding(mesh))
    measure = functools.partial(
        evaluate,
        functools.partial(generate, temperature=config.eval.temperature, top_p=config.eval.top_p),
        score,
        encoded=test_tasks,
        key=jax.random.key(config.seed + 1),
        samples=config.eval.samples,
        num_rollouts=config.alloc.budget,
        place=place,
    )
    optimizer = make_optimizer(
        learning_rate=config.optim.learning_rate, warmup_steps=config.optim.warmup_steps,
        decay_steps=config.optim.decay_steps, beta1=config.optim.beta1,
        beta2=config.optim.beta2, weight_decay=config.optim.weight_decay, grad_clip=config.optim.grad_clip,
    )  # fmt: skip

    with (
        jax.set_mesh(mesh),
        verifiers,
        Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
    ):
        # ------------------------------------------------------------ where the run starts from
        root, first = jax.random.key(config.seed), checkpoints.latest_step()
        belief = place(
            budget.init_belief(
                len(train_tasks), discount=config.alloc.discount, discount_mixed=config.alloc.discount_mixed
            )
        )
        prior = None if config.alloc.prior == "shared" else place(budget.init_prior(config.alloc.prior, num_features))
        reference = None
        try:
            if first is None or config.loss.kl_coefficient:
                params, finished = start_params(
                    config, policy_config, mesh, shardings, pairs, cache, root, stop=stop, place=place
                )
                if not finished:
                    print("krl: stopped during supervised fine-tuning; the same command continues it")
                    return
                reference = jax.tree.map(jnp.copy, params) if config.loss.kl_coefficient else None
                state = init_state(policy_config, optimizer, params)
                del params  # the state has its own
            if first is not None:
                like = jax.tree.map(
                    lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings
                )
                like = saved(abstract_state(policy_config, optimizer, like), belief, prior)
                first, trees = checkpoints.restore(like)
                state, belief = TrainState(trees["params"], trees["opt_state"]), trees["belief"]
                prior = trees["prior"] if prior is not None else None
                print(f"krl: continuing from step {first}")
        except (ValueError, FloatingPointError) as error:
            raise SystemExit(f"train.py: {error}") from None
        first = first or 0

        # ------------------------------------------------------------ the loop
        with MetricsLog(workdir, first_step=first) as log, progress(config.steps, first, config.alloc.rule) as show:
            if first == 0 and config.eval.every:
                evaluation = measure(params=state.params)
                log.write(0, {"rollouts_total": 0} | {f"eval/{k}": v for k, v in evaluation.items()})
                show(0, f"accuracy {evaluation['accuracy']:.3f}")
            if config.steps == 0:
                checkpoints.save(0, saved(state, belief, prior))
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
                        tasks=train_tasks.tasks.take(task_ids.tolist()), temperature=config.sample.temperature,
                    )  # fmt: skip
                    before = known = budget.take(belief, prompts.task_ids)
                    if prior is not None:
                        shared_by = place(features[task_ids])
                        known = inform(prior, known, shared_by)
                    seen, pilot, rounds = known.visits > 0, 0, []
                if (
                    config.alloc.rule in budget.PILOT_RULES
                ):  # n_min rollouts of every prompt before the counts are chosen
                    pilot = config.alloc.n_min
                    rounds.append(draw(jnp.full_like(prompts.task_ids, pilot), num_rollouts=len(task_ids) * pilot))
                    pilots, outcomes, _ = rounds[0]
                    known = budget.observe(known, jnp.arange(len(task_ids)), outcomes, pilots.prompt_index, pilots.mask)
                with clock.phase("budget"):
                    counts, info = jax.block_until_ready(allocate(known, config.alloc.budget))
                    believed = budget.mean(known)  # the belief's buffers are given away below
                left = config.alloc.budget - len(task_ids) * pilot
                rounds.append(draw(counts - pilot, num_rollouts=left, first_sample=pilot))
                rollouts = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(drawn for drawn, _, _ in rounds))
                rewards = place(np.concatenate([got for _, got, _ in rounds]))
                faults = sum((collections.Counter(failed) for _, _, failed in rounds), collections.Counter())
                with clock.phase("update"):
                    advantages = advantages_of(rewards, rollouts.prompt_index, rollouts.mask)
                    state, learnt = policy_update(
                        policy_config, optimizer, state, prompts, rollouts, advantages, shuffle_key,
                        num_updates=config.optim.updates_per_step, micro_batch=config.optim.micro_batch,
                        temperature=config.sample.temperature, clip_low=config.loss.clip_low,
                        clip_high=config.loss.clip_high, dual_clip=config.loss.dual_clip,
                        importance_cap=config.loss.importance_cap, kl_coefficient=config.loss.kl_coefficient,
                        reference=reference,
                    )  # fmt: skip
                    if prior is not None:
                        prior = learn_prior(prior, before, shared_by, rewards, rollouts.prompt_index, rollouts.mask)
                        learnt |= budget.prior_metrics(prior, config.prompts_per_step)
                    belief = update_belief(
                        belief, prompts.task_ids, rewards, rollouts.prompt_index, rollouts.mask, step, rollouts.lengths
                    )
                    jax.block_until_ready((state, belief, prior))
                step += 1

                # ---------------------------------------------------- what the step showed
                shown = step_metrics(counts, seen, rollouts, rewards, advantages)
                metrics = {k: float(v) for k, v in (shown | learnt | info).items()}
                seconds = sum(clock.seconds.values())
                in_a_row, skipped = skipped_updates(state)
                metrics |= {f"seconds/{phase}": spent for phase, spent in clock.seconds.items()}
                metrics |= {f"verifier/{kind}": faults[kind] for kind in ("timeouts", "crashes", "errors")}
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
                    checkpoints.save(step, saved(state, belief, prior))
        if stop.is_set() and step < config.steps:
            checkpoints.save(step, saved(state, belief, prior))
            print(f"krl: stopped after step {step}; the same command continues from there")
            return

    # ---------------------------------------------------------------- what the run showed
    if config.steps == 0:
        print(f"krl: fine-tuned; the checkpoint is in {workdir / 'checkpoints'}")
        return
    print(report.write([workdir], workdir))


def sample_and_score(generate, score, clock, params, prompts, key, counts, *, tasks, **options):
    """One round of a step's rollouts, their rewards and the verifiers' faults, timed."""
    with clock.phase("rollout"):
        rollouts = jax.block_until_ready(generate(params, prompts, counts, key, **options))
    with clock.phase("verify"):
        return rollouts, *score(rollouts, tasks.prompts, tasks.answers)


def start_params(config, policy_config, mesh, shardings, pairs, cache, key, *, stop, place):
    """The parameters of the first step, and whether they are finished: False only if `stop` was set."""
    if config.policy.path:
        found, params = policy.load_hf(config.policy.path, mesh)
        if dataclasses.replace(found, **computed_by(config)) != policy_config:
            raise ValueError(f"{config.policy.path} is not what this run began from; choose another --workdir")
    else:
        params = jax.jit(functools.partial(policy.init, policy_config), out_shardings=shardings)(key)
    if pairs is None:
        return params, True
    with progress(config.sft.steps, 0, "fine-tuning") as show:
        return finetune(
            policy_config, params, pairs, cache, steps=config.sft.steps, batch_size=config.sft.batch_size,
            learning_rate=config.sft.learning_rate, warmup_steps=20, decay_steps=0, seed=config.seed,
            save_every=config.sft.save_every, max_bad_updates=config.max_bad_updates, stop=stop, place=place,
            report=lambda step, loss: show(step, f"loss {loss:.3f}"),
        )  # fmt: skip


def saved(state: TrainState, belief: budget.Belief, prior: budget.Prior | None) -> dict:
    """The trees of a checkpoint, apart so that an evaluation can read the parameters alone."""
    trees = {"params": state.params, "opt_state": state.opt_state, "belief": belief}
    return trees if prior is None else trees | {"prior": prior}


def make_verifiers(config: ConfigDict) -> VerifierPool:
    """The reward's worker processes."""
    limits = config.verify
    return VerifierPool(
        config.data.reward, workers=limits.workers, item_seconds=limits.item_seconds,
        batch_seconds=limits.batch_seconds, items_per_worker=limits.items_per_worker, memory_gb=limits.memory_gb,
    )  # fmt: skip


def load_task_sets(config: ConfigDict) -> dict[str, TaskSet]:
    """The tasks for "sft", "train" and "test"."""
    if config.data.source == "arithmetic":
        c = config.arithmetic
        rungs = {name: c[name] for name in ("addition", "subtraction", "multiplication", "two_step") if c[name]}
        ladder = make_ladder(rungs, {"warm": c.num_warm, "train": c.num_train, "test": c.num_test}, seed=config.seed)
        return {"sft": ladder["warm"], "train": ladder["train"], "test": ladder["test"]}
    if config.data.source == "operators":
        o = config.operators
        sizes = {"warm": o.num_warm, "train": o.num_train, "test": o.num_test}
        drawn = make_operators(sizes, seed=config.seed, num_operators=o.num_operators)
        return {"sft": drawn["warm"], "train": drawn["train"], "test": drawn["test"]}
    data, sft = config.data, config.sft
    further = [name.strip() for name in data.fields.split(",") if name.strip()]

    def read(split: str, path: str, limit: int) -> TaskSet:
        fields = further if split == "train" else ()
        if data.name in SOURCES:
            return load_named(data.name, split=split, path=path, limit=limit, fields=fields)
        return load_tasks(
            name=data.name, subset=data.subset, split=data[f"{split}_split"], path=path, prompt_field=data.prompt_field,
            answer_field=data.answer_field, completion_field=data.completion_field, limit=limit, fields=fields,
        )  # fmt: skip

    train = read("train", data.path, data.max_train)
    no_test_split = data.name in SOURCES and "test" not in SOURCES[data.name].splits
    if data.test_path or not (data.path or no_test_split):
        test = read("test", data.test_path, 0)
    else:
        kept = len(train) - min(config.eval.prompts or len(train) // 10, len(train) // 2)
        train, test = train.take(range(kept)), train.take(range(kept, len(train)))
    if not sft.path:
        return {"sft": train, "train": train, "test": test}
    pairs = load_tasks(
        name="", subset="", split="", path=sft.path, prompt_field=sft.prompt_field, answer_field="",
        completion_field=sft.completion_field, limit=0,
    )  # fmt: skip
    return {"sft": pairs, "train": train, "test": test}


def find_pairs(config: ConfigDict, encoded: EncodedTasks, tokenizer: Tokenizer) -> Pairs:
    """The rows of supervised fine-tuning."""
    if not config.sft.row_tokens:
        return encode_pairs(encoded, tokenizer, config.sample.max_new_tokens)
    pairs, left_out = pack_pairs(encoded, tokenizer, config.sft.row_tokens)
    print(f"krl: {len(encoded) - left_out} pairs for fine-tuning in {len(pairs[0])} rows, {left_out} too long")
    return pairs


def find_features(config: ConfigDict, tasks: EncodedTasks) -> tuple[np.ndarray, int]:
    """What the prior goes by: features [D, F] int32 of the training prompts, and how many different ones."""
    fields, name = tasks.tasks.fields, config.alloc.prior_field
    if config.alloc.prior == "features":
        width = config.alloc.prior_width
        return budget.hash_features(tasks.tokens, tasks.mask, fields, width=width), width
    if config.alloc.prior == "groups":
        if name not in fields:
            raise ValueError(
                f"config.alloc.prior_field={name!r} is none of the training data's fields {sorted(fields)}; "
                "name it in config.data.fields too"
            )
        return budget.number_groups(fields[name])
    return np.zeros((len(tasks), 0), np.int32), 0


def sft_cache(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The directory of the tokenizer and fine-tuned policy that belong to this config and no other."""
    decides = ("seed", "data.", "arithmetic.", "operators.", "tokenizer.", "policy.", "sft.", "sample.max_new_tokens")
    flat = {k: v for k, v in flatten(config).items() if k.startswith(decides) and k not in FREE_KEYS}
    name = hashlib.blake2b(json.dumps(flat, sort_keys=True).encode(), digest_size=6).hexdigest()
    return pathlib.Path(config.sft.dir or workdir / "sft") / name


def find_tokenizer(config: ConfigDict, tasks: TaskSet, cache: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The tokenizer of a run that has begun, or the config's, or the policy's, or one trained on the texts."""
    if (workdir / "config.json").exists():
        return workdir / "policy"
    if config.tokenizer.path or config.policy.path:
        return pathlib.Path(config.tokenizer.path or config.policy.path)
    file = cache / "tokenizer.model"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        frame = config.data.template if "{prompt}" in config.data.template else "{prompt}"
        prompts = [frame.replace("{prompt}", prompt) for prompt in tasks.prompts]
        texts = [p + c for p, c in zip(prompts, tasks.completions or tasks.prompts, strict=True)]
        size, fallback = config.tokenizer.vocab_size, config.tokenizer.byte_fallback
        train_sentencepiece(texts, file, vocab_size=size, byte_fallback=fallback)
    return file


def find_policy(config: ConfigDict, tokenizer: Tokenizer, workdir: pathlib.Path) -> policy.PolicyConfig:
    """The decoder of a run: its checkpoint's, or one of the config's sizes."""
    if config.policy.path:
        if (workdir / "config.json").exists():
            found = policy.read_config(workdir / "policy", **computed_by(config))
        else:
            found, _ = check_hf(config.policy.path, **computed_by(config))
        check_vocabulary(tokenizer, found.vocab_size)
        row = config.data.max_prompt_tokens + config.sample.max_new_tokens
        longest = json.loads(found.source).get("max_position_embeddings") or row
        if row > longest:
            print(f"krl: rows of {row} tokens are longer than the {longest} that the checkpoint was made for")
        return found
    sizes = {name: value for name, value in config.policy.items() if name != "path"}
    return policy.PolicyConfig(vocab_size=tokenizer.vocab_size, **sizes)


def computed_by(config: ConfigDict) -> dict[str, Any]:
    """The options of a decoder that are about its computation and not its checkpoint."""
    return {name: config.policy[name] for name in ("dtype", "unroll", "remat", "attention")}


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
