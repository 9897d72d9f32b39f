"""The figures of one run, or of several side by side."""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter, ScalarFormatter

from krl.report.history import STATES, Run, counts_by_rate, series, smooth, transitions

COLOUR = "#00798c"  # of the last run, the one in question
OTHER_COLOURS = ("#8b8b8b", "#dd8a26", "#b23a48", "#5b5ea6", "#6a994e")  # of those it is compared with
STATE_COLOURS = ("#e7e5e4", "#cfd6e6", "#9fb0d3", "#637db5", "#2f4a86")  # from never to always solved
INK, FAINT = "#333333", "#8a8a8a"
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#bbbbbb",
    "ytick.color": "#bbbbbb",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#ececec",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,  # inches
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.wspace": 0.04,
    "figure.constrained_layout.hspace": 0.04,
    "savefig.dpi": 200,
}


def draw(runs: list[Run], out: pathlib.Path) -> None:
    """Write each panel as {name}.png, and figures.png of four of them."""
    panels: dict[str, Callable] = {
        "accuracy": _accuracy,
        "effective_ratio": _effective,
        "counts": _counts,
        "transitions": _transitions,
        "price": _price,
    }
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, panel in panels.items():
            figure = Figure(figsize=(4.4, 3.3))  # not pyplot's, which a notebook may be using
            axis = figure.subplots()
            panel(axis, runs)
            if name not in ("counts", "transitions"):  # they say which run is which
                _legend(figure, axis)
            figure.savefig(out / f"{name}.png")
        figure = Figure(figsize=(8, 6.2))
        axes = figure.subplots(2, 2)
        for axis, name in zip(axes.flat, ("accuracy", "effective_ratio", "counts", "transitions"), strict=True):
            panels[name](axis, runs)
        _legend(figure, axes[0, 1])
        figure.savefig(out / "figures.png")


def _coloured(runs: list[Run]) -> list[tuple[Run, str]]:
    others = [OTHER_COLOURS[number % len(OTHER_COLOURS)] for number in range(len(runs) - 1)]
    return list(zip(runs, [*others, COLOUR], strict=True))


def _legend(figure, axis) -> None:
    """Which line is which run, above the figure."""
    lines, names = axis.get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside upper left", ncols=max(1, round(3 * figure.get_figwidth() / 8)))


