"""The report as one HTML file: what it holds, and that whatever a model wrote stays text."""

import json
import re

import pyarrow as pa
import pytest

from krl.report import command as report
from krl.report import page
from krl.report.history import sample_rollouts
from krl.run.log import read_rows
from krl.run.rollouts import SCHEMA, write_step
from tests.test_report import write_evaluations, write_run
from tests.written import write_whole_run

EVIL = "</script><script>document.title='hacked'</script><!-- \u2028 \u2029 <img src=x onerror=\"document.title='hacked'\">"
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


def held(text: str) -> dict:
    """The data of a page."""
    return json.loads(DATA.search(text).group(1))


def written(workdirs, out) -> str:
    report.write(workdirs, out)
    return out.read_text()


def test_numbers_and_texts_are_in_the_page(tmp_path):
    workdir = write_evaluations(write_run(tmp_path / "a", accuracies=(0.1, 0.2, 0.4)), [0, 0, 1, 4], [4, 0, 0, 4])
    text = written([workdir], tmp_path / "report.html")
    assert "0.100 → 0.400" in text
    assert not (tmp_path / "figures.png").exists()
    data = held(text)
    rows = data["rows"]
    assert [(row["rollouts"], row["accuracy"]) for row in rows["accuracy"]] == [(0, 0.1), (100, 0.2), (200, 0.4)]
    assert {row["share"] for row in rows["budgets"]} == {0.25, 0.75}  # counts of 2 and 6
    assert [(row["belief"], row["count"]) for row in rows["counts"] if row["step"] == 2] == [(0.1, 6), (0.5, 2)]
    assert [row["smoothed"] for row in rows["steps"]] == [0.3, 0.3]
    assert {chart["name"] for chart in data["charts"]} == {"accuracy", "flow", "effective", "budgets", "counts"}
    for name, said in (
        ("price", "The rule has no price"), ("calibration", "Too few groups"), ("lengths", "No lengths were recorded"),
        ("mismatch", "was not recorded"), ("phases", "No times were recorded"), ("waiting", "was not recorded"),
    ):  # fmt: skip
        figure = re.search(rf'<figure id="{name}">.*?</figure>', text, re.S).group()
        assert said in figure
        assert 'class="chart"' not in figure
    assert "No rollouts were kept" in text


def test_a_run_with_nothing_but_metrics_has_a_page(tmp_path):
    workdir = write_run(tmp_path / "a", accuracies=(float("nan"),))
    (workdir / "groups.jsonl").unlink()
    text = written([workdir, workdir], tmp_path / "report.html")
    assert held(text)["charts"] == []
    assert text.count("groups.jsonl") == 3  # budgets, counts, calibration say what is missing
    assert "share no held-out prompts" in text


