"""Budgets that choose their prompts against uniform ones and published rules, over seeds that no tuning saw.

    python -m benchmarks.study --task operators --out runs/study [--jobs 2] [--budget-minutes 60] [--only NAME ...]

The same command goes on where it was cut off, elsewhere too: what is done is in docs/study/{task}.jsonl.
docs/results.md has the protocol, which was written before the runs.

Every setting is tuned alike, on seeds that are not reported: the learning rate first, then the weight of the KL penalty
at the best rate, each over a grid that grows until the best is not at its end. The variants of the operators task take
what was chosen on operators. Learning rates are constant: where they fall to 0, all runs stop rising when the schedule
says so, and not when they have learnt what their rollouts can teach them.

Differences are paired by seed, which decides the task, the warm start, the order of the prompts and the held-out
prompts. Rollouts to reach the baseline are counted to when the interpolated curve first touches the baseline's final
accuracy; noise makes that a little early for all, the baseline itself included.
"""

import argparse
import functools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

from benchmarks import runs
from benchmarks.runs import Job
from krl.report.history import STATES

RATE, PENALTY, RULE, PRIOR, PROMPTS, BUDGET = (
    "optim.learning_rate", "loss.kl_coefficient", "alloc.rule", "alloc.prior", "prompts_per_step", "alloc.budget",
)  # fmt: skip
TASKS: dict[str, tuple[str, dict[str, Any]]] = {  # a file of configs/, and what is changed in it
    "operators": ("operators", {}),
    "quarter": ("operators", {"operators.impossible": 0.25}),
    "half": ("operators", {"operators.impossible": 0.5}),
    "wrong": ("operators", {"operators.wrong": 0.05}),
    "solved": ("operators", {"operators.shown_well": 0.8}),
    "maze": ("maze", {}),
    "arithmetic": ("arithmetic", {"optim.decay_steps": 0}),
}


def uniform(prompts: int, each: int, **more: Any) -> dict[str, Any]:
    """Uniform budgets."""
    return {RULE: "uniform", PRIOR: "shared", "alloc.n_min": 1, PROMPTS: prompts, BUDGET: prompts * each, **more}


def pool(rule: str, rollouts: int = 256, reach: float = 0.01, **more: Any) -> dict[str, Any]:
    """A rule that chooses among 128 candidates."""
    chosen = {"alloc.n_min": 0, "alloc.candidates": 128, "alloc.group": 4, "alloc.explored": 0.05, "alloc.reach": reach}
    return {RULE: rule, PRIOR: "features", BUDGET: rollouts, PROMPTS: 32, **chosen, **more}


def fixed(rule: str, **more: Any) -> dict[str, Any]:
    """A rule that gives every one of 32 prompts some of 256 rollouts."""
    return {RULE: rule, PRIOR: "features", BUDGET: 256, PROMPTS: 32, "alloc.n_min": 2, **more}


