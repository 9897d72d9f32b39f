"""Every way to give out rollouts, tuned alike and compared over seeds that no tuning saw.

    python -m benchmarks.study --task operators --out runs/study [--jobs 2] [--budget-minutes 60] [--only NAME ...]
    python -m benchmarks.study --task arithmetic --out runs/arithmetic

The same command goes on where it was cut off, elsewhere too: what is done is in docs/study/{task}.jsonl.

Each setting's learning rate is the one with the best mean final accuracy on the tuning seeds, from a grid that is
extended until the best is not at its end. Rates are constant: where they fall to 0, all runs stop rising when the
schedule says so, and not when they have learnt what their rollouts can teach them.

Differences are paired by seed, which decides the task, the warm start, the prompts of each step and the held-out
prompts. Rollouts to reach the baseline are counted to when the interpolated curve first touches the
baseline's final accuracy; noise makes that a little early for all, the baseline itself included.
"""

import argparse
import functools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np

from benchmarks import runs
from benchmarks.runs import Job
from krl.run.history import STATES

BASE, DOUBLE, MAIN = "uniform_256", "uniform_512", "knapsack_log_features"
RULE, PRIOR, FIELD = "alloc.rule", "alloc.prior", "alloc.prior_field"
TASKS: dict[str, dict[str, Any]] = {  # what the study changes in a task's config, and the field that names its groups
    "operators": {FIELD: "operator"},
    "arithmetic": {
        FIELD: "digits", "prompts_per_step": 32, "alloc.budget": 256, "optim.decay_steps": 0,
        "eval.samples": 2,
    },
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "uniform_128": {RULE: "uniform", PRIOR: "shared", "alloc.budget": 128},
    "uniform_256": {RULE: "uniform", PRIOR: "shared"},
    "uniform_512": {RULE: "uniform", PRIOR: "shared", "alloc.budget": 512},
    "uniform_1024": {RULE: "uniform", PRIOR: "shared", "alloc.budget": 1024},
    "knapsack_log_features": {RULE: "knapsack_log", PRIOR: "features"},
    "knapsack_log_groups": {RULE: "knapsack_log", PRIOR: "groups"},
    "knapsack_log_shared": {RULE: "knapsack_log", PRIOR: "shared"},
    "knapsack_features": {RULE: "knapsack", PRIOR: "features"},
    "knapsack_groups": {RULE: "knapsack", PRIOR: "groups"},
    "knapsack_shared": {RULE: "knapsack", PRIOR: "shared"},
    "knapsack_paper": {RULE: "knapsack_paper", PRIOR: "shared"},
    "vip_features": {RULE: "vip", PRIOR: "features"},
    "vip_process": {RULE: "vip", PRIOR: "gaussian_process"},  # as published: its own predictor, on the same features
    "variance_features": {RULE: "variance", PRIOR: "features"},
    "variance_shared": {RULE: "variance", PRIOR: "shared"},
    "inverse_sqrt_features": {RULE: "inverse_sqrt", PRIOR: "features"},
    "two_round": {RULE: "two_round", PRIOR: "features"},
    "skip": {RULE: "skip", PRIOR: "shared"},
    "oracle": {RULE: "knapsack_log", PRIOR: "features", "alloc.scouts": 32},  # 1024 more rollouts a step, not counted
}
RATES, EXTENSIONS = (3e-4, 6e-4, 1.2e-3, 2.4e-3), 2
TUNING_SEEDS = (0, 1, 2)
DRAWN = {
    BASE: "#7f7f7f", DOUBLE: "#2f2f2f", "knapsack_paper": "#edae49", "vip_features": "#d1495b",
    "knapsack_features": "#8d6fc0", MAIN: "#00798c", "inverse_sqrt_features": "#2e7d32",
}  # fmt: skip