def _note(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=FAINT)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _accuracy(axis, runs: list[Run]) -> None:
    axis.set(title="Held-out accuracy", xlabel="rollouts spent, thousands")
    ends = []
    for run, colour in _coloured(runs):
        spent, accuracy = series(run, "eval/accuracy")
        if len(spent):
            axis.plot(spent / 1000, accuracy, color=colour, label=run["label"])
            axis.plot(spent[-1] / 1000, accuracy[-1], "o", color=colour, markersize=4.5)
            ends.append((accuracy[-1], spent[-1] / 1000, colour))
    if not ends:
        return _note(axis, "no evaluation")
    bottom, top = axis.get_ylim()
    above: dict[float, float] = {}  # the height that a label at x must have to leave the ones below it legible
    for y, x, colour in sorted(ends):
        height = max(y, above.get(x, y))
        above[x] = height + 0.07 * (top - bottom)
        axis.annotate(
            f"{y:.3f}", (x, height), (6, 0), textcoords="offset points", va="center", color=colour, weight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _effective(axis, runs: list[Run]) -> None:
    """Smoothed over a tenth of the steps."""
    for run, colour in _coloured(runs):
        steps, share = series(run, "effective_ratio_rollouts", over="step")
        if len(share):
            window = len(share) // 10 // 2 * 2 + 1  # odd
            axis.plot(steps, smooth(share, window), color=colour, linewidth=1.6, label=run["label"])
    axis.set(title="Rollouts with a gradient", xlabel="step")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _counts(axis, runs: list[Run]) -> None:
    """What the last run with uneven counts gave in its first and its last quarter: medians, and 80% of the groups."""
    uneven = [pair for pair in _coloured(runs) if any(len(set(row["counts"])) > 1 for row in pair[0]["groups"])]
    if not uneven:
        axis.set_title("Rollouts given to a prompt")
        recorded = any(run["groups"] for run in runs)
        return _note(axis, "every prompt got as many as the others" if recorded else "no record of the groups")
    run, colour = uneven[-1]
    quarter = max(1, len(run["groups"]) // 4)
    parts = (("first quarter", "o:", 0.5, run["groups"][:quarter]), ("last quarter", "o-", 1, run["groups"][-quarter:]))
    for name, line, alpha, rows in parts:
        rate, low, median, high = counts_by_rate(rows)
        axis.fill_between(rate, low, high, color=colour, alpha=0.15 * alpha, linewidth=0)
        axis.plot(rate, median, line, color=colour, alpha=alpha, markersize=3.5, label=name)
    even = np.mean(run["groups"][-1]["counts"])
    axis.axhline(even, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.text(0.5, even * 0.93, "on average", color=FAINT, ha="center", va="top", fontsize=7.5)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set(title=f"Rollouts given by {run['name']}", xlabel="believed success rate of a prompt", xlim=(0, 1))
    axis.legend(loc="upper right", title="of the steps", alignment="left")


def _transitions(axis, runs: list[Run]) -> None:
    """Where the held-out prompts were at the first and the last evaluation; one bar if all runs began alike."""
    axis.set_title("Held-out prompts by how often solved")
    known = [(run["label"], colour, transitions(run)) for run, colour in _coloured(runs)]
    tables = [(name, colour, table / table.sum()) for name, colour, table in known if table is not None]
    if not tables:
        return _note(axis, "no record of two evaluations")
    first = tables[0][2].sum(axis=1)
    alike = all(np.abs(table.sum(axis=1) - first).max() < 0.01 for _, _, table in tables)
    row = 0
    for number, (name, colour, table) in enumerate(tables):
        if number == 0 or not alike:
            _bar(axis, row, "before" if alike else f"before {name}", INK, table.sum(axis=1))
            row += 1
        _bar(axis, row, name, colour, table.sum(axis=0))
        origin = table.T.ravel()  # within each state after, by the state before
        axis.barh(row + 0.3, origin, left=np.cumsum(origin) - origin, color=STATE_COLOURS * 5, height=0.1)
        row += 1
    axis.text(1, 0.77, "thin line: what they were before", color=FAINT, fontsize=7, ha="right", va="bottom")
    patches = [Patch(color=c, label=s) for s, c in zip(STATES, STATE_COLOURS, strict=True)]
    axis.legend(
        handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, handlelength=0.9, handleheight=0.9,
        columnspacing=1.0, handletextpad=0.4,
    )  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(max(row, 4) - 0.58, -0.45), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _bar(axis, row: int, name: str, colour: str, shares: np.ndarray) -> None:
    """The shares of the five states as one bar under its name."""
    left = np.cumsum(shares) - shares
    axis.text(0, row - 0.23, name, color=colour, weight="bold", va="bottom")
    axis.barh(row, shares, left=left, color=STATE_COLOURS, height=0.4, edgecolor="white", linewidth=0.8)
    for number, share in enumerate(shares):
        if share >= 0.06:  # there is room for it
            shade = INK if number < 3 else "white"
            axis.text(
                left[number] + share / 2, row, f"{share:.0%}", ha="center", va="center", color=shade, fontsize=7.5
            )


def _price(axis, runs: list[Run]) -> None:
    """What the last rollout of each step's budget was worth, for the runs whose rule has a price."""
    for run, colour in _coloured(runs):
        steps, price = series(run, "price", over="step")
        if len(steps):
            axis.plot(steps, np.exp(price), color=colour, linewidth=1.2, label=run["label"])
            axis.set_yscale("log")
    axis.set(title="Gain of the last rollout of a step", xlabel="step")
