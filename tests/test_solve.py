"""The solvers against brute force and a float64 dynamic program, and against one another."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krl import budget
from krl.base.sharding import make_mesh
from tests.test_budget import best_by_dynamic_program, objective, value

rate = st.sampled_from([0.0, 1.0, 1e-6, 1 - 2**-20, 0.5, 0.25]) | st.floats(0.0, 1.0, width=32)
rates = st.sampled_from([0, 1, 6]).flatmap(lambda n: st.lists(rate, min_size=n, max_size=n))  # each size compiles


@st.composite
def instances(draw):
    """Rates with bounds of their own, a mask and a budget between the extremes."""
    p = np.array(draw(rates), np.float32)
    lists = [st.lists(bounds, min_size=len(p), max_size=len(p)) for bounds in (st.integers(1, 3), st.integers(0, 6))]
    n_min, room = (np.array(draw(numbers), np.int32) for numbers in lists)
    mask = np.array(draw(st.lists(st.booleans(), min_size=len(p), max_size=len(p))), bool)
    least, most = n_min[mask].sum(), (n_min + room)[mask].sum()
    return p, n_min, n_min + room, mask, int(draw(st.integers(int(least), int(most))))


def best(p, n_min, n_max, mask, total):
    """The highest objective by a float64 dynamic program with bounds of each prompt's own."""
    table = np.full(total + 1, -np.inf)
    table[0] = 0.0
    for rate, low, high in zip(p[mask].astype(float), n_min[mask], n_max[mask], strict=True):
        after = np.full(total + 1, -np.inf)
        for n in range(low, min(high, total) + 1):
            after[n:] = np.maximum(after[n:], table[: total + 1 - n] + value(n, rate))
        table = after
    return table[total]


@settings(deadline=None, max_examples=60)
@given(instances())
def test_bounds_and_masks_of_each_prompt(instance):
    p, n_min, n_max, mask, total = instance
    gains = budget.log_gains(p, n_min, n_max, columns=8)
    counts = np.asarray(budget.knapsack(gains, total, n_min, n_max, mask))
    assert counts.sum() == total
    assert (counts[mask] >= n_min[mask]).all()
    assert (counts[mask] <= n_max[mask]).all()
    assert (counts[~mask] == 0).all()
    assert objective(counts[mask], p[mask].astype(float)) == pytest.approx(best(*instance), rel=1e-9, abs=1e-12)
    large = budget.knapsack_large(jnp.asarray(p), total, n_min, n_max, mask)
    np.testing.assert_array_equal(counts, large)


@pytest.mark.parametrize("factor", [2, 3, 8, 30, 64])
def test_many_prompts_equal_the_dynamic_program_and_the_tableless_search(factor):
    rng = np.random.default_rng(factor)
    p = np.concatenate([rng.beta(0.4, 0.4, 44), [0, 0, 1, 1]]).astype(np.float32)
    total = len(p) * factor
    counts = np.asarray(budget.knapsack(budget.log_gains(jnp.array(p), 2, 64), total, 2))
    assert objective(counts, p.astype(float)) == pytest.approx(
        best_by_dynamic_program(p.astype(float), total, 2, 64), rel=1e-9
    )
    np.testing.assert_array_equal(counts, budget.knapsack_large(jnp.array(p), total, 2, 64))


def test_tableless_search_agrees_up_to_a_thousand_rollouts():
    p = jnp.array([1e-6, 1e-4, 0.01, 0.5, 0.99, 1 - 1e-6], jnp.float32)
    gains = budget.log_gains(p, 1, 1024)
    for total in (6, 100, 3000, 6 * 1024):
        counts = budget.knapsack(gains, total, 1)
        assert int(counts.sum()) == total
        np.testing.assert_array_equal(counts, budget.knapsack_large(p, total, 1, 1024))


def test_permuted_prompts_get_permuted_counts():
    rng = np.random.default_rng(0)
    p, order = jnp.array(rng.random(20), jnp.float32), rng.permutation(20)
    for solve in (
        lambda p: budget.knapsack(budget.log_gains(p, 2, 32), 200, 2),
        lambda p: budget.knapsack_large(p, 200, 2, 32),
    ):
        np.testing.assert_array_equal(solve(p)[order], solve(p[order]))


def test_jit_equals_eager_and_vmap_equals_a_loop():
    rng = np.random.default_rng(1)
    p, totals = jnp.array(rng.random((3, 7)), jnp.float32), jnp.array([14, 40, 70])
    for solve in (
        lambda p, total: budget.knapsack(budget.log_gains(p, 2, 10), total, 2),
        lambda p, total: budget.knapsack_large(p, total, 2, 10),
        lambda p, total: budget.knapsack_cost(budget.log_gains(p, 2, 10), 1 + 9 * p, 10 * total, 2)[0],
    ):
        loop = np.stack([solve(row, total) for row, total in zip(p, totals, strict=True)])
        np.testing.assert_array_equal(jax.vmap(solve)(p, totals), loop)
        np.testing.assert_array_equal(jax.jit(solve)(p[1], totals[1]), loop[1])


def test_eight_devices_give_the_counts_of_one():
    p = jnp.array(np.random.default_rng(2).beta(0.5, 0.5, 64), jnp.float32)
    mesh = make_mesh((8,), ("data",))
    spread = jax.device_put(p, jax.NamedSharding(mesh, jax.P("data")))
    for solve in (
        jax.jit(lambda p: budget.knapsack(budget.log_gains(p, 2, 32), 512, 2)),
        jax.jit(lambda p: budget.knapsack_large(p, 512, 2, 32)),
    ):
        np.testing.assert_array_equal(solve(p), solve(spread))