# A record of each prompt alone that keeps everything.
UNSHARED = {
    PRIOR: "shared",
    "alloc.fit_discounts": False,
    "alloc.discount": 1.0,
    "alloc.discount_mixed": 1.0,
    "alloc.fade": 1.0,
}
SPLITS = ("uniform_32x8", "uniform_64x4", "uniform_16x16")  # of the same 256 rollouts; the best of them is the baseline
SETTINGS: dict[str, dict[str, Any]] = {
    "uniform_32x8": uniform(32, 8),
    "uniform_64x4": uniform(64, 4),
    "uniform_16x16": uniform(16, 16),
    "uniform_64x8": uniform(64, 8),
    "uniform_64x16": uniform(64, 16),
    "reach": pool("reach"),
    "reach_128": pool("reach", rollouts=128),
    "knapsack_log_32": fixed("knapsack_log"),
    # What of it is the choice of prompts, the weights, and the loss.
    "reach_32": fixed("reach", **{"alloc.reach": 0.01}),
    "knapsack_log": pool("knapsack_log"),
    "odds": pool("reach", reach=0.0),
    "variance": pool("variance"),
    "inverse_sqrt_32": fixed("inverse_sqrt"),
    "reach_untilted": pool("reach", **{"loss.average": "candidates"}),
    **{
        f"{name}_{scale}": setting | {"loss.scale": scale}
        for scale in ("none", "mean")
        for name, setting in {
            "uniform_64x4": uniform(64, 4), "reach": pool("reach"), "odds": pool("reach", reach=0.0),
            "variance": pool("variance"),
        }.items()
    },
}  # fmt: skip
# Published rules, each as it was stated: docs/results.md says what had to be chosen. They are not tuned.
PUBLISHED: dict[str, dict[str, Any]] = {
    "knapsack_paper": fixed("knapsack_paper", **{PRIOR: "shared"}),
    "vip_none": fixed("vip", **{"loss.scale": "none"}),
    "mopps": pool("mopps", **UNSHARED | {"alloc.group": 8, "alloc.candidates": 512, "alloc.explored": 0.0}),
    "pilot_commit": pool("pilot_commit", **{"alloc.group": 8}),
    "reinforce_ada_none": pool("reinforce_ada", **{"loss.scale": "none"}),
    "dynamic": uniform(32, 8, **{RULE: "dynamic"}),
    "coba": fixed("coba", **{PRIOR: "shared", PROMPTS: 16}),
    "hora": fixed("hora", **{PRIOR: "shared", PROMPTS: 16, "alloc.n_min": 4}),
    "gvm_none": fixed("gvm", **{PRIOR: "shared", PROMPTS: 16, "alloc.n_min": 8, "loss.scale": "none"}),
}  # fmt: skip
CORE = tuple(SETTINGS)[:8]
SETTINGS |= PUBLISHED
UNTUNED = (  # run at CENTRE, which tuning chose for the baseline
    *PUBLISHED, "reach_32", "reach_untilted", "knapsack_log", "variance", "variance_none", "variance_mean", "odds_none",
    "odds_mean",
)  # fmt: skip
MAIN, DOUBLE, FOUR_TIMES = "reach", "uniform_64x8", "uniform_64x16"
GRIDS = {RATE: (6e-4, 1.2e-3, 2.4e-3), PENALTY: (0.0, 0.02, 0.04)}  # tuned in this order
CENTRE = {RATE: 1.2e-3, PENALTY: 0.02}
EXTENSIONS = 2  # by a factor of 2 beyond an end
TUNING_SEEDS = (0, 1, 2)
SAMPLES = 32  # of each held-out prompt at the end of a reported run
DRAWN = {
    "uniform_64x4": "#7f7f7f", DOUBLE: "#505050", FOUR_TIMES: "#111111", "knapsack_log_32": "#8d6fc0", MAIN: "#00798c",
}  # fmt: skip

MakeJob = Callable[[str, dict[str, float], int], Job]  # (setting, values of the tuned keys, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="operators")
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=CORE, metavar="NAME", help="settings")
    parser.add_argument("--seeds", type=int, nargs=2, default=(400, 411), metavar=("FIRST", "LAST"))
    parser.add_argument("--tune", action="store_true", help="run what tuning needs, and no reported seeds")
    options, changes = runs.parse(parser)
    options.results = options.results or pathlib.Path(f"docs/study/{options.task}.jsonl")
    tuned_on = "operators" if TASKS[options.task][0] == "operators" else options.task
    at_tuning = functools.partial(make_job, tuned_on, changes | {"eval.every": 100})
    make = functools.partial(make_job, options.task, changes)
    seeds = range(options.seeds[0], options.seeds[1] + 1)

    if options.task == tuned_on:
        tune(options.only, at_tuning, options)
    tuning = runs.read_results(options.results.with_name(f"{tuned_on}.jsonl"))
    chosen = {name: choose(name, at_tuning, tuning) for name in SETTINGS}
    options.samples = SAMPLES
    if not options.tune:
        jobs = [make(name, known, seed) for seed in seeds for name in options.only if (known := chosen[name])]
        runs.run_all(jobs, options)

    rows = runs.read_results(options.results)
    found: Found = {}
    for name, values in chosen.items():
        jobs_of = {seed: make(name, values, seed).key() for seed in seeds} if values else {}
        found[name] = {seed: rows[key] for seed, key in jobs_of.items() if key in rows}
    base = max(SPLITS, key=lambda name: score(name, chosen[name] or CENTRE, at_tuning, tuning) or 0.0)
    text = "\n\n".join([tuning_table(chosen, at_tuning, tuning), *tables({k: v for k, v in found.items() if v}, base)])
    waiting = [name for name in SETTINGS if not found[name]]
    text += f"\n\nnot run yet: {', '.join(waiting)}" if waiting else ""
    print(text)
    (options.out / f"{options.task}.md").write_text(text + "\n")
    draw(found, options.out / f"{options.task}.png")


def make_job(task: str, changes: dict, name: str, values: dict[str, float], seed: int) -> Job:
    """The run of a setting with some values of the tuned keys."""
    config, variant = TASKS[task]
    return Job(config, name, variant | SETTINGS[name] | values | changes | {"seed": seed})


# ---------------------------------------------------------------- tuning


