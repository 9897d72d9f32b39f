"""The budget room against brute force, an exact dynamic program and numerical integration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from krl import budget


def value(n, p):
    """V(n, p) in float64."""
    return p * (1 - p) ** 2 * (1 - p**n - (1 - p) ** n)


def best_by_brute_force(p, total, n_min, n_max):
    """The highest sum of values over every way to spend the budget."""
    ways = itertools.product(range(n_min, n_max + 1), repeat=len(p))
    return max(sum(map(value, way, p)) for way in ways if sum(way) == total)


def best_by_dynamic_program(p, total, n_min, n_max):
    """The same by dynamic programming in float64, for sizes beyond brute force."""
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    for rate in p:
        after = np.full(total + 1, -np.inf)
        for n in range(n_min, n_max + 1):
            after[n:] = np.maximum(after[n:], best[: total + 1 - n] + value(n, rate))
        best = after
    return best[total]


def objective(counts, p):
    return sum(value(int(n), rate) for n, rate in zip(counts, p, strict=True))


rates = st.sampled_from([1, 4]).flatmap(lambda n: st.lists(st.floats(0.0, 1.0, width=32), min_size=n, max_size=n))


@settings(deadline=None, max_examples=40)
@given(rates, st.integers(1, 2), st.sampled_from([0, 1, 4]), st.integers(0, 100))
def test_knapsack_equals_brute_force(p, n_min, room, share):
    """Few numbers of prompts and bounds, since each compiles."""
    n_max = n_min + room
    total = len(p) * n_min + round(share / 100 * len(p) * room)
    counts = np.asarray(budget.knapsack(budget.log_gains(jnp.array(p), n_min, n_max), total, n_min))
    assert counts.sum() == total
    assert counts.min() >= n_min
    assert counts.max() <= n_max
    assert objective(counts, p) == pytest.approx(best_by_brute_force(p, total, n_min, n_max), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_knapsack_equals_dynamic_program(seed):
    p = np.random.default_rng(seed).beta(0.5, 0.5, 24).astype(np.float32).astype(float)
    counts = np.asarray(budget.knapsack(budget.log_gains(jnp.array(p), 2, 64), 24 * 8, 2))
    assert counts.sum() == 24 * 8
    assert objective(counts, p) == pytest.approx(best_by_dynamic_program(p, 24 * 8, 2, 64), rel=1e-6)


def test_hard_prompts_get_most_and_certain_ones_least():
    p = jnp.array([0.0, 0.02, 0.5, 0.98, 1.0])
    counts = budget.knapsack(budget.log_gains(p, 2, 128), 160, 2).tolist()
    assert counts[0] == counts[4] == 2
    assert counts[1] > 90
    assert counts[1] > counts[2] > counts[3]


@pytest.mark.parametrize(("total", "expected"), [(6, [2, 2, 2]), (7, [3, 2, 2]), (11, [4, 4, 3]), (30, [10, 10, 10])])
def test_equal_prompts_share_evenly_and_ties_go_to_the_first(total, expected):
    for p in (0.3, 0.0, 1.0):
        gains = budget.log_gains(jnp.full(3, p), 2, 10)
        assert budget.knapsack(gains, total, 2).tolist() == expected


def test_extreme_rates_stay_ordered_for_long_rows():
    p = jnp.array([1e-6, 1e-4, 0.5, 1 - 1e-4, 1 - 1e-6], jnp.float32)
    gains = np.asarray(budget.log_gains(p, 1, 1024))
    assert np.isfinite(gains).all()
    assert (np.diff(gains, axis=1) <= 0).all()
    n = np.arange(1, 1024)
    wide = np.asarray(p, np.float64)[:, None]
    with np.errstate(under="ignore"):
        direct = np.log(wide) + 2 * np.log1p(-wide) + np.logaddexp(
            n * np.log(wide) + np.log1p(-wide), n * np.log1p(-wide) + np.log(wide)
        )  # fmt: skip
    np.testing.assert_allclose(gains, direct, rtol=2e-5)


def test_empty_and_single():
    assert budget.knapsack(jnp.zeros((0, 5)), 0, 2).shape == (0,)
    assert budget.knapsack(budget.log_gains(jnp.array([0.4]), 2, 9), 9, 2).tolist() == [9]
    assert budget.knapsack(budget.log_gains(jnp.array([0.4, 0.1]), 3, 3), 6, 3).tolist() == [3, 3]


def test_counts_and_rates_and_budgets_do_not_recompile():
    traces = []

    @jax.jit
    def solve(p, total):
        traces.append(1)
        return budget.knapsack(budget.log_gains(p, 2, 16), total, 2)

    rng = np.random.default_rng(0)
    for total in (16, 40, 100):
        counts = solve(jnp.array(rng.random(8)), total)
        assert int(counts.sum()) == total
    assert len(traces) == 1


def test_counts_never_fall_when_the_budget_grows():
    gains = budget.log_gains(jnp.array(np.random.default_rng(1).random(7)), 1, 12)
    counts = np.array([budget.knapsack(gains, total, 1) for total in range(7, 7 * 12 + 1)])
    assert (np.diff(counts, axis=0) >= 0).all()


@pytest.mark.parametrize(("total", "word"), [(7, "budget 7"), (41, "budget 41")])
def test_impossible_budget_is_refused(total, word):
    with pytest.raises(ValueError, match=word):
        budget.knapsack(jnp.zeros((4, 8)), total, 2)
    with pytest.raises(ValueError, match=word):
        budget.allocate("knapsack", budget.init_belief(4), total, 2, 10)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        budget.knapsack(budget.log_gains(jnp.array([0.5, jnp.nan]), 1, 4), 4, 1)
    with pytest.raises(ValueError, match="shape"):
        budget.log_gains(jnp.ones((2, 2)), 1, 4)
    with pytest.raises(ValueError, match="n_min"):
        budget.log_gains(jnp.ones(2), 0, 4)
    with pytest.raises(ValueError, match="whole numbers"):
        budget.log_gains_beta(jnp.ones(2), jnp.ones(2), 1, 4, powers=(-1, 1))
    with pytest.raises(ValueError, match=r"weights must have shape \[M\], got \(2, 2\)"):
        budget.in_proportion(jnp.ones((2, 2)), 8, 0, 8, 4)
    for wrong in (-1.0, jnp.nan):
        with pytest.raises(ValueError, match="the weights must be numbers of at least 0"):
            budget.in_proportion(jnp.array([1.0, wrong]), 8, 0, 8, 4)
    with pytest.raises(ValueError, match="unknown allocation rule 'greedy'"):
        budget.allocate("greedy", budget.init_belief(2), 8, 1, 8)


@pytest.mark.parametrize("powers", [(1, 2), (0, 1), (0, 2), (2, 0)])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.1, 4.1), (3.0, 0.2), (20.0, 60.0)])
def test_expected_gains_equal_numerical_integration(alpha, beta, powers):
    gains = np.exp(np.asarray(budget.log_gains_beta(jnp.array([alpha]), jnp.array([beta]), 2, 12, powers=powers)))[0]

    def gain(p, n):
        return p ** powers[0] * (1 - p) ** powers[1] * (p**n * (1 - p) + (1 - p) ** n * p)

    for column, n in enumerate(range(2, 12)):
        expected, _ = integrate.quad(lambda p, n=n: gain(p, n) * stats.beta.pdf(p, alpha, beta), 0, 1, limit=200)
        assert gains[column] == pytest.approx(expected, rel=2e-3)


def test_expected_gains_fall_and_tell_two_failures_from_two_hundred():
    alpha, beta = jnp.array([0.2, 0.2, 0.2]), jnp.array([0.2, 2.2, 200.2])
    gains = np.asarray(budget.log_gains_beta(alpha, beta, 2, 128))
    assert np.isfinite(gains).all()
    assert (np.diff(gains, axis=1) <= 0).all()
    assert budget.knapsack(jnp.array(gains), 60, 2)[1] > budget.knapsack(jnp.array(gains), 60, 2)[2]


def test_uniform_rule_spends_everything():
    counts, _ = budget.allocate("uniform", budget.init_belief(3), 11, 1, 8)
    assert counts.tolist() == [4, 4, 3]


def test_a_function_is_a_rule():
    def first_takes_all(belief, total, n_min, n_max):
        return jnp.array([total, 0]), {"note": 1}

    counts, info = budget.allocate(first_takes_all, budget.init_belief(2), 6, 1, 8)
    assert counts.tolist() == [6, 0]
    assert info == {"note": 1}


def updated_by_hand(successes, failures, ids, rewards, index, mask, discount, discount_mixed):
    """The belief's update as loops."""
    successes, failures = successes.copy(), failures.copy()
    for row, task in enumerate(ids):
        got = [r for r, i, m in zip(rewards, index, mask, strict=True) if m and i == row]
        if got:
            keep = discount if min(got) == max(got) else discount_mixed
            successes[task] = keep * (successes[task] + sum(got))
            failures[task] = keep * (failures[task] + len(got) - sum(got))
    return successes, failures


