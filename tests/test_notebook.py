"""The notebooks run from top to bottom, what they find is so, and what is kept of them is small and anyone's."""

import json
import pathlib
import re
import sys

import matplotlib
import numpy as np
import pytest

from krl.run.log import read_rows
from tests.command_line import undrawn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
BOOKS = sorted(file.stem for file in FOLDER.glob("*.ipynb"))


def run_book(name, place):
    """What a notebook's code leaves behind when it runs in an empty directory, and the figures it drew."""
    book = json.loads((FOLDER / f"{name}.ipynb").read_text())
    names = {"__name__": "__main__"}
    plt.close("all")
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context(), undrawn():
        patch.setattr(plt, "show", lambda: None)
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(place)
        for cell in book["cells"]:
            if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ()):
                exec(compile("".join(cell["source"]), f"{name}, cell {cell['id']}", "exec"), names)
    names["figures"] = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    return names


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_book("allocation", tmp_path_factory.mktemp("allocation"))


def all_labelled(figures):
    return all(axis.get_title() for figure in figures for axis in figure.axes)


@pytest.mark.parametrize("name", BOOKS)
def test_what_is_kept_of_a_notebook(name):
    """It begins with its installation, shows its figures, and says nothing of the machine it ran on."""
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < 600_000
    assert not re.search(r"/home/|/tmp/|/root/|/work/|Traceback| eta ", text)
    book = json.loads(text)
    assert book["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}
    }  # fmt: skip
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["install"]
    assert "".join(code[0]["source"]).startswith("%pip install -q ..")
    assert not any("execution" in cell["metadata"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    shown = sum("plt.show()" in "".join(cell["source"]) for cell in code)
    assert shown == sum("image/png" in output.get("data", ()) for output in outputs)


@pytest.mark.slow
def test_a_reward_and_data_of_ones_own(tmp_path):
    """The policy finds the largest digit far more often than the examples, and the log has what the reward said."""
    found = run_book("own_reward_and_data", tmp_path)
    assert found["accuracy"][0] < 0.5
    assert found["accuracy"][-1] > found["accuracy"][0] + 0.15
    log = found["log"]
    assert len(log) == 25 * 128
    for row in log.select(range(0, len(log), 50)):
        digits = row["prompt"].split()[:3]
        assert row["answer"] == max(digits)
        right, copied = row["response"].strip() == row["answer"], row["response"].strip() in digits
        assert row["reward"] == pytest.approx(1.0 if right else 0.1 if copied else 0.0)
    assert all_labelled(found["figures"])


@pytest.mark.slow
def test_an_ablation_pairs_its_runs_by_seed(tmp_path):
    found = run_book("ablation", tmp_path)
    assert {name: len(group) for name, group in found["runs"].items()} == dict.fromkeys(found["SETTINGS"], 2)
    for seed in range(2):
        alike = [group[seed]["evaluations"][0]["solved"] for group in found["runs"].values()]
        assert alike[0] == alike[1] == alike[2]  # before the first step nothing differs
    for name, (low, high) in found["intervals"].items():
        ends = [
            read_rows(tmp_path / "runs" / one / str(seed) / "metrics.jsonl")[-1]["eval/accuracy"]
            for one in (name, "uniform")
            for seed in range(2)
        ]
        differences = np.array(ends[:2]) - np.array(ends[2:])
        assert (low + high) / 2 == pytest.approx(differences.mean())
        assert high - low == pytest.approx(2 * 12.706205 * differences.std(ddof=1) / 2**0.5, abs=1e-5)  # t of 1 degree
    assert all_labelled(found["figures"])


@pytest.mark.slow
def test_a_first_run_learns_and_spends_its_budget(tmp_path):
    found = run_book("quickstart", tmp_path)
    assert found["accuracy"][-1] > found["accuracy"][0] + 0.05
    assert found["counts"].sum() == 50 * 128 == len(found["rollouts"])
    assert sum(row["advantage"] for row in found["shown"]) == pytest.approx(0.0, abs=1e-3)
    assert all_labelled(found["figures"])


@pytest.mark.slow
def test_two_prompts_get_the_best_of_all_splits(ran):
    def value(p, n):
        return p * (1 - p) ** 2 * (1 - p**n - (1 - p) ** n)

    best = max(range(2, 23), key=lambda n: value(0.5, n) + value(0.05, 24 - n))
    assert ran["pair_counts"].tolist() == [best, 24 - best]
    assert ran["greedy"].tolist() == ran["exact"].tolist()


@pytest.mark.slow
def test_every_rule_spends_the_budget_and_no_more(ran):
    shown = ran["replays"] | ran["own"]
    assert len(shown) == 6
    for replay in shown.values():
        spent = (replay.counts * replay.prompts).sum(axis=1)
        np.testing.assert_allclose(spent, np.full(ran["seeds"], ran["steps"] * 256), rtol=1e-5)
    for rule in (ran["any_mixed"], ran["optimist"]):
        assert ran["budget"].allocate(rule, ran["belief"], 60, 2, 24)[0].sum() == 60


@pytest.mark.slow
def test_the_text_tells_what_was_found(ran):
    shares = {rule: replay.effective.mean() for rule, replay in (ran["replays"] | ran["own"]).items()}
    assert shares["uniform"] < shares["knapsack_paper"] < shares["knapsack"] < shares["known"]
    assert max(shares["any_mixed"], shares["optimist"]) < shares["knapsack"]
    assert ran["explained"]["why"].tolist() == ["unseen", "price", "n_min", "price", "price"]
    assert len(ran["figures"]) >= 6
    assert all(axis.get_xlabel() and axis.get_title() for figure in ran["figures"] for axis in figure.axes)
