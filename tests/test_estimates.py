"""avg@k, pass@k, maj@k and their intervals against brute force, loops and known distributions."""

import io
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from krl.eval import estimates
from krl.eval.estimates import average, bootstrap, pass_at, summarize, table, winner


def test_pass_at_equals_the_share_of_subsets_with_a_success():
    for samples in range(1, 8):
        for solved in range(samples + 1):
            outcomes = [i < solved for i in range(samples)]
            for size in range(1, samples + 1):
                subsets = [any(chosen) for chosen in itertools.combinations(outcomes, size)]
                got = pass_at(size, np.array([solved, 0]), samples)
                assert got.tolist() == pytest.approx([np.mean(subsets), 0.0], abs=1e-15)


@pytest.mark.parametrize(("samples", "solved", "size"), [(1024, 1, 512), (1024, 3, 64), (4096, 2000, 2), (300, 299, 1)])
def test_pass_at_is_exact_where_binomials_are_huge(samples, solved, size):
    exact = 1 - Fraction(math.comb(samples - solved, size), math.comb(samples, size))
    assert pass_at(size, np.array([solved]), samples)[0] == pytest.approx(float(exact), rel=1e-11)


def vote_by_hand(keys):
    """The winner by counting in two loops."""
    best, most = 0, 0
    for i, candidate in enumerate(keys):
        votes = 0
        for other in keys:
            votes += candidate is not None and other == candidate
        if votes > most:
            best, most = i, votes
    return best


@settings(deadline=None)
@given(st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=1, max_size=9))
def test_majority_equals_a_loop(keys):
    assert winner(keys) == vote_by_hand(keys)


def test_statistics_worked_by_hand():
    rewards = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    keys: list = [["7", "8", "7", None], ["3", "3", "4", "4"], [None] * 4, [None, None, None, "5"]]
    lengths, finished = np.full((4, 4), 3), np.ones((4, 4), bool)
    lengths[0, 0], finished[0, 0] = 11, False
    got = summarize(rewards, lengths, finished, keys)
    assert (got["tasks"], got["samples"]) == (4, 4)
    assert got["avg@4"]["value"] == pytest.approx((3 + 1.5 + 0 + 1) / 16)
    assert got["pass@1"]["value"] == pytest.approx((3 + 1 + 0 + 1) / 16)  # partial credit is not solved
    assert got["pass@2"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert got["pass@4"]["value"] == 0.75
    assert got["maj@4"]["value"] == 0.5  # the tie goes to the wrong "3"; three without an answer do not vote
    assert got["response_length"] == 3.5
    assert got["truncation_rate"] == 1 / 16
    assert json.loads(json.dumps(got)) == got


@pytest.mark.parametrize(("samples", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_pass_is_given_for_powers_of_two_and_k(samples, sizes):
    ones = np.ones((1, samples))
    got = summarize(ones, ones, ones > 0, [["1"] * samples])
    assert [name for name in got if name.startswith("pass@")] == [f"pass@{size}" for size in sizes]
    assert got[f"avg@{samples}"] == got[f"maj@{samples}"] == {"value": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("rewards", "keys"), [(np.zeros((0, 2)), []), (np.zeros((2, 0)), [[], []]), (np.zeros((2, 1)), [["1"], ["1", "2"]])]
)
def test_statistics_of_nothing_are_refused(rewards, keys):
    with pytest.raises(ValueError, match=r"\[D, k\]"):
        summarize(rewards, rewards, rewards > 0, keys)


@pytest.mark.parametrize(("size", "solved"), [(3, 1), (20, 10), (30, 12), (100, 7)])
def test_intervals_of_successes_are_binomial_quantiles(size, solved):
    """The resampled number of successes is binomial, so its quantiles are known."""
    p = solved / size
    below = np.cumsum([math.comb(size, i) * p**i * (1 - p) ** (size - i) for i in range(size + 1)])
    values = (np.arange(size) < solved).astype(float)[:, None]
    low, high = bootstrap(values)
    assert low[0] == pytest.approx(np.searchsorted(below, 0.025) / size)
    assert high[0] == pytest.approx(np.searchsorted(below, 0.975) / size)


def test_intervals_are_fixed_and_as_wide_as_the_normal_ones():
    values = np.random.default_rng(5).normal(size=(400, 2)) * [1.0, 3.0]
    low, high = bootstrap(values)
    half = 1.96 * values.std(axis=0) / 20
    np.testing.assert_allclose([low, high], [values.mean(axis=0) - half, values.mean(axis=0) + half], atol=0.02)
    np.testing.assert_array_equal(bootstrap(values), (low, high))
    assert not np.array_equal(bootstrap(values, seed=1), (low, high))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draws = np.random.default_rng(0).uniform(size=(100, 300)) ** 2  # 300 sets of 100 tasks; the mean is 1/3
    low, high = bootstrap(draws)
    assert 0.91 < np.mean((low <= 1 / 3) & (high >= 1 / 3)) < 0.98


def test_intervals_of_many_tasks_are_those_of_plain_resampling(monkeypatch):
    monkeypatch.setattr(estimates, "NUM_RESAMPLES", 70)  # 33 at once, so the last part is a small one
    values = np.random.default_rng(1).normal(size=30_000)
    means = values[np.random.default_rng(0).integers(30_000, size=(70, 30_000))].mean(axis=1)
    low, high = bootstrap(values[:, None])
    np.testing.assert_allclose([low[0], high[0]], np.quantile(means, [0.025, 0.975]), rtol=1e-9)


def shown(results):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(results))
    return console.export_text()


def test_the_table_has_a_row_a_set_and_their_average():
    half = np.array([[1.0, 0.0]])
    one = summarize(half, np.full((1, 2), 10), half > 0, [["1", "2"]])
    none = summarize(np.zeros((3, 2)), np.full((3, 2), 20), np.ones((3, 2), bool), [["1", "2"]] * 3)
    lines = [line for line in shown({"aime[red]": one, "amc": none}).splitlines() if line.strip(" ─")]
    cells = [line.split() for line in lines]
    assert cells == [
        ["set", "tasks", "k", "avg@2", "95%", "pass@2", "maj@2", "tokens", "cut"],
        ["aime[red]", "1", "2", "50.0", "50.0-50.0", "100.0", "100.0", "10", "50.0"],
        ["amc", "3", "2", "0.0", "0.0-0.0", "0.0", "0.0", "20", "0.0"],
        ["average", "25.0", "50.0", "50.0", "15", "25.0"],
    ]
    assert average({"one": one, "none": none})["pass@k"] == 0.5
    assert "average" not in shown({"aime": one})
    other = summarize(np.zeros((3, 1)), np.ones((3, 1)), np.ones((3, 1), bool), [["1"]] * 3)
    assert "avg@k" in shown({"aime": one, "amc": other})