def test_belief_update_equals_loops():
    rng = np.random.default_rng(0)
    belief = budget.init_belief(9, discount=0.8, discount_mixed=0.3)
    successes, failures = np.zeros(9), np.zeros(9)
    for _ in range(5):
        ids = rng.permutation(9)[:4]
        index = np.sort(rng.integers(0, 5, 12))  # 4 marks padding
        mask = index < 4
        rewards = rng.choice([0.0, 0.5, 1.0], 12).astype(np.float32)
        belief = budget.update(
            belief, jnp.array(ids), jnp.array(rewards), jnp.array(index), jnp.array(mask), fit_discounts=False
        )
        successes, failures = updated_by_hand(successes, failures, ids, rewards, index, mask, 0.8, 0.3)
        np.testing.assert_allclose(belief.successes, successes, rtol=1e-5)
        np.testing.assert_allclose(belief.failures, failures, rtol=1e-5)
    assert int(belief.visits.sum()) <= 20


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.3), (0.2, 1.0), (2.0, 2.0)])
def test_prior_is_recovered_from_data(alpha, beta):
    rng = np.random.default_rng(0)
    p, n = rng.beta(alpha, beta, 20_000), rng.integers(2, 30, 20_000)
    wins = rng.binomial(n, p)
    belief = budget.init_belief(20_000).replace(
        successes=jnp.array(wins, jnp.float32), failures=jnp.array(n - wins, jnp.float32)
    )
    fitted = budget.prior_by_moments(belief)
    np.testing.assert_allclose(fitted, (alpha, beta), rtol=0.1)


