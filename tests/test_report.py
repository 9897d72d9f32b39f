"""What a comparison of runs says and draws, against numbers worked by hand."""

import io
import json
import math
import pathlib

import numpy as np
import pytest

from benchmarks.runs import transitions
from krl.report import charts, figures
from krl.report import command as report
from krl.report.history import found, read_run, read_runs, rollouts_to_reach, smooth, states, summary
from krl.run.log import MetricsLog

STATE = {"never": 0, "rarely": 1, "sometimes": 2, "mostly": 3, "always": 4}


def write_run(path, rule="uniform", *, rollouts=100, accuracies=(0.1, 0.2), effective=0.3, counts=(2, 6), price=None):
    """A run with an evaluation and a second of time in every step."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"alloc.rule": rule, "alloc.budget": rollouts}))
    with MetricsLog(path, first_step=0) as log:
        log.write(0, {"rollouts_total": 0, "eval/accuracy": accuracies[0]})
        for step, accuracy in enumerate(accuracies[1:], start=1):
            row = {
                "rollouts_total": rollouts * step, "eval/accuracy": accuracy, "effective_ratio_rollouts": effective,
                "effective_ratio_prompts": effective / 2, "seconds/step": 1.0,
            }  # fmt: skip
            log.write(step, row if price is None else row | {"price": price})
            groups = {"counts": counts, "scored": counts, "belief": [0.5, 0.1], "task_ids": [0, 1], "successes": [1, 1]}
            log.write_groups(step, {name: np.array(values) for name, values in groups.items()})
    return path


def write_evaluations(path, first, last, *, samples=4, fields=None, said=((), ())):
    rows = [
        {"step": s, "rollouts_total": 100 * s, "samples": samples, "solved": x, "said": t}
        for s, x, t in ((0, first, said[0]), (9, last, said[1]))
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [f"p{number}" for number in range(len(first))]
    (path / "held_out.json").write_text(json.dumps({"prompts": prompts, "fields": fields or {}}))
    return path


def test_a_report_ends_with_the_accuracies_of_runs_of_different_cost(tmp_path):
    workdirs = [
        write_run(tmp_path / "a", "uniform", accuracies=(0.1, 0.2, 0.3, 0.4)),
        write_run(tmp_path / "b", "uniform", rollouts=200, accuracies=(0.1, 0.2, 0.3, 0.5)),
        write_run(tmp_path / "c", "knapsack", accuracies=(0.1, 0.3, 0.5, 0.6), effective=0.7),
    ]
    lines = report.write(workdirs, tmp_path / "out").splitlines()
    assert lines[0] == f"figures: {tmp_path}/out/figures.png"
    assert lines[-1] == "knapsack with 100 rollouts a step: 0.600; uniform with 100: 0.400; uniform with 200: 0.500"
    # 0.4 is met half-way from the second to the third evaluation of b, 400 to 600, and from the first to the second of c
    rows = [line.split() for line in lines if " a step  " in line]
    assert [" ".join(row[:4]) for row in rows] == ["uniform, 100 a step", "uniform, 200 a step", "knapsack, 100 a step"]
    assert [row[4:] for row in rows] == [
        ["0.300", "0.150", "0.100", "0.400", "300", "300", "0:03"],
        ["0.300", "0.150", "0.100", "0.500", "600", "500", "0:03"],
        ["0.700", "0.350", "0.100", "0.600", "300", "150", "0:03"],
    ]
    for name in ("figures", "accuracy", "effective", "counts"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


def test_runs_of_equal_cost_go_by_their_rules_and_a_level_may_never_be_reached(tmp_path):
    workdirs = [write_run(tmp_path / "a", accuracies=(0.1, 0.4)), write_run(tmp_path / "b", "knapsack")]
    runs = read_runs(workdirs)
    assert report.sentence(runs) == "knapsack with 100 rollouts a step: 0.200; uniform with 100: 0.400"
    lines = report.table(runs).splitlines()
    assert [line.split()[0] for line in lines if "0:01" in line] == ["uniform", "knapsack"]
    assert "never" in next(line for line in lines if line.startswith("knapsack "))
    assert "found" not in "\n".join(lines)


def test_runs_of_different_length_say_their_steps(tmp_path):
    write_run(tmp_path / "a", accuracies=(0.1, 0.2, 0.3))
    write_run(tmp_path / "b", "knapsack", rollouts=1000, accuracies=(0.1, 0.4))
    assert report.sentence(read_runs([tmp_path / "a", tmp_path / "b"])) == (
        "knapsack with 1,000 rollouts a step for 1 steps: 0.400; uniform with 100 for 2 steps: 0.300"
    )


def test_equal_settings_go_by_their_directories(tmp_path):
    runs = read_runs([write_run(tmp_path / name) for name in ("a", "b")])
    assert [run["label"] for run in runs] == ["uniform (a)", "uniform (b)"]
    assert [run["label"] for run in read_runs([tmp_path / "a"])] == ["uniform"]
    runs = read_runs([tmp_path / "a", tmp_path / "b", write_run(tmp_path / "c", rollouts=50)])
    assert [run["label"] for run in runs] == [
        "uniform (a), 100 a step",
        "uniform (b), 100 a step",
        "uniform, 50 a step",
    ]


def test_a_run_without_evaluations_is_reported(tmp_path):
    path = write_run(tmp_path / "a", accuracies=(math.nan, math.nan, math.nan))
    lines = report.write([path], path).splitlines()
    assert lines[-1] == "uniform with 100 rollouts a step: not evaluated"
    assert lines[-3].split() == ["uniform", "0.300", "0.150", "-", "-", "200", "0:02"]
    with pytest.raises(ValueError, match="holds no run"):
        report.write([tmp_path / "nothing"], tmp_path)


def test_rollouts_to_reach_by_hand(tmp_path):
    run = read_run(write_run(tmp_path / "a", accuracies=(0.2, 0.2, 0.6)))
    assert rollouts_to_reach(run, 0.1) == rollouts_to_reach(run, 0.2) == 0
    assert rollouts_to_reach(run, 0.3) == pytest.approx(125)
    assert rollouts_to_reach(run, 0.7) is None


def test_states_at_their_bounds():
    solved = {0: "never", 1: "rarely", 2: "rarely", 3: "sometimes", 6: "sometimes", 7: "mostly", 8: "always"}
    got = states({"samples": 8, "solved": list(solved)})
    assert got.tolist() == [STATE[name] for name in solved.values()]
    assert states({"samples": 1, "solved": [0, 1]}).tolist() == [STATE["never"], STATE["always"]]


def test_transitions_count_prompts_from_state_to_state(tmp_path):
    run = read_run(write_evaluations(write_run(tmp_path / "a"), [0, 0, 1, 4, 4], [0, 4, 2, 4, 3]))
    expected = np.zeros((5, 5), int)
    for before, after in (
        ("never", "never"),
        ("never", "always"),
        ("rarely", "sometimes"),
        ("always", "always"),
        ("always", "sometimes"),  # 3 of 4 is at most 3/4
    ):
        expected[STATE[before], STATE[after]] += 1
    np.testing.assert_array_equal(transitions(run), expected)
    assert transitions(read_run(write_run(tmp_path / "old"))) is None


def test_the_words_of_a_run_end_with_what_it_said_before_and_after(tmp_path):
    said = [["one", 0.0], ["t\n" * 80, 0.7 + 0.2 + 0.1]], [["two", None], ["half\n \x1b[2Jnow", 0.5]]
    path = write_evaluations(write_run(tmp_path / "a"), [0, 0, 1], [4, 0, 0], said=said)
    shown = report.in_words([read_run(path)]).splitlines()
    begin = shown.index("what it said to the first held-out prompts:")
    assert shown[begin + 1 : begin + 8] == [
        "  p0", "    before, wrong:         one", "    after, no reward:      two",
        "  p1", "    before, right:         " + "t " * 49 + "t…", "    after, reward 0.5:     half \ufffd[2Jnow", "",
    ]  # fmt: skip
    other = write_evaluations(write_run(tmp_path / "b"), [0, 0, 1], [4, 0, 0], said=((), said[1]))
    assert "what it said" not in report.in_words([read_run(other)])  # of a run that began without writing it down
    assert "what it said" not in report.in_words(read_runs([path, other]))


def test_a_terminal_that_lacks_a_letter_shows_the_rest(tmp_path, monkeypatch):
    said = [["caf\u00e9", 1.0]], [["\u4e00", 1.0]]
    path = write_evaluations(write_run(tmp_path / "a"), [0], [4], said=said)
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    report.main([str(path), "--out", str(tmp_path / "report.html")])
    assert b"caf?" in written.getvalue()
    assert "caf\u00e9" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_found_is_the_share_of_values_solved_more_than_half_of_the_time(tmp_path):
    # with 4 samples: a 4 + 1 of 8, b 2 + 2 of 8 (half is not more than half), c 3 of 4
    path = write_evaluations(
        write_run(tmp_path / "a"), [0] * 5, [4, 2, 1, 2, 3],
        fields={"one": ["x"] * 5, "each": list("vwxyz"), "letter": list("ababc"), "later": list("xxxyy")},
    )  # fmt: skip
    assert found(read_run(path)) == summary(read_run(path))["found"] == pytest.approx(2 / 3)
    text = report.table(read_runs([path, write_run(tmp_path / "old", "knapsack")]))
    assert "found" in text
    rows = [line.split() for line in text.splitlines() if "0:01" in line]
    assert [row[5] for row in rows] == ["0.667", "-"]


@pytest.mark.parametrize(("values", "share"), [(200, 0.5), (201, math.nan), (1, math.nan), (2, 0.5)])
def test_a_field_groups_prompts_if_it_has_2_to_200_values(tmp_path, values, share):
    # two prompts of each value; the even values are always solved
    names = [number for number in range(values) for _ in range(2)]
    solved = [4 * (number % 2 == 0) for number in names]
    path = write_evaluations(write_run(tmp_path / "a"), solved, solved, fields={"name": [str(n) for n in names]})
    assert found(read_run(path)) == pytest.approx(share, nan_ok=True)


def test_smoothing_shrinks_at_the_ends():
    assert smooth(np.array([1.0, 2.0, 6.0, 3.0, 9.0]), 5).tolist() == [3, 3, 4.2, 5, 6]
    assert smooth(np.array([1.0, 2.0]), 1).tolist() == [1, 2]


def drawn(monkeypatch, workdirs, out: pathlib.Path) -> dict[str, dict]:
    """What Vega is asked to draw, by the names of the files, in their order."""
    asked: list[dict] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            figures.vl_convert, "vegalite_to_png", lambda text, scale: asked.append(json.loads(text)) or b"PNG"
        )
        runs = read_runs(workdirs)
        figures.draw(runs, *charts.make(runs), out)
    files = sorted(out.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    return dict(zip((path.stem for path in files), asked, strict=True))


def everywhere(part, name):
    """All values of a key, however deep."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return ([part[name]] if isinstance(part, dict) and name in part else []) + [
        v for p in inner for v in everywhere(p, name)
    ]


