"""The benchmarks' statistics, rows and order of runs, against hand-worked values and a train.py of a few lines."""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import subprocess
import time

import numpy as np
import pytest

from benchmarks import accelerator, elasticity, noise, runs, study
from benchmarks.runs import Job
from krl.configs.check import check
from krl.run.setup import NAMES

TRAIN = """
import json, pathlib, sys
given = dict(text.removeprefix("--config.").split("=", 1) for text in sys.argv if text.startswith("--config."))
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir()
with (workdir.parent / "started").open("a") as file:
    file.write(json.dumps(given) + "\\n")
if given["seed"] == "13" or given["alloc.rule"] == "unheard":
    sys.exit("train.py: refused")
if given.get("steps") != "0":
    rate = float(given["optim.learning_rate"])
    config = {"seed": int(given["seed"]), "alloc.rule": "uniform", "alloc.prior": "shared", "alloc.budget": 8,
              "optim.learning_rate": rate, "optim.decay_steps": 0, "steps": 1}
    (workdir / "config.json").write_text(json.dumps(config))
    first = {"step": 0, "rollouts_total": 0, "eval/accuracy": 0.0}
    last = {"step": 1, "rollouts_total": 8, "eval/accuracy": rate, "effective_ratio_rollouts": 0.5, "prompts_unseen": 1,
            "seconds/step": 1, "compiles": 9}
    (workdir / "metrics.jsonl").write_text(json.dumps(first) + "\\n" + json.dumps(last) + "\\n")
    (workdir / "groups.jsonl").write_text(json.dumps({"step": 1, "tokens": [7]}) + "\\n")
"""


EVAL = """
import json, pathlib, sys
given = dict(text.removeprefix("--config.").split("=", 1) for text in sys.argv if text.startswith("--config."))
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
samples = int(given["eval.samples"])
held_out = {"avg@k": {"value": 0.5}, "pass@1": {"value": 0.5}, f"pass@{samples}": {"value": 0.75}}
(workdir / "results.json").write_text(json.dumps({"settings": {}, "sets": {"held_out": held_out}}))
"""


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Runs in tmp_path by TRAIN instead of train.py."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval.py").write_text(EVAL)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return argparse.Namespace(
        out=tmp_path / "out",
        results=tmp_path / "results.jsonl",
        jobs=2,
        keep=False,
        until=math.inf,
        warm=set(),
        samples=0,
    )


def job(seed, rate=0.5, name="uniform"):
    return Job("operators", name, {"alloc.rule": "uniform", "optim.learning_rate": rate, "seed": seed})


def started(options):
    file = options.out / "started"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_interval_of_three_differences():
    # Mean 0.02, standard deviation 0.01, error 0.01 / sqrt(3); the t quantile of 2 degrees of freedom is 4.3027.
    got = runs.interval([0.01, 0.03, 0.02])
    assert got[:4] == pytest.approx(
        (0.02, 0.0057735, 0.02 - 4.302653 * 0.0057735, 0.02 + 4.302653 * 0.0057735), abs=1e-6
    )
    assert got.n == 3
    assert runs.interval([0.5]).mean == 0.5
    assert math.isnan(runs.interval([0.5]).low)
    assert math.isnan(runs.interval([]).mean)


def test_differences_are_paired_by_seed():
    base = {1: {"accuracy": 0.1}, 2: {"accuracy": 0.5}, 4: {"accuracy": 0.9}}
    found = {"uniform": base, "reach": {2: {"accuracy": 0.6}, 1: {"accuracy": 0.4}, 3: {"accuracy": 0.0}}}
    got = study.paired(found, "reach", "uniform")
    assert (got.n, got.mean) == (2, pytest.approx(0.2))


