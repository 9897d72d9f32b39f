"""What runs showed: figures and one short table.

    python -m krl.run.report runs/uniform runs/knapsack --out runs

compares finished runs of the same prompts, steps and rollouts.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table

from krl.run.metrics import format_seconds, read_rows

Run = dict  # {"name", "config", "metrics": rows, "groups": rows}
COLOURS = ("#7f7f7f", "#d1495b", "#00798c", "#edae49", "#30638e")


def read_run(workdir: pathlib.Path) -> Run:
    """The rows and the config that a run left in its work directory.

    Raises:
        ValueError: the directory holds no run.
    """
    metrics = read_rows(workdir / "metrics.jsonl")
    if not metrics or not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds no run; give the --workdir of a run that has taken a step")
    config = json.loads((workdir / "config.json").read_text())
    return {
        "name": config["alloc.rule"],
        "config": config,
        "metrics": metrics,
        "groups": read_rows(workdir / "groups.jsonl"),
    }


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(rollouts spent, value) at the steps that have a metric, both float64."""
    rows = [(row["rollouts_total"], row[name]) for row in run["metrics"] if row.get(name) is not None]
    return np.array([r[0] for r in rows], float), np.array([r[1] for r in rows], float)


def rollouts_to_reach(run: Run, accuracy: float) -> float | None:
    """Rollouts after which the run's evaluation accuracy reached a level, interpolated; None if never."""
    spent, reached = series(run, "eval/accuracy")
    for i in range(len(spent)):
        if reached[i] >= accuracy:
            if i == 0 or reached[i] == reached[i - 1]:
                return float(spent[i])
            part = (accuracy - reached[i - 1]) / (reached[i] - reached[i - 1])
            return float(spent[i - 1] + part * (spent[i] - spent[i - 1]))
    return None


def summary(run: Run) -> dict[str, float]:
    """The numbers of the table: means over all steps, and the last evaluation."""
    _, effective = series(run, "effective_ratio_rollouts")
    _, prompts = series(run, "effective_ratio_prompts")
    _, accuracy = series(run, "eval/accuracy")
    _, seconds = series(run, "seconds/step")
    return {
        "effective_ratio_rollouts": float(effective.mean()) if effective.size else float("nan"),
        "effective_ratio_prompts": float(prompts.mean()) if prompts.size else float("nan"),
        "first_accuracy": float(accuracy[0]) if accuracy.size else float("nan"),
        "final_accuracy": float(accuracy[-1]) if accuracy.size else float("nan"),
        "rollouts": float(max((row["rollouts_total"] for row in run["metrics"]), default=0)),
        "seconds": float(seconds.sum()),
    }


def write(workdirs: Sequence[pathlib.Path], out: pathlib.Path) -> str:
    """Write the figures of some runs and say in words how they did.

    Args:
        workdirs: of the runs; the first is the one the others are compared with.
        out: where figures.png and the single figures go.

    Returns:
        The table and the comparison as text.

    Raises:
        ValueError: a directory holds no run.
    """
    runs = [read_run(workdir) for workdir in workdirs]
    out.mkdir(parents=True, exist_ok=True)
    figures(runs, out)
    lines = [_table(runs)]
    base, first = runs[0], summary(runs[0])
    for run in runs[1:]:
        lines.append(_verdict(base["name"], first, run))
    lines.append(f"figures: {out}/figures.png")
    return "\n".join(lines)


_RATES = ("effective_ratio_rollouts", "effective_ratio_prompts", "first_accuracy", "final_accuracy")


