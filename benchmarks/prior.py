"""Which prior predicts best: replays the groups that runs logged, in seconds, without a model.

    python -m benchmarks.prior runs/demo/uniform runs/demo/knapsack [--field operator]
    python -m benchmarks.prior --simulate gsm8k.jsonl

Before every visit of a prompt, a prior says how likely each number of successes is (a beta-binomial, with the prompt's
own discounted record); the first table is the mean logarithm of what it gave to the number that came, nats a visit,
over all visits, over first visits and over later ones. Higher is better; 0 would be foresight. The second table is that
of the features' candidates, each held fixed: memory, spread and strength. docs/budget.md quotes the first.

--simulate takes the real prompts of a file in GSM8K's format, with success rates that are made up: the logit falls
with the steps of the worked solution (which the prior does not see), scatters from prompt to prompt, and rises
slowly from step to step. It shows what text can tell where it says little.
"""

import argparse
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from krl import budget
from krl.budget import prior as priors
from krl.configs import default
from krl.hf.tokenizer import load_tokenizer
from krl.report.history import read_run
from krl.run.data import encode, load_task_sets
from krl.tasks import load_named, step_task_ids


class Logged(NamedTuple):
    """The groups of a run, and what was known of its D prompts before any of them was sampled."""

    rows: list[dict]
    tokens: np.ndarray  # [D, P] int32
    mask: np.ndarray  # [D, P] bool
    fields: dict[str, tuple[str, ...]]  # D texts each


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="*", type=pathlib.Path)
    parser.add_argument("--simulate", type=pathlib.Path, metavar="FILE", help="in GSM8K's format")
    parser.add_argument("--field", default="", help="the field that names a prompt's group; by default the first")
    parser.add_argument("--width", type=int, default=4096, help="to how many features those of a prompt are hashed")
    options = parser.parse_args()
    try:
        runs = {workdir: read_logged(workdir) for workdir in options.workdirs}
        if options.simulate:
            runs[options.simulate] = simulate(options.simulate)
    except ValueError as error:
        parser.error(str(error))
    if not runs:
        parser.error("name work directories of runs, or a file to --simulate")
    for workdir, logged in runs.items():
        print(f"\n{workdir}: {len(logged.rows)} steps, {len(logged.tokens)} prompts\n")
        print("| prior | all visits | first visits | later visits |\n|---|---|---|---|")
        for name, source, features, width in sources(logged, options.field, options.width):
            scores, first, prior = replay(logged, source, features, width)
            cells = (scores.mean(), scores[first].mean(), scores[~first].mean() if (~first).any() else np.nan)
            print(f"| {name} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
            if name == "features":
                best = prior
        print_candidates(best)


def read_logged(workdir: pathlib.Path) -> Logged:
    """The groups of a run's work directory, with its training prompts made again from its config."""
    run, config = read_run(workdir), default.get_config()
    config.update_from_flattened_dict(run["config"])
    tasks = encode(config, load_tokenizer(workdir / "policy"), load_task_sets(config)["train"])
    return Logged(run["groups"], tasks.tokens, tasks.mask, dict(tasks.tasks.fields))


def simulate(file: pathlib.Path, *, steps: int = 300, prompts: int = 64, each: int = 8, seed: int = 0) -> Logged:
    """Uniform groups of a run on the prompts of a file, with made-up success rates; words are its tokens."""
    tasks, rng = load_named("gsm8k", split="train", path=str(file)), np.random.default_rng(seed)
    words = [re.findall(r"\w+|\S", prompt.lower()) for prompt in tasks.prompts]
    numbers = {word: number for number, word in enumerate(sorted({word for prompt in words for word in prompt}))}
    longest = max(map(len, words))
    tokens = np.array([[numbers[word] for word in prompt] + [0] * (longest - len(prompt)) for prompt in words])
    mask = np.arange(longest) < np.array([len(prompt) for prompt in words])[:, None]
    lines = np.array([completion.count("\n") for completion in tasks.completions])
    logits = -1.0 * (lines - lines.mean()) + rng.normal(0, 1, len(lines))
    rows = []
    for step in range(steps):
        ids = step_task_ids(len(tasks), prompts, step, seed=seed)
        wins = rng.binomial(each, 1 / (1 + np.exp(-logits[ids] - 0.005 * step)))
        rows.append({"task_ids": ids, "counts": [each] * prompts, "successes": wins})
    return Logged(rows, tokens, mask, {})


def sources(logged: Logged, field: str, width: int):
    """(name, source, features [D, F], number of features) of the priors that this run can tell of."""
    hashed = budget.hash_features(logged.tokens, logged.mask, {}, width=width)
    yield "shared", "features", np.full((len(hashed), 1), width, np.int32), width  # no feature: the common prior
    if logged.fields:
        yield "groups", "groups", *budget.number_groups(logged.fields[field or next(iter(logged.fields))])
        told = budget.hash_features(logged.tokens, logged.mask, logged.fields, width=width)
        yield "features and fields", "features", told, width
    yield "features", "features", hashed, width
    shuffled = np.random.default_rng(0).permutation(hashed)
    yield "features, shuffled", "features", shuffled, width
    yield "gaussian_process", "gaussian_process", hashed, width


def replay(logged: Logged, source: str, features: np.ndarray, width: int):
    """Nats of every visit, whether it was the prompt's first ([visits] each), and the prior at the end."""
    belief, prior = budget.init_belief(len(logged.tokens)), budget.init_prior(source, width)
    scores, first = [], []
    # One shape for all steps: prompts without rollouts, and rollouts without a reward, are added.
    most = max(len(row["task_ids"]) for row in logged.rows)
    longest = max(sum(row["counts"]) for row in logged.rows)
    for number, row in enumerate(logged.rows):
        here = len(row["task_ids"])
        others = np.setdiff1d(np.arange(min(len(logged.tokens), 2 * most)), row["task_ids"])[: most - here]
        ids = jnp.asarray(np.concatenate([row["task_ids"], others]))
        counts = np.pad(row.get("scored", row["counts"]), (0, most - here))
        wins = np.pad(np.array(row["successes"], np.float32), (0, most - here))
        index = np.repeat(np.arange(most), counts)
        rewards = np.concatenate([np.arange(n) < w for n, w in zip(counts, wins, strict=True)])
        rewards, mask, index = (
            jnp.asarray(np.pad(part, (0, longest - len(index))))
            for part in (rewards.astype(np.float32), np.ones(len(index), bool), index)
        )
        seen, nats, belief, prior = step(
            belief, prior, jnp.asarray(features)[ids], ids, rewards, index, mask, jnp.asarray(counts),
            jnp.asarray(wins), number,
        )  # fmt: skip
        scores.append(nats[:here])
        first.append(~np.asarray(seen)[:here])
    return np.concatenate(scores), np.concatenate(first), prior


@jax.jit
def step(belief, prior, features, ids, rewards, index, mask, counts, wins, number):
    """One step of the run, judged before it is learnt from."""
    known = budget.take(belief, ids, number)
    alpha, beta = budget.posterior(budget.inform(prior, known, features))
    nats = jax.scipy.special.betaln(alpha + wins, beta + counts - wins) - jax.scipy.special.betaln(alpha, beta)
    prior = budget.learn_prior(prior, known, features, rewards, index, mask)
    belief = budget.update(belief, ids, rewards, index, mask, number, sampled=counts > 0, fit_discounts=False)
    return known.visits > 0, nats, belief, prior


def print_candidates(prior: budget.Prior) -> None:
    """The late scores of each candidate of the features, less that of the common prior; nats a step, weighted late."""
    print("\n| memory | spread | " + " | ".join(f"strength {strength:g}" for strength in priors.STRENGTHS) + " |")
    print("|---|---|" + "---|" * len(priors.STRENGTHS))
    gains = np.asarray(prior.scores - prior.shared_score) * (1 - priors.SCORE_MEMORY)
    for (memory, spread), row in zip(priors.CANDIDATES, gains, strict=True):
        print(f"| {memory} | {spread} | " + " | ".join(f"{gain:+.3f}" for gain in row) + " |")
    print("(nats a step above the common prior, averaged over the late steps)")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
