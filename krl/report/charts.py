"""The charts of the report, each a function (runs, rows by name) -> Chart that adds the rows it draws."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np

from krl.report.findings import bin_edges, budget_map, calibration, counts_at, flow, over_prompts, spending, thin
from krl.report.history import STATES, Run
from krl.report.specs import (
    SHORT,
    Chart,
    colour,
    finish,
    has,
    labelled,
    line_of_each,
    log_ticks,
    run_legend,
    view_of_each,
)

PHASES = ("budget", "rollout", "verify", "wait", "update")
DRAWN = (
    "effective_ratio_rollouts", "smoothed", "price", "response_length_mean", "response_length_max", "truncation_rate",
    "mismatch", "mismatch_max", "staleness_mean", "staleness_max",
)  # fmt: skip
MOST_POINTS = 4000  # of the counts at chosen steps
Rows = dict[str, list[dict]]


def make(runs: Sequence[Run]) -> tuple[list[Chart], Rows]:
    """The charts of some runs, in the order of the page, and their rows by name."""
    rows: Rows = {}
    charts = [chart(runs, rows) for chart in (
        accuracy, prompt_flow, effective, budgets, counts, price, calibrations, waiting, lengths, mismatch, phases,
    )]  # fmt: skip
    if len(runs) > 1:
        charts.insert(1, differences(runs, rows))
    return charts, rows


def _steps(runs: Sequence[Run], rows: Rows) -> None:
    """The rows that most charts share: the steps, thinned."""
    if "steps" in rows:
        return
    rows["steps"] = []
    for run in runs:
        for row in thin(run):
            if "price" in row and not 0 < (price := math.exp(min(row["price"], 700))) < 1e300:
                del row["price"]  # no place on a logarithmic axis
            elif "price" in row:
                row["price"] = price
            rows["steps"].append({"run": run["label"]} | {name: row[name] for name in ("step", *DRAWN) if name in row})


def accuracy(runs: Sequence[Run], rows: Rows) -> Chart:
    """Held-out accuracy over what was spent."""
    rows["accuracy"] = [row for run in runs for row in labelled(run, spending(run))]
    views = {}
    for name, title in (
        ("rollouts", "rollouts spent"),
        ("tokens", "response tokens sampled"),
        ("seconds", "seconds in steps"),
    ):
        if has(rows["accuracy"], name):
            views[name] = finish(
                line_of_each(
                    runs, "accuracy", "accuracy", over=(name, title), data="accuracy", form=".3f",
                    scale=alt.Scale(zero=False), dots=True,
                )
            )  # fmt: skip
    reading = "Share of the held-out prompts' samples that are right; higher is better, and further left is cheaper."
    if not views:
        reading = "No evaluation was recorded."
    return Chart("accuracy", "Held-out accuracy", reading, views, run_legend(runs))


def differences(runs: Sequence[Run], rows: Rows) -> Chart:
    """Each run less the first, over the held-out prompts they share."""
    rows["differences"] = [
        {"run": run["label"], **found} for run in runs[1:] if (found := over_prompts(runs[0], run)) is not None
    ]
    title = f"Difference in accuracy to {runs[0]['label']}"
    if not rows["differences"]:
        return Chart("differences", title, "The runs share no held-out prompts with recorded evaluations.", {})
    base = alt.Chart(alt.NamedData("differences")).encode(
        y=alt.Y("run:N", axis=None, sort=[run["label"] for run in runs[1:]]), color=colour(runs)
    )
    tips = [alt.Tooltip("run:N"), alt.Tooltip("pairs:Q", title="prompts", format=",")]
    tips += [alt.Tooltip(f"{name}:Q", format="+.4f") for name in ("mean", "low", "high")]
    x = alt.X("mean:Q", title="difference in accuracy", axis=alt.Axis(format="+.3~f", tickCount=5))
    zero = alt.Chart().mark_rule(color="var(--faint)").encode(x=alt.datum(0))
    bar = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title="difference in accuracy"), x2="high:Q")
    dot = base.mark_point(filled=True, size=90, opacity=1).encode(x=x, tooltip=tips)
    name = base.mark_text(dy=-13, align="center", limit=240).encode(x=x, text="run:N")
    reading = (
        "Paired over the held-out prompts that both runs share, at their last evaluations, with 95% intervals; "
        "right of the line a run is better. The intervals are over prompts, not seeds: another seed of the same "
        "settings may differ by more."
    )
    spec = finish(alt.layer(zero, bar, dot, name), height=50 + 54 * len(rows["differences"]))
    notes = [
        f"{row['run']}: {row['mean']:+.4f}, "
        + (
            f"interval {row['low']:+.4f} to {row['high']:+.4f}, {row['pairs']:,} prompts."
            if row["pairs"] > 1
            else "one prompt."
        )
        for row in rows["differences"]
    ]
    return Chart("differences", title, reading, {"": spec}, notes=notes)


def effective(runs: Sequence[Run], rows: Rows) -> Chart:
    """The share of rollouts with a gradient."""
    _steps(runs, rows)
    views = {}
    if has(rows["steps"], "smoothed"):
        share = line_of_each(runs, "effective_ratio_rollouts", "share of rollouts", form=".0%", faint=True)
        views[""] = finish(share + line_of_each(runs, "smoothed", "share of rollouts", form=".0%"))
    reading = (
        "Rollouts whose group saw rewards that differ: only these change the policy. Bold: mean over a tenth of the "
        "run."
    )
    return Chart(
        "effective", "Rollouts with a gradient", reading if views else "No step was recorded.", views, run_legend(runs)
    )


def _bin_names() -> list[str]:
    edges = [f"{100 * edge:.0f}" for edge in bin_edges()]
    return [f"{low}\N{EN DASH}{high}%" for low, high in pairwise(edges)]


def budgets(runs: Sequence[Run], rows: Rows) -> Chart:
    """Where the budget went, by believed success rate."""
    names = _bin_names()
    rows["budgets"] = [
        {"run": run["label"], "rates": names[row["bin"]], **row} for run in runs for row in budget_map(run["groups"])
    ]
    most = float(
        np.percentile([row["share"] for row in rows["budgets"]] or [0.0], 99)
    )  # the first step knows nothing: all in one bin

    def draw(base: alt.Chart, label: str) -> alt.Chart:
        return base.mark_rect(color="var(--run-main)").encode(
            x=alt.X(
                "step:Q",
                title="step",
                axis=alt.Axis(labelExpr=SHORT, tickMinStep=1),
                scale=alt.Scale(nice=False, zero=False),
            ),
            x2="until:Q",
            y=alt.Y("rates:O", title="believed success rate", sort=names[::-1], scale=alt.Scale(domain=names[::-1])),
            fillOpacity=alt.FillOpacity(
                "share:Q", legend=None, scale=alt.Scale(domain=[0, most], range=[0.04, 1], clamp=True)
            ),
            tooltip=[
                alt.Tooltip("step:Q"),
                alt.Tooltip("rates:O", title="believed success rate"),
                alt.Tooltip("share:Q", format=".1%", title="share of the rollouts"),
                alt.Tooltip("rollouts:Q", format=","),
                alt.Tooltip("prompts:Q", format=","),
            ],
        )

    views = view_of_each(runs, rows["budgets"], draw, "budgets", 300)
    reading = (
        "Each column is a step (or a few): the darker a cell, the more of its rollouts went to prompts believed that "
        "easy."
    )
    legend = [
        (f"0 to {most:.0%} of a step's rollouts, or more", "linear-gradient(90deg, transparent, var(--run-main))")
    ]
    if not views:
        reading, legend = "The groups of the steps were not recorded (groups.jsonl).", []
    return Chart("budgets", "Where the budget went", reading, views, legend)


def counts(runs: Sequence[Run], rows: Rows) -> Chart:
    """How many rollouts a prompt got, over its believed success rate, at chosen steps."""
    steps = sorted({row["step"] for run in runs for row in run["groups"]})
    title = "Rollouts given to a prompt"
    if not steps:
        return Chart("counts", title, "The groups of the steps were not recorded (groups.jsonl).", {})
    prompts = sum(len(run["groups"][0]["counts"]) for run in runs if run["groups"])
    most = int(np.clip(MOST_POINTS // max(prompts, 1), 2, 30))
    chosen = sorted(
        {steps[number] for number in np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)}
    )
    rows["counts"] = [row for run in runs for row in labelled(run, counts_at(run["groups"], chosen))]
    given = [row["count"] for row in rows["counts"]]
    scale = (
        alt.Scale(type="symlog")
        if min(given) < 1
        else alt.Scale(type="log", base=2, domain=[min(given), max(max(given), min(given) + 1)])
    )
    at = alt.param(name="at", value=chosen[-1])
    chart = (
        alt.Chart(alt.NamedData("counts"))
        .add_params(at)
        .transform_filter("datum.step === at")
        .mark_point(filled=True, opacity=0.75)
        .encode(
            x=alt.X(
                "belief:Q", title="believed success rate", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
            ),
            y=alt.Y("count:Q", title="rollouts", scale=scale, axis=alt.Axis(format="d", tickCount=6)),
            size=alt.Size("prompts:Q", legend=None, scale=alt.Scale(domain=[1, 32], range=[40, 600], clamp=True)),
            color=colour(runs),
            tooltip=[
                *([alt.Tooltip("run:N")] if len(runs) > 1 else []),
                alt.Tooltip("belief:Q", format=".0%", title="believed success rate"),
                alt.Tooltip("count:Q", title="rollouts each"),
                alt.Tooltip("prompts:Q"),
            ],
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
    steps = {}
    for run in runs:
        bars, ribbons = flow(run)
        steps[run["label"]] = [str(step) for step in dict.fromkeys(bar["step"] for bar in bars)]
        rows["flow_bars"] += labelled(run, [bar | {"from": bar["at"] - 0.07, "to": bar["at"] + 0.07} for bar in bars])
        for number, ribbon in enumerate(ribbons):
            kept = {name: ribbon[name] for name in ("before", "after", "prompts")} | {"number": number}
            for x, side in ((0.07, ""), (0.2, ""), (0.8, "_after"), (0.93, "_after")):
                point = {"x": ribbon["at"] + x, "low": ribbon["low" + side], "high": ribbon["high" + side]}
                rows["flow_ribbons"].append({"run": run["label"], **kept, **point})
    shades = [f"var(--state-{number})" for number in range(len(STATES))]

    def draw(bars: alt.Chart, label: str) -> Any:
        ribbons = alt.Chart(alt.NamedData("flow_ribbons")).transform_filter(f"datum.run === {json.dumps(label)}")
        names = json.dumps(steps[label])
        ticks = list(range(len(steps[label])))
        x = alt.Axis(
            values=ticks,
            labelExpr=f"{names}[datum.value]",
            title="step of the evaluation",
            grid=False,
            labelOverlap=True,
        )
        y = alt.Axis(format="%", title="held-out prompts", grid=False)
        scale = alt.Scale(domain=[-0.07, len(ticks) - 0.93], nice=False)
        shade = alt.Scale(domain=list(STATES), range=shades)
        paint = lambda field: alt.Color(f"{field}:N", legend=None, scale=shade)  # noqa: E731
        many = alt.Tooltip("prompts:Q", format=",")
        return alt.layer(
            ribbons.mark_area(interpolate="monotone", opacity=0.4).encode(
                x=alt.X("x:Q", axis=x, scale=scale), y=alt.Y("low:Q", axis=y), y2="high:Q", color=paint("before"),
                detail="number:N", tooltip=[alt.Tooltip("before:N"), alt.Tooltip("after:N"), many],
            ),
            bars.mark_rect().encode(
                x=alt.X("from:Q", axis=x, scale=scale), x2="to:Q", y=alt.Y("low:Q", axis=y), y2="high:Q",
                color=paint("state"), tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("state:N", title="solved"), many],
            ),
        )  # fmt: skip

    views = view_of_each(runs, rows["flow_bars"], draw, "flow_bars", 320)
    reading = "A bar is an evaluation; a ribbon leads prompts to how often they are solved at the next one shown."
    legend = list(zip([f"{state} solved" for state in STATES], shades, strict=True))
    if not views:
        reading, legend = "Fewer than two evaluations were recorded prompt by prompt (evaluations.jsonl).", []
    return Chart("flow", "Held-out prompts by how often solved", reading, views, legend)


def price(runs: Sequence[Run], rows: Rows) -> Chart:
    """What the last rollout of a step's budget was worth."""
    _steps(runs, rows)
    views = {}
    if has(rows["steps"], "price"):
        views[""] = finish(
            line_of_each(runs, "price", "marginal gain", form=".2~g", ticks=log_ticks(rows["steps"], "price"))
        )
    reading = (
        "The smallest gain that a step still bought with a rollout: it falls as less is left to learn from these "
        "prompts."
    )
    if not views:
        reading = "The rule has no price: only knapsack rules weigh a rollout's gain."
    return Chart("price", "Price of a rollout", reading, views, run_legend(runs))


