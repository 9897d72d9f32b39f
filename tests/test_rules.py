"""The rules, the belief's records, the values of other estimators, explain and replay."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from krl import budget
from krl.budget.belief import Outcomes, _check

NAMES = sorted(set(budget.RULES) - {"mopps", "pilot_commit", "reinforce_ada"})  # which choose prompts


def visited(groups, lengths=None) -> budget.Belief:
    """A belief after one visit of every task; groups are lists of rewards, an empty one is no visit."""
    index = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    rewards = jnp.array([reward for group in groups for reward in group], jnp.float32)
    lengths = None if lengths is None else jnp.array(lengths)
    ones = jnp.ones(len(index), bool)
    return budget.observe(budget.init_belief(len(groups)), jnp.arange(len(groups)), rewards, index, ones, 0, lengths)


def random_belief(rng: np.random.Generator, tasks: int) -> budget.Belief:
    belief = visited([rng.integers(0, 2, rng.integers(0, 40)) for _ in range(tasks)])
    return belief.replace(even_streak=jnp.array(rng.integers(0, 5, tasks)), visits=jnp.array(rng.integers(0, 9, tasks)))


@pytest.mark.parametrize("rule", NAMES)
def test_every_rule_spends_the_budget_within_its_bounds(rule):
    rng = np.random.default_rng(0)
    beliefs = [random_belief(rng, 6) for _ in range(4)]
    beliefs += [visited([[outcome] * 9] * 6) for outcome in (0, 1)] + [budget.init_belief(6)]
    solve = jax.jit(lambda belief, total: budget.allocate(rule, belief, total, 2, 12)[0])
    for belief in beliefs:
        for total in (12, 13, 40, 71, 72):
            counts = np.asarray(solve(belief, total))
            assert counts.sum() == total
            assert counts.min() >= 2
            assert counts.max() <= 12
    assert budget.allocate(rule, budget.init_belief(1), 5, 2, 12)[0].tolist() == [5]
    assert budget.allocate(rule, budget.init_belief(3), 6, 2, 2)[0].tolist() == [2, 2, 2]


def test_vip_leaves_the_least_variance():
    rng = np.random.default_rng(1)
    for _ in range(20):
        wins, total = jnp.asarray(40 * rng.beta(0.3, 0.3, 3), jnp.float32), int(rng.integers(6, 22))
        belief = budget.init_belief(3).replace(successes=wins, failures=40 - wins)
        counts = np.asarray(budget.allocate("vip", belief, total, 2, 8)[0])
        rate = np.asarray(budget.mean(belief), np.float64)

        def left(counts, rate=rate):
            return (rate * (1 - rate) / (np.array(counts) - 1)).sum()

        others = [c for c in np.ndindex(9, 9, 9) if sum(c) == total and min(c) >= 2]
        assert left(counts) <= min(map(left, others)) * (1 + 1e-6)
    assert budget.allocate("vip", budget.init_belief(4), 8, 1, 8)[0].tolist() == [2, 2, 2, 2]


def paper_counts(groups, total, n_min, n_max):
    """The paper's rule on one visit of each prompt, with rates strictly between 0 and 1 solved one rollout at a time."""
    rates = [np.mean(group) if len(group) >= 8 else None for group in groups]
    counts = [total // len(groups) if rate is None else n_min for rate in rates]
    between = [i for i, rate in enumerate(rates) if rate is not None and 0 < rate < 1]
    unsolved = [i for i, rate in enumerate(rates) if rate == 0]
    needs = {i: min(n_max, int(math.log(0.1) / math.log(max(rates[i], 1 - rates[i])))) for i in between}
    surplus = sum(needs.values()) < total - sum(counts)
    while sum(counts) < total:

        def gain(i, n):
            p = rates[i]
            return p * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p)

        wanting = [i for i in between if counts[i] < (n_min + needs[i] if surplus else n_max) and counts[i] < n_max]
        if wanting:
            counts[max(wanting, key=lambda i: gain(i, counts[i]))] += 1
        else:
            counts[min((i for i in unsolved if counts[i] < n_max), key=lambda i: counts[i])] += 1
    return counts