def test_a_row_from_a_work_directory(tmp_path):
    config = {"seed": 3, "alloc.rule": "knapsack", "alloc.prior": "features", "alloc.budget": 8, "optim.learning_rate": 0.1, "optim.decay_steps": 2, "steps": 3}  # fmt: skip
    metrics = [
        {"step": 0, "rollouts_total": 0, "eval/accuracy": 0.25},
        {"step": 1, "rollouts_total": 8, "effective_ratio_rollouts": 0.5, "prompts_unseen": 1.0, "seconds/step": 90.0, "compiles": 9},
        {"step": 2, "rollouts_total": 16, "effective_ratio_rollouts": 0.3, "prompts_unseen": 1.0, "seconds/step": 1.0, "compiles": 9, "eval/accuracy": 0.375},
        {"step": 3, "rollouts_total": 24, "effective_ratio_rollouts": 0.1, "prompts_unseen": 0.5, "seconds/step": 1.5, "compiles": 9, "eval/accuracy": 0.123456},
    ]  # fmt: skip
    groups = [{"step": 1, "tokens": [3, 4]}, {"step": 2, "tokens": [5, 5]}, {"step": 3, "tokens": [1, 0]}]
    evaluations = [
        {"step": 0, "rollouts_total": 0, "samples": 8, "solved": [0, 0, 2, 3, 8, 7]},
        {"step": 2, "rollouts_total": 16, "samples": 8, "solved": [8] * 6},
        {"step": 3, "rollouts_total": 24, "samples": 8, "solved": [0, 1, 6, 7, 8, 0]},
    ]
    held_out = {"prompts": list("uvwxyz"), "fields": {"operator": ["a", "b", "b", "c", "c", "a"], "digits": [1] * 6}}
    write = lambda name, rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("config.json", [config])
    write("metrics.jsonl", metrics)
    write("groups.jsonl", groups)
    without = runs.row_of(tmp_path)
    write("evaluations.jsonl", evaluations)
    write("held_out.json", [held_out])
    row = runs.row_of(tmp_path)
    assert without == {key: row[key] for key in without}
    assert set(row) - set(without) == {"transitions", "found", "dead"}
    # Step 1 compiled, and counts as the median of 90, 1 and 1.5 seconds.
    assert row["curve"] == [[0, 0, 0.0, 0.25], [16, 17, 2.5, 0.375], [24, 18, 4.0, 0.1235]]
    assert (row["seed"], row["rule"], row["accuracy"], row["seconds"]) == (3, "knapsack", 0.1235, 4.0)
    assert (row["effective"], row["effective_first_pass"]) == (0.3, 0.4)
    # Operators: a 0 of 16, b 7 of 16, c 15 of 16.
    assert (row["found"], row["dead"]) == (0.3333, 0.3333)
    # never -> never and rarely; 2 of 8 (rarely) -> 6 (sometimes); 3 (sometimes) -> 7 (mostly); 8 -> 8; 7 (mostly) -> 0.
    expected = np.zeros((5, 5), int)
    expected[[0, 0, 1, 2, 4, 3], [0, 1, 2, 3, 4, 0]] = 1
    assert row["transitions"] == expected.tolist()
    write("metrics.jsonl", metrics[:3])
    with pytest.raises(ValueError, match="unfinished"):
        runs.row_of(tmp_path)


def test_what_it_took_to_reach_a_level():
    row = {"curve": [[0, 0, 0, 0.1], [10, 40, 5, 0.3], [20, 60, 9, 0.2], [30, 80, 15, 0.6]]}
    assert runs.spent_by(row, 0.25) == pytest.approx(7.5)
    assert runs.spent_by(row, 0.4, runs.TOKENS) == pytest.approx(70)
    assert runs.spent_by(row, 0.1) == 0
    assert runs.spent_by(row, 0.7) == math.inf