def test_prior_of_three_tasks_is_worked_by_hand():
    """Rates 3/4, 3/4, 1/2 of 4 outcomes each, one task without any, and the two pseudo-tasks: a mean of 0.6."""
    belief = budget.init_belief(4).replace(
        successes=jnp.array([3.0, 3, 2, 0]), failures=jnp.array([1.0, 1, 2, 0]), barren=jnp.full(4, 1e6)
    )
    observed = (0.15**2 + 0.15**2 + 0.1**2 + 0.4**2 + 0.6**2) / 5 / (0.6 * 0.4)
    noise = 3 / 4 / 5
    rho = (observed - noise) / (1 - noise)
    np.testing.assert_allclose(budget.prior_by_moments(belief), np.array([0.6, 0.4]) * (1 - rho) / rho, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_prior_survives_data_without_variance(rate):
    belief = budget.init_belief(50).replace(
        successes=jnp.full(50, 8 * rate), failures=jnp.full(50, 8 * (1 - rate)), visits=jnp.ones(50, jnp.int32)
    )
    alpha, beta = budget.prior_by_moments(belief)
    assert np.isfinite([alpha, beta]).all()
    assert alpha > 0
    assert beta > 0


def test_prior_of_nothing_is_jeffreys_like():
    alpha, beta = budget.prior_by_moments(budget.init_belief(5))
    assert float(alpha) == pytest.approx(float(beta))
