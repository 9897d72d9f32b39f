"""The numbers that the report draws, against numbers worked by hand."""

import json
import math

import numpy as np
import pytest

from krl.report import findings
from krl.report.history import read_run, read_runs
from tests.test_report import write_evaluations, write_run


def test_thinned_steps_are_means_and_keep_maxima(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    run["metrics"] = [{"step": 0, "eval/accuracy": 0.5}] + [
        {"step": step, "truncation_rate": rate, "response_length_max": longest, "price": price, "effective_ratio_rollouts": rate}
        for step, rate, longest, price in ((1, 0.1, 5, None), (2, 0.3, 9, -2.0), (3, 0.5, 7, -3.0))
    ]  # fmt: skip
    first, second = findings.thin(run, most=2)
    assert (first["step"], first["until"], second["step"], second["until"]) == (1, 3, 3, 4)
    assert (first["truncation_rate"], first["response_length_max"], first["price"]) == (pytest.approx(0.2), 9, -2.0)
    assert second["smoothed"] == 0.5  # a tenth of three steps is one
    assert len(findings.thin(run)) == 3
    run["metrics"] = run["metrics"][:1]
    assert findings.thin(run) == []


def test_spending_adds_up_tokens_and_seconds(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    step = {"seconds/step": 2.0, "tokens_per_second": 10.0}
    run["metrics"] = [
        {"step": 0, "rollouts_total": 0, "eval/accuracy": 0.1},
        {"step": 1, "rollouts_total": 8} | step,
        {"step": 2, "rollouts_total": 16, "eval/accuracy": 0.2} | step,
        {"step": 3, "rollouts_total": 24, "eval/accuracy": None} | step,
    ]
    assert findings.spending(run) == [
        {"accuracy": 0.1, "step": 0, "rollouts": 0, "tokens": 0.0, "seconds": 0.0},
        {"accuracy": 0.2, "step": 2, "rollouts": 16, "tokens": 40.0, "seconds": 4.0},
    ]
    del run["metrics"][1]["tokens_per_second"]
    assert "tokens" not in findings.spending(run)[1]


def test_the_map_of_the_budget_has_the_shares_of_each_part():
    groups = [
        {"step": 1, "belief": [0.0, 0.5, 0.51], "counts": [2, 4, 6]},
        {"step": 2, "belief": [0.0, 1.0, 1.0], "counts": [8, 2, 2]},
    ]
    # edges around 0.5 of twelve bins: sin^2 of 37.5, 45 and 52.5 degrees = 0.371, 0.5, 0.629
    expected = [(1, 2, 0, 2 / 12, 1, 2), (1, 2, 6, 10 / 12, 2, 10), (2, 3, 0, 8 / 12, 1, 8), (2, 3, 11, 4 / 12, 2, 4)]
    names = ("step", "until", "bin", "share", "prompts", "rollouts")
    assert [tuple(row[name] for name in names) for row in findings.budget_map(groups)] == expected
    merged = findings.budget_map(groups, most=1)
    assert [(row["bin"], row["rollouts"], row["until"]) for row in merged] == [(0, 10, 3), (6, 10, 3), (11, 4, 3)]
    assert findings.budget_map([]) == []


def test_counts_at_steps_are_put_together():
    groups = [{"step": step, "belief": [0.101, 0.099, 0.5], "counts": [4, 4, 8]} for step in (1, 2, 3)]
    assert findings.counts_at(groups, [2]) == [
        {"step": 2, "belief": 0.1, "count": 4, "prompts": 2},
        {"step": 2, "belief": 0.5, "count": 8, "prompts": 1},
    ]


def test_calibration_by_hand():
    # Ten groups of four rollouts believed at 0.1 of which half have one success and half none; one group believed at 0.9
    groups = [{"step": 1, "belief": [0.1] * 10 + [0.9], "counts": [4] * 10 + [2], "successes": [1.0, 0.0] * 5 + [1.0]}]
    rows, error = findings.calibration(groups)
    assert error == pytest.approx((40 * abs(5 / 40 - 0.1) + 2 * abs(0.5 - 0.9)) / 42)
    (row,) = rows  # a bin of one group is not shown, but counted in the error
    assert (row["observed"], row["groups"], row["rollouts"]) == (0.125, 10, 40)
    assert row["believed"] == pytest.approx(0.1)
    # the groups differ from 4 p by 0.5 each: v = 10 * 0.25 / 40^2, so p (1 - p) / v = 70, which is more than the 40 rollouts
    assert (row["low"], row["high"]) == pytest.approx(findings.wilson(0.125, 40))
    groups[0]["successes"] = [4.0] + [0.0] * 10  # groups as unlike as can be: v = (3.6^2 + 9 * 0.4^2) / 40^2 = 0.009
    (row,), _ = findings.calibration(groups)
    assert (row["low"], row["high"]) == pytest.approx(findings.wilson(0.1, 10))
    groups[0]["successes"] = [0.0] * 11
    (row,), _ = findings.calibration(groups)
    assert row["high"] == pytest.approx(findings.wilson(0.0, 10)[1])


def test_calibration_is_of_the_rollouts_that_have_a_reward():
    groups = [{"step": 1, "belief": [0.5] * 10, "counts": [4] * 10, "scored": [2] * 10, "successes": [1.0] * 10}]
    ((row,), error), whole = findings.calibration(groups), {"step": 2, "belief": [0.5] * 10, "counts": [2] * 10, "successes": [1.0] * 10}  # fmt: skip
    assert (row["observed"], row["rollouts"], error) == (0.5, 20, 0.0)
    ((row,), error) = findings.calibration([*groups, whole])  # a row of an older version, where all have one
    assert (row["observed"], row["rollouts"], error) == (0.5, 40, 0.0)
    whole["successes"] = [-3.0] * 5 + [6.0] * 5  # which had sums of any rewards
    ((row,), _) = findings.calibration([whole])
    assert row["observed"] == 0.5


def test_calibration_of_a_column_that_is_not_there():
    rows, error = findings.calibration([{"step": 1, "belief": [0.5], "counts": [2], "successes": [1.0]}], "prior")
    assert rows == []
    assert math.isnan(error)


def test_flow_stacks_always_at_the_bottom_and_joins_ends(tmp_path):
    run = read_run(write_evaluations(write_run(tmp_path / "a"), [0, 0, 1, 4], [4, 0, 0, 4]))
    bars, ribbons = findings.flow(run)
    assert [(bar["at"], bar["state"], bar["low"], bar["high"]) for bar in bars] == [
        (0, "always", 0, 0.25), (0, "rarely", 0.25, 0.5), (0, "never", 0.5, 1), (1, "always", 0, 0.5), (1, "never", 0.5, 1),
    ]  # fmt: skip
    ends = [(r["before"], r["after"], r["low"], r["high"], r["low_after"], r["high_after"]) for r in ribbons]
    assert ends == [
        ("always", "always", 0, 0.25, 0, 0.25),
        ("rarely", "never", 0.25, 0.5, 0.5, 0.75),
        ("never", "always", 0.5, 0.75, 0.25, 0.5),
        ("never", "never", 0.75, 1, 0.75, 1),
    ]
    run["evaluations"] *= 10
    assert len({bar["at"] for bar in findings.flow(run)[0]}) == 7
    run["evaluations"] = run["evaluations"][:1]
    assert findings.flow(run) == ([], [])


def test_runs_are_paired_over_the_prompts_they_share(tmp_path):
    a, b = (
        read_run(write_evaluations(write_run(tmp_path / name), solved, solved)) for name, solved in (("a", [0, 2, 4, 1]), ("b", [2, 2, 4, 4]))
    )  # fmt: skip
    b["held_out"]["prompts"] = ["p0", "p1", "p2", "other"]
    a["held_out"]["prompts"] = ["p2", "p1", "p0", "p0"]  # the second p0 has no partner
    # p2: 4/4 - 0; p1: 2/4 - 2/4; p0: 2/4 - 4/4
    found = findings.over_prompts(a, b)
    half = 1.959964 * np.std([1, 0, -0.5], ddof=1) / math.sqrt(3)
    assert found["pairs"] == 3
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([1 / 6, 1 / 6 - half, 1 / 6 + half])
    b["held_out"]["prompts"] = ["w", "x", "y", "z"]
    assert findings.over_prompts(a, b) is None
    b["evaluations"] = []
    assert findings.over_prompts(a, b) is None


def test_seeds_of_equal_settings_are_paired(tmp_path):
    runs = []
    for rule, ends in (("uniform", (0.1, 0.2, 0.3)), ("knapsack", (0.2, 0.4, 0.3))):
        for seed, end in enumerate(ends):
            path = write_run(tmp_path / f"{rule}{seed}", rule, accuracies=(0.0, end))
            settings = json.loads((path / "config.json").read_text()) | {"seed": seed, "sft.dir": str(path)}
            (path / "config.json").write_text(json.dumps(settings))
            runs.append(path)
    uniform, knapsack = findings.by_settings(read_runs(runs))
    assert [run["config"]["alloc.rule"] for run in knapsack] == ["knapsack"] * 3
    found = findings.over_seeds(uniform, knapsack)
    half = 4.302653 * np.std([0.1, 0.2, 0.0], ddof=1) / math.sqrt(3)  # Student's 97.5% for two degrees of freedom
    assert found["pairs"] == 3
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([0.1, 0.1 - half, 0.1 + half])
    assert findings.over_seeds(uniform, knapsack[:1]) is None