def test_the_cost_table_counts_who_never_arrives():
    base = {"accuracy": 0.4, "curve": [[0, 0, 0, 0.0], [10, 10, 10, 0.4]]}
    fast, slow = ({"accuracy": last, "curve": [[0, 0, 0, 0.0], [10, 10, 5, last]]} for last in (0.8, 0.2))
    table = study.cost_table({"uniform": {1: base, 2: base, 3: base}, "reach": {1: fast, 2: slow, 3: fast}}, "uniform")
    assert table.splitlines()[-1] == "| reach | 3 | 0.500 | 0.500 | 1 | 0.500 | 0.250 |"


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2.0, [1, 2, 4]),
        (4.0, [1, 2, 4, 8]),
        (1.0, [0.5, 1, 2, 4]),
        (100.0, [1, 2, 4, 8, 16]),
        (0.0, [0.25, 0.5, 1, 2, 4]),
    ],
)
def test_the_best_value_is_bracketed(best, tried):
    # The accuracy of each falls with its distance from `best`; so one step beyond the end is no better.
    assert study.grid((1, 2, 4), lambda value: -abs(value - best)) == tried


def test_no_grid_grows_before_all_of_it_is_known_nor_below_nothing():
    assert study.grid((1, 2, 4), lambda value: None if value == 1 else value) == [1, 2, 4]
    assert study.grid((0, 2, 4), lambda value: -value) == [0, 2, 4]


def test_the_penalty_is_tuned_at_the_best_rate():
    """Accuracy is best at a rate of 2.4e-3 and a weight of .04, one step inside the grids that are grown."""
    make = functools.partial(study.make_job, "operators", {})
    rows = {}

    def run(wanted):
        for values in wanted:
            distance = abs(values[study.RATE] - 2.4e-3) + abs(values[study.PENALTY] - 0.04)
            rows.update({make("reach", values, seed).key(): {"accuracy": 1 - distance} for seed in study.TUNING_SEEDS})

    asked = []
    while (wanted := study.search("reach", make, rows)[1]) != asked:
        run(wanted)
        asked = wanted
    assert study.choose("reach", make, rows) == {study.RATE: 2.4e-3, study.PENALTY: 0.04}
    assert [tuple(values.values()) for values in asked] == [
        (6e-4, 0.02), (1.2e-3, 0.02), (2.4e-3, 0.02), (4.8e-3, 0.02), (2.4e-3, 0.0), (2.4e-3, 0.02), (2.4e-3, 0.04), (2.4e-3, 0.08),
    ]  # fmt: skip
    assert study.choose("reach", make, {}) is None


def test_holm_multiplies_by_how_many_are_left():
    # 4 x .01, then 3 x .013 and 2 x .02, not below it; the largest as it is.
    assert study.holm([0.02, 0.01, 0.9, 0.013]) == pytest.approx([0.04, 0.04, 0.9, 0.04])
    assert study.holm([0.6, 0.7]) == [1.0, 1.0]
    assert study.holm([]) == []


def test_the_results_of_a_study_by_hand():
    curve = {"curve": [[0, 0, 0, 0.0]], "effective": 0.5}
    found = {
        name: {seed: curve | {"accuracy": mean + seed * slope} for seed in (1, 2, 3)}
        for name, mean, slope in (("uniform_64x4", 0.5, 0.1), ("reach", 0.6, 0.11), (study.DOUBLE, 0.5, 0.1))
    }
    rows = study.results_table(found, "uniform_64x4").splitlines()
    # Differences of .11, .12 and .13: an error of .01 / sqrt(3), 4.3027 of which are .0248.
    assert rows[3].startswith(
        "| reach | 3 | 0.820 | +0.120 (+0.095 to +0.145) | 0.00461 | +0.120 (+0.095 to +0.145) |  | 0.500 |"
    )