def test_the_papers_rule_equals_its_description():
    rng = np.random.default_rng(1)
    surpluses = []
    for seed in range(12):
        wins = rng.integers(0, 17, 7)
        groups = [rng.permutation(np.arange(16) < w) for w in wins] + [np.zeros(16)] * 2 + [[1, 0]] * (seed % 2 * 2)
        total = len(groups) * 8
        counts, info = budget.allocate("knapsack_paper", visited(groups), total, 2, 40)
        assert counts.tolist() == paper_counts(groups, total, 2, 40)
        surpluses.append(float(info["surplus"]))
    assert set(surpluses) == {0.0, 1.0}


def test_proportional_rules():
    belief = visited([[1] * 5 + [0] * 95, [1] * 50 + [0] * 50, [1] * 95 + [0] * 5])
    spread = np.array([(w + 0.5) * (100.5 - w) for w in (5, 50, 95)]) ** 0.5
    counts, _ = budget.allocate("variance", belief, 300, 1, 300)
    np.testing.assert_allclose(counts, 300 * spread / spread.sum(), atol=1)
    weights = np.array([(w + 0.5) ** -0.5 for w in (5, 50, 95)])
    counts, _ = budget.allocate("inverse_sqrt", belief, 300, 1, 300)
    np.testing.assert_allclose(counts, 300 * weights / weights.sum(), atol=1)


def test_skip_explores_less_often_the_longer_groups_were_even():
    streaks = jnp.repeat(jnp.array([0, 1, 3]), 200)
    belief = budget.init_belief(600).replace(even_streak=streaks)
    counts, info = budget.allocate("skip", belief, 4800, 2, 40)
    explored = np.asarray(counts).reshape(3, 200) > 2
    np.testing.assert_allclose(explored.mean(axis=1), [1, 1 / 2, 1 / 4], atol=0.02)
    assert float(info["skipped"]) == pytest.approx(1 - explored.mean())
    assert np.ptp(np.asarray(counts)[explored.reshape(-1)]) <= 1


def test_dynamic_says_how_many_rounds_it_would_take():
    belief = visited([[0] * 10_000, [1, 0] * 5_000])
    counts, info = budget.allocate("dynamic", belief, 8, 2, 8)
    assert counts.tolist() == [4, 4]
    assert float(info["rounds"]) == pytest.approx(2 / (1 - 2 * 0.5**4), rel=1e-3)


def test_tokens_break_the_tie_of_equal_prompts():
    belief = visited([[0, 1], [0, 1], []], lengths=[10, 30, 200, 200])
    np.testing.assert_allclose(budget.mean_tokens(belief), [20, 200, 110])
    counts, info = budget.allocate("knapsack_tokens", belief, 24, 2, 20)
    assert counts[0] > counts[1]
    assert float(info["expected_tokens"]) == pytest.approx(np.dot(counts, [20, 200, 110]))


def test_continuous_rewards_prefer_spread_and_room():
    belief = visited([[0.5] * 8, [0.1, 0.9] * 4, [0.9, 1.0] * 4])
    variance = budget.reward_variance(belief)
    assert float(variance[1]) > float(variance[0]) > 0
    counts, _ = budget.allocate("knapsack_continuous", belief, 40, 2, 30)
    assert int(counts[1]) == max(counts.tolist())


def test_a_value_function_is_a_rule():
    belief = visited([[1] * 50 + [0] * 50, [1] * 90 + [0] * 10])
    rule = budget.value_rule(lambda p, n: (1 - p) * jnp.log(n))
    counts, _ = budget.allocate(rule, belief, 60, 1, 59)
    assert int(counts[0]) == pytest.approx(60 * 0.5 / 0.6, abs=2)