def test_counts_of_the_tableless_search_never_fall_when_the_budget_grows():
    p = jnp.array([0.0, 0.3, 0.3, 0.9, 1.0], jnp.float32)
    counts = np.array([budget.knapsack_large(p, total, 1, 9) for total in range(5, 46)])
    assert (np.diff(counts, axis=0) >= 0).all()


def test_rising_rows_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"row 1.*max_plus_dp"):
        budget.knapsack(jnp.array([[-1.0, -2.0], [-2.0, -1.0]]), 3, 1)


def test_what_is_masked_or_out_of_bounds_is_not_looked_at():
    nan = jnp.array([[0.0, -1.0, 5.0], [jnp.nan, 0.0, 1.0]])
    mask = jnp.array([True, False])
    assert budget.knapsack(nan, 2, 1, 2, mask).tolist() == [2, 0]
    assert budget.knapsack_large(jnp.array([0.5, jnp.nan]), 2, 1, 4, mask).tolist() == [2, 0]
    assert budget.knapsack_cost(jnp.zeros((2, 1)), jnp.array([3, 0]), 6, 1, mask=mask)[0].tolist() == [2, 0]


def test_a_table_ends_where_its_gains_do():
    """n_max beyond the table's width is cut, and so is the budget that can be met."""
    assert budget.knapsack(jnp.zeros((2, 3)), 8, 1, 10).tolist() == [4, 4]
    with pytest.raises(ValueError, match="budget 9 cannot be met: 2 prompts take 2 to 8"):
        budget.knapsack(jnp.zeros((2, 3)), 9, 1, 10)


def test_zeros_of_either_sign_tie():
    assert budget.knapsack(jnp.array([[-0.0], [0.0]]), 3, 1).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((jnp.array([0.5, jnp.nan]), 4, 1, 4), "NaN"),
        ((jnp.ones((2, 2)), 4, 1, 4), "shape"),
        ((jnp.array([0.5]), 9, 1, 4), "budget 9"),
        ((jnp.array([0.5, 0.5, 0.5]), 9, 1, 10**9), "below 2\\^31"),
        ((jnp.array([0.5]), 4, 5, 4), "n_min"),
        ((jnp.array([0.5, 0.5]), 4, jnp.array([1, 1, 1]), 4), "n_min must be one number"),
    ],
)
def test_bad_input_of_the_tableless_search_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        budget.knapsack_large(*arguments)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_dynamic_program_equals_brute_force_on_any_table(seed):
    rng = np.random.default_rng(seed)
    prompts, most = rng.choice([1, 4], 2)  # each size compiles
    values = rng.normal(size=(prompts, most + 1))
    values[rng.random(values.shape) < 0.2] = -np.inf
    total = int(rng.integers(0, prompts * most + 1))
    ways = [way for way in itertools.product(range(most + 1), repeat=prompts) if sum(way) == total]
    scores = [sum(values[i, n] for i, n in enumerate(way)) for way in ways]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if max(scores) == -np.inf:
            with pytest.raises(ValueError, match="no allowed counts"):
                budget.max_plus_dp(values, total)
            return
        counts = np.asarray(budget.max_plus_dp(values, total))
    assert counts.sum() == total
    assert sum(values[i, n] for i, n in enumerate(counts)) == pytest.approx(max(scores), abs=1e-12)


def test_dynamic_program_and_knapsack_agree_and_it_says_which_is_faster():
    p = np.random.default_rng(3).random(12)
    n = np.arange(0, 17)[None, :]
    values = np.where(n < 2, -np.inf, value(n, p[:, None]))
    counts = budget.max_plus_dp(values, 96)
    gains = budget.log_gains(jnp.array(p, jnp.float32), 2, 16)
    assert objective(np.asarray(counts), p) == pytest.approx(
        objective(np.asarray(budget.knapsack(gains, 96, 2)), p), rel=1e-6
    )
    with pytest.warns(UserWarning, match="concave"):
        budget.max_plus_dp(np.sqrt(np.arange(4.0))[None, :], 2)
    with pytest.raises(ValueError, match="NaN"):
        budget.max_plus_dp(np.array([[0.0, np.nan]]), 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_token_budget_is_kept_and_the_bound_holds(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(4).astype(np.float32).astype(float)
    costs = rng.integers(1, 9, 4)
    total = int(rng.integers(costs.sum(), 6 * costs.sum() + 1))
    counts, bound = budget.knapsack_cost(budget.log_gains(jnp.array(p, jnp.float32), 1, 6), jnp.array(costs), total, 1)
    counts = np.asarray(counts)
    assert counts @ costs <= total
    assert counts.min() >= 1
    ways = [way for way in itertools.product(range(1, 7), repeat=4) if np.dot(way, costs) <= total]
    missed = max(objective(way, p) for way in ways) - objective(counts, p)
    assert -1e-9 <= missed <= float(bound) * (1 + 1e-5) + 1e-9
    if counts.max() < 6:  # less than one rollout's gain
        assert (
            float(bound) <= max(value(n + 1, rate) - value(n, rate) for n, rate in zip(counts, p, strict=True)) + 1e-6
        )


@pytest.mark.parametrize(
    ("costs", "total", "words"), [([0.0, 1.0], 9, "above 0"), ([3.0, 4.0], 6, "cover the 7"), ([2e9, 2e9], 9, "2\\^31")]
)
def test_costs_that_make_no_sense_are_refused(costs, total, words):
    with pytest.raises(ValueError, match=words):
        budget.knapsack_cost(jnp.zeros((2, 3)), jnp.array(costs), total, 1)