MakeJob = Callable[[str, float, int], Job]  # (setting, learning rate, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="operators")
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), metavar="NAME", help=f"settings, beside {BASE}")
    parser.add_argument("--seeds", type=int, nargs=2, default=(100, 111), metavar=("FIRST", "LAST"))
    options, changes = runs.parse(parser)
    options.results = options.results or pathlib.Path(f"docs/study/{options.task}.jsonl")
    make = functools.partial(make_job, options.task, changes)
    names = [name for name in SETTINGS if options.only is None or name in (BASE, *options.only)]
    seeds = range(options.seeds[0], options.seeds[1] + 1)

    tune(names, make, options)
    chosen = {name: choose(name, make, runs.read_results(options.results)) for name in SETTINGS}
    runs.run_all([make(name, chosen[name], seed) for seed in seeds for name in names if chosen[name]], options)

    rows = runs.read_results(options.results)
    found: dict[str, dict[int, dict]] = {name: {} for name in SETTINGS}
    for name, rate in chosen.items():
        jobs = {seed: make(name, rate, seed).key() for seed in seeds} if rate else {}
        found[name] = {seed: rows[key] for seed, key in jobs.items() if key in rows}
    waiting = [name for name in SETTINGS if not found[name]]
    found = {name: rows for name, rows in found.items() if rows or name in (BASE, MAIN)}
    tables = [results_table(found, chosen), prior_by_value(found), cost_table(found)]
    text = "\n\n".join([*tables, transitions(found, BASE), transitions(found, MAIN)])
    text += f"\n\nnot run yet: {', '.join(waiting)}" if waiting else ""
    print(text)
    (options.out / "tables.md").write_text(text + "\n")
    draw(found, options.out / "study.png")


# ---------------------------------------------------------------- tuning


def make_job(task: str, changes: dict, name: str, rate: float, seed: int) -> Job:
    """The run of a setting with a learning rate."""
    settings = TASKS[task] | changes | SETTINGS[name] | {"optim.learning_rate": rate, "seed": seed}
    if settings[PRIOR] != "groups":
        del settings[FIELD]
    return Job(task, name, settings)


def rate_grid(score: Callable[[float], float | None]) -> list[float]:
    """The learning rates to try, ascending.

    Args:
        score: the mean final accuracy with a rate, None where it is not known yet. While all are known and the
            best is at an end, the grid grows by a factor of 2 beyond it, EXTENSIONS times at most.
    """
    rates = list(RATES)
    for _ in range(EXTENSIONS):
        known = [(got, rate) for rate in rates if (got := score(rate)) is not None]
        best = max(known)[1] if len(known) == len(rates) else None
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            break
    return rates


def grid(name: str, make: MakeJob, rows: dict[str, dict]) -> dict[float, float | None]:
    """The learning rates of a setting and their mean final accuracies on the tuning seeds, None where seeds are missing."""

    def score(rate: float) -> float | None:
        got = [rows.get(make(name, rate, seed).key()) for seed in TUNING_SEEDS]
        return statistics.mean(row["accuracy"] for row in got if row) if all(got) else None

    return {rate: score(rate) for rate in rate_grid(score)}


def choose(name: str, make: MakeJob, rows: dict[str, dict]) -> float | None:
    """The best learning rate that is known, None if none is."""
    known = {rate: score for rate, score in grid(name, make, rows).items() if score is not None}
    return max(known, key=lambda rate: known[rate]) if known else None


def tune(names: Sequence[str], make: MakeJob, options: argparse.Namespace) -> None:
    """Run the grids until none grows."""
    added = True
    while added:
        rows = runs.read_results(options.results)
        tried = [(name, rate) for name in names for rate in grid(name, make, rows)]
        added = runs.run_all([make(name, rate, seed) for seed in TUNING_SEEDS for name, rate in tried], options) > 0


# ---------------------------------------------------------------- tables and figure

Found = dict[str, dict[int, dict]]  # setting -> seed -> row


def paired(found: Found, name: str, key: str) -> runs.Interval:
    """A setting's number less the baseline's, over the seeds that both have."""
    mine, base = found[name], found[BASE]
    return runs.interval([mine[seed][key] - base[seed][key] for seed in mine if seed in base])


def results_table(found: Found, chosen: dict[str, float | None]) -> str:
    """Accuracy, effective share and found operators of every setting."""
    less = f"less {BASE} (95%)"
    lines = [
        f"| setting | learning rate | seeds | final accuracy | {less} | effective share | {less} | first pass | found | dead |",
        "|---" * 10 + "|",
    ]
    for name, rows in found.items():
        rate = f"{chosen[name]:g}" if chosen[name] else ""
        means = [_mean(rows, key) for key in ("accuracy", "effective", "effective_first_pass", "found", "dead")]
        gains = [_signed(paired(found, name, key)) for key in ("accuracy", "effective")]
        lines.append(_line(name, rate, len(rows), means[0], gains[0], means[1], gains[1], *means[2:]))
    return "\n".join(lines)