def test_values_rise_as_their_derivations_say():
    """Against the exact moments of the estimators under a binomial number of successes."""
    for p in (0.02, 0.3, 0.5, 0.9):
        for n in (2, 3, 8, 40):
            k = np.arange(n + 1)
            weight = stats.binom.pmf(k, n, p)
            sample_variance = k * (n - k) / (n * (n - 1))
            without_baseline = k * (1 - p) / n
            for value, estimate in ((budget.rloo_value, sample_variance), (budget.reinforce_value, without_baseline)):
                share = (weight @ estimate) ** 2 / (weight @ estimate**2)
                assert float(value(p, n)) == pytest.approx(p * (1 - p) ** 2 * share, rel=1e-4)
    draws = np.random.default_rng(0).normal(0.5, 0.1, (200_000, 5)).var(axis=1, ddof=1)
    share = draws.mean() ** 2 / (draws**2).mean()
    assert float(budget.continuous_value(0.5, 0.01, 5)) == pytest.approx(0.01 * 0.5 * share, rel=0.02)


def test_values_of_rare_successes_keep_their_digits():
    for p in (1e-6, 1e-4, 1 - 2.0**-20):
        exact = np.float64(p) * (1 - np.float64(p)) ** 2 * (2 * np.float64(p) * (1 - np.float64(p)))
        assert float(budget.grpo_value(p, 2)) == pytest.approx(exact, rel=1e-3 if p > 0.5 else 1e-5)
    gains = budget.gains_of(budget.grpo_value, jnp.array([1e-4, 0.9999]), 1, 128)
    assert int(budget.knapsack(gains, 50, 1).sum()) == 50


def test_small_gains_that_are_found_by_large_numbers_fall():
    """1 - p^n - (1 - p)^n rounds as numbers near 1 do; a rise that is more than that is still refused."""
    p = jnp.array([0.5, 2e-4, 5e-5, 1e-5])
    gains = np.asarray(budget.gains_of(lambda p, n: 1 - p**n - (1 - p) ** n, p, 2, 24))
    assert (gains[:, 1:] <= gains[:, :-1]).all()
    np.testing.assert_allclose(np.exp(gains[1]), 2e-4 * (1 - 2e-4) ** np.arange(2, 24), rtol=0.01)
    rising = budget.gains_of(lambda p, n: jnp.where(p < 0.1, 1e-5 * n**2, n**0.5), p, 2, 24)
    with pytest.raises(ValueError, match="rises along row 1"):
        budget.knapsack(rising, 20, 2)


@pytest.mark.parametrize("value", [budget.grpo_value, budget.rloo_value, budget.reinforce_value])
def test_values_of_estimators_are_concave(value):
    p = jnp.linspace(0.001, 0.999, 97)
    if value is not budget.reinforce_value:  # which compares a rollout with no other
        np.testing.assert_allclose(value(p, 1), 0, atol=1e-7)
    gains = np.asarray(budget.gains_of(value, p, 2, 64))
    assert (gains[:, 1:] <= gains[:, :-1]).all()
    exact = np.diff(np.asarray(value(p[:, None], jnp.arange(2, 65)[None, :]), np.float64), axis=1)
    np.testing.assert_allclose(np.exp(gains), exact, atol=2e-7)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 1), max_size=25), min_size=1, max_size=4))
def test_window_keeps_the_newest_outcomes(visits):
    """One task visited again and again, its rows shuffled among another task's and padding."""
    belief, outcomes, newest = budget.init_belief(5), [], []
    for step, group in enumerate(visits):
        index = np.array([1] * len(group) + [0] * 3 + [2] * (27 - len(group)))  # always 30 rows, to compile once
        rewards = np.array([*group, 1, 0, *[1] * (28 - len(group))], np.float32)
        order = np.random.default_rng(step).permutation(len(index))
        outcomes += [rewards[i] for i in order if index[i] == 1]
        newest = [rewards[i] for i in order if index[i] == 1] or newest
        belief = budget.observe(
            belief, jnp.array([0, 4]), rewards[order], index[order], jnp.array(index[order] < 2), step
        )
    window = newest if len(newest) >= 16 else outcomes[-16:]
    expected = np.mean(window) if window else 0.0
    assert float(budget.window_rate(belief)[4]) == pytest.approx(expected)
    assert int(belief.recorded[4]) == len(outcomes)
    assert int(belief.visits[1]) == 0
    assert int(belief.last_step[1]) == -1


