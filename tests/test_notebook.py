"""The notebook runs from top to bottom, and its numbers agree with sums done another way."""

import json
import pathlib

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOTEBOOK = pathlib.Path(__file__).parent.parent / "notebooks" / "allocation.ipynb"


@pytest.fixture(scope="module")
def ran():
    """What the notebook's code leaves behind, and how many figures it drew."""
    book = json.loads(NOTEBOOK.read_text())
    names = {"__name__": "__main__"}
    plt.close("all")
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.setattr(plt, "show", lambda: None)
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {cell['id']}", "exec"), names)
    names["figures"] = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    return names


def test_two_prompts_get_the_best_of_all_splits(ran):
    def value(p, n):
        return p * (1 - p) ** 2 * (1 - p**n - (1 - p) ** n)

    best = max(range(2, 23), key=lambda n: value(0.5, n) + value(0.05, 24 - n))
    assert ran["pair_counts"].tolist() == [best, 24 - best]
    assert ran["greedy"].tolist() == ran["exact"].tolist()


def test_every_rule_spends_the_budget_and_no_more(ran):
    shown = ran["replays"] | ran["own"]
    assert len(shown) == 6
    for replay in shown.values():
        spent = (replay.counts * replay.prompts).sum(axis=1)
        np.testing.assert_allclose(spent, np.full(ran["seeds"], ran["steps"] * 256), rtol=1e-5)
    for rule in (ran["any_mixed"], ran["optimist"]):
        assert ran["budget"].allocate(rule, ran["belief"], 60, 2, 24)[0].sum() == 60


def test_the_text_tells_what_was_found(ran):
    shares = {rule: replay.effective.mean() for rule, replay in (ran["replays"] | ran["own"]).items()}
    assert shares["uniform"] < shares["knapsack_paper"] < shares["knapsack"] < shares["known"]
    assert max(shares["any_mixed"], shares["optimist"]) < shares["knapsack"]
    assert ran["explained"]["why"].tolist() == ["unseen", "price", "n_min", "price", "price"]
    assert len(ran["figures"]) >= 6
    assert all(axis.get_xlabel() and axis.get_title() for figure in ran["figures"] for axis in figure.axes)
