"""What the charts of the report are made of: a figure, a line for every run, an axis; all in Vega-Lite.

Colours are CSS variables of krl/report/page.css, so that one page serves light and dark. A specification names the rows
it draws, and the page holds each set of rows once.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from krl.report.history import Run

OTHER_COLOURS = 5  # of runs that the last one is compared with
SHORT = "format(datum.value, datum.value < 1000 ? '~r' : '~s')"  # 20k; each number by itself
LOOK = {  # what all charts have in common, as Vega's config
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "background": None,
    "view": {"stroke": None},
    "text": {"color": "var(--ink)", "fontSize": 12},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "gridColor": "var(--line)",
        "tickColor": "var(--faint)",
        "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "domain": False, "tickSize": 4,
        "labelPadding": 4, "titlePadding": 8, "labelFlush": False,
    },
    "axisX": {
        "grid": False, "labelOverlap": "greedy", "labelSeparation": 6, "tickCount": 6, "domain": True,
        "domainColor": "var(--faint)",
    },
    # The unit stands above the axis, where it is read first and takes no width.
    "axisY": {
        "ticks": False, "tickCount": 5, "titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": 0,
        "titleY": -10,
    },
    "line": {"strokeJoin": "round", "strokeCap": "round"},
}  # fmt: skip


class Chart(NamedTuple):
    """One figure of the report."""

    name: str
    title: str
    reading: str  # how to read it; where `views` is empty, why nothing is drawn
    views: dict[str, dict]  # Vega-Lite specifications by what a button says
    legend: Sequence[tuple[str, str]] = ()  # words and the CSS background of their swatch
    slider: Sequence[int] = ()  # steps that the parameter "at" goes through
    notes: Sequence[str] = ()  # numbers in words, below


def colours(runs: Sequence[Run]) -> list[str]:
    """The CSS colour of each run: the last is the one in question."""
    return [*(f"var(--run-{number % OTHER_COLOURS})" for number in range(len(runs) - 1)), "var(--run-main)"]


def run_legend(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Which colour is which run; nothing for a single one."""
    return list(zip((run["label"] for run in runs), colours(runs), strict=True)) if len(runs) > 1 else []


def colour(runs: Sequence[Run]) -> alt.Color:
    """The encoding of the column `run` as colour; the page has the legend."""
    domain = [run["label"] for run in runs]
    return alt.Color("run:N", legend=None, scale=alt.Scale(domain=domain, range=colours(runs)))


def finish(chart: Any, height: int = 260) -> dict:
    """The specification of a chart, height in pixels, without what the page says once for all."""
    spec = chart.properties(width="container", height=height).to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def labelled(run: Run, rows: Sequence[dict]) -> list[dict]:
    """Rows that say whose they are."""
    return [{"run": run["label"], **row} for row in rows]


def has(rows: Sequence[dict], name: str) -> bool:
    """Whether some row has a column."""
    return any(name in row for row in rows)


def log_ticks(rows: Sequence[dict], *names: str) -> list[float]:
    """Where a logarithmic axis of some columns has its lines: at powers of ten, and between where those are few."""
    values = [row[name] for row in rows for name in names if row.get(name)]
    if not values:
        return []
    powers = 10.0 ** np.arange(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    for between in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [
            float(power * part) for power in powers for part in between if min(values) <= power * part <= max(values)
        ]
        if len(ticks) >= 3:
            break
    return ticks or [min(values)]


def line_of_each(
    runs: Sequence[Run], y: str, title: str, *, over: tuple[str, str] = ("step", "step"), data: str = "steps",
    form: str = ".3~g", scale: alt.Scale | None = None, ticks: Sequence[float] = (),
    dashed: bool = False, faint: bool = False, dots: bool = False,
) -> Any:  # fmt: skip
    """A layered chart with a line for every run.

    Args:
        runs: whose lines they are.
        y, title: column, and what the axis says.
        over: column and title of the horizontal axis.
        data: name of the rows.
        form: of the numbers, as in d3-format.
        scale: of the vertical axis.
        ticks: of a logarithmic axis; none for a linear one.
        dashed, faint, dots: how a line looks. A faint one tells no numbers under the pointer.
    """
    base = alt.Chart(alt.NamedData(data)).transform_filter(f"isValid(datum.{over[0]}) && isValid(datum.{y})")
    below = alt.Axis(labelExpr=SHORT, tickMinStep=1 if over[0] == "step" else alt.Undefined)
    x = alt.X(f"{over[0]}:Q", title=over[1], axis=below, scale=alt.Scale(nice=False))
    axis = alt.Axis(format=form, title=title, values=ticks or alt.Undefined)
    scale = alt.Scale(type="log", nice=False) if ticks else scale
    base = base.encode(
        x=x, y=alt.Y(y, type="quantitative", axis=axis, scale=scale or alt.Undefined), color=colour(runs)
    )
    line = base.mark_line(
        strokeDash=[4, 4] if dashed else alt.Undefined, opacity=0.3 if faint else 1, strokeWidth=1 if faint else 2,
        clip=not dots, point={"size": 36, "filled": True} if dots else False,
    )  # fmt: skip
    names = [alt.Tooltip("run:N", title="run")] if len(runs) > 1 else []
    tips = [
        *names,
        alt.Tooltip(f"{over[0]}:Q", format=",.0f", title=over[1]),
        alt.Tooltip(f"{y}:Q", format=form, title=title),
    ]
    return alt.layer(line, *([] if faint else [base.mark_point(opacity=0, size=90, filled=True).encode(tooltip=tips)]))


def view_of_each(
    runs: Sequence[Run],
    rows: Sequence[dict],
    draw: Callable[[alt.Chart, str], Any],
    data: str,
    height: int,
) -> dict:
    """A view for each run that has rows, named by its label; the last run first."""
    views = {}
    for run in reversed(runs):
        label = run["label"]
        if any(row["run"] == label for row in rows):
            mine = alt.Chart(alt.NamedData(data)).transform_filter(f"datum.run === {json.dumps(label)}")
            views[label] = finish(draw(mine, label), height)
    return views