@pytest.mark.parametrize(("drifts", "start"), [(False, 0.3), (True, 0.9)])
def test_discounts_follow_the_drift(drifts, start):
    """Rates that stay call for more of the evidence; rates that are drawn anew make it worthless."""
    rng, ids = np.random.default_rng(0), jnp.arange(64)
    belief = budget.init_belief(64, discount=start, discount_mixed=start)
    rates, index = rng.random(64), jnp.repeat(ids, 8)
    for step in range(60):
        rates = rng.random(64) if drifts else rates
        rewards = jnp.array(rng.random(512) < np.repeat(rates, 8), jnp.float32)
        belief = budget.update(belief, ids, rewards, index, jnp.ones(512, bool), step)
    if drifts:
        assert float(belief.discount_mixed) < 0.2
    else:
        assert float(belief.discount_mixed) > 0.65
    held = budget.update(belief, ids, rewards, index, jnp.ones(512, bool), fit_discounts=False, fit_prior=False)
    assert float(held.discount_mixed) == float(belief.discount_mixed)
    assert float(held.prior_alpha) == float(belief.prior_alpha)


def test_explain_says_why():
    belief = visited([[0] * 200, [1, 0] * 10, [], [1] + [0] * 60])
    table = budget.explain(belief, 60, 2, 30)
    counts = table["count"]
    assert counts.sum() == 60
    assert table["why"].tolist() == ["n_min", "price", "unseen", "price"]
    assert budget.explain(belief, 60, 2, 16)["why"][1] == "n_max"
    assert (table["low"] < table["mean"]).all()
    assert (table["mean"] < table["high"]).all()
    free = counts > 2
    assert (table["next_gain"][free] <= table["price"][free]).all()
    assert (table["gain"][free] >= table["price"][free] * (1 - 1e-6)).all()
    known = budget.explain(visited([[1, 0] * 50_000]), 5, 2, 30)
    assert known["value"][0] == pytest.approx(float(budget.grpo_value(0.5, 5)), rel=1e-3)


def test_explain_tells_what_waited_from_what_was_chosen():
    belief = visited([[0] * 200, [1, 0] * 10, [0] * 100, [1] + [0] * 60, [1, 1, 0] * 5]).replace(
        last_step=jnp.array([4, 5, 3, 5, 5])
    )
    plain = budget.explain(belief, 8, 0, 8, rule="knapsack", group=4)
    table = budget.explain(belief, 12, 0, 8, rule="knapsack", group=4, explored=1)
    assert (table["count"] - plain["count"]).tolist() == [0, 0, 4, 0, 0]
    assert table["why"][2] == "waited" != plain["why"][2]
    assert (table["price"] == plain["price"]).all()


def replayed(rule, rates, **options):
    keys = jax.random.split(jax.random.key(1), len(rates))
    sizes = {"prompts_per_step": 16, "budget": 128, "n_min": 2, "n_max": 32}
    return budget.replay(rule, rates, keys, **(sizes | options))


@pytest.mark.slow
def test_replay_of_fixed_rates_converges_to_what_is_known():
    rates = jnp.tile(jnp.array(np.random.default_rng(0).beta(0.3, 0.3, (2, 1, 32)), jnp.float32), (1, 120, 1))
    known, believed = replayed("known", rates), replayed("knapsack", rates)
    uniform = replayed("uniform", rates)
    p = np.asarray(rates[:, 0], np.float64)
    eight = (1 - p**8 - (1 - p) ** 8).mean(axis=1)
    np.testing.assert_allclose(uniform.mixed.mean(axis=1), eight, atol=0.03)
    np.testing.assert_allclose(uniform.effective, uniform.mixed, rtol=1e-5)
    late = slice(80, None)
    missed = known.expected[:, late].mean() - believed.expected[:, late].mean()
    assert -1e-6 <= missed < 0.2 * (known.expected.mean() - uniform.expected.mean())
    assert known.expected.mean() > uniform.expected.mean()
    assert believed.counts.shape == (2, 20)