def calibrations(runs: Sequence[Run], rows: Rows) -> Chart:
    """Believed against observed success rates, of the belief and of its prior."""
    rows["calibration"], notes, views = [], [], {}
    for column, words in (("belief", "belief"), ("prior", "prior alone")):
        for run in runs:
            points, error = calibration(run["groups"], column)
            rows["calibration"] += labelled(run, [{"kind": column, **point} for point in points])
            if not math.isnan(error):
                whose = f" of {run['label']}" if len(runs) > 1 else ""
                notes.append(f"Expected calibration error of the {words}{whose}: {error:.3f}.")
    base = alt.Chart(alt.NamedData("calibration"))
    for column, words in (("belief", "belief"), ("prior", "prior alone")):
        if not any(row["kind"] == column for row in rows["calibration"]):
            continue
        mine = base.transform_filter(f"datum.kind === '{column}'").encode(
            x=alt.X(
                "believed:Q", title="believed success rate", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
            ),
            color=colour(runs),
        )
        y = alt.Axis(format="%", title="observed success rate")
        tips = [alt.Tooltip("run:N")] if len(runs) > 1 else []
        tips += [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("believed", "observed", "low", "high")]
        tips += [alt.Tooltip(f"{name}:Q", format=",") for name in ("groups", "rollouts")]
        ends = alt.Chart(alt.InlineData([{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        views[words] = finish(alt.layer(
            ends.mark_line(color="var(--faint)", strokeDash=[4, 4], strokeWidth=1).encode(x="x:Q", y="y:Q"),
            mine.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y=alt.Y("low:Q", axis=y), y2="high:Q"),
            mine.mark_point(filled=True, opacity=1).encode(
                y=alt.Y("observed:Q", axis=y, scale=alt.Scale(domain=[0, 1])), tooltip=tips,
                size=alt.Size("rollouts:Q", legend=None, scale=alt.Scale(range=[30, 300])),
            ),
        ), 320)  # fmt: skip
    reading = (
        "A dot is all rollouts given at beliefs within a bin, larger for more; on the diagonal, beliefs are right. "
        "Bars are 95% intervals. The error is the mean distance from the diagonal, every rollout alike."
    )
    if not views:
        recorded = any(run["groups"] for run in runs)
        reading = (
            "Too few groups were recorded to compare beliefs with outcomes."
            if recorded
            else "The groups of the steps were not recorded (groups.jsonl)."
        )
    elif not any(row["kind"] == "prior" for row in rows["calibration"]):
        notes.append("What the prior alone expected was not recorded.")
    return Chart("calibration", "Were the beliefs right?", reading, views, run_legend(runs), notes=notes)


def waiting(runs: Sequence[Run], rows: Rows) -> Chart:
    """How long ago prompts were sampled."""
    _steps(runs, rows)
    if not has(rows["steps"], "staleness_mean"):
        return Chart("waiting", "How long prompts wait", "How long ago prompts were sampled was not recorded.", {})
    mean, longest = (
        line_of_each(runs, name, "steps since it was sampled", form=",.4~g", dashed=name == "staleness_max")
        for name in ("staleness_mean", "staleness_max")
    )
    reading = (
        "Steps since a training prompt was last sampled, on average over all of them (solid) and at most (dashed). "
        "What waits for long may be unlearnt without being seen."
    )
    return Chart("waiting", "How long prompts wait", reading, {"": finish(mean + longest)}, run_legend(runs))


def lengths(runs: Sequence[Run], rows: Rows) -> Chart:
    """Tokens of a response, and how many were cut off."""
    _steps(runs, rows)
    views = {}
    if has(rows["steps"], "response_length_mean"):
        scale = alt.Scale(zero=True)
        longest = line_of_each(runs, "response_length_max", "tokens", form=",.4~g", scale=scale, dashed=True)
        views["tokens"] = finish(
            line_of_each(runs, "response_length_mean", "tokens", form=",.4~g", scale=scale) + longest
        )
    if has(rows["steps"], "truncation_rate"):
        most = max(row.get("truncation_rate", 0.0) for row in rows["steps"])
        scale = alt.Scale(domain=[0, max(most, 0.05)])
        views["cut off"] = finish(line_of_each(runs, "truncation_rate", "share cut off", form=".1~%", scale=scale))
    reading = (
        "Solid: mean of a step; dashed: the longest. Cut off are responses that reached the limit without an end token."
    )
    return Chart(
        "lengths", "Response lengths", reading if views else "No lengths were recorded.", views, run_legend(runs)
    )


def mismatch(runs: Sequence[Run], rows: Rows) -> Chart:
    """How far the sampler's log-probs were from the learner's."""
    _steps(runs, rows)
    title, names = "Sampler against learner", ("mismatch", "mismatch_max")
    if not has(rows["steps"], "mismatch"):
        return Chart(
            "mismatch", title, "The difference between the sampler's and the learner's log-probs was not recorded.", {}
        )
    if not any(row.get(name) or 0.0 for row in rows["steps"] for name in names):
        return Chart("mismatch", title, "Sampler and learner computed the same log-probs, to the last bit.", {})
    for row in rows["steps"]:
        for name in names:
            if not row.get(name):
                row.pop(name, None)  # a logarithmic axis has no 0
    mean, largest = (
        line_of_each(
            runs,
            name,
            "nats per token",
            form=".0e",
            ticks=log_ticks(rows["steps"], *names),
            dashed=name == "mismatch_max",
        )
        for name in names
    )
    reading = (
        "Difference of the two log-probs of a sampled token in the step's first update: mean (solid) and largest "
        "(dashed). Both run the same policy, so all of it is rounding."
    )
    return Chart("mismatch", title, reading, {"": finish(mean + largest)}, run_legend(runs))


def phases(runs: Sequence[Run], rows: Rows) -> Chart:
    """Where a step's time went."""
    rows["phases"], tops = [], {}
    for run in runs:
        totals = []
        for row in thin(run, most=120):
            low = 0.0
            for phase in PHASES:
                high = low + row.get(f"seconds/{phase}", 0.0)
                if high > low:
                    part = {"step": row["step"], "until": row["until"], "phase": phase, "low": low, "high": high}
                    rows["phases"].append({"run": run["label"], "seconds": high - low, **part})
                low = high
            totals.append(low)
        tops[run["label"]] = 1.5 * float(np.percentile(totals, 90)) if totals else 0.0
    shades = [f"var(--phase-{number})" for number in range(len(PHASES))]

    def draw(base: alt.Chart, label: str) -> alt.Chart:
        x = alt.X(
            "step:Q",
            title="step",
            axis=alt.Axis(labelExpr=SHORT, tickMinStep=1),
            scale=alt.Scale(nice=False, zero=False),
        )
        y = alt.Y(
            "low:Q",
            title="seconds a step",
            axis=alt.Axis(format="~g"),
            scale=alt.Scale(domain=[0, tops[label]], nice=False),
        )
        return base.mark_rect(clip=True).encode(
            x=x, x2="until:Q", y=y, y2="high:Q",
            color=alt.Color("phase:N", legend=None, scale=alt.Scale(domain=list(PHASES), range=shades)),
            tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("phase:N"), alt.Tooltip("seconds:Q", format=".3~g")],
        )  # fmt: skip

    views = view_of_each(runs, rows["phases"], draw, "phases", 260)
    reading = "Seconds of a step by what it was doing; evaluations and checkpoints are not in it."
    if any(row["high"] > tops[row["run"]] for row in rows["phases"]):
        reading += " Bars that reach the top are cut there: those steps compiled programs, as a rule."
    if not views:
        return Chart("phases", "Where the time went", "No times were recorded.", {})
    used = [phase for phase in PHASES if any(row["phase"] == phase for row in rows["phases"])]
    legend = [(phase, shade) for phase, shade in zip(PHASES, shades, strict=True) if phase in used]
    return Chart("phases", "Where the time went", reading, views, legend)