def test_runs_leave_rows_from_which_the_next_call_goes_on(options, capsys):
    jobs = [job(seed, rate) for seed in (1, 2) for rate in (0.25, 0.5)]
    assert runs.run_all(jobs[:3], options) == 3
    rows = runs.read_results(options.results)
    assert [rows[j.key()]["accuracy"] for j in jobs[:3]] == [0.25, 0.5, 0.25]
    assert rows[jobs[0].key()]["processor"]
    order = started(options)
    for seed in ("1", "2"):  # the warm start first, once
        assert next(given.get("steps") for given in order if given["seed"] == seed) == "0"
    assert sum(given.get("steps") == "0" for given in order) == 2
    assert {path.name for path in options.out.iterdir()} == {"started"}  # work directories are gone
    options.out, options.warm = options.out.with_name("elsewhere"), set()  # only the rows are left
    options.out.mkdir()
    assert runs.run_all(jobs, options) == 1
    assert [given["seed"] for given in started(options)] == ["2", "2"]
    assert runs.run_all([j._replace(name="another name") for j in jobs], options) == 0
    assert len(options.results.read_text().splitlines()) == 4


def test_runs_are_measured_with_more_samples_where_those_are_asked_for(options):
    options.samples = 32
    assert runs.run_all([job(1), job(2)], options) == 2
    assert [row["pass"] for row in runs.read_results(options.results).values()] == [[0.5, 0.75]] * 2
    assert sum(given.get("steps") != "0" for given in started(options)) == 2


def test_a_run_that_fails_does_not_stop_the_others(options, capsys):
    assert runs.run_all([job(13), job(13, 0.25), job(1)], options) == 1
    assert "refused" in capsys.readouterr().err
    assert len(started(options)) == 3  # the warm start of 13 failed, so its runs never began


def test_a_warm_start_is_made_whatever_the_rule_that_waits_for_it(options):
    unheard = Job("operators", "vip", {"alloc.rule": "unheard", "optim.learning_rate": 0.5, "seed": 1})
    assert runs.run_all([unheard, job(1)], options) == 1


def test_no_run_starts_when_time_is_up(options):
    options.until = time.monotonic()
    assert runs.run_all([job(1)], options) == 0
    assert started(options) == []


def test_noise_of_prompts_and_of_rollouts_is_told_from_the_signal():
    """Over many draws of few batches, where a plain square of the mean would be 0.2 too large."""
    rng = np.random.default_rng(0)
    mean, draws = np.array([1.0, 0.0, -2.0, 0.0]), []
    for _ in range(3000):
        pairs = mean + 0.5 * rng.normal(size=(4, 1, 4)) + 0.3 * rng.normal(size=(4, 2, 4))
        draws.append(noise.split_noise(pairs, np.zeros(4)))
    got = {key: np.mean([draw[key] for draw in draws]) for key in draws[0]}
    assert got["signal"] == pytest.approx(5.0, abs=0.06)
    assert got["within"] == pytest.approx(4 * 0.09, rel=0.03)
    assert got["between"] == pytest.approx(4 * 0.25, rel=0.06)


def test_a_step_down_the_gradient_of_what_should_fall_is_a_rise():
    rng = np.random.default_rng(0)
    pairs = np.array([1.0, -2.0, 0.0]) + rng.normal(size=(4000, 2, 3)) * [0.5, 1.0, 0.0]  # nothing moves the last
    got = noise.split_noise(pairs, np.array([3.0, 0.0, 7.0]))
    assert got["rise"] == pytest.approx(3 / np.sqrt(1 + 0.25), rel=0.01)
    assert noise.split_noise(pairs, np.array([0.0, 3.0, 0.0]))["rise"] < 0


@pytest.mark.parametrize("task", study.TASKS)
def test_every_setting_of_the_study_can_run(task):
    for name in study.SETTINGS:
        job = study.make_job(task, {}, name, study.CENTRE, 0)
        config = importlib.import_module(f"krl.configs.{job.task}").get_config()
        config.update_from_flattened_dict(job.changes)
        check(config, NAMES)
        config.update_from_flattened_dict(runs.WARM)  # as the warm start of its seed may be made from it
        check(config, NAMES)


