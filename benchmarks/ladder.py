"""How often the warm-started policy solves the training prompts of each rung, before any reinforcement.

    python -m benchmarks.ladder --sft runs/ladder/sft [--samples 256]

Reads the warm start that a run cached with --config.sft.dir, or makes it. docs/results.md quotes the table.
"""

import argparse
import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from krl import rollout
from krl.base.sharding import make_mesh
from krl.base.types import Prompts
from krl.configs import arithmetic
from krl.eval.sample import score_rollouts
from krl.hf.tokenizer import load_tokenizer
from krl.run import data as run_data
from krl.run import start as run_start

EDGES = (0.0, 0.005, 0.05, 0.2, 0.5, 0.8, 0.95, 1.01)
AT_ONCE = 16  # prompts a call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", default="runs/ladder/sft")
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    config = arithmetic.get_config()
    config.sft.dir = options.sft

    mesh = make_mesh(tuple(config.mesh.shape), tuple(config.mesh.axis_names))
    tasks = run_data.load_task_sets(config)
    folder = pathlib.Path(options.sft)
    tokenizer = load_tokenizer(run_start.find_tokenizer(config, tasks["sft"], folder, folder))
    pairs = run_start.find_pairs(config, run_data.encode(config, tokenizer, tasks["sft"]), tokenizer)
    policy_config = run_start.find_policy(config, tokenizer, folder)
    cache = run_start.sft_cache(folder, config, policy_config.vocab_size, pairs)
    encoded = run_data.encode(config, tokenizer, tasks["train"])
    with jax.set_mesh(mesh), run_data.make_verifiers(config) as verifiers:
        params = run_start.start_params(config, policy_config, mesh, pairs, cache, None, should_stop=lambda: False)
        generate = functools.partial(
            rollout.generate, policy_config, params, max_new_tokens=config.sample.max_new_tokens,
            eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
        )  # fmt: skip
        rates = np.zeros(len(encoded))
        for begin in range(0, len(encoded) - AT_ONCE + 1, AT_ONCE):
            ids = np.arange(begin, begin + AT_ONCE, dtype=np.int32)
            prompts = Prompts(encoded.tokens[ids], encoded.mask[ids], ids)
            rollouts = generate(prompts, jnp.full(AT_ONCE, options.samples), jax.random.key(1))
            asked = encoded.tasks.take(ids)
            rewards, _ = score_rollouts(tokenizer, verifiers.score, rollouts, asked.prompts, asked.answers)
            rates[ids] = rewards.reshape(AT_ONCE, -1).mean(axis=1)

    rungs = np.array(["".join(sorted(set(re.findall(r"[-+*]", prompt)))) for prompt in encoded.tasks.prompts])
    names = [f"{low:g} to {min(high, 1):g}" for low, high in itertools.pairwise(EDGES)]
    print("| rung | prompts | mean | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    for rung in [*sorted(set(rungs)), "all"]:
        mine = rates if rung == "all" else rates[rungs == rung]
        shares = np.histogram(mine, EDGES)[0] / len(mine)
        print(f"| `{rung}` | {len(mine)} | {mine.mean():.3f} | " + " | ".join(f"{s:.2f}" for s in shares) + " |")


if __name__ == "__main__":
    main()