def prior_by_value(found: Found) -> str:
    """What a better prior and a better value are worth apart: gains in accuracy, rules down and priors across."""
    priors = ("shared", "groups", "features")
    lines = [
        f"Accuracy less {BASE}'s, mean +- standard error, by value and prior:\n",
        _line("value", *priors),
        "|---" * 4 + "|",
    ]
    for rule in dict.fromkeys(settings[RULE] for settings in SETTINGS.values()):
        gains = {
            SETTINGS[name][PRIOR]: paired(found, name, "accuracy")
            for name in found
            if SETTINGS[name][RULE] == rule and set(SETTINGS[name]) <= {RULE, PRIOR} and name != BASE
        }
        cells = [
            f"{gains[prior].mean:+.3f} +- {gains[prior].error:.3f}" if prior in gains and gains[prior].n > 1 else ""
            for prior in priors
        ]
        if any(cells):
            lines.append(_line(rule, *cells))
    return "\n".join(lines)


def cost_table(found: Found) -> str:
    """What it took to reach the baseline, seed by seed."""
    lines = [
        f"What reaching {BASE}'s final accuracy of the same seed took, as a share of all that it spent:\n",
        "| setting | seeds | rollouts, median | mean of those that did | never did | tokens, median | seconds, median |",
        "|---" * 7 + "|",
    ]
    for name, rows in found.items():
        pairs = [(row, found[BASE][seed]) for seed, row in rows.items() if seed in found[BASE]]
        rollouts, tokens, seconds = (
            [runs.spent_by(row, base["accuracy"], column) / base["curve"][-1][column] for row, base in pairs]
            for column in (runs.ROLLOUTS, runs.TOKENS, runs.SECONDS)
        )
        did = [share for share in rollouts if share < float("inf")]
        medians = [_number(statistics.median(shares)) if pairs else "" for shares in (rollouts, tokens, seconds)]
        mean = _number(statistics.mean(did)) if did else ""
        lines.append(_line(name, len(pairs), medians[0], mean, len(pairs) - len(did), *medians[1:]))
    return "\n".join(lines)


def transitions(found: Found, name: str) -> str:
    """Where held-out prompts went from the first evaluation to the last."""
    tables = [np.array(row["transitions"]) for row in found[name].values() if "transitions" in row]
    counts = sum(tables, np.zeros((len(STATES), len(STATES))))
    lines = [
        f"{name}, held-out prompts from the first evaluation (rows) to the last (columns), shares of a row:\n",
        _line("solved", "prompts", *STATES),
        "|---" * 7 + "|",
    ]
    for kind, row in zip(STATES, counts, strict=True):
        lines.append(_line(kind, f"{row.sum():.0f}", *(f"{share:.3f}" for share in row / max(row.sum(), 1))))
    return "\n".join(lines)


def _line(*cells) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _mean(rows: dict[int, dict], key: str) -> str:
    values = [row[key] for row in rows.values() if key in row]
    return _number(statistics.mean(values)) if values else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if value < float("inf") else "never"


def _signed(gain) -> str:
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" if gain.n > 1 else ""


def draw(found: Found, file: pathlib.Path) -> None:
    """Mean accuracy over rollouts, tokens and seconds, with a band of its standard error."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    curves = {name: np.array([row["curve"] for row in found[name].values()]) for name in DRAWN if found.get(name)}
    units = {
        runs.ROLLOUTS: ("rollouts, thousands", 1e3),
        runs.TOKENS: ("tokens, thousands", 1e3),
        runs.SECONDS: ("seconds", 1.0),
    }
    for axes, (column, (label, unit)) in zip(panels, units.items(), strict=True):
        for name in sorted(curves, key=lambda name: -curves[name][:, -1, runs.ACCURACY].mean()):
            spent, accuracy = curves[name][:, :, column].mean(axis=0) / unit, curves[name][:, :, runs.ACCURACY]
            mean, error = accuracy.mean(axis=0), accuracy.std(axis=0, ddof=len(accuracy) > 1) / len(accuracy) ** 0.5
            axes.plot(spent, mean, color=DRAWN[name], label=name, linestyle="--" if name == DOUBLE else "-")
            axes.fill_between(spent, mean - error, mean + error, color=DRAWN[name], alpha=0.18, linewidth=0)
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0].set(ylabel="held-out accuracy")
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