def test_rewards_outside_0_to_1_and_extreme_prices_have_a_page(tmp_path):
    workdirs = [write_whole_run(tmp_path / name, steps=6, prompts=16) for name in ("a", "b")]
    for workdir, sign, price in zip(workdirs, (-1, 2), (-800.0, 800.0), strict=True):
        for name, change in (
            ("groups", lambda row, sign=sign: row | {"successes": [sign * count for count in row["counts"]]}),
            ("metrics", lambda row, price=price: row | ({"price": price} if "price" in row else {})),
        ):
            rows = [change(row) for row in read_rows(workdir / f"{name}.jsonl")]
            (workdir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "report: " in report.of_a_run(workdirs[0])
    text = written(workdirs, tmp_path / "report.html")
    assert all(title in text for title in ("Were the beliefs right?", "Price of a rollout"))


def test_a_report_that_fails_is_told_and_is_not_the_runs_failure(tmp_path):
    said = report.of_a_run(tmp_path / "nothing")
    assert said.startswith("krl: the run is finished, but its report could not be written (ValueError: ")


def test_settings_that_differ_come_first(tmp_path):
    runs = [write_whole_run(tmp_path / rule, steps=1, rule=rule) for rule in ("uniform", "knapsack")]
    text = written(runs, tmp_path / "report.html")
    shown = text[text.index('<section id="settings">') : text.index("<details>")]
    keys = re.findall(r"<td>([a-z_]+(?:\.\w+)?)</td>", shown)
    assert keys == [
        "alloc.rule",
        "alloc.budget",
        "alloc.n_min",
        "prompts_per_step",
        "steps",
    ]  # the rest has its default
    own = '<td class="own">&#34;uniform&#34;</td><td class="own">&#34;knapsack&#34;</td> <td>&#34;reach&#34;</td>'
    assert own in " ".join(shown.split())


def test_two_runs_are_compared(tmp_path):
    runs = [
        write_whole_run(tmp_path / rule, steps=4, rule=rule, seed=n) for n, rule in enumerate(("uniform", "knapsack"))
    ]
    text = written(runs, tmp_path / "report.html")
    assert "over prompts, not seeds" in " ".join(text.split())
    assert 'id="comparison"' in text
    assert 'id="seeds"' not in text
    (difference,) = held(text)["rows"]["differences"]
    assert difference["pairs"] == 40
    runs += [
        write_whole_run(tmp_path / f"{rule}2", steps=4, rule=rule, seed=7 + n)
        for n, rule in enumerate(("uniform", "knapsack"))
    ]
    for path, seed in zip(runs, (0, 0, 1, 1), strict=True):
        settings = json.loads((path / "config.json").read_text()) | {"seed": seed}
        (path / "config.json").write_text(json.dumps(settings))
    seeds = re.search(r'<section id="seeds">.*?</section>', written(runs, tmp_path / "report.html"), re.S).group()
    assert re.findall(r"<td>(alloc\.rule=\w+)</td><td>(\d)</td>", seeds) == [
        ("alloc.rule=uniform", "2"),
        ("alloc.rule=knapsack", "2"),
    ]
    assert seeds.count("<td>2</td></tr>") == 1  # two pairs, of the second settings


def test_what_a_model_wrote_is_never_markup(tmp_path):
    workdir = write_whole_run(tmp_path / "<b>&amp;", steps=2, rule="<i>rule", response=EVIL)
    text = written([workdir], tmp_path / "report.html")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    assert len(scripts) == 3  # data, Vega, the page's own
    assert held(text)["rollouts"][0]["response"] == EVIL
    assert all(mark not in scripts[0] for mark in ("<", "\u2028", "\u2029"))
    for mark in ("<b>&amp;", "<i>rule", "<img", "onerror="):
        assert mark not in text.replace(scripts[0], "").replace(scripts[1], "")
    assert "&lt;i&gt;rule" in text


def test_a_run_shows_what_it_said_before_and_after(tmp_path):
    workdir = write_evaluations(write_run(tmp_path / "a"), [0, 4], [4, 4], said=([[EVIL, 0.0]], [["fine", 1.0]]))
    text = written([workdir], tmp_path / "report.html")
    section = re.search(r'<section id="said">.*?</section>', text, re.S).group()
    assert "before, wrong" in section
    assert "after, right</td><td>fine" in section
    assert EVIL not in text
    assert 'id="said"' not in written([workdir, workdir], tmp_path / "two.html")


def test_long_texts_are_cut_with_a_mark():
    assert page.cut("a" * 1200) == "a" * 1200
    assert page.cut("a" * 600 + "b" * 1000 + "c" * 600) == "a" * 600 + " … 1,000 characters left out … " + "c" * 600


def test_sampled_rollouts_are_spread(tmp_path):
    workdir = write_whole_run(tmp_path / "a", steps=50, prompts=16)
    rows = sample_rollouts(workdir, 160)
    steps = [row["step"] for row in rows]
    assert len(rows) == 160
    assert len(set(steps)) == 16
    assert (steps[0], steps[-1]) == (1, 50)
    assert {steps.count(step) for step in steps} == {10}
    kinds = {(row["fault"], row["reward"], row["finished"]) for row in rows}
    assert len(kinds) == 4
    assert len({(row["step"], row["prompt_id"], row["sample"]) for row in rows}) == 160
    assert rows == sample_rollouts(workdir, 160)
    assert sample_rollouts(tmp_path, 160) == []
    assert len(sample_rollouts(workdir, 3)) == 3


def test_a_rare_rollout_is_among_the_sampled(tmp_path):
    log = pa.Table.from_pylist(
        [{"step": 1, "sample": n, "reward": float(n == 250), "belief": 0.2, "finished": True, "fault": ""} for n in range(300)],
        schema=SCHEMA,
    )  # fmt: skip
    write_step(tmp_path / "rollouts", 1, log, most_gb=1.0)
    rows = sample_rollouts(tmp_path, 4)
    assert len(rows) == 4
    assert [row["sample"] for row in rows if row["reward"]] == [250]


def test_a_thousand_steps_fit_into_five_megabytes(tmp_path):
    workdir = write_whole_run(tmp_path / "a", steps=1000, prompts=64, response="なが" * 5000, log_every=100)
    report.write([workdir], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize("name", ["report.html", "out"])
def test_the_command_ends_with_the_page(tmp_path, capsys, name):
    workdir = write_run(tmp_path / "a")
    report.main([str(workdir), "--out", str(tmp_path / name)])
    path = tmp_path / name if name.endswith("html") else tmp_path / name / "report.html"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {path}"
    assert lines[-3] == "uniform with 100 rollouts a step: 0.200"
    assert (lines[0] == f"figures: {tmp_path}/out/figures.png") == (name == "out")
    assert path.exists()
    with pytest.raises(SystemExit, match="holds no run"):
        report.main([str(tmp_path / "nothing"), "--out", str(path)])
