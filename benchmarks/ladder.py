"""How often the warm-started policy solves the training prompts of each rung, before any reinforcement.

    python -m benchmarks.ladder --sft runs/ladder/sft [--samples 256]

Reads the warm start that a run cached with --config.sft.dir, or makes it. docs/results.md quotes the table.
"""

import argparse
import functools
import itertools
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from krl import rollout
from krl.base.types import Prompts
from krl.configs import arithmetic
from krl.eval.sample import score_rollouts
from krl.run.learner import start_params
from krl.run.setup import set_up

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

    with tempfile.TemporaryDirectory() as workdir:
        parts = set_up(config, pathlib.Path(workdir))
    tokenizer, encoded = parts.tokenizer, parts.train
    with jax.set_mesh(parts.mesh), parts.verifiers as verifiers:
        params = start_params(config, parts, lambda: False)
        generate = functools.partial(
            rollout.generate, parts.policy_config, params, max_new_tokens=config.sample.max_new_tokens,
            eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id,
        )  # fmt: skip
        rates = np.zeros(len(encoded))
        for begin in range(0, len(encoded) - AT_ONCE + 1, AT_ONCE):
            ids = np.arange(begin, begin + AT_ONCE, dtype=np.int32)
            prompts = Prompts(encoded.tokens[ids], encoded.mask[ids], ids)
            rollouts = generate(prompts, jnp.full(AT_ONCE, options.samples), jax.random.key(1))
            rewards, _ = score_rollouts(tokenizer, verifiers.score, rollouts, encoded.tasks.take(ids))
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
