"""What a step's gradient is worth under each rule, at one checkpoint: signal, noise, and where the noise comes from.

    python train.py --config configs/operators.py --workdir runs/early --config.steps=100 --config.alloc.n_min=2
    python -m benchmarks.noise runs/early [--batches 64]

Every rule chooses counts for the same batches of prompts from the same belief, and each batch is sampled twice. Of
the update's gradient g (of the surrogate alone, without a penalty) the table has

    signal    |E g|^2, from products of different batches
    within    noise that other rollouts of the same prompts would bring, E |g - g'|^2 / 2
    between   noise that other prompts bring: the rest of E |g|^2
    per rollout   signal / (within + between) / R, less or more than uniform budgets of R have
    rise      how fast accuracy on the training prompts rises along the step that Adam takes, E[g] / sqrt(E[g^2]) in
              each parameter: its product with the gradient of accuracy, which other rollouts measure

A rule can help at once where within is a large part and rise is above that of uniform budgets. What it finds for
later steps, such as the first success of a prompt that always failed, is not in these numbers.
"""

import argparse
import functools
import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.ops import segment_sum
from ml_collections import ConfigDict

from krl import budget, learn, policy, rollout
from krl.base.masked import divide
from krl.base.types import Prompts
from krl.configs import default
from krl.eval.sample import score_rollouts
from krl.run.checkpoint import Checkpoints
from krl.run.setup import Setup, set_up

RULES = ("uniform", "knapsack", "knapsack_log", "knapsack_paper", "vip", "variance", "inverse_sqrt", "skip")


class Checkpoint(NamedTuple):
    """A run at its newest checkpoint."""

    step: int
    config: ConfigDict
    parts: Setup
    params: dict
    belief: budget.Belief
    prior: budget.Prior | None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path, help="of a run of train.py")
    parser.add_argument("--batches", type=int, default=64, help="of prompts, for every rule, at least 2")
    options = parser.parse_args()
    if options.batches < 2 or not (options.workdir / "config.json").exists():
        parser.error(
            f"need --batches of at least 2 and the work directory of a run, got {options.batches} and {options.workdir}"
        )
    run = read_checkpoint(options.workdir)
    with jax.set_mesh(run.parts.mesh), run.parts.verifiers:
        target = accuracy_gradient(run, options.batches)
        rows = {}
        for rule in RULES:
            rows[rule] = measure(run, rule, run.config.alloc.budget, options.batches, target)
        rows["uniform, twice R"] = measure(run, "uniform", 2 * run.config.alloc.budget, options.batches, target)
    print(table(rows))


def read_checkpoint(workdir: pathlib.Path) -> Checkpoint:
    """The newest checkpoint of a work directory."""
    config = default.get_config()
    config.update_from_flattened_dict(json.loads((workdir / "config.json").read_text()))
    parts = set_up(config, workdir)
    like = {"params": parts.params, "belief": budget.init_belief(len(parts.train))}
    if config.alloc.prior != "shared":
        like["prior"] = budget.init_prior(config.alloc.prior, parts.num_features)
    with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        found = checkpoints.restore(like)
    if found is None:
        raise SystemExit(f"{workdir} holds no checkpoint yet")
    return Checkpoint(found[0], config, parts, found[1]["params"], found[1]["belief"], found[1].get("prior"))


def draw_batches(run: Checkpoint, rule: str, budget_size: int, batches: int, *, first: int, repeats: int):
    """(prompts, rollouts, rewards) of batches of prompts, each `repeats` times with other rollouts."""
    config, parts = run.config, run.parts
    generate = functools.partial(
        rollout.generate, parts.policy_config, run.params, max_new_tokens=config.sample.max_new_tokens,
        eos_ids=parts.tokenizer.eos_ids, pad_id=parts.tokenizer.pad_id, temperature=config.sample.temperature,
    )  # fmt: skip
    allocate = jax.jit(functools.partial(budget.allocate, rule, n_min=config.alloc.n_min, n_max=config.alloc.n_max))
    for number in range(first, first + batches):
        ids = np.random.default_rng((config.seed, number)).choice(len(parts.train), config.prompts_per_step, False)
        prompts = Prompts(parts.train.tokens[ids], parts.train.mask[ids], ids.astype(np.int32))
        known = budget.take(run.belief, jnp.asarray(ids), run.step)
        if run.prior is not None:
            known = budget.inform(run.prior, known, jnp.asarray(parts.features[ids]))
        counts, _ = allocate(known, budget_size)
        tasks = parts.train.tasks.take(ids.tolist())
        for repeat in range(repeats):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), number), repeat)
            rollouts = generate(prompts, counts, key, num_rollouts=budget_size)
            rewards, _ = score_rollouts(parts.tokenizer, parts.verifiers.score, rollouts, tasks)
            yield prompts, rollouts, jnp.asarray(rewards)


