"""Every allocation rule on the same success rates, without a model.

    python -m benchmarks.rules --out runs/rules [--logged runs/demo/uniform runs/demo/knapsack]

Prints the tables of docs/budget.md and draws docs/rules.png: synthetic rates (30% hopeless, 30% solved, all
drifting) over 20 seeds, how much the prior and the discounts matter, and the rates of real runs.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from krl import budget
from krl.budget.simulate import BINS
from krl.report.history import read_run

SIZES = {"prompts_per_step": 64, "budget": 512, "n_min": 2, "n_max": 64}
RULES = ("known", "knapsack", "two_round", "knapsack_paper", "variance", "skip", "uniform", "inverse_sqrt")
SETTINGS = (
    ("fitted", "fitted", "fitted"), ((0.5, 0.5), "fitted", "fitted"), ("fitted", 0.9, 0.9), ("fitted", 0.9, 0.25),
    ("fitted", 1.0, 1.0), ("fitted", 0.7, 0.7), ("fitted", 0.5, 0.5),
    ((0.1, 0.1), 0.9, 0.9), ((0.5, 0.5), 0.9, 0.9), ((0.5, 0.5), 0.7, 0.7), ((1.0, 1.0), 0.9, 0.9),
)  # fmt: skip


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=pathlib.Path, required=True)
    arguments.add_argument("--seeds", type=int, default=20)
    arguments.add_argument("--logged", type=pathlib.Path, nargs="*", default=[], help="work directories")
    options = arguments.parse_args()
    try:
        logged = {workdir: read_run(workdir) for workdir in options.logged}
    except ValueError as error:
        arguments.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(0), options.seeds)

    replays = {}
    for drift, trend in ((0.05, 0.003), (0.1, 0.0), (0.05, 0.01)):
        print(f"\nDrift {drift} and trend {trend} logits per step, {options.seeds} seeds\n")
        rates = jax.vmap(lambda key, d=drift, t=trend: budget.synthetic_rates(key, 1024, 320, drift=d, trend=t))(keys)
        shown = compare(rates, keys)
        replays = replays or shown
        if replays is shown:
            print(
                "\n| prior | after an even group | after a mixed one | realised value | shortfall |"
                "\n|---|---|---|---|---|"
            )
            best = replays["known"].realised.mean()
            for prior, even, mixed in SETTINGS:
                fixed = None if prior == "fitted" else prior
                held = None if even == "fitted" else (even, mixed)
                got = budget.replay("knapsack", rates, keys, prior=fixed, discounts=held, **SIZES)
                print(f"| {prior} | {even} | {mixed} | {got.realised.mean():.3f} | {best - got.realised.mean():.3f} |")
    draw(replays, options.out / "rules.png")

    for workdir in options.logged:
        config = logged[workdir]["config"]
        rates = budget.logged_rates(logged[workdir]["groups"], config[f"{config['data.source']}.num_train"])
        for discounts in (None, (0.9, 0.9), (0.9, 0.25)):
            print(f"\nRates of {workdir.name}, discounts {discounts or 'fitted'}\n")
            compare(jnp.tile(rates, (options.seeds, 1, 1)), keys, discounts=discounts)


def compare(rates, keys, **discounts) -> dict[str, budget.Replay]:
    """A row for each rule; the shortfall is against the rule that knows the rates, +- its standard error over seeds."""
    replays = {rule: budget.replay(rule, rates, keys, **discounts, **SIZES) for rule in RULES}
    best = replays["known"].realised.mean(axis=1)
    print("| rule | rollouts in mixed groups | mixed prompts | realised value | shortfall | log loss, nats |")
    print("|---|---|---|---|---|---|")
    for rule, got in replays.items():
        missed = best - got.realised.mean(axis=1)
        error = missed.std(ddof=1) / len(missed) ** 0.5
        print(
            f"| {rule} | {got.effective.mean():.3f} | {got.mixed.mean():.3f} | {got.realised.mean():.3f} "
            f"| {missed.mean():.3f} +- {error:.3f} | {got.log_loss.mean():.3f} |"
        )
    return replays


def draw(replays: dict[str, budget.Replay], file: pathlib.Path) -> None:
    """Shortfall by step, rollouts by success rate, and calibration of the belief."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    centres = (np.arange(BINS) + 0.5) / BINS
    best = replays["known"].realised.mean(axis=0)
    window = np.ones(16) / 16
    rules = ("knapsack", "known", "knapsack_paper", "variance", "skip", "uniform")
    for number, rule in enumerate(rules):
        got, colour = replays[rule], f"C{number}"
        counts = np.average(got.counts, axis=0, weights=np.maximum(got.prompts, 1e-9))
        middle.plot(centres, counts, marker=".", color=colour, label=rule)
        missed = np.convolve(best - got.realised.mean(axis=0), window, mode="valid")
        if rule != "known":
            left.plot(np.arange(len(missed)) + 16, missed, color=colour, label=rule)
    left.set(title="Value missed against known rates", xlabel="step", ylabel="sum of p(1-p)² over mixed groups", ylim=0)
    middle.set(title="Where the rollouts go", xlabel="true success rate", ylabel="rollouts per prompt", ylim=0)
    middle.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    got = replays["knapsack"]
    seen = got.believed.sum(axis=0) > 0
    rate = np.average(got.succeeded, axis=0, weights=np.maximum(got.believed, 1e-9))
    right.plot([0, 1], [0, 1], color="0.7")
    right.plot(centres[seen], rate[seen], marker="o", color="C0")
    right.set(title="Calibration of the belief", xlabel="believed success rate", ylabel="true success rate")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
