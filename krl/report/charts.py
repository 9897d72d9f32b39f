"""The charts of the report: functions (runs, rows by name) -> Chart, each of which adds the rows that it draws."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np

from krl.report.findings import bin_edges, budget_map, calibration, counts_at, flow, over_prompts, spending, thin
from krl.report.history import STATES, Run, spread
from krl.report.specs import (
    LOGARITHMIC,
    STEPS,
    Chart,
    LineChart,
    Lines,
    Rows,
    colour,
    draw_chart,
    finish,
    of_run,
    run_legend,
    tips,
    view_of_each,
    whose,
)

PHASES = ("budget", "rollout", "verify", "wait", "update")
DRAWN = (
    "effective_ratio_rollouts", "smoothed", "price", "response_length_mean", "response_length_max", "truncation_rate",
    "mismatch", "mismatch_max", "staleness_mean", "staleness_max",
)  # fmt: skip
ON_LOG_AXES = ("price", "mismatch", "mismatch_max")  # of those
MOST_POINTS = 4000  # of the counts at chosen steps
BELIEVED = "believed success rate"
NO_GROUPS = "The groups of the steps were not recorded (groups.jsonl)."
EQUAL = "Sampler and learner computed the same log-probs, to the last bit."
RATE: dict[str, Any] = {"axis": alt.Axis(format="%"), "scale": alt.Scale(domain=[0, 1])}
SPENT = {"rollouts": "rollouts spent", "tokens": "response tokens sampled", "seconds": "seconds in steps"}

LINE_CHARTS = (
    LineChart(
        "accuracy", "Held-out accuracy",
        "Share of the held-out prompts' samples that are right; higher is better, and further left is cheaper.",
        "No evaluation was recorded.",
        {
            name: Lines({"accuracy": "dots"}, "accuracy", ".3f", alt.Scale(zero=False), (name, words), data="accuracy")
            for name, words in SPENT.items()
        },
    ),
    LineChart(
        "effective", "Rollouts with a gradient",
        "Rollouts whose group saw rewards that differ: only these change the policy. Bold: mean over a tenth of the "
        "run.",
        "No step was recorded.",
        {"": Lines({"effective_ratio_rollouts": "faint", "smoothed": "solid"}, "share of rollouts", ".0%")},
    ),
    LineChart(
        "price", "Price of a rollout",
        "The smallest gain that a step still bought with a rollout: it falls as less is left to learn from these "
        "prompts.",
        "The rule has no price: only knapsack rules weigh a rollout's gain.",
        {"": Lines({"price": "solid"}, "marginal gain", ".2~g", LOGARITHMIC)},
    ),
    LineChart(
        "waiting", "How long prompts wait",
        "Steps since a training prompt was last sampled, on average over all of them (solid) and at most (dashed). "
        "What waits for long may be unlearnt without being seen.",
        "How long ago prompts were sampled was not recorded.",
        {"": Lines({"staleness_mean": "solid", "staleness_max": "dashed"}, "steps since it was sampled", ",.4~g")},
    ),
    LineChart(
        "lengths", "Response lengths",
        "Solid: mean of a step; dashed: the longest. Cut off are responses that reached the limit without an end "
        "token.",
        "No lengths were recorded.",
        {
            "tokens": Lines(
                {"response_length_mean": "solid", "response_length_max": "dashed"}, "tokens", ",.4~g",
                alt.Scale(zero=True),
            ),
            "cut off": Lines({"truncation_rate": "solid"}, "share cut off", ".1~%", reach=0.05),
        },
    ),
    LineChart(
        "mismatch", "Sampler against learner",
        "Difference of the two log-probs of a sampled token in the step's first update: mean (solid) and largest "
        "(dashed). Both run the same policy, so all of it is rounding.",
        "The difference between the sampler's and the learner's log-probs was not recorded.",
        {"": Lines({"mismatch": "solid", "mismatch_max": "dashed"}, "nats per token", ".0e", LOGARITHMIC)},
    ),
)  # fmt: skip


def make(runs: Sequence[Run]) -> tuple[list[Chart], Rows]:
    """The charts of some runs, in the order of the page, and their rows by name."""
    rows: Rows = {"accuracy": _labelled(runs, spending), "steps": _labelled(runs, _steps)}
    lines = {chart.name: draw_chart(runs, rows, chart) for chart in LINE_CHARTS}
    compared = any(row.get("mismatch") is not None for run in runs for row in run["metrics"] if row["step"])
    if compared and not lines["mismatch"].views:
        lines["mismatch"] = lines["mismatch"]._replace(reading=EQUAL)
    return [
        lines["accuracy"], *([differences(runs, rows)] if len(runs) > 1 else []), prompt_flow(runs, rows),
        lines["effective"], lines["price"], counts(runs, rows), calibrations(runs, rows), budgets(runs, rows),
        lines["waiting"], lines["lengths"], lines["mismatch"], phases(runs, rows),
    ], rows  # fmt: skip


def _labelled(runs: Sequence[Run], find: Callable[[Run], Sequence[dict]]) -> list[dict]:
    """What is found in each run, in rows that say whose they are."""
    return [{"run": run["label"], **row} for run in runs for row in find(run)]


def _steps(run: Run) -> list[dict]:
    """The thinned steps that most charts share, without what has no place on a logarithmic axis."""
    rows = []
    for row in thin(run):
        if "price" in row:
            row["price"] = math.exp(min(row["price"], 700))
        shown = [name for name in DRAWN if name in row and (name not in ON_LOG_AXES or 0 < row[name] < 1e300)]
        rows.append({name: row[name] for name in ("step", *shown)})
    return rows


def differences(runs: Sequence[Run], rows: Rows) -> Chart:
    """Each run less the first, over the held-out prompts they share."""
    labels = [run["label"] for run in runs[1:]]
    found = [over_prompts(runs[0], run) for run in runs[1:]]
    rows["differences"] = [{"run": label, **said} for label, said in zip(labels, found, strict=True) if said]
    title = f"Difference in accuracy to {runs[0]['label']}"
    if not rows["differences"]:
        return Chart("differences", title, "The runs share no held-out prompts with recorded evaluations.", {})
    low, mean = (alt.X(f"{name}:Q", title="difference in accuracy") for name in ("low", "mean"))
    base = alt.Chart(alt.NamedData("differences")).encode(
        x=mean.axis(format="+.3~f", tickCount=5), y=alt.Y("run:N", axis=None, sort=labels), color=colour(runs)
    )
    told = tips(("run:N",), ("pairs:Q", ",", "prompts"), *((f"{name}:Q", "+.4f") for name in ("mean", "low", "high")))
    layers = (
        alt.Chart().mark_rule(color="var(--faint)").encode(x=alt.datum(0)),
        base.mark_rule(strokeWidth=2).encode(x=low, x2="high:Q"),
        base.mark_point(filled=True, size=90, opacity=1).encode(tooltip=told),
        base.mark_text(dy=-13, align="center", limit=240).encode(text="run:N"),
    )
    spec = finish(alt.layer(*layers), height=50 + 54 * len(rows["differences"]))
    reading = (
        "Paired over the held-out prompts that both runs share, at their last evaluations, with 95% intervals; "
        "right of the line a run is better. The intervals are over prompts, not seeds: another seed of the same "
        "settings may differ by more."
    )
    notes = []
    for row in rows["differences"]:
        pairs = f"interval {row['low']:+.4f} to {row['high']:+.4f}, {row['pairs']:,} prompts"
        notes.append(f"{row['run']}: {row['mean']:+.4f}, {pairs if row['pairs'] > 1 else 'one prompt'}.")
    return Chart("differences", title, reading, {"": spec}, notes=notes)


def budgets(runs: Sequence[Run], rows: Rows) -> Chart:
    """Where the budget went, by believed success rate."""
    bounds = [f"{100 * edge:.0f}" for edge in bin_edges()]
    names = [f"{low}\N{EN DASH}{high}%" for low, high in pairwise(bounds)]
    rows["budgets"] = _labelled(
        runs, lambda run: [{"rates": names[row["bin"]], **row} for row in budget_map(run["groups"])]
    )
    shares = [row["share"] for row in rows["budgets"]] or [0.0]
    most = float(np.percentile(shares, 99))  # the first step knows nothing: all in one bin
    shade = alt.Scale(domain=[0, most], range=[0.04, 1], clamp=True)
    told = tips(
        ("step:Q",), ("rates:O", "", BELIEVED), ("share:Q", ".1%", "share of the rollouts"), ("rollouts:Q", ","),
        ("prompts:Q", ","),
    )  # fmt: skip

    def draw(base: alt.Chart, label: str) -> alt.Chart:
        return base.mark_rect(color="var(--run-main)").encode(
            x=STEPS, x2="until:Q",
            y=alt.Y("rates:O", title=BELIEVED, sort=names[::-1], scale=alt.Scale(domain=names[::-1])),
            fillOpacity=alt.FillOpacity("share:Q", legend=None, scale=shade), tooltip=told,
        )  # fmt: skip

    views = view_of_each(runs, rows, "budgets", 300, draw)
    reading = (
        "Each column is a step (or a few): the darker a cell, the more of its rollouts went to prompts believed that "
        "easy."
    )
    ramp = "linear-gradient(90deg, transparent, var(--run-main))"
    legend = [(f"0 to {most:.0%} of a step's rollouts, or more", ramp)]
    return Chart("budgets", "Where the budget went", reading if views else NO_GROUPS, views, legend)


def counts(runs: Sequence[Run], rows: Rows) -> Chart:
    """How many rollouts a prompt got, over its believed success rate, at chosen steps."""
    steps = sorted({row["step"] for run in runs for row in run["groups"]})
    title = "Rollouts given to a prompt"
    if not steps:
        return Chart("counts", title, NO_GROUPS, {})
    prompts = sum(len(run["groups"][0]["counts"]) for run in runs if run["groups"])
    most = int(np.clip(MOST_POINTS // max(prompts, 1), 2, 30))
    chosen = [steps[number] for number in spread(len(steps), most)]
    rows["counts"] = _labelled(runs, lambda run: counts_at(run["groups"], chosen))
    given = [row["count"] for row in rows["counts"]]
    least, largest = min(given), max(given)
    domain = [least, largest] if least < largest else [least / 2, 2 * least]
    doubling = alt.Scale(type="log", base=2, domain=domain)
    scale = alt.Scale(type="symlog") if least < 1 else doubling
    told = tips(*whose(runs), ("belief:Q", ".0%", BELIEVED), ("count:Q", "", "rollouts each"), ("prompts:Q",))
    chart = (
        alt.Chart(alt.NamedData("counts"))
        .add_params(alt.param(name="at", value=chosen[-1]))
        .transform_filter("datum.step === at")
        .mark_point(filled=True, opacity=0.75)
        .encode(
            x=alt.X("belief:Q", title=BELIEVED, **RATE),
            y=alt.Y("count:Q", title="rollouts", scale=scale, axis=alt.Axis(format="d", tickCount=6)),
            size=alt.Size("prompts:Q", legend=None, scale=alt.Scale(domain=[1, 32], range=[40, 600], clamp=True)),
            color=colour(runs),
            tooltip=told,
        )
    )
    reading = (
        "A dot is the prompts of one step with the same belief and count, larger for more prompts; move the slider "
        "through the run."
    )
    return Chart("counts", title, reading, {"": finish(chart)}, run_legend(runs), chosen)


def prompt_flow(runs: Sequence[Run], rows: Rows) -> Chart:
    """How held-out prompts moved between never and always solved."""
    rows["flow_bars"], rows["flow_ribbons"] = [], []
    steps: dict[str, list[str]] = {}
    for run in runs:
        named, (bars, ribbons) = {"run": run["label"]}, flow(run)
        steps[run["label"]] = [str(step) for step in dict.fromkeys(bar["step"] for bar in bars)]
        rows["flow_bars"] += [named | bar | {"from": bar["at"] - 0.07, "to": bar["at"] + 0.07} for bar in bars]
        for number, ribbon in enumerate(ribbons):
            kept = {name: ribbon[name] for name in ("before", "after", "prompts")} | {"number": number}
            for x, side in ((0.07, ""), (0.2, ""), (0.8, "_after"), (0.93, "_after")):
                point = {"x": ribbon["at"] + x, "low": ribbon["low" + side], "high": ribbon["high" + side]}
                rows["flow_ribbons"].append(named | kept | point)
    shades = [f"var(--state-{number})" for number in range(len(STATES))]

    def draw(bars: alt.Chart, label: str) -> Any:
        shown = len(steps[label])
        axis = alt.Axis(
            values=list(range(shown)), labelExpr=f"{json.dumps(steps[label])}[datum.value]",
            title="step of the evaluation", grid=False, labelOverlap=True,
        )  # fmt: skip
        across: dict[str, Any] = {"axis": axis, "scale": alt.Scale(domain=[-0.07, shown - 0.93], nice=False)}
        low = alt.Y("low:Q", axis=alt.Axis(format="%", title="held-out prompts", grid=False))
        paint = alt.Scale(domain=list(STATES), range=shades)
        return alt.layer(
            of_run("flow_ribbons", label).mark_area(interpolate="monotone", opacity=0.4).encode(
                x=alt.X("x:Q", **across), y=low, y2="high:Q", color=alt.Color("before:N", scale=paint),
                detail="number:N", tooltip=tips(("before:N",), ("after:N",), ("prompts:Q", ",")),
            ),
            bars.mark_rect().encode(
                x=alt.X("from:Q", **across), x2="to:Q", y=low, y2="high:Q", color=alt.Color("state:N", scale=paint),
                tooltip=tips(("step:Q",), ("state:N", "", "solved"), ("prompts:Q", ",")),
            ),
        )  # fmt: skip

    views = view_of_each(runs, rows, "flow_bars", 320, draw)
    reading = "A bar is an evaluation; a ribbon leads prompts to how often they are solved at the next one shown."
    if not views:
        reading = "Fewer than two evaluations were recorded prompt by prompt (evaluations.jsonl)."
    legend = list(zip([f"{state} solved" for state in STATES], shades, strict=True))
    return Chart("flow", "Held-out prompts by how often solved", reading, views, legend)


def calibrations(runs: Sequence[Run], rows: Rows) -> Chart:
    """Believed against observed success rates, of the belief and of its prior."""
    rows["calibration"], notes, views = [], [], {}
    observed = RATE | {"axis": alt.Axis(format="%", title="observed success rate")}
    told = tips(
        *whose(runs), *((f"{name}:Q", ".1%") for name in ("believed", "observed", "low", "high")), ("groups:Q", ","),
        ("rollouts:Q", ","),
    )  # fmt: skip
    for column, words in (("belief", "belief"), ("prior", "prior alone")):
        found = []
        for run in runs:
            points, error = calibration(run["groups"], column)
            found += [{"run": run["label"], "kind": column, **point} for point in points]
            if not math.isnan(error):
                named = f"{words} of {run['label']}" if len(runs) > 1 else words
                notes.append(f"Expected calibration error of the {named}: {error:.3f}.")
        if not found:
            continue
        rows["calibration"] += found
        ends = alt.Chart(alt.InlineData([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        base = (
            alt.Chart(alt.NamedData("calibration"))
            .transform_filter(f"datum.kind === '{column}'")
            .encode(x=alt.X("believed:Q", title=BELIEVED, **RATE), color=colour(runs))
        )
        size = alt.Size("rollouts:Q", legend=None, scale=alt.Scale(range=[30, 300]))
        views[words] = finish(alt.layer(
            ends.mark_line(color="var(--faint)", strokeDash=[4, 4], strokeWidth=1).encode(x="x:Q", y="y:Q"),
            base.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y=alt.Y("low:Q", **observed), y2="high:Q"),
            base.mark_point(filled=True, opacity=1).encode(y=alt.Y("observed:Q", **observed), size=size, tooltip=told),
        ), 320)  # fmt: skip
    reading = (
        "A dot is all rollouts given at beliefs within a bin, larger for more; on the diagonal, beliefs are right. "
        "Bars are 95% intervals. The error is the mean distance from the diagonal, every rollout alike."
    )
    if not views:
        recorded = any(run["groups"] for run in runs)
        reading = "Too few groups were recorded to compare beliefs with outcomes." if recorded else NO_GROUPS
    elif "prior alone" not in views:
        notes.append("What the prior alone expected was not recorded.")
    return Chart("calibration", "Were the beliefs right?", reading, views, run_legend(runs), notes=notes)


def phases(runs: Sequence[Run], rows: Rows) -> Chart:
    """Where a step's time went."""
    rows["phases"], tops = [], {}
    for run in runs:
        totals = []
        for row in thin(run, most=120):
            high = 0.0
            for phase in PHASES:
                low, high = high, high + row.get(f"seconds/{phase}", 0.0)
                if high > low:
                    part = {"step": row["step"], "until": row["until"], "phase": phase, "low": low, "high": high}
                    rows["phases"].append({"run": run["label"], "seconds": high - low, **part})
            totals.append(high)
        tops[run["label"]] = 1.5 * float(np.percentile(totals, 90)) if totals else 0.0
    shades = {phase: f"var(--phase-{number})" for number, phase in enumerate(PHASES)}
    colours = alt.Scale(domain=list(shades), range=list(shades.values()))

    def draw(base: alt.Chart, label: str) -> alt.Chart:
        height = alt.Scale(domain=[0, tops[label]], nice=False)
        return base.mark_rect(clip=True).encode(
            x=STEPS, x2="until:Q", y2="high:Q",
            y=alt.Y("low:Q", title="seconds a step", axis=alt.Axis(format="~g"), scale=height),
            color=alt.Color("phase:N", scale=colours),
            tooltip=tips(("step:Q",), ("phase:N",), ("seconds:Q", ".3~g")),
        )  # fmt: skip

    views = view_of_each(runs, rows, "phases", 260, draw)
    reading = "Seconds of a step by what it was doing; evaluations and checkpoints are not in it."
    if any(row["high"] > tops[row["run"]] for row in rows["phases"]):
        reading += " Bars that reach the top are cut there: those steps compiled programs, as a rule."
    used = {row["phase"] for row in rows["phases"]}
    legend = [(phase, shade) for phase, shade in shades.items() if phase in used]
    return Chart("phases", "Where the time went", reading if views else "No times were recorded.", views, legend)