@functools.partial(jax.jit, static_argnames=("config",))
def gradient(config: policy.PolicyConfig, params: dict, prompts: Prompts, rollouts, advantages: jax.Array, temperature):
    """The update's gradient of the surrogate, a token mean, where the policy is the one that sampled; [parameters]."""
    response = jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    tokens = jnp.concatenate([prompts.tokens[rollouts.prompt_index], rollouts.tokens], axis=1)
    mask = jnp.concatenate([prompts.mask[rollouts.prompt_index], response], axis=1)

    def loss(params):
        start = prompts.tokens.shape[1]
        logps = policy.token_logps(config, params, tokens, mask, start=start, temperature=temperature)
        total, count = learn.policy_loss(logps, jax.lax.stop_gradient(logps), advantages, response)[0]
        return divide(total, count)

    return ravel_pytree(jax.grad(loss)(params))[0]


def accuracy_gradient(run: Checkpoint, batches: int) -> np.ndarray:
    """The gradient of minus the mean success rate of the training prompts, without bias; [parameters]."""
    num_prompts, total = run.config.prompts_per_step, 0.0
    for prompts, rollouts, rewards in draw_batches(
        run, "uniform", 2 * run.config.alloc.budget, batches, first=10**6, repeats=1
    ):
        counts = segment_sum(jnp.ones_like(rewards), rollouts.prompt_index, num_prompts)
        groups = (rewards, rollouts.prompt_index, rollouts.mask, num_prompts)
        plain = learn.group_advantages(*groups, scale_by_std=False)
        plain = plain * divide(counts, counts - 1)[rollouts.prompt_index]  # leave-one-out: no bias
        # Of a token mean: advantages are weighed so that it is the mean over rollouts of a sum over their tokens.
        plain = plain * rollouts.lengths.mean()
        total = total + gradient(
            run.parts.policy_config, run.params, prompts, rollouts, plain, run.config.sample.temperature
        )
    return np.asarray(total / batches, np.float64)


def measure(run: Checkpoint, rule: str, budget_size: int, batches: int, target: np.ndarray) -> dict[str, float]:
    """The quantities of the table for one rule."""
    config, found, effective = run.config, [], []
    for prompts, rollouts, rewards in draw_batches(run, rule, budget_size, batches, first=0, repeats=2):
        groups = (rollouts.prompt_index, rollouts.mask, config.prompts_per_step)
        clip = config.loss.advantage_clip or math.inf
        scale = {"scale_by_std": config.loss.scale == "std", "scale_by_mean": config.loss.scale == "mean"}
        advantages = learn.group_advantages(rewards, *groups, **scale, clip=clip)
        effective.append(float((advantages != 0).mean()))
        longest = config.sample.max_new_tokens
        advantages = advantages * learn.token_weights(config.loss.average, rollouts.lengths, *groups, longest)
        found.append(
            np.asarray(
                gradient(run.parts.policy_config, run.params, prompts, rollouts, advantages, config.sample.temperature)
            )
        )
    pairs = np.array(found, np.float64).reshape(batches, 2, -1)
    split = split_noise(pairs, target)
    noise = split["within"] + split["between"]
    return split | {"effective": float(np.mean(effective)), "per rollout": split["signal"] / noise / budget_size}


def split_noise(pairs: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Signal, noise and rise of gradients, two of each batch of prompts. Signal and noise have no bias.

    Args:
        pairs: [batches, 2, parameters], gradients of a loss; at least two batches.
        target: [parameters], the gradient of what should fall, from other rollouts.
    """
    batches, means = len(pairs), pairs.mean(axis=1)
    signal = ((means.sum(axis=0) ** 2).sum() - (means**2).sum()) / (batches * (batches - 1))
    within = ((pairs[:, 0] - pairs[:, 1]) ** 2).sum(axis=-1).mean() / 2
    between = (pairs[:, 0] * pairs[:, 1]).sum(axis=-1).mean() - signal
    rises = divide_or_zero(means, np.sqrt((pairs**2).mean(axis=(0, 1)))) @ target
    error = rises.std(ddof=1) / batches**0.5
    return {"signal": signal, "within": within, "between": between, "rise": rises.mean(), "error": error}


def divide_or_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0: parameters that no batch moved."""
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Per rollout and rise as shares of what uniform budgets have."""
    base = rows["uniform"]
    lines = [
        "| rule | effective | signal | within | between | signal to noise, per rollout | rise | error |",
        "|---" * 8 + "|",
    ]
    for rule, row in rows.items():
        shares = (row["per rollout"] / base["per rollout"], row["rise"] / base["rise"], row["error"] / base["rise"])
        lines.append(
            f"| {rule} | {row['effective']:.3f} | {row['signal']:.3g} | {row['within']:.3g} | {row['between']:.3g} | "
            + " | ".join(f"{share:.2f}" for share in shares)
            + " |"
        )
    return "\n".join(lines) + "\n(the last three as shares of uniform budgets')"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