def test_a_rule_in_rounds_works_wherever_rules_do():
    """As docs/recipes/rule.md writes one, without a default for what the rounds before have shown."""

    @budget.in_rounds(lambda prompts, rollouts, n_min, group: (prompts * n_min, rollouts))
    def second_look(belief, rollouts, n_min, n_max, shown, least=0.0):
        mixed = (shown.successes > least) & (shown.failures > least)
        return budget.knapsack(jnp.where(mixed, 0.0, -1e3)[:, None] - jnp.arange(n_max - n_min), rollouts, n_min), {}

    belief = budget.init_belief(4)
    assert budget.allocate(second_look, belief, 16, 2, 8)[0].tolist() == [4, 4, 4, 4]
    assert budget.explain(belief, 16, 2, 8, rule=second_look)["count"].tolist() == [4, 4, 4, 4]
    ends = lambda prompts, rollouts, n_min, group: (prompts * n_min, rollouts)  # noqa: E731
    marked = budget.in_rounds(ends)(functools.partial(second_look, least=1.0))
    for rule in (second_look, functools.partial(second_look, least=1.0), marked):
        assert budget.has_rounds(rule)
        assert budget.rounds_of(rule, 4, 16, 2) == (8, 16)
        shown = replayed(rule, jnp.full((1, 3, 16), 0.5))
        assert shown.counts.max() == 128 / 16


def test_replay_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="unknown allocation rule"):
        replayed("best", jnp.ones((1, 2, 16)))
    with pytest.raises(ValueError, match="D >= 16"):
        replayed("uniform", jnp.ones((1, 2, 8)))
    with pytest.raises(ValueError, match=r"a key for each of the 2 seeds of the rates, got \(3,\)"):
        budget.replay(
            "uniform", jnp.ones((2, 2, 16)), jax.random.split(jax.random.key(0), 3),
            prompts_per_step=16, budget=32, n_min=2, n_max=4
        )  # fmt: skip
    with pytest.raises(ValueError, match="the rule spent 32 rollouts, 2 to 2 each, not "):
        replayed(lambda belief, total, n_min, n_max: (jnp.full(16, n_min), {}), jnp.full((1, 2, 16), 0.5))
    with pytest.raises(ValueError, match="budget 128 cannot be met"):
        replayed("uniform", jnp.ones((1, 2, 16)), n_max=4)


@pytest.mark.slow
def test_beta_knapsack_comes_closest_to_the_known_rates():
    """What docs/budget.md shows for all rules and more seeds."""
    keys = jax.random.split(jax.random.key(0), 2)
    rates = jax.vmap(lambda key: budget.synthetic_rates(key, 1024, 320))(keys)
    options = {"prompts_per_step": 64, "budget": 512, "n_min": 2, "n_max": 64}
    rules = ("known", "knapsack", "knapsack_paper", "skip", "uniform")
    value = {rule: budget.replay(rule, rates, keys, **options).realised.mean() for rule in rules}
    shortfall = {rule: value["known"] - got for rule, got in value.items()}
    assert shortfall["knapsack"] < min(shortfall[rule] for rule in ("knapsack_paper", "skip", "uniform"))
    assert 0 < shortfall["knapsack"] <= shortfall["knapsack_paper"] / 3


def test_rates_of_a_logged_run_are_recovered():
    rng, steps, tasks = np.random.default_rng(0), 120, 12
    true = np.linspace(0.05, 0.95, tasks)[None, :] * np.linspace(0.5, 1.0, steps)[:, None]
    rows = []
    for step in range(steps):
        ids = rng.permutation(tasks)[:4]
        rows.append({"task_ids": ids, "counts": [30] * 4, "successes": rng.binomial(30, true[step, ids])})
    rates = np.asarray(budget.logged_rates(rows, tasks, bandwidth=15.0))
    assert rates.shape == (steps, tasks)
    assert np.abs(rates - true).mean() < 0.03