def score(name: str, values: dict[str, float], make: MakeJob, rows: dict[str, dict]) -> float | None:
    """The mean final accuracy over the tuning seeds; None where one is missing."""
    got = [rows.get(make(name, values, seed).key()) for seed in TUNING_SEEDS]
    return statistics.mean(row["accuracy"] for row in got if row) if all(got) else None


def grid(values: Sequence[float], score_of: Callable[[float], float | None]) -> list[float]:
    """The values of a key to try, ascending.

    Args:
        values: to begin with.
        score_of: the mean final accuracy with a value, None where it is not known yet. While all are known and the best
            is at an end, the grid grows by a factor of 2 beyond it, EXTENSIONS times at most; nothing is below 0.
    """
    tried = list(values)
    for _ in range(EXTENSIONS):
        known = [(got, value) for value in tried if (got := score_of(value)) is not None]
        best = max(known)[1] if len(known) == len(tried) else None
        if best == tried[-1]:
            tried.append(best * 2)
        elif best and best == tried[0]:
            tried.insert(0, best / 2)
        else:
            break
    return tried


def search(name: str, make: MakeJob, rows: dict[str, dict]) -> tuple[dict[str, float] | None, list[dict[str, float]]]:
    """(the best values of the tuned keys, None until all is known; all values that are to be tried so far)."""
    if name in UNTUNED:
        return dict(CENTRE), []
    best, wanted = dict(CENTRE), []
    for key, start in GRIDS.items():
        score_of = lambda value, key=key, best=best: score(name, best | {key: value}, make, rows)  # noqa: E731
        points = grid(start, score_of)
        wanted += [best | {key: value} for value in points]
        scores = {value: score_of(value) for value in points}
        if None in scores.values():
            return None, wanted
        best = best | {key: max(points, key=lambda value: scores[value] or 0.0)}
    return best, wanted


def choose(name: str, make: MakeJob, rows: dict[str, dict]) -> dict[str, float] | None:
    """The best values of the tuned keys, None until they are known."""
    return search(name, make, rows)[0]


def tune(names: Sequence[str], make: MakeJob, options: argparse.Namespace) -> None:
    """Run what the searches ask for until they ask for no more."""
    added = True
    while added:
        rows = runs.read_results(options.results)
        wanted = [(name, values) for name in names for values in search(name, make, rows)[1]]
        added = (
            runs.run_all([make(name, values, seed) for name, values in wanted for seed in TUNING_SEEDS], options) > 0
        )


# ---------------------------------------------------------------- tables and figure

Found = dict[str, dict[int, dict]]  # setting -> seed -> row


def tuning_table(chosen: dict[str, dict[str, float] | None], make: MakeJob, rows: dict[str, dict]) -> str:
    """What was tried on the tuning seeds; what was chosen is marked."""
    lines = [f"Mean final accuracy on the tuning seeds {TUNING_SEEDS}, by learning rate and KL weight:\n"]
    for name, best in chosen.items():
        tried = {tuple(values.values()): values for values in search(name, make, rows)[1]}
        scores = [(values, score(name, values, make, rows)) for values in tried.values()]
        cells = [
            f"{values[RATE]:g}, {values[PENALTY]:g}: {got:.3f}{' *' * (values == best)}"
            for values, got in scores
            if got is not None
        ]
        lines += [f"- {name}: {'; '.join(cells)}"] if cells else []
    return "\n".join(lines)


def tables(found: Found, base: str) -> list[str]:
    """All tables of the reported seeds; none without the baseline."""
    if base not in found:
        return []
    shown = [results_table(found, base), cost_table(found, base), pass_table(found)]
    return shown + [transitions(found, name) for name in (base, MAIN) if name in found]


def paired(found: Found, name: str, base: str, key: str = "accuracy") -> runs.Interval:
    """A setting's number less another's, over the seeds that both have."""
    mine, others = found.get(name, {}), found.get(base, {})
    return runs.interval([mine[seed][key] - others[seed][key] for seed in mine if seed in others])


