"""What the charts of the report are made of: a figure, a line for every run, an axis; all in Vega-Lite.

Colours are CSS variables of krl/report/page.css, so that one page serves light and dark. A specification names the rows
it draws, and the page holds each set of rows once.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from krl.report.history import Run

Rows = dict[str, list[dict]]  # what charts draw, by name

OTHER_COLOURS = 5  # of runs that the last one is compared with
SHORT = "format(datum.value, datum.value < 1000 ? '~r' : '~s')"  # 20k; each number by itself
STEPS = alt.X(  # the axis of bars that begin and end at steps
    "step:Q", title="step", axis=alt.Axis(labelExpr=SHORT, tickMinStep=1), scale=alt.Scale(nice=False, zero=False)
)
LOGARITHMIC = alt.Scale(type="log", nice=False)
LOOKS: dict[str, dict[str, Any]] = {  # of lines; what a look does not say is as in the first
    "solid": {"opacity": 1, "strokeWidth": 2, "clip": True, "point": False},
    "dashed": {"strokeDash": [4, 4]},
    "faint": {"opacity": 0.3, "strokeWidth": 1},
    "dots": {"clip": False, "point": {"size": 36, "filled": True}},
}
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
    "legend": {"disable": True},  # the page has its own
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


class Lines(NamedTuple):
    """A view with a line for every run and column."""

    columns: Mapping[str, str]  # how the lines of each look, a key of LOOKS
    title: str  # of the vertical axis
    form: str  # of its numbers, as in d3-format
    scale: Any = alt.Undefined  # of that axis
    over: tuple[str, str] = ("step", "step")  # column and title of the horizontal axis
    data: str = "steps"  # name of the rows
    reach: float = 0.0  # above 0: the vertical axis goes from 0 to the largest number, at least so far


class LineChart(NamedTuple):
    """A figure whose views are lines; `missing` is its reading where no view has a point."""

    name: str
    title: str
    reading: str
    missing: str
    views: dict[str, Lines]


def colours(runs: Sequence[Run]) -> list[str]:
    """The CSS colour of each run: the last is the one in question."""
    return [*(f"var(--run-{number % OTHER_COLOURS})" for number in range(len(runs) - 1)), "var(--run-main)"]


def run_legend(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Which colour is which run; nothing for a single one."""
    return list(zip((run["label"] for run in runs), colours(runs), strict=True)) if len(runs) > 1 else []


def colour(runs: Sequence[Run]) -> alt.Color:
    """The encoding of the column `run` as colour; a single one needs no legend."""
    scale = alt.Scale(domain=[run["label"] for run in runs], range=colours(runs))
    return alt.Color("run:N", scale=scale, legend=alt.Undefined if len(runs) > 1 else None)


def tips(*columns: Sequence[str]) -> list[alt.Tooltip]:
    """What is told under the pointer: columns with their types, and for each a format ("" for none) and a title."""
    told: list[dict[str, Any]] = [dict(zip(("shorthand", "format", "title"), each, strict=False)) for each in columns]
    return [alt.Tooltip(**{name: said for name, said in each.items() if said}) for each in told]


def whose(runs: Sequence[Run]) -> list[tuple[str]]:
    """The column for `tips` that tells runs apart; none for a single one."""
    return [("run:N",)] if len(runs) > 1 else []


def finish(chart: Any, height: int = 260) -> dict:
    """The specification of a chart, height in pixels, without what the page says once for all."""
    spec = chart.properties(width="container", height=height).to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def log_ticks(values: Sequence[float]) -> list[float]:
    """Where a logarithmic axis of some values has its lines: at powers of ten, and between where those are few."""
    low, high = min(values), max(values)
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for between in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = np.outer(powers, between).ravel()
        ticks = ticks[(low <= ticks) & (ticks <= high)]
        if len(ticks) >= 3:
            break
    return ticks.tolist() or [low]


def draw_chart(runs: Sequence[Run], rows: Rows, chart: LineChart) -> Chart:
    """A figure of lines, with the views that have a point."""
    drawn = {words: draw_lines(runs, rows, view) for words, view in chart.views.items()}
    views = {words: spec for words, spec in drawn.items() if spec is not None}
    return Chart(chart.name, chart.title, chart.reading if views else chart.missing, views, run_legend(runs))


def draw_lines(runs: Sequence[Run], rows: Rows, view: Lines) -> dict | None:
    """The specification of a view with lines; None where no row has a point. Faint lines tell no numbers."""
    over, words = view.over
    found = [row[column] for row in rows[view.data] if over in row for column in view.columns if column in row]
    if not found:
        return None
    below = alt.Axis(labelExpr=SHORT, tickMinStep=1 if over == "step" else alt.Undefined)
    ticks = log_ticks(found) if view.scale is LOGARITHMIC else alt.Undefined
    scale = alt.Scale(domain=[0, max(*found, view.reach)]) if view.reach else view.scale
    axis = alt.Axis(format=view.form, title=view.title, values=ticks)
    layers = []
    for column, look in view.columns.items():
        base = (
            alt.Chart(alt.NamedData(view.data))
            .transform_filter(f"isValid(datum.{over}) && isValid(datum.{column})")
            .encode(
                x=alt.X(f"{over}:Q", title=words, axis=below, scale=alt.Scale(nice=False)),
                y=alt.Y(f"{column}:Q", axis=axis, scale=scale),
                color=colour(runs),
            )
        )
        layers.append(base.mark_line(**LOOKS["solid"] | LOOKS[look]))
        if look != "faint":
            told = tips(*whose(runs), (f"{over}:Q", ",.0f", words), (f"{column}:Q", view.form, view.title))
            layers.append(base.mark_point(opacity=0, size=90, filled=True).encode(tooltip=told))
    return finish(alt.layer(*layers))


def view_of_each(
    runs: Sequence[Run], rows: Rows, data: str, height: int, draw: Callable[[alt.Chart, str], Any]
) -> dict[str, dict]:
    """A view for each run that has rows of a name, named by its label; the last run first."""
    having = {row["run"] for row in rows[data]}
    return {
        label: finish(draw(of_run(data, label), label), height)
        for label in (run["label"] for run in reversed(runs))
        if label in having
    }


def of_run(data: str, label: str) -> alt.Chart:
    """A chart of one run's rows of a name."""
    return alt.Chart(alt.NamedData(data)).transform_filter(f"datum.run === {json.dumps(label)}")
