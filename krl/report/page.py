"""The report of runs as one HTML file that needs nothing else: no network, no other file."""

import base64
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import vl_convert
from markupsafe import Markup

from krl._version import __version__
from krl.configs import default
from krl.configs.check import flatten
from krl.report import specs
from krl.report.findings import NO_SETTINGS, by_settings, faults, over_seeds, spending
from krl.report.history import Run, before_and_after, sample_rollouts, series, summary
from krl.rewards.functions import SOLVED
from krl.run.log import format_seconds

HERE = pathlib.Path(__file__).parent
NONE = "\N{EN DASH}"  # in the place of a number that is not there
SECTIONS = (  # headings and the charts under them
    ("What it learnt", ("accuracy", "differences", "flow")),
    ("The budget", ("effective", "price", "counts", "calibration", "budgets", "waiting")),
    ("How it ran", ("lengths", "mismatch", "phases")),
)
ROLLOUTS = 400  # that the page holds, of all runs together
SHOWN = ("step", "belief", "count", "reward", "advantage", "length", "fault")  # their numbers
LONGEST = 1200  # characters of a text that the page holds


def build(
    runs: Sequence[Run],
    drawn: Sequence[specs.Chart],
    rows: specs.Rows,
    table: Mapping[str, Sequence[str]],
    sentence: str,
) -> str:
    """The page of some runs.

    Args:
        runs: the last is the one in question.
        drawn, rows: their charts, from `krl.report.charts.make`.
        table: columns of the comparison by their headings, a cell a run.
        sentence: what the comparison comes to.

    Returns:
        HTML. Whatever the runs wrote is in it as text alone.
    """
    by_name = {chart.name: chart for chart in drawn}
    labels, colours, rollouts = [run["label"] for run in runs], specs.colours(runs), _rollouts(runs)
    held = {
        "runs": labels, "colours": colours, "look": specs.LOOK, "rows": rows, "rollouts": rollouts,
        "charts": [{"name": each.name, "views": each.views, "slider": each.slider} for each in drawn if each.views],
    }  # fmt: skip
    bundle, script = _bundle(), (HERE / "page.js").read_text(encoding="utf-8")
    every, differing = _settings(runs)
    several = len(runs) > 1
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template).render(
        title=" · ".join(labels) if len(runs) < 4 else f"{len(runs)} runs", about=_about(runs), runs=labels,
        tiles=[] if several else _tiles(runs[0]), table=table if several else {}, sentence=sentence, seeds=_seeds(runs),
        faults=[(run["label"], *told) for run in runs if (told := faults(run))],
        colours=colours, workdirs=[str(run["workdir"]) for run in runs], every=every, differing=differing,
        version=__version__, sampled=len(rollouts), said=[] if several else _said(runs[0]),
        sections=[(heading, [by_name[name] for name in names if name in by_name]) for heading, names in SECTIONS],
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")), bundle=Markup(bundle), script=Markup(script),
        data=Markup(embed(held)), digests=Markup(f"{_digest(bundle)} {_digest(script)}"),
    )  # fmt: skip


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script; making it takes 2 s."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if "</script" in bundle.lower():
        raise ValueError("the bundle of Vega ends its own script element; install another vl-convert-python")
    return bundle