def test_rates_of_a_log_leave_out_what_has_no_reward_and_count_any_reward_as_part_of_a_success():
    plain = [
        {"task_ids": [0, 1], "counts": [2, 3], "successes": [1, 0]},
        {"task_ids": [2, 0], "counts": [2, 2], "successes": [2, 1]},
    ]
    expected = budget.logged_rates(plain, 3)
    wide = [row | {"counts": [9, 9], "scored": row["counts"]} for row in plain]
    np.testing.assert_array_equal(budget.logged_rates(wide, 3), expected)
    step = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    task = [0, 0, 1, 1, 1, 2, 2, 0, 0, 2, 0]
    reward = [3.0, -1.0, 0.0, -2.0, 0.0, 1.0, 5.0, 0.0, 1.0, None, None]
    log = pa.table({"step": step, "prompt_id": task, "reward": pa.array(reward, pa.float32())})
    np.testing.assert_array_equal(budget.logged_rates(log, 3), expected)
    faults = [""] * 9 + ["errors"] * 2  # a log of an older version has 0 there
    old = pa.table({"step": step, "prompt_id": task, "reward": [*reward[:9], 0.0, 0.0], "fault": faults})
    np.testing.assert_array_equal(budget.logged_rates(old, 3), expected)
    never = [{"task_ids": [0], "counts": [2], "scored": [0], "successes": [0.0]}]
    assert np.isfinite(budget.logged_rates(never, 1)).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rewards": [1.0, 2.0, 0.0]}, "from 0 to 1, shares of a success, got 2.0"), ({"rewards": [1.0, np.nan, 0.0]}, "got nan"),
     ({"task_ids": [2, 2]}, "must be distinct"), ({"task_ids": [2, 9]}, "from 0 to 3, got 2 to 9"),
     ({"task_ids": [-1, 2]}, "from 0 to 3, got -1 to 2"), ({"prompt_index": [0, 2, 1]}, "from 0 to 1, got 0 to 2")],
)  # fmt: skip
@pytest.mark.parametrize("learn", [budget.observe, budget.update])
def test_outcomes_that_cannot_be_are_refused_and_those_outside_the_mask_are_not_looked_at(learn, changed, message):
    right = {"task_ids": [2, 0], "rewards": [1.0, 0.0, 0.0], "prompt_index": [0, 0, 1]}
    belief = budget.init_belief(4)

    def after(given, **masked):
        arrays = {name: jnp.array(values) for name, values in given.items()}
        return learn(belief, **arrays, **masked)

    everything = jnp.ones(3, bool)
    with pytest.raises(ValueError, match=re.escape(message)):
        after(right | changed, mask=everything)
    with pytest.raises(ValueError, match=re.escape(message)):
        after(right | changed, mask=np.ones(3, np.int32))
    if "task_ids" not in changed:
        number = [
            a != b for a, b in zip(*((right | more)[next(iter(changed))] for more in ({}, changed)), strict=True)
        ].index(True)
        one, other = (after(right | more, mask=everything.at[number].set(False)) for more in ({}, changed))
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_outcomes_that_other_processes_have_a_part_of_are_not_looked_at():
    elsewhere = SimpleNamespace(is_fully_addressable=False)
    _check(budget.init_belief(2), elsewhere, Outcomes(elsewhere, elsewhere, elsewhere, None))
    with pytest.raises((TypeError, ValueError)):  # what looking at it would give
        _check(
            budget.init_belief(2), np.arange(2), Outcomes(SimpleNamespace(), np.zeros(1, int), np.ones(1, bool), None)
        )


def test_a_budget_is_a_whole_number():
    with pytest.raises(ValueError, match=r"budget 16\.5 must be a whole number of rollouts"):
        budget.allocate("uniform", budget.init_belief(4), 16.5, 2, 8)
    with pytest.raises(ValueError, match="budget None must be a whole number of rollouts"):
        budget.allocate("uniform", budget.init_belief(4), None, 2, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"group": 4.0}, "got group=4.0"),
        ({"group": "4"}, "got group='4'"),
        ({"explored": -1}, "explored must be a whole number of prompts, not below 0, got -1"),
        ({"explored": 1.5}, "explored must be a whole number of prompts, not below 0, got 1.5"),
    ],
)
def test_groups_and_explored_prompts_are_whole_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        budget.allocate("reach", budget.init_belief(4), 8, 0, 8, **{"group": 4} | wrong)