def holm(probabilities: Sequence[float]) -> list[float]:
    """Holm's correction: the probabilities when the smallest of so many is named (Scandinavian J. Statistics 6, 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order, adjusted, highest = np.argsort(probabilities), [0.0] * len(probabilities), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[index]))
        adjusted[index] = highest
    return adjusted


def results_table(found: Found, base: str) -> str:
    """Accuracy of every setting, paired with the baseline and more of its rollouts; effective share, found, dead."""
    lines = [
        _line(
            "setting",
            "seeds",
            "final accuracy",
            f"less {base} (95%)",
            "Holm p",
            f"less {DOUBLE}",
            f"less {FOUR_TIMES}",
            "effective",
            "found",
            "dead",
        ),
        "|---" * 10 + "|",
    ]
    gains = {name: paired(found, name, base) for name in found if name != base}
    tested = [name for name, gain in gains.items() if gain.n > 1]
    adjusted = dict(zip(tested, holm([_probability(gains[name]) for name in tested]), strict=True))
    for name, rows in found.items():
        means = [_mean(rows, key) for key in ("accuracy", "effective", "found", "dead")]
        more = [_signed(paired(found, name, other)) if name != other else "" for other in (DOUBLE, FOUR_TIMES)]
        gain = _signed(gains[name]) if name in gains else ""
        p = f"{adjusted[name]:.3g}" if name in adjusted else ""
        lines.append(_line(name, len(rows), means[0], gain, p, *more, *means[1:]))
    return "\n".join(lines)


def _probability(gain: runs.Interval) -> float:
    """Of a mean so far from 0 by chance, by the t test on both sides."""
    return 2 * float(stats.t.sf(abs(gain.mean / gain.error), gain.n - 1)) if gain.error else float(gain.mean == 0)


def cost_table(found: Found, base: str) -> str:
    """What it took to reach the baseline, seed by seed."""
    lines = [
        f"What reaching {base}'s final accuracy of the same seed took, as a share of all that it spent:\n",
        "| setting | seeds | rollouts, median | mean of those that did | never did | tokens, median | seconds, median "
        "|",
        "|---" * 7 + "|",
    ]
    for name, rows in found.items():
        pairs = [(row, found[base][seed]) for seed, row in rows.items() if seed in found[base]]
        rollouts, tokens, seconds = (
            [runs.spent_by(row, against["accuracy"], column) / against["curve"][-1][column] for row, against in pairs]
            for column in (runs.ROLLOUTS, runs.TOKENS, runs.SECONDS)
        )
        did = [share for share in rollouts if share < float("inf")]
        medians = [_number(statistics.median(shares)) if pairs else "" for shares in (rollouts, tokens, seconds)]
        mean = _number(statistics.mean(did)) if did else ""
        lines.append(_line(name, len(pairs), medians[0], mean, len(pairs) - len(did), *medians[1:]))
    return "\n".join(lines)


def pass_table(found: Found) -> str:
    """Share of the held-out prompts that at least one of k samples solves, at the end."""
    sizes = [2**power for power in range(int(np.log2(SAMPLES)) + 1)]
    lines = [
        "Held-out pass@k at the end, means over seeds:\n",
        _line("setting", *(f"pass@{k}" for k in sizes)),
        "|---" * (1 + len(sizes)) + "|",
    ]
    for name, rows in found.items():
        measured = [row["pass"] for row in rows.values() if "pass" in row]
        lines += [_line(name, *(f"{value:.3f}" for value in np.mean(measured, axis=0)))] if measured else []
    return "\n".join(lines)


def transitions(found: Found, name: str) -> str:
    """Where held-out prompts went from the first evaluation to the last."""
    of_seeds = [np.array(row["transitions"]) for row in found[name].values() if "transitions" in row]
    counts = sum(of_seeds, np.zeros((len(STATES), len(STATES))))
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


def _signed(gain: runs.Interval) -> str:
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" if gain.n > 1 else ""


def draw(found: Found, file: pathlib.Path) -> None:
    """Mean accuracy over rollouts and tokens, with a band of its standard error."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    curves = {name: np.array([row["curve"] for row in found[name].values()]) for name in DRAWN if found.get(name)}
    units = {runs.ROLLOUTS: ("rollouts, thousands", 1e3), runs.TOKENS: ("tokens, thousands", 1e3)}
    for axes, (column, (label, unit)) in zip(panels, units.items(), strict=True):
        for name in sorted(curves, key=lambda name: -curves[name][:, -1, runs.ACCURACY].mean()):
            spent, accuracy = curves[name][:, :, column].mean(axis=0) / unit, curves[name][:, :, runs.ACCURACY]
            mean, error = accuracy.mean(axis=0), accuracy.std(axis=0, ddof=len(accuracy) > 1) / len(accuracy) ** 0.5
            style = {DOUBLE: "--", FOUR_TIMES: ":"}.get(name, "-")
            axes.plot(spent, mean, color=DRAWN[name], label=name, linestyle=style)
            axes.fill_between(spent, mean - error, mean + error, color=DRAWN[name], alpha=0.18, linewidth=0)
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0].set(ylabel="held-out accuracy")
    if curves:
        panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