def embed(held: Any) -> str:
    """JSON that can stand in a script element: no text in it can end the element or begin a comment.

    Numbers are rounded to five digits, and those that are not finite become null.

    >>> embed({"said": "</script><!--", "rate": 1 / 3, "none": float("nan")})
    '{"said":"\\\\u003c/script>\\\\u003c!--","rate":0.33333,"none":null}'
    """
    text = json.dumps(_plain(held), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(held: Any) -> Any:
    if isinstance(held, Mapping):
        return {key: _plain(value) for key, value in held.items()}
    if isinstance(held, list | tuple):
        return [_plain(value) for value in held]
    if isinstance(held, np.integer):
        return int(held)
    if isinstance(held, float | np.floating):
        rounded = float(f"{held:.5g}") if math.isfinite(held) else None
        return int(rounded) if rounded is not None and rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return held


def _digest(script: str) -> str:
    """What the page's security policy knows a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _about(runs: Sequence[Run]) -> list[str]:
    """What the runs were, in a line where that is the same for all; of a single one also its seed and directory."""
    lines = set()
    for run in runs:
        settings, line = run["config"], f"{run['metrics'][-1]['step']:,} steps"
        if "prompts_per_step" in settings:
            budget, prompts = settings["alloc.budget"], f"{settings['prompts_per_step']:,}"
            if settings.get("alloc.n_min") == 0:
                prompts = f"up to {budget // settings['alloc.group']:,}"
            line += f" of {prompts} prompts and {budget:,} rollouts"
        source = settings.get("data.name") or settings.get("data.path") or settings.get("data.source")
        lines.add(f"{line} on {source}" if source else line)
    if len(runs) > 1:
        return list(lines) if len(lines) == 1 else []
    seed = runs[0]["config"].get("seed")
    return [lines.pop() + ("" if seed is None else f", seed {seed}"), str(runs[0]["workdir"])]


def _rate(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.3f}"


def _tiles(run: Run) -> list[tuple[str, str]]:
    """A few large numbers: what they are, and how much."""
    numbers, (_, largest) = summary(run), series(run, "count_max")
    share, ends = numbers["effective_ratio_rollouts"], [_rate(numbers[f"{end}_accuracy"]) for end in ("first", "final")]
    found = ("found: values of a field solved more often than not", _rate(numbers["found"]))
    return [
        ("held-out accuracy, before → after", " → ".join(ends)),
        *([] if math.isnan(numbers["found"]) else [found]),
        ("rollouts with a gradient, mean", NONE if math.isnan(share) else f"{share:.0%}"),
        ("rollouts", f"{numbers['rollouts']:,.0f}"),
        ("most rollouts of a prompt in a step", f"{largest.max():,.0f}" if largest.size else NONE),
        ("time in steps", format_seconds(numbers["seconds"])),
    ]


def _seeds(runs: Sequence[Run]) -> list[list[str]]:
    """Settings that ran with several seeds: their mean accuracies and differences to the first; [] if none did."""
    lists = by_settings(runs)
    if all(len({run["config"].get("seed") for run in each}) < 2 for each in lists):
        return []
    settings = [each[0]["config"] for each in lists]
    own = {key for each in settings for key, value in each.items() if value != settings[0].get(key)} - NO_SETTINGS
    rows = []
    for each, config in zip(lists, settings, strict=True):
        ends = [end[-1]["accuracy"] for run in each if (end := spending(run))]
        name = ", ".join(f"{key}={config[key]}" for key in sorted(own & config.keys())) or config["alloc.rule"]
        found = over_seeds(lists[0], each) if each is not lists[0] else None
        between = [NONE, NONE, NONE]
        if found:
            between = [f"{found['mean']:+.4f}", f"{found['low']:+.4f} to {found['high']:+.4f}", str(found["pairs"])]
        rows.append([name, str(len(each)), _rate(float(np.mean(ends))) if ends else NONE, *between])
    return rows


def _settings(runs: Sequence[Run]) -> tuple[list, list]:
    """(every key, values as JSON, default) and those of them that differ from the default or between runs."""
    usual = flatten(default.get_config())
    names = list(dict.fromkeys([*usual, *(key for run in runs for key in run["config"])]))
    every, differing = [], []
    for name in names:
        values = [json.dumps(run["config"][name]) if name in run["config"] else NONE for run in runs]
        row = (name, values, json.dumps(usual[name]) if name in usual else NONE)
        every.append(row)
        differing += [row] if any(value not in (row[2], NONE) for value in values) else []
    differing.sort(key=lambda row: len(set(row[1])) == 1)  # what differs between runs comes first
    return every, differing


def _said(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(cut(prompt), [(word, cut(text)) for word, text in ends]) for prompt, ends in before_and_after(run)]


def _rollouts(runs: Sequence[Run]) -> list[dict]:
    """Some rollouts of every run as the page's table shows them."""
    shown = []
    for number, run in enumerate(runs):
        for rollout in sample_rollouts(run["workdir"], ROLLOUTS // len(runs)):
            ended = "failed" if rollout["finished"] else "cut off"
            outcome = "solved" if (rollout["reward"] or 0.0) >= SOLVED else ended
            shown.append(
                {"run": number, "outcome": "fault" if rollout["fault"] else outcome}
                | {name: rollout[name] for name in SHOWN}
                | {name: cut(rollout[name]) for name in ("prompt", "answer", "response")}
                | {"reason": rollout["reason"] or ""}  # null in older logs
            )
    return sorted(shown, key=lambda rollout: -rollout["step"])


def cut(text: str, longest: int = LONGEST) -> str:
    """A text of at most so many characters and a mark in the middle that says how many are missing.

    >>> cut("abcdefgh", 4)
    'ab … 4 characters left out … gh'
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters left out … {text[-half:]}"