def test_figures_show_the_runs_numbers(tmp_path, monkeypatch):
    a = write_evaluations(write_run(tmp_path / "a"), [0, 0, 4, 1], [0, 2, 4, 4])
    b = write_evaluations(
        write_run(tmp_path / "b", "knapsack", rollouts=200, price=math.log(0.25)), [0, 0, 4, 1], [4] * 4
    )
    asked = drawn(monkeypatch, [a, b], tmp_path / "out")
    assert {"accuracy", "effective", "counts", "flow", "price", "figures"} <= asked.keys()
    rows = asked["accuracy"]["datasets"]["accuracy"]
    assert [(row["run"], row["rollouts"], row["accuracy"]) for row in rows] == [
        ("uniform, 100 a step", 0, 0.1), ("uniform, 100 a step", 100, 0.2),
        ("knapsack, 200 a step", 0, 0.1), ("knapsack, 200 a step", 200, 0.2),
    ]  # fmt: skip
    assert asked["price"]["datasets"]["steps"][-1]["price"] == pytest.approx(0.25)
    assert asked["flow"]["title"] == "Held-out prompts by how often solved, knapsack, 200 a step"
    assert asked["accuracy"]["title"] == "Held-out accuracy"
    whole = asked["figures"]
    assert [panel["title"].split(",")[0] for line in whole["vconcat"] for panel in line["hconcat"]] == [
        asked[name]["title"].split(",")[0] for name in figures.PANELS
    ]
    assert set(whole["datasets"]) == {"accuracy", "steps", "counts", "flow_bars", "flow_ribbons"}


