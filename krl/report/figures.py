"""The charts of the page as PNG files: the first view of each in light colours, drawn by Vega without a browser."""

import json
import pathlib
import re
from collections.abc import Sequence

import vl_convert

from krl.report.history import Run
from krl.report.specs import LOOK, Chart, Rows

PANELS = ("accuracy", "effective", "counts", "flow")  # of figures.png
CSS = pathlib.Path(__file__).parent / "page.css"
WIDTH, SCALE = 400, 2  # pixels of a chart, and of the file for each of these
LIGHT = {  # beside what the page's charts look like
    "background": "white",
    "title": {"anchor": "start", "fontSize": 14, "offset": 14, "color": "var(--ink)"},
    "legend": {
        "orient": "top", "title": None, "offset": 34, "symbolOpacity": 1, "labelColor": "var(--ink)",
        "labelFontSize": 11, "labelLimit": 260,
    },
}  # fmt: skip
_APART = {"resolve": {"scale": {"color": "independent"}}}  # each chart has its own colours and legend


def draw(runs: Sequence[Run], drawn: Sequence[Chart], rows: Rows, out: pathlib.Path) -> None:
    """Write every chart that shows something as {name}.png, and figures.png of four of them.

    Args:
        runs: that are compared.
        drawn, rows: their charts, from `krl.report.charts.make`.
        out: directory, made if it is missing.
    """
    labels = [run["label"] for run in runs] if len(runs) > 1 else []
    shown = {chart.name: _panel(chart, labels) for chart in drawn if chart.views}
    out.mkdir(parents=True, exist_ok=True)
    for name, panel in shown.items():
        _write(panel, rows, out / f"{name}.png")
    four = [shown[name] for name in PANELS if name in shown]
    if four:
        lines = [_APART | {"hconcat": four[first : first + 2], "spacing": 40} for first in (0, 2) if four[first:]]
        _write(_APART | {"vconcat": lines, "spacing": 30}, rows, out / "figures.png")


def _panel(chart: Chart, labels: Sequence[str]) -> dict:
    """The specification of a chart's first view, with a title, which names the run if it is of one."""
    name, spec = next(iter(chart.views.items()))
    text = json.dumps({key: part for key, part in spec.items() if key != "params"})
    if chart.slider:
        text = text.replace("datum.step === at", f"datum.step === {chart.slider[-1]}")
    title = f"{chart.title}, {name}" if name in labels else chart.title
    return json.loads(text) | {"width": WIDTH, "title": title}


def _write(panel: dict, rows: Rows, path: pathlib.Path) -> None:
    """Draw a specification with the rows that it names, in the light colours of the page."""
    named = set(re.findall(r'"data": {"name": "(\w+)"}', json.dumps(panel))) & rows.keys()
    datasets = panel.get("datasets", {}) | {name: rows[name] for name in named}
    whole = panel | {"datasets": datasets, "padding": 14, "config": LOOK | LIGHT}
    light = dict(re.findall(r"(--[\w-]+): ([^;]+);", CSS.read_text(encoding="utf-8").partition("}")[0]))
    text = re.sub(r"var\((--[\w-]+)\)", lambda found: light[found[1]], json.dumps(whole))
    path.write_bytes(vl_convert.vegalite_to_png(text, scale=SCALE))
