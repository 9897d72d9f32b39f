"""Measure a run's newest checkpoint on its held-out tasks.

    python eval.py --config configs/arithmetic.py --workdir runs/arithmetic [--config.eval.samples=32 ...]

Takes the config and work directory of a train.py run; keys of the eval section may differ. Prints one
line and writes results.json into the work directory.
"""

import functools
import json
import pathlib

import jax
from absl import app, logging

from configs.check import FREE_KEYS, check, flatten, parse_flags
from krl import budget, policy, rollout
from krl.policy.tokenizer import SentencePieceTokenizer
from krl.run.checkpoint import Checkpoints, check_workdir
from krl.run.evaluate import evaluate, score_rollouts
from krl.sharding import make_mesh, named_sharding, tree_sharding
from krl.tasks import encode_tasks
from train import CONFIG, REWARDS, WORKDIR, load_task_sets


def main(_):
    config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
    logging.set_verbosity(logging.WARNING)

    # ---------------------------------------------------------------- what to measure
    try:
        check(config, rules=list(budget.RULES), rewards=list(REWARDS))
        flat = flatten(config)
        check_workdir(workdir, flat, [*FREE_KEYS, *(key for key in flat if key.startswith("eval."))])
        mesh = make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
        tokenizer = SentencePieceTokenizer(workdir / "tokenizer.model")
        tasks = load_task_sets(config)["test"]
        encoded = encode_tasks(
            tasks, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens, limit=config.eval.prompts
        )
        policy_config = policy.PolicyConfig(vocab_size=tokenizer.vocab_size, **config.policy)
        shapes = jax.eval_shape(functools.partial(policy.init, policy_config), jax.random.key(0))
        shardings = tree_sharding(mesh, policy.param_axes(policy_config), shapes)
        like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            restored = checkpoints.restore({"params": like})
        if restored is None:
            raise ValueError(f"{workdir} holds no checkpoint yet; let train.py take {config.checkpoint.every} steps")
    except ValueError as error:
        raise SystemExit(f"eval.py: {error}") from None
    step, trees = restored

    # ---------------------------------------------------------------- measure it
    generate = functools.partial(
        rollout.generate,
        policy_config,
        max_new_tokens=config.sample.max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        temperature=config.eval.temperature,
    )
    with jax.set_mesh(mesh):
        results = evaluate(
            generate,
            functools.partial(score_rollouts, tokenizer, REWARDS[config.data.reward]),
            trees["params"],
            encoded,
            jax.random.key(config.seed + 1),
            num_prompts=config.prompts_per_step,
            samples=config.eval.samples,
            place=functools.partial(jax.device_put, device=named_sharding(mesh)),
        )
    results |= {"step": step, "tasks": len(encoded), "samples": config.eval.samples}
    (workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"step {step}: accuracy {results['accuracy']:.3f}, pass@{config.eval.samples} {results['pass_at_k']:.3f}, "
        f"{len(encoded)} tasks, mean length {results['response_length']:.1f} tokens, "
        f"{results['truncation_rate']:.1%} cut off"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