def test_figures_need_no_page(tmp_path, monkeypatch):
    """No colour of the style sheet and no slider is left, and colours of several runs have a legend."""
    workdirs = [write_run(tmp_path / f"{number}", f"rule{number}") for number in range(8)]
    for name, spec in drawn(monkeypatch, workdirs, tmp_path / "out").items():
        text = json.dumps(spec)
        assert "var(" not in text, name
        assert "=== at" not in text, name
        assert "params" not in spec, name
    spec = drawn(monkeypatch, workdirs, tmp_path / "more")["effective"]
    assert "disable" not in spec["config"]["legend"]
    (colour, *_) = everywhere(spec, "color")
    assert "legend" not in colour
    assert len(colour["scale"]["range"]) == 8
    assert colour["scale"]["range"][-1] not in colour["scale"]["range"][:-1]
    single = drawn(monkeypatch, workdirs[:1], tmp_path / "single")["effective"]
    assert [one["legend"] for one in everywhere(single, "color") if isinstance(one, dict) and "legend" in one] == [
        None
    ] * 3


def test_figures_leave_out_what_is_not_recorded(tmp_path, monkeypatch):
    path = write_run(tmp_path / "a", accuracies=(math.nan, math.nan))
    asked = drawn(monkeypatch, [path], tmp_path / "out")
    assert "effective" in asked
    assert not {"accuracy", "flow", "price"} & asked.keys()
    (path / "groups.jsonl").unlink()
    assert "counts" not in drawn(monkeypatch, [path], tmp_path / "less")


def test_a_run_before_its_first_step_is_reported(tmp_path):
    path = write_run(tmp_path / "a", accuracies=(0.5,))
    assert report.write([path], path).splitlines()[-1] == "uniform with 100 rollouts a step: 0.500"