def test_the_study_tunes_and_resumes(options, monkeypatch, capsys):
    """With TRAIN accuracy is the learning rate, so that the grid of rates grows twice."""
    monkeypatch.setattr(study, "GRIDS", {study.RATE: (0.1, 0.2), study.PENALTY: (0.0, 0.02)})
    monkeypatch.setattr(study, "CENTRE", {study.RATE: 0.1, study.PENALTY: 0.02})
    monkeypatch.setattr(study, "TUNING_SEEDS", (0,))
    (options.out.parent / "configs").mkdir()
    (options.out.parent / "configs" / "operators.py").touch()
    results = options.results.with_name("operators.jsonl")
    command = f"study --out {options.out} --results {results} --only uniform_64x4 reach --seeds 5 6 --jobs 2"
    monkeypatch.setattr("sys.argv", command.split())
    study.main()
    # Rates 0.1 to 0.8 with .02, further weights at 0.8 of which none is better; then two seeds each.
    tried = [row["changes"] for row in runs.read_results(results).values()]
    assert sum(row["seed"] == 0 for row in tried) == 2 * (4 + 3)
    assert sum(row["seed"] in (5, 6) for row in tried) == 2 * 2
    shown = capsys.readouterr().out
    assert "| reach | 2 | 0.800 | +0.000 (+0.000 to +0.000) |" in shown
    assert "reach_128" in shown.splitlines()[-1]  # not run yet
    assert "| reach | 0.500 | 0.750 |" in shown
    before = len(started(options))
    study.main()
    assert len(started(options)) == before
    assert (options.out / "operators.md").read_text() in capsys.readouterr().out
    assert (options.out / "operators.png").stat().st_size > 1000


@pytest.mark.parametrize("task", ["operators", "arithmetic", "maze"])
def test_elasticity_asks_for_runs_that_can_be(task):
    rollouts = int(runs.read_config(task, {})["alloc.budget"])
    for total in (rollouts // 2, rollouts, 2 * rollouts, 4 * rollouts):
        config = importlib.import_module(f"krl.configs.{task}").get_config()
        config.update_from_flattened_dict(elasticity.job(task, {}, 0, total).changes)
        check(config, NAMES)


def test_the_verdict_on_elasticity():
    budgets = [4, 8, 16, 32]
    gains = {1: 0.02, 2: 0.04, 3: 0.03}  # 0.03 with a standard error of 0.01 / sqrt(3)
    accuracy = {(seed, 8): 0.1 * seed for seed in gains} | {(seed, 16): 0.1 * seed + gains[seed] for seed in gains}
    text = elasticity.report(accuracy, budgets)
    assert "| 16 | 3 | 0.230 ± 0.061 | +0.030 ± 0.006 |" in text  # 0.12, 0.24 and 0.33
    assert text.splitlines()[-1].startswith("allocation can matter here")
    noisy = accuracy | {(3, 16): 0.25}  # -0.05 for the third seed
    assert elasticity.report(noisy, budgets).splitlines()[-1].startswith("no sign")
    assert elasticity.report({(1, 8): 0.5, (1, 16): 0.9}, budgets).splitlines()[-1].startswith("two seeds at least")


@pytest.mark.slow
def test_what_an_accelerator_is_measured_by_runs_anywhere(capsys, monkeypatch):
    monkeypatch.setattr(
        accelerator, "TOY", dataclasses.replace(accelerator.TOY, embed_size=8, head_size=4, mlp_size=16)
    )
    accelerator.main(["--toy"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kernels = lines[1:5]
    assert [line["key"] for line in lines] == ["attention", *["packed attention"] * 4, "decode", "update", "update"]
    assert lines[0]["right"]
    assert [line["kernel"] for line in kernels] == [
        "xla, packed", "auto, a row each", "cudnn, packed", "tokamax, packed",
    ]  # fmt: skip
    assert all(line["right"] and line["seconds"] > 0 for line in kernels[:2])
    assert "cuDNN" in kernels[2]["fails"]  # there is no GPU
    assert all(line["tokens_per_second"] > 0 for line in lines[5:])
    assert (
        subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=accelerator.__file__.rsplit("/", 2)[0]).returncode == 0
    )
