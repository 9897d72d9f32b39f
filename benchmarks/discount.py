"""Which discounts predict best: replays the groups that real runs logged.

    python -m benchmarks.discount runs/demo/uniform runs/demo/knapsack

For every visit after the first pass over the data, the belief says how likely the observed number of
successes was (a beta-binomial); the table is the mean logarithm of that, nats per visit, higher is
better. docs/results.md quotes its output.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaln

from krl import budget
from krl.report.history import read_run

# (after an even group, after a mixed one); equal numbers are a plain discount.
PAIRS = ((1.0, 1.0), (0.9, 0.9), (0.7, 0.7), (0.4, 0.4), (0.2, 0.2), (0.9, 0.5), (0.9, 0.25), (0.9, 0.1), (0.7, 0.25))


def main():
    workdirs = [pathlib.Path(name) for name in sys.argv[1:]]
    if not workdirs:
        raise ValueError("name work directories of runs")
    print("| after an even group | after a mixed group | " + " | ".join(w.name for w in workdirs) + " |")
    print("|---|---|" + "---|" * len(workdirs))
    for even, mixed in PAIRS:
        scores = [f"{predictive_log_likelihood(workdir, even, mixed):.3f}" for workdir in workdirs]
        print(f"| {even} | {mixed} | " + " | ".join(scores) + " |")


def predictive_log_likelihood(workdir: pathlib.Path, discount: float, discount_mixed: float) -> float:
    """Mean log-probability of each visit's number of successes, nats, under the belief before it."""
    rows = read_run(workdir)["groups"]
    num_tasks = 1 + max(max(row["task_ids"]) for row in rows)
    belief = budget.init_belief(num_tasks, discount=discount, discount_mixed=discount_mixed)
    scores: list[float] = []
    for row in rows:
        counts, wins = np.array(row.get("scored", row["counts"])), np.array(row["successes"])
        ids = jnp.array(row["task_ids"])
        seen = np.asarray(belief.visits[ids]) > 0
        alpha, beta = (np.asarray(x, float) for x in budget.posterior(budget.take(belief, ids)))
        log_probability = betaln(alpha + wins, beta + counts - wins) - betaln(alpha, beta)
        scores.extend(log_probability[seen])
        rewards = np.concatenate([np.arange(n) < w for n, w in zip(counts, wins, strict=True)]).astype(np.float32)
        index = np.repeat(np.arange(len(counts)), counts)
        belief = budget.update(
            belief, ids, jnp.array(rewards), jnp.array(index), jnp.ones(len(rewards), bool),
            fit_discounts=False,
        )  # fmt: skip
    return float(np.mean(scores))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.discount: {error}")