def _table(runs: list[Run]) -> str:
    table = Table(box=None, pad_edge=False)
    headings = (
        "rule",
        "effective rollouts",
        "effective prompts",
        "accuracy before",
        "after",
        "rollouts",
        "time in steps",
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for run in runs:
        s = summary(run)
        table.add_row(
            run["name"],
            *("-" if math.isnan(s[key]) else f"{s[key]:.3f}" for key in _RATES),
            f"{s['rollouts']:,.0f}",
            format_seconds(s["seconds"]),
        )
    console = Console(width=110, file=None, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _verdict(base: str, first: dict[str, float], run: Run) -> str:
    s, name = summary(run), run["name"]
    gained = s["final_accuracy"] - first["final_accuracy"]
    outcome = (
        f"{name} won by {gained:+.3f}" if gained > 0 else f"{base} won by {-gained:+.3f}" if gained < 0 else "a draw"
    )
    text = (
        f"{outcome} in final accuracy ({s['final_accuracy']:.3f} against {first['final_accuracy']:.3f}); "
        f"effective rollouts {s['effective_ratio_rollouts'] - first['effective_ratio_rollouts']:+.3f} "
        f"({s['effective_ratio_rollouts']:.3f} against {first['effective_ratio_rollouts']:.3f})"
    )
    needed = rollouts_to_reach(run, first["final_accuracy"])
    if needed is None:
        return text + f"\n{name} never reached {base}'s final accuracy"
    share = needed / first["rollouts"] if first["rollouts"] else float("nan")
    return (
        text
        + f"\n{name} reached {base}'s final accuracy with {share:.0%} of its rollouts ({needed:,.0f} of {first['rollouts']:,.0f})"
    )


def figures(runs: list[Run], out: pathlib.Path) -> None:
    """Write effective_ratio.png, accuracy.png, counts.png, price.png, and figures.png with all four."""
    panels = {
        "effective_ratio": _draw_effective,
        "accuracy": _draw_accuracy,
        "counts": _draw_counts,
        "price": _draw_price,
    }
    for name, draw in panels.items():
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")  # not pyplot's, which a notebook may be using
        draw(figure.subplots(), runs)
        figure.savefig(out / f"{name}.png", dpi=150)
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axis, draw in zip(figure.subplots(2, 2).flat, panels.values(), strict=True):
        draw(axis, runs)
    figure.savefig(out / "figures.png", dpi=130)


def _draw_effective(axis, runs: list[Run]) -> None:
    for run, colour in zip(runs, COLOURS, strict=False):
        rows = [(r["step"], r["effective_ratio_rollouts"]) for r in run["metrics"] if "effective_ratio_rollouts" in r]
        steps, ratio = np.array(rows, float).reshape(-1, 2).T
        window = min(9, max(len(ratio), 1))
        padded = np.pad(ratio, (window // 2, window - 1 - window // 2), mode="edge") if len(ratio) else ratio
        axis.plot(steps, ratio, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, np.convolve(padded, np.ones(window) / window, "valid"), color=colour, label=run["name"])
    axis.set(xlabel="step", ylabel="share of rollouts with a gradient", ylim=(0, 1), title="Effective gradients")
    axis.legend(frameon=False, loc="lower right")
    _tidy(axis)


def _draw_accuracy(axis, runs: list[Run]) -> None:
    for run, colour in zip(runs, COLOURS, strict=False):
        spent, accuracy = series(run, "eval/accuracy")
        axis.plot(spent / 1000, accuracy, color=colour, marker="o", markersize=3, label=run["name"])
    axis.set(xlabel="rollouts spent, thousands", ylabel="held-out accuracy", title="Accuracy")
    axis.legend(frameon=False, loc="lower right")
    _tidy(axis)


def _draw_counts(axis, runs: list[Run]) -> None:
    """Counts against the belief they were given for: the last run's, at four steps."""
    run = runs[-1]
    if run["groups"]:
        chosen = sorted({int(i) for i in np.linspace(min(10, len(run["groups"]) - 1), len(run["groups"]) - 1, 4)})
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(chosen)))
        for shade, row in zip(shades, (run["groups"][i] for i in chosen), strict=True):
            axis.scatter(
                row["belief"], row["counts"], s=14, alpha=0.75, color=shade, label=f"step {row['step']}", linewidths=0
            )
        axis.legend(frameon=False)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set(
        xlabel="believed success rate", ylabel="rollouts given", xlim=(-0.02, 1.02), title=f"Budgets of {run['name']}"
    )
    _tidy(axis)


def _draw_price(axis, runs: list[Run]) -> None:
    """What the last rollout of each step's budget was worth, for the runs whose rule has a price."""
    for run, colour in zip(runs, COLOURS, strict=False):
        rows = [(row["step"], row["price"]) for row in run["metrics"] if row.get("price") is not None]
        if rows:
            steps, price = np.array(rows, float).T
            axis.plot(steps, np.exp(price), color=colour, label=run["name"])
            axis.legend(frameon=False)
            axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="gain of the last rollout", title="Price of a rollout")
    _tidy(axis)


def _tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: print the comparison and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m krl.run.report", description="Compare runs.")
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="work directories; the first is the baseline")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the figures go")
    options = parser.parse_args(arguments)
    try:
        print(write(options.workdirs, options.out))
    except ValueError as error:
        sys.exit(f"krl.run.report: {error}")


if __name__ == "__main__":
    main()
